"""Who may open an association, and when: peers by AE title and address, and only while there is room."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from service.errors import StorageFullError
from service.settings import DicomSettings
from service.spool import Spool


@dataclass(frozen=True)
class Rejection:
    """An A-ASSOCIATE-RJ: result, source and reason of PS3.8 table 9-21, and the same in a word."""

    result: int
    source: int
    reason: int
    word: str


CALLED_AE_TITLE_UNKNOWN = Rejection(1, 1, 7, "called-ae-title-not-recognized")
CALLING_AE_TITLE_UNKNOWN = Rejection(1, 1, 3, "calling-ae-title-not-recognized")
STORAGE_FULL = Rejection(2, 3, 2, "storage-full")  # transient, local limit exceeded: the peer tries again
NOT_NOW = Rejection(2, 1, 1, "internal-error")  # transient, no reason given


class Admission:
    """The rules of one listener.

    A configured peer must come from one of its addresses. An AE title that is not configured is refused
    unless ``allow_unknown_peers`` is set.
    """

    def __init__(self, settings: DicomSettings, spool: Spool) -> None:
        self._settings = settings
        self._spool = spool
        self._networks: dict[str, list[IPv4Network | IPv6Network]] = {}
        for peer in settings.peers:
            networks = [ip_network(text, strict=False) for text in peer.addresses]
            self._networks.setdefault(peer.ae_title, []).extend(networks)

    def judge(self, *, calling_ae_title: str, called_ae_title: str, address: str) -> Rejection | None:
        """Why this peer may not open an association now; None if it may."""
        if called_ae_title.strip() != self._settings.ae_title:
            return CALLED_AE_TITLE_UNKNOWN
        if not self._knows(calling_ae_title.strip(), address):
            return CALLING_AE_TITLE_UNKNOWN
        try:
            self._spool.check_space()
        except StorageFullError:
            return STORAGE_FULL
        return None

    def _knows(self, calling_ae_title: str, address: str) -> bool:
        networks = self._networks.get(calling_ae_title)
        if networks is None:
            return self._settings.allow_unknown_peers
        caller = ip_address(address.split("%")[0])  # without the zone of a link-local address
        if isinstance(caller, IPv6Address) and caller.ipv4_mapped is not None:
            caller = caller.ipv4_mapped
        return any(caller in network for network in networks)
