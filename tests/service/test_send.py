"""The storage SCU: the stored bytes go out as they are, and every answer and silence has its meaning."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_peer import MR_IMAGE_STORAGE, data_set_of, encode, make_object
from phantom import write_classic_series
from pydicom import dcmread, dcmwrite
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)
from pynetdicom.presentation import AllStoragePresentationContexts
from storage_scp import StorageScp

from service.dicom.send import OutcomeKind, echo, judge_status, send_file, send_files
from service.settings import Destination

# pynetdicom drops the socket of a connection that was never made without closing it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)


def destination(port: int, *, ae_title: str = "PACS", timeout_s: float = 20.0, **more: Any) -> Destination:
    return Destination(
        name="pacs", ae_title=ae_title, host="127.0.0.1", port=port, timeout_s=timeout_s, **more
    )


def write_object(folder: Path, number: int = 1, **attributes: Any) -> Path:
    path = folder / f"{number}.dcm"
    dcmwrite(path, make_object(number, **attributes), enforce_file_format=True)
    return path


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (0x0000, OutcomeKind.DELIVERED),
        (0x0111, OutcomeKind.DELIVERED),  # duplicate SOP instance
        (0xB000, OutcomeKind.WARNING),
        (0xB006, OutcomeKind.WARNING),
        (0xB007, OutcomeKind.WARNING),
        (0x0107, OutcomeKind.WARNING),
        (0xA700, OutcomeKind.RETRY),
        (0xA702, OutcomeKind.RETRY),
        (0x0213, OutcomeKind.RETRY),
        (0xA900, OutcomeKind.PARK),
        (0xA9FF, OutcomeKind.PARK),
        (0x0122, OutcomeKind.PARK),
        (0x0124, OutcomeKind.PARK),
        (0xC000, OutcomeKind.RETRY_FAILURE_STATUS),
        (0xCFFF, OutcomeKind.RETRY_FAILURE_STATUS),
        (0x0110, OutcomeKind.RETRY_FAILURE_STATUS),
        (0xFE00, OutcomeKind.RETRY_FAILURE_STATUS),
        (0x4242, OutcomeKind.RETRY_FAILURE_STATUS),
    ],
)
def test_what_a_status_means(tmp_path: Path, status: int, kind: OutcomeKind) -> None:
    assert judge_status(status).kind is kind
    assert judge_status(status).status == status
    assert (judge_status(status).error is None) is (status == 0)


@pytest.mark.parametrize("status", [0x0000, 0xB007, 0x0111, 0xA700, 0xC123, 0x0122])
def test_the_status_of_the_peer_comes_back(tmp_path: Path, status: int) -> None:
    with StorageScp(statuses=[status]) as scp:
        outcome = send_file(write_object(tmp_path), destination(scp.port), calling_ae_title="SEGNODE")
    assert outcome == judge_status(status)
    assert scp.associations == 1


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        RLELossless,
        JPEGLSLossless,
    ],
)
def test_the_bytes_go_out_as_they_lie(tmp_path: Path, syntax: str) -> None:
    array = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    (path,) = write_classic_series(tmp_path, array, np.eye(4), transfer_syntax=syntax)
    everything = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, syntax]
    with StorageScp(transfer_syntax_uids=everything) as scp:
        outcome = send_file(path, destination(scp.port), calling_ae_title="SEGNODE")
    assert outcome.kind is OutcomeKind.DELIVERED
    (received,) = scp.objects
    assert received.transfer_syntax_uid == syntax
    assert received.data_set == data_set_of(path.read_bytes())
    assert received.calling_ae_title == "SEGNODE"
    assert received.sop_instance_uid == dcmread(path).SOPInstanceUID


@pytest.mark.parametrize(
    "own", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian]
)
@pytest.mark.parametrize("wanted", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_an_uncompressed_file_is_rewritten_for_a_peer_that_wants_it(
    tmp_path: Path, own: str, wanted: str
) -> None:
    array = np.arange(256, dtype=np.uint16).reshape(1, 16, 16)
    (path,) = write_classic_series(tmp_path, array, np.eye(4), transfer_syntax=own)
    with StorageScp(transfer_syntax_uids=[wanted]) as scp:
        outcome = send_file(path, destination(scp.port), calling_ae_title="SEGNODE")
    assert outcome.kind is OutcomeKind.DELIVERED
    (received,) = scp.objects
    assert received.transfer_syntax_uid == wanted
    expected = dcmread(path)
    expected.file_meta.TransferSyntaxUID = wanted
    assert received.data_set == encode(expected)


@pytest.mark.parametrize("syntax", [RLELossless, ExplicitVRBigEndian])
def test_a_file_that_the_peer_cannot_take_is_parked(tmp_path: Path, syntax: str) -> None:
    array = np.zeros((1, 8, 8), np.uint8)
    (path,) = write_classic_series(tmp_path, array, np.eye(4), transfer_syntax=syntax)
    with StorageScp() as scp:
        outcome = send_file(path, destination(scp.port), calling_ae_title="SEGNODE")
    assert outcome.kind is OutcomeKind.PARK
    assert "presentation context" in (outcome.error or "")
    assert scp.attempts == 0


def test_a_class_that_the_peer_does_not_take_is_parked(tmp_path: Path) -> None:
    with StorageScp(sop_class_uids=["1.2.840.10008.5.1.4.1.1.2"]) as scp:
        outcome = send_file(write_object(tmp_path), destination(scp.port), calling_ae_title="SEGNODE")
    assert outcome.kind is OutcomeKind.PARK
    assert "presentation context" in (outcome.error or "")


def test_a_rejected_association_is_tried_again(tmp_path: Path) -> None:
    with StorageScp(require_called_ae_title=True) as scp:
        wrong = destination(scp.port, ae_title="WRONG")
        outcome = send_file(write_object(tmp_path), wrong, calling_ae_title="SEGNODE")
    assert outcome.kind is OutcomeKind.RETRY
    assert outcome.status is None
    assert "rejects the association" in (outcome.error or "")


def test_an_abort_is_tried_again(tmp_path: Path) -> None:
    with StorageScp(abort_on=lambda number: number == 0) as scp:
        outcome = send_file(write_object(tmp_path), destination(scp.port), calling_ae_title="SEGNODE")
        assert (outcome.kind, outcome.status) == (OutcomeKind.RETRY, None)
        again = send_file(write_object(tmp_path), destination(scp.port), calling_ae_title="SEGNODE")
        assert again.kind is OutcomeKind.DELIVERED


def test_a_peer_that_answers_too_late_is_tried_again(tmp_path: Path) -> None:
    with StorageScp(delay_s=1.5) as scp:
        slow = destination(scp.port, timeout_s=0.3)
        outcome = send_file(write_object(tmp_path), slow, calling_ae_title="SEGNODE")
    assert (outcome.kind, outcome.status) == (OutcomeKind.RETRY, None)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_peer_that_is_not_there_is_tried_again(tmp_path: Path) -> None:
    outcome = send_file(write_object(tmp_path), destination(closed_port()), calling_ae_title="SEGNODE")
    assert (outcome.kind, outcome.status) == (OutcomeKind.RETRY, None)
    assert "no connection" in (outcome.error or "")


def test_a_host_that_has_no_address_is_tried_again(tmp_path: Path) -> None:
    nowhere = destination(104).model_copy(update={"host": "pacs.invalid"})
    outcome = send_file(write_object(tmp_path), nowhere, calling_ae_title="SEGNODE")
    assert (outcome.kind, outcome.status) == (OutcomeKind.RETRY, None)


@contextmanager
def rude_peer(answer: bytes = b"", *, then_close: bool = False) -> Iterator[int]:
    """A TCP listener that takes one connection, reads a little, answers with the bytes, and goes silent."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.recv(1000)
                connection.sendall(answer)
                if not then_close:
                    done.wait(20)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            done.set()
            thread.join(20)


