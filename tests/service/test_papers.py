"""The papers in deploy say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.dicom.contexts import TRANSFER_SYNTAXES
from service.dicom.incoming import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    MAXIMUM_PDU_BYTES,
)
from service.dicom.proof import _STORAGE as SEGMENTATION_CLASSES
from service.dicom.report_proof import _ENHANCED_SR, _SECONDARY_CAPTURE
from service.dicom.selection import _PLANAR
from service.settings import DicomSettings, HttpSettings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.fixture(scope="module")
def conformance() -> str:
    return (DEPLOY / "conformance.md").read_text(encoding="utf-8")


def uids_after(text: str, heading: str) -> list[str]:
    """The second column of the first table whose head begins so."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(heading):
            break
    uids = []
    for line in lines:
        if not line.startswith("|"):
            break
        uids += re.findall(r"^\|[^|]*\| ([0-9.]+) \|", line)
    return uids


def test_the_transfer_syntaxes_are_those_of_the_code_in_its_order(conformance: str) -> None:
    assert uids_after(conformance, "| Transfer syntax |") == list(TRANSFER_SYNTAXES)


def test_the_image_classes_are_those_of_the_code(conformance: str) -> None:
    assert uids_after(conformance, "| SOP class | UID |\n".strip()) == sorted(_PLANAR)


def test_the_classes_that_are_sent_are_those_of_the_code(conformance: str) -> None:
    sent = set(uids_after(conformance, "| SOP class | UID | Sent |"))
    objects = {*SEGMENTATION_CLASSES.values(), _ENHANCED_SR, _SECONDARY_CAPTURE}
    assert sent == objects | {"1.2.840.10008.1.1", "1.2.840.10008.1.20.1"}


def test_the_implementation_is_that_of_the_code(conformance: str) -> None:
    for fact in (IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, str(MAXIMUM_PDU_BYTES)):
        assert fact in conformance
    assert f"{DicomSettings().maximum_associations} as acceptor" in conformance


def test_the_ports_are_those_of_the_code() -> None:
    ports = (DEPLOY / "ports.md").read_text(encoding="utf-8")
    assert f"TCP {DicomSettings().port}" in ports
    assert f"api {HttpSettings().port}" in ports


def test_every_paper_that_is_linked_is_there() -> None:
    for paper in DEPLOY.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", paper.read_text(encoding="utf-8")):
            assert (DEPLOY / link).exists(), f"{paper.name} links to {link}"


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_there_are() -> None:
    known = set(re.findall(r'"(segnode_\w+)"', (DEPLOY.parent / "service" / "metrics.py").read_text()))
    for path in (DEPLOY / "grafana" / "segnode.json", DEPLOY / "prometheus" / "alerts.yml"):
        asked = set(re.findall(r"\bsegnode_\w+", path.read_text(encoding="utf-8")))
        assert asked
        assert asked <= known, asked - known
