"""Who is let in: AE title, address and certificate must belong together, for each peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.dicom.admission import (
    ADDRESS_UNKNOWN,
    CALLED_AE_TITLE_UNKNOWN,
    CALLING_AE_TITLE_UNKNOWN,
    CERTIFICATE_UNKNOWN,
    Admission,
    Rejection,
)
from service.settings import DicomSettings
from service.spool import Spool
from service.tls import PeerCertificate

TLS = {"certificate": "a", "key": "b", "trusted": "c"}
PEERS = [
    {"ae_title": "PACS", "addresses": ["10.1.2.0/24", "fd00::/8"]},
    {"ae_title": "CT1", "addresses": ["10.1.3.7"], "certificates": ["ct1.hospital.test"]},
    {"ae_title": "CT1", "addresses": ["10.1.4.0/24"], "certificates": ["SHA256:" + "AB" * 32]},
]
CT1 = PeerCertificate(frozenset({"ct1.hospital.test", "scanner"}), "00" * 32)
SPARE = PeerCertificate(frozenset({"spare"}), "ab" * 32)


@pytest.mark.parametrize(
    ("calling", "called", "address", "certificate", "wanted"),
    [
        ("PACS", "SEGNODE", "10.1.2.200", None, None),
        ("PACS  ", "SEGNODE ", "10.1.2.1", CT1, None),
        ("PACS", "SEGNODE", "fd00::1", None, None),
        ("PACS", "SEGNODE", "::ffff:10.1.2.9", None, None),
        ("PACS", "SEGNODE", "10.1.3.7", None, ADDRESS_UNKNOWN),
        ("PACS", "SEGNODE", "127.0.0.1", None, ADDRESS_UNKNOWN),
        ("pacs", "SEGNODE", "10.1.2.1", None, CALLING_AE_TITLE_UNKNOWN),
        ("OTHER", "SEGNODE", "10.1.2.1", None, CALLING_AE_TITLE_UNKNOWN),
        ("PACS", "OTHER", "10.1.2.1", None, CALLED_AE_TITLE_UNKNOWN),
        ("CT1", "SEGNODE", "10.1.3.7", CT1, None),
        ("CT1", "SEGNODE", "10.1.4.4", SPARE, None),
        ("CT1", "SEGNODE", "10.1.4.4", CT1, CERTIFICATE_UNKNOWN),  # the other place's certificate
        ("CT1", "SEGNODE", "10.1.3.7", SPARE, CERTIFICATE_UNKNOWN),
        ("CT1", "SEGNODE", "10.1.3.7", None, CERTIFICATE_UNKNOWN),
        ("CT1", "SEGNODE", "10.1.3.8", CT1, ADDRESS_UNKNOWN),
    ],
)
def test_title_address_and_certificate_belong_together(
    tmp_path: Path,
    calling: str,
    called: str,
    address: str,
    certificate: PeerCertificate | None,
    wanted: Rejection | None,
) -> None:
    assert (
        admission(tmp_path).judge(
            calling_ae_title=calling, called_ae_title=called, address=address, certificate=certificate
        )
        is wanted
    )


def test_a_peer_is_told_the_same_whatever_is_unknown() -> None:
    told = {(r.result, r.source, r.reason) for r in (CALLING_AE_TITLE_UNKNOWN, ADDRESS_UNKNOWN)}
    assert told == {(CERTIFICATE_UNKNOWN.result, CERTIFICATE_UNKNOWN.source, CERTIFICATE_UNKNOWN.reason)}


def test_letting_anybody_in_leaves_the_known_ones_their_addresses(tmp_path: Path) -> None:
    judge = admission(tmp_path, allow_unknown_peers=True).judge
    known = {"calling_ae_title": "PACS", "called_ae_title": "SEGNODE"}
    assert judge(**{**known, "calling_ae_title": "OTHER"}, address="192.0.2.1") is None
    assert judge(**known, address="192.0.2.1") is ADDRESS_UNKNOWN


def admission(folder: Path, **more: Any) -> Admission:
    settings = DicomSettings.model_validate({"peers": PEERS, "tls": TLS, **more})
    return Admission(settings, Spool(folder / "spool", low_watermark_bytes=0, reserve_bytes=0))
