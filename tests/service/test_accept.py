"""segnode accept on a node that runs: what it tries, what it finds, and the PDF that it leaves."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_harness import ApiHarness
from bundle_factory import make_threshold_bundle
from running_node import ROUTE, SEGNODE, RunningNode
from storage_scp import StorageScp

from models.registry import Registry
from service.acceptance import judge_delivery
from service.records.tables import Delivery, DeliveryState
from service.settings import Destination


@pytest.fixture(scope="module")
def pacs() -> Iterator[StorageScp]:
    with StorageScp() as scp:
        yield scp


@pytest.fixture(scope="module")
def node(pacs: StorageScp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    folder = tmp_path_factory.mktemp("accept")
    registry = Registry(folder / "models")
    bundle = make_threshold_bundle(folder / "bundle").folder
    manifest = registry.add(bundle, check_golden=False).manifest
    registry.activate(manifest.name, manifest.version)
    route = ROUTE | {"match": {"Modality": "MR", "SeriesDescription": "Acceptance"}, "quiet_time_s": 1.0}
    with RunningNode(
        folder / "node", models=registry.root, destinations={"pacs": pacs.port}, routes=[route]
    ) as running:
        yield running


def accept(node: RunningNode, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*SEGNODE, "accept", "--config", str(node.config), "--output", str(output)]
    command += ["--node", f"SEGNODE@127.0.0.1:{node.dicom_port}", *options]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def words_of(pdf: Path) -> str:
    """The text of an uncompressed PDF."""
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF-")
    return " ".join(part.decode("latin-1") for part in re.findall(rb"\((.*?)\) Tj", content))


def test_a_node_that_works_is_accepted_with_every_figure(
    node: RunningNode, pacs: StorageScp, tmp_path: Path
) -> None:
    before = len(pacs.segmentations)
    ended = accept(node, tmp_path / "report.pdf", "--set", "SeriesDescription=Acceptance")
    assert ended.returncode == 0, ended.stderr + node.log()
    words = words_of(tmp_path / "report.pdf")
    assert "every check passed" in words
    assert "FAILED" not in words
    for what in ("C-ECHO from SEGNODE to PACS", "C-STORE", "Proven DICOM-SEG", "Sent to pacs", "Dice"):
        assert what in words
    assert len(pacs.segmentations) == before + 1


def test_a_study_that_no_route_takes_is_a_failed_check_in_the_report(
    node: RunningNode, tmp_path: Path
) -> None:
    ended = accept(node, tmp_path / "report.pdf", "--timeout-s", "4")
    assert ended.returncode == 1
    assert "NOT_ACCEPTED" in ended.stderr
    words = words_of(tmp_path / "report.pdf")
    assert "NOT accepted" in words
    assert "does the route match the study" in words


def test_a_peer_that_the_node_does_not_know_is_turned_away(node: RunningNode, tmp_path: Path) -> None:
    ended = accept(node, tmp_path / "report.pdf", "--calling-ae-title", "NOBODY")
    assert ended.returncode == 1
    assert "FAILED" in words_of(tmp_path / "report.pdf")


@pytest.mark.parametrize(("asked_for", "words"), [(True, "Committed by pacs"), (False, "Sent to pacs")])
def test_what_was_sent_is_not_accepted_where_it_has_to_be_committed(
    api: ApiHarness, asked_for: bool, words: str
) -> None:
    pacs = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=1, storage_commitment=asked_for)
    job_id = api.enqueue(destinations=["pacs"])
    api.succeed(job_id)
    found = []
    for state in (DeliveryState.PENDING, DeliveryState.SENT, DeliveryState.COMMITTED, DeliveryState.PARKED):
        with api.records.write() as session:
            session.query(Delivery).one().state = state
        check = judge_delivery(api.records, job_id, pacs, timeout_s=0)
        assert check.what == words
        assert state.value in check.found
        found += [state] * check.passed
    assert found == [DeliveryState.COMMITTED if asked_for else DeliveryState.SENT]
