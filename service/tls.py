"""TLS as the node speaks it: which versions and suites, whose certificates, and what went wrong in words.

The rules are those of DICOM's BCP 195 RFC 8996, 9325 TLS Secure Transport Connection Profile (PS3.15
section B.12): TLS 1.2 or 1.3 and nothing older, never a fall back to plain text; in TLS 1.2 the four suites
of RFC 9325 section 4.2, which all have forward secrecy and authenticated encryption.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from models.errors import SegnodeError
from service.logs import get_logger

# RFC 9325 section 4.2, in OpenSSL's names. TLS 1.3 has suites of its own, all of them good.
TLS_1_2_SUITES = (
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
)

log = get_logger(__name__)


class TlsError(SegnodeError):
    """Raised when certificates or keys that the configuration names cannot be used."""

    code = "TLS_UNUSABLE"


@dataclass(frozen=True)
class PeerCertificate:
    """Whose certificate a peer has shown: its names in lower case, and the SHA-256 of its DER form."""

    names: frozenset[str]
    sha256: str

    @classmethod
    def of(cls, connection: ssl.SSLSocket) -> Self | None:
        """The certificate of the other side; None where it has shown none."""
        der = connection.getpeercert(binary_form=True)
        if der is None:
            return None
        certificate = x509.load_der_x509_certificate(der)
        return cls(frozenset(_names(certificate)), hashlib.sha256(der).hexdigest())

    def is_one_of(self, wanted: tuple[str, ...]) -> bool:
        """True if a name of the certificate, or ``sha256:`` and its digest, is among these."""
        mine = self.names | {f"sha256:{self.sha256}"}
        return not mine.isdisjoint(each.lower().replace("sha-256:", "sha256:") for each in wanted)


def server_context(certificate: Path, key: Path, trusted: Path | None) -> ssl.SSLContext:
    """What a listener secures its connections with.

    Parameters
    ----------
    certificate, key : path
        PEM files: the certificate with those that lead to its root, and its private key.
    trusted : path, optional
        PEM file of the authorities that sign clients' certificates. With it a client must show one.

    Raises
    ------
    TlsError
        If a file cannot be read, holds nothing of the kind, or key and certificate do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context)
    load_certificate(context, certificate, key)
    if trusted is not None:
        _trust(context, trusted)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(trusted: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """What a connection to a server is secured with: its certificate and its name are checked.

    Raises
    ------
    TlsError
        As :func:`server_context`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _restrict(context)
    _trust(context, trusted)
    if certificate is not None and key is not None:
        load_certificate(context, certificate, key)
    return context


class ReloadingContext:
    """A server's context that follows its files: a renewed certificate needs no restart.

    Files that cannot be used when they have changed are logged, and the context before them stays.
    """

    def __init__(self, certificate: Path, key: Path, trusted: Path | None) -> None:
        self._paths = (certificate, key, trusted)
        self._lock = threading.Lock()
        self._seen = self._state()
        self._context = server_context(certificate, key, trusted)

    def current(self) -> ssl.SSLContext:
        """The context for the next connection."""
        with self._lock:
            state = self._state()
            if state != self._seen:
                self._seen = state
                try:
                    self._context = server_context(*self._paths)
                    log.info("tls.reloaded")
                except TlsError as error:
                    log.error("tls.not_reloaded", exc_info=error)
            return self._context

    def following(self) -> ssl.SSLContext:
        """A context for servers that keep theirs for ever: it takes the present certificate each time."""
        context = server_context(*self._paths)

        def take_present(handshake: Any, _name: str | None, _context: ssl.SSLContext) -> None:
            handshake.context = self.current()

        context.sni_callback = take_present
        return context

    def wrap_socket(self, connection: Any, **options: Any) -> ssl.SSLSocket:
        """Secure a connection later: whoever calls does the handshake, in a thread of its own."""
        return self.current().wrap_socket(connection, **{**options, "do_handshake_on_connect": False})

    def _state(self) -> tuple[Any, ...]:
        return tuple(_fingerprint(path) for path in self._paths if path is not None)


class DeferredContext:
    """A client's context whose connections do their handshake later, where its error can be seen."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context

    def wrap_socket(self, connection: Any, **options: Any) -> ssl.SSLSocket:
        return self._context.wrap_socket(connection, **{**options, "do_handshake_on_connect": False})


def explain(error: OSError) -> str:
    """What a handshake failed of, as a few words without data of the peer's."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return "no handshake in time"
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError)):
        return "the other side closed the connection"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return type(error).__name__


@dataclass(frozen=True)
class CertificateState:
    """One certificate of a file: whose it is, and until when it is good (UTC, naive)."""

    subject: str
    begins_at: datetime
    ends_at: datetime


def read_certificates(path: Path) -> list[CertificateState]:
    """The certificates of a PEM file, in its order. Raises TlsError."""
    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise TlsError(
            f"{path} holds no certificate in PEM.", remedy="Give a file of BEGIN CERTIFICATE blocks."
        ) from error
    return [
        CertificateState(
            each.subject.rfc4514_string(),
            each.not_valid_before_utc.astimezone(UTC).replace(tzinfo=None),
            each.not_valid_after_utc.astimezone(UTC).replace(tzinfo=None),
        )
        for each in certificates
    ]


def check_key(certificate: Path, key: Path) -> None:
    """Raises TlsError unless the private key is that of the certificate, and needs no passphrase."""
    try:
        public = x509.load_pem_x509_certificates(certificate.read_bytes())[0].public_key()
        private = load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise _unreadable(key, error) from error
    except (ValueError, TypeError) as error:
        raise TlsError(
            f"{key} holds no private key that can be read without a passphrase.",
            remedy="Give a PEM file with the key, readable by the node's user alone.",
        ) from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != public.public_bytes(*form):
        raise TlsError(
            f"{key} is not the key of the certificate {certificate}.",
            remedy="Give the two that were made together, the node's own certificate first in its file.",
        )


def _restrict(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(":".join(TLS_1_2_SUITES))
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION


def load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Have connections show a certificate. Raises TlsError."""
    read_certificates(certificate)
    check_key(certificate, key)
    try:
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise TlsError(
            f"The certificate {certificate} cannot be used: {explain(error)}.",
            remedy="Use RSA keys of 2048 bits or more, or elliptic curves, and signatures with SHA-256.",
        ) from error


def _trust(context: ssl.SSLContext, trusted: Path) -> None:
    read_certificates(trusted)
    try:
        context.load_verify_locations(trusted)
    except (ssl.SSLError, OSError) as error:
        raise TlsError(f"The certificates of {trusted} cannot be used: {explain(error)}.") from error


def _names(certificate: x509.Certificate) -> Iterator[str]:
    for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        yield str(attribute.value).lower()
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return
    yield from (name.lower() for name in extension.value.get_values_for_type(x509.DNSName))


def _fingerprint(path: Path) -> tuple[int, int, int] | None:
    try:
        state = os.stat(path)
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> TlsError:
    return TlsError(
        f"{path} cannot be read: {error.strerror}.",
        remedy="Check the path, and that the node's user may read it.",
    )
