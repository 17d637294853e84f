"""Fixtures of the service's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_harness import ApiHarness
from command_line import Segnode, command_line
from dicom_peer import node_settings
from structlog.testing import capture_logs

from service.dicom.receive import Receiver
from service.records.database import Records
from service.spool import Spool


@pytest.fixture
def records(records_url: str) -> Iterator[Records]:
    """Empty records, as a new node has them."""
    opened = Records(records_url)
    yield opened
    opened.close()


@pytest.fixture
def api(tmp_path: Path, records: Records) -> Iterator[ApiHarness]:
    """The HTTP interface over empty records, with a key for each role; its logs go nowhere."""
    with capture_logs():
        yield ApiHarness(tmp_path, records, storage={"low_watermark_bytes": 0, "reserve_bytes": 0})


@pytest.fixture
def segnode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Segnode]:
    """The command, run in a folder of its own."""
    with command_line(tmp_path, monkeypatch, capfd) as run:
        yield run


@pytest.fixture
def node_spool(tmp_path: Path) -> Spool:
    """The spool of a receiver under test."""
    return Spool(tmp_path / "node" / "spool")


@pytest.fixture
def start_receiver(tmp_path: Path, records: Records, node_spool: Spool) -> Iterator[Callable[..., Receiver]]:
    """Start a receiver; its settings may be given by section. Stopped at the end of the test."""
    started = []

    def begin(**sections: Any) -> Receiver:
        receiver = Receiver(node_settings(tmp_path / "node", **sections), records, node_spool)
        receiver.start()
        started.append(receiver)
        return receiver

    yield begin
    for receiver in started:
        receiver.stop()