@pytest.mark.parametrize(
    ("answer", "then_close"),
    [
        (b"", False),
        (b"", True),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", True),
        (struct.pack(">BBL", 2, 0, 0xFFFFFFFF) + b"x" * 100, False),  # four gigabytes of A-ASSOCIATE-AC
        (struct.pack(">BBL", 2, 0, 500) + b"x" * 100, False),  # half an A-ASSOCIATE-AC
    ],
    ids=["silent", "closes", "http", "huge", "half"],
)
def test_a_peer_that_speaks_no_dicom_is_tried_again(tmp_path: Path, answer: bytes, then_close: bool) -> None:
    with rude_peer(answer, then_close=then_close) as port:
        outcome = send_file(
            write_object(tmp_path), destination(port, timeout_s=0.5), calling_ae_title="SEGNODE"
        )
    assert (outcome.kind, outcome.status) == (OutcomeKind.RETRY, None)


def test_a_peer_that_stops_reading_does_not_hold_the_sender(tmp_path: Path) -> None:
    path = write_object(tmp_path, PixelData=b"\0" * (20 << 20))
    with StorageScp() as scp, frozen_proxy(scp.port) as port:
        before = time.monotonic()
        outcome = send_file(path, destination(port, timeout_s=0.5), calling_ae_title="SEGNODE")
    assert (outcome.kind, outcome.status) == (OutcomeKind.RETRY, None)
    assert time.monotonic() - before < 60  # not for ever: without a time-out this never returns


