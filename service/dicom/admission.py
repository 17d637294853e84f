"""Who may open an association, and when: peers by AE title, address and certificate; while there is room."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from service.errors import StorageFullError
from service.settings import DicomSettings, Peer
from service.spool import Spool
from service.tls import PeerCertificate


@dataclass(frozen=True)
class Rejection:
    """An A-ASSOCIATE-RJ: result, source and reason of PS3.8 table 9-21, and the same in a word."""

    result: int
    source: int
    reason: int
    word: str


CALLED_AE_TITLE_UNKNOWN = Rejection(1, 1, 7, "called-ae-title-not-recognized")
CALLING_AE_TITLE_UNKNOWN = Rejection(1, 1, 3, "calling-ae-title-not-recognized")
ADDRESS_UNKNOWN = Rejection(1, 1, 3, "address-not-of-this-ae-title")
CERTIFICATE_UNKNOWN = Rejection(1, 1, 3, "certificate-not-of-this-ae-title")
STORAGE_FULL = Rejection(2, 3, 2, "storage-full")  # transient, local limit exceeded: the peer tries again
NOT_NOW = Rejection(2, 1, 1, "internal-error")  # transient, no reason given


class Admission:
    """The rules of one listener.

    A configured peer must come from one of its addresses, and show one of its certificates where the settings
    name some. An AE title that is not configured is refused unless ``allow_unknown_peers`` is set. The peer
    is told no more than that its AE title is not recognised; the log and the audit trail say which it was.
    """

    def __init__(self, settings: DicomSettings, spool: Spool) -> None:
        self._settings = settings
        self._spool = spool
        self._peers: dict[str, list[tuple[list[IPv4Network | IPv6Network], Peer]]] = {}
        for peer in settings.peers:
            networks = [ip_network(text, strict=False) for text in peer.addresses]
            self._peers.setdefault(peer.ae_title, []).append((networks, peer))

    def judge(
        self,
        *,
        calling_ae_title: str,
        called_ae_title: str,
        address: str,
        certificate: PeerCertificate | None = None,
    ) -> Rejection | None:
        """Why this peer may not open an association now; None if it may."""
        if called_ae_title.strip() != self._settings.ae_title:
            return CALLED_AE_TITLE_UNKNOWN
        unknown = self._does_not_know(calling_ae_title.strip(), address, certificate)
        if unknown is not None:
            return unknown
        try:
            self._spool.check_space()
        except StorageFullError:
            return STORAGE_FULL
        return None

    def _does_not_know(
        self, calling_ae_title: str, address: str, certificate: PeerCertificate | None
    ) -> Rejection | None:
        peers = self._peers.get(calling_ae_title)
        if peers is None:
            return None if self._settings.allow_unknown_peers else CALLING_AE_TITLE_UNKNOWN
        caller = _address(address)
        here = [peer for networks, peer in peers if any(caller in network for network in networks)]
        if not here:
            return ADDRESS_UNKNOWN
        if not any(_shows_its_own(peer, certificate) for peer in here):
            return CERTIFICATE_UNKNOWN
        return None


def is_loopback(address: str) -> bool:
    """True if a connection came from this host."""
    return _address(address).is_loopback


def _address(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text.split("%")[0])  # without the zone of a link-local address
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _shows_its_own(peer: Peer, certificate: PeerCertificate | None) -> bool:
    if not peer.certificates:
        return True
    return certificate is not None and certificate.is_one_of(peer.certificates)
