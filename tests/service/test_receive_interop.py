"""Reception from DCMTK's senders, of real compressed series, byte for byte."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_peer import data_set_of
from phantom import write_classic_series
from pydicom import dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLosslessSV1
from sqlalchemy import select

from service.dicom.receive import Receiver
from service.dicom.send import OutcomeKind, echo, send_file
from service.records.database import Records
from service.records.tables import Instance
from service.settings import Destination
from service.spool import Spool

Tool = Callable[[str], Path]

_SERIES = {  # folder: storescu's option, transfer syntax
    "compressed": ("-xv", "1.2.840.10008.1.2.4.90"),
    "compressed_jpegls": ("-xt", "1.2.840.10008.1.2.4.80"),
    "compressed_j2k": ("-xv", "1.2.840.10008.1.2.4.90"),
    "compressed_rle": ("-xr", "1.2.840.10008.1.2.5"),
    "anatomical": ("-x=", None),
}


def storescu(tool: Path, port: int, paths: list[Path], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool, "-v", "-aet", "DCMTK", "-aec", "SEGNODE", *options, "127.0.0.1", str(port), *paths],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def kept(records: Records, spool: Spool) -> dict[str, Path]:
    with records.read() as session:
        return {row.sop_instance_uid: spool.absolute(row.path) for row in session.scalars(select(Instance))}


@pytest.mark.parametrize("folder", sorted(_SERIES))
def test_storescu_sends_a_compressed_series(
    start_receiver: Callable[..., Receiver],
    records: Records,
    node_spool: Spool,
    shared_data: Path,
    require_tool: Tool,
    folder: str,
) -> None:
    tool = require_tool("storescu")
    paths = sorted((shared_data / "dicom_edge_cases" / "generic" / folder / "001").glob("*.dcm"))
    assert len(paths) >= 4
    option, syntax = _SERIES[folder]
    receiver = start_receiver()
    done = storescu(tool, receiver.port, paths, option)
    assert done.returncode == 0, done.stderr
    files = kept(records, node_spool)
    for path in paths:
        source = dcmread(path)
        assert syntax is None or source.file_meta.TransferSyntaxUID == syntax
        received = dcmread(files[source.SOPInstanceUID])
        assert received.file_meta.TransferSyntaxUID == source.file_meta.TransferSyntaxUID
        assert received.PixelData == source.PixelData
        del received.PixelData, source.PixelData  # DCMTK writes OB where the source says OW
        assert received == source


@pytest.mark.parametrize(
    ("option", "syntax"), [("-xd", DeflatedExplicitVRLittleEndian), ("-xs", JPEGLosslessSV1)]
)
def test_storescu_sends_what_no_real_series_here_has(
    start_receiver: Callable[..., Receiver],
    records: Records,
    node_spool: Spool,
    tmp_path: Path,
    require_tool: Tool,
    option: str,
    syntax: str,
) -> None:
    tool = require_tool("storescu")
    array = np.arange(4096, dtype=np.uint16).reshape(1, 64, 64)
    (path,) = write_classic_series(tmp_path, array, np.eye(4), transfer_syntax=syntax)
    receiver = start_receiver()
    done = storescu(tool, receiver.port, [path], option)
    assert done.returncode == 0, done.stderr
    (received,) = kept(records, node_spool).values()
    assert dcmread(received).file_meta.TransferSyntaxUID == syntax
    assert dcmread(received) == dcmread(path)


def test_echoscu_is_answered(start_receiver: Callable[..., Receiver], require_tool: Tool) -> None:
    tool = require_tool("echoscu")
    receiver = start_receiver()
    command = [tool, "-aet", "DCMTK", "-aec", "SEGNODE", "127.0.0.1", str(receiver.port)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def test_the_sender_and_the_receiver_of_the_node_understand_each_other(
    start_receiver: Callable[..., Receiver], records: Records, node_spool: Spool, tmp_path: Path
) -> None:
    array = np.arange(300_000, dtype=np.uint16).reshape(1, 500, 600)  # several PDUs
    (path,) = write_classic_series(tmp_path, array, np.eye(4))
    receiver = start_receiver()
    node = Destination(name="node", ae_title="SEGNODE", host="127.0.0.1", port=receiver.port)
    assert echo(node, calling_ae_title="OTHERNODE").kind is OutcomeKind.DELIVERED
    assert send_file(path, node, calling_ae_title="OTHERNODE").kind is OutcomeKind.DELIVERED
    (received,) = kept(records, node_spool).values()
    assert data_set_of(received.read_bytes()) == data_set_of(path.read_bytes())


def test_storescp_takes_what_the_node_sends(tmp_path: Path, require_tool: Tool) -> None:
    tool = require_tool("storescp")
    array = np.arange(4096, dtype=np.uint16).reshape(1, 64, 64)
    (path,) = write_classic_series(tmp_path / "source", array, np.eye(4))
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    port = _free_port()
    with subprocess.Popen(
        [tool, "-od", inbox, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as scp:
        try:
            pacs = Destination(name="pacs", ae_title="STORESCP", host="127.0.0.1", port=port)
            _wait_for(pacs)
            assert send_file(path, pacs, calling_ae_title="SEGNODE").kind is OutcomeKind.DELIVERED
        finally:
            scp.terminate()
    (received,) = inbox.iterdir()
    assert dcmread(received) == dcmread(path)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(pacs: Destination) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection((pacs.host, pacs.port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("storescp does not listen")