@contextmanager
def frozen_proxy(target: int) -> Iterator[int]:
    """Passes 100 kB to the target and everything back; then reads no more, with the connection open."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def serve() -> None:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", target))
            back = threading.Thread(target=pump, args=(server, client, None))
            back.start()
            pump(client, server, 100_000)
            done.wait(30)
            server.shutdown(socket.SHUT_RDWR)
            back.join(20)
            client.close()
            server.close()

        def pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
            passed = 0
            try:
                while (limit is None or passed < limit) and (data := source.recv(4096)):
                    sink.sendall(data)
                    passed += len(data)
            except OSError:
                return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            done.set()
            thread.join(40)


def test_many_files_go_over_one_association(tmp_path: Path) -> None:
    paths = [write_object(tmp_path, number) for number in range(5)]
    with StorageScp(statuses=[0, 0xC000, 0, 0xA700]) as scp:
        outcomes = list(send_files(paths, destination(scp.port), calling_ae_title="SEGNODE"))
    assert [path for path, _ in outcomes] == paths
    assert [outcome.status for _, outcome in outcomes] == [0, 0xC000, 0, 0xA700, 0]
    assert scp.associations == 1


def test_after_an_abort_the_rest_goes_over_a_new_association(tmp_path: Path) -> None:
    paths = [write_object(tmp_path, number) for number in range(4)]
    with StorageScp(abort_on=lambda number: number == 1) as scp:
        outcomes = [o.kind for _, o in send_files(paths, destination(scp.port), calling_ae_title="SEGNODE")]
    assert outcomes == [
        OutcomeKind.DELIVERED,
        OutcomeKind.RETRY,
        OutcomeKind.DELIVERED,
        OutcomeKind.DELIVERED,
    ]
    assert scp.associations == 2


def test_more_classes_than_one_association_can_propose(tmp_path: Path) -> None:
    classes = [str(context.abstract_syntax) for context in AllStoragePresentationContexts][:70]
    paths = [write_object(tmp_path, n, SOPClassUID=uid) for n, uid in enumerate(classes)]
    with StorageScp() as scp:
        outcomes = list(send_files(paths, destination(scp.port), calling_ae_title="SEGNODE"))
    assert [path for path, _ in outcomes] == paths
    assert {outcome.kind for _, outcome in outcomes} == {OutcomeKind.DELIVERED}
    assert scp.associations == 2


def test_what_is_not_a_dicom_file_is_parked(tmp_path: Path) -> None:
    junk = tmp_path / "junk.dcm"
    junk.write_bytes(b"not DICOM" * 100)
    for path in (junk, tmp_path / "absent.dcm"):
        outcome = send_file(path, destination(closed_port()), calling_ae_title="SEGNODE")
        assert outcome.kind is OutcomeKind.PARK
        assert outcome.error


def test_the_calling_title_of_the_destination_wins(tmp_path: Path) -> None:
    with StorageScp() as scp:
        to = destination(scp.port, calling_ae_title="SEG_TO_PACS")
        assert send_file(write_object(tmp_path), to, calling_ae_title="SEGNODE").status == 0
    assert scp.objects[0].calling_ae_title == "SEG_TO_PACS"
    assert scp.objects[0].sop_class_uid == MR_IMAGE_STORAGE


def test_echo() -> None:
    with StorageScp() as scp:
        assert echo(destination(scp.port), calling_ae_title="SEGNODE").kind is OutcomeKind.DELIVERED
    outcome = echo(destination(closed_port()), calling_ae_title="SEGNODE")
    assert outcome.kind is OutcomeKind.RETRY
