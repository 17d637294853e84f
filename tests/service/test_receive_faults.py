"""The storage SCP against what hospitals, networks, disks and ill-meaning peers do to it."""

from __future__ import annotations

import errno
import gc
import os
import queue
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dicom_peer import CALLING_AE_TITLE, MR_IMAGE_STORAGE, associated, encode, make_object
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.association import Association
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AssociationSocket
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session
from waiting import wait_until

from service.dicom import incoming, object_store
from service.dicom.receive import Receiver
from service.records.database import Records
from service.records.instances import ReceivedInstance, Recorded, record_instance
from service.records.tables import Event, Instance
from service.spool import Spool

Start = Callable[..., Receiver]

VERIFICATION = "1.2.840.10008.1.1"


def rows(records: Records) -> list[Instance]:
    with records.read() as session:
        return list(session.scalars(select(Instance)))


def events(records: Records, kind: str) -> list[Event]:
    with records.read() as session:
        return list(session.scalars(select(Event).where(Event.kind == kind)))


def files(spool: Spool) -> list[Path]:
    return [p for d in (spool.incoming_dir, spool.instances_dir) for p in d.rglob("*") if p.is_file()]


# --- Objects that are refused


@pytest.mark.parametrize(
    ("sop_class_uid", "sop_instance_uid"),
    [(MR_IMAGE_STORAGE, "2.25.404"), ("1.2.840.10008.5.1.4.1.1.2", "2.25.3.1")],
    ids=["instance", "class"],
)
def test_a_command_that_names_another_object_is_refused(
    start_receiver: Start, records: Records, node_spool: Spool, sop_class_uid: str, sop_instance_uid: str
) -> None:
    receiver = start_receiver()
    with associated(receiver.port, [(sop_class_uid, [ExplicitVRLittleEndian])]) as sender:
        status = sender.store(make_object(), sop_class_uid=sop_class_uid, sop_instance_uid=sop_instance_uid)
    assert status == 0xA900
    assert rows(records) == []
    assert files(node_spool) == []
    (event,) = events(records, "instance_refused")
    assert event.detail["status"] == "0xA900"
    assert event.actor == CALLING_AE_TITLE
    assert event.alert


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_an_object_without_an_identifier_is_refused(
    start_receiver: Start, records: Records, node_spool: Spool, keyword: str
) -> None:
    receiver = start_receiver()
    with associated(receiver.port) as sender:
        response = sender.store_response(encode(make_object(**{keyword: None})), sop_instance_uid="2.25.3.1")
        assert response.Status == 0xC000
        assert response.ErrorComment == f"The object has no {keyword}."
        assert sender.store(make_object()) == 0x0000  # the association lives on
    assert len(rows(records)) == 1
    assert len(files(node_spool)) == 1
    assert len(events(records, "instance_refused")) == 1


# A sequence and an item of undefined length: repeated, it nests deeper than any recursion goes.
_OPEN_ITEM = struct.pack("<HH2sHLHHL", 8, 0x1140, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)


def _bomb() -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    start = struct.pack("<HH2sHL", 0x0008, 0x0008, b"UT", 0, 1 << 30)
    return deflater.compress(start + b"\0" * (100 << 20)) + deflater.flush()


@pytest.mark.parametrize(
    ("data", "syntax"),
    [
        (b"not a data set, whatever the sender says", ExplicitVRLittleEndian),
        (encode(make_object())[:90], ExplicitVRLittleEndian),
        (_OPEN_ITEM * 30_000, ExplicitVRLittleEndian),
        (encode(make_object()), ImplicitVRLittleEndian),  # a vendor that encodes otherwise than it says
        (_bomb(), DeflatedExplicitVRLittleEndian),
        (b"\xff" * 200, DeflatedExplicitVRLittleEndian),
    ],
    ids=["text", "truncated", "deep", "wrong-syntax", "bomb", "damaged-stream"],
)
def test_an_unreadable_data_set_is_refused_and_the_association_lives(
    start_receiver: Start, records: Records, node_spool: Spool, data: bytes, syntax: str
) -> None:
    receiver = start_receiver()
    contexts = [(MR_IMAGE_STORAGE, [s]) for s in {syntax, ExplicitVRLittleEndian}]
    with associated(receiver.port, contexts) as sender:
        assert sender.store(data, transfer_syntax_uid=syntax) == 0xC000
        assert sender.store(make_object()) == 0x0000
    assert len(files(node_spool)) == 1
    assert len(events(records, "instance_refused")) == 1


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # pydicom's, on either side
@pytest.mark.parametrize("uid", ["../../../etc/passwd", "1.2.3/../../4", "1.2.3\\..\\4", "/etc/passwd"])
def test_a_uid_that_is_a_path_is_refused_with_an_event(
    start_receiver: Start, records: Records, node_spool: Spool, uid: str
) -> None:
    receiver = start_receiver()
    data = encode(make_object())
    tricked = data.replace(b"UI\x08\x002.25.3.1", b"UI" + struct.pack("<H", len(uid)) + uid.encode())
    assert tricked != data
    with associated(receiver.port) as sender:
        assert sender.store(tricked, sop_instance_uid=uid) == 0xC000
        assert sender.store(tricked, sop_instance_uid="2.25.3.1") == 0xC000
        assert sender.store(data) == 0x0000
    assert len(files(node_spool)) == 1
    refused = events(records, "instance_refused")
    assert len(refused) == 2
    assert uid not in str([event.detail for event in refused])  # nothing foreign in the audit trail


def test_a_c_store_without_data_set_is_refused(start_receiver: Start) -> None:
    receiver = start_receiver()
    with associated(receiver.port) as sender:
        message = _store_message(make_object(), CommandDataSetType=0x0101)
        message.data_set = BytesIO()
        association = sender.association
        association._reactor_checkpoint.clear()
        for fragment in message.encode_msg(sender.context_id(MR_IMAGE_STORAGE, ExplicitVRLittleEndian), 0):
            association.dul.send_pdu(fragment)
        _, response = association.dimse.get_msg(block=True)
        association._reactor_checkpoint.set()
        assert response.Status == 0xC000


def test_an_object_over_the_limit_is_refused(
    start_receiver: Start, records: Records, node_spool: Spool
) -> None:
    receiver = start_receiver(dicom={"maximum_object_bytes": 1 << 20})
    with associated(receiver.port) as sender:
        assert sender.store(make_object(PixelData=b"\0" * (2 << 20))) == 0xC000
        assert files(node_spool) == []
        assert sender.store(make_object()) == 0x0000
    (event,) = events(records, "instance_refused")
    assert "1048576 bytes" in event.detail["reason"]


def test_a_refusal_that_repeats_is_recorded_once(start_receiver: Start, records: Records) -> None:
    receiver = start_receiver()
    with associated(receiver.port) as sender:
        for _ in range(5):
            assert sender.store(b"nonsense, sent again and again") == 0xC000
    assert len(events(records, "instance_refused")) == 1


# --- Peers


@pytest.mark.parametrize(
    ("calling", "called", "addresses", "let_in"),
    [
        ("MODALITY", "SEGNODE", ["127.0.0.0/8"], True),
        ("MODALITY", "SEGNODE", ["::1/128", "127.0.0.1/32"], True),
        ("MODALITY", "SEGNODE", ["10.0.0.0/8"], False),
        ("STRANGER", "SEGNODE", ["127.0.0.0/8"], False),
        ("MODALITY", "OTHERNODE", ["127.0.0.0/8"], False),
    ],
)
def test_only_known_peers_from_their_addresses_are_let_in(
    start_receiver: Start, records: Records, calling: str, called: str, addresses: list[str], let_in: bool
) -> None:
    peers = [{"ae_title": "MODALITY", "addresses": addresses}]
    receiver = start_receiver(dicom={"allow_unknown_peers": False, "peers": peers})
    for _ in range(2):
        with associated(receiver.port, calling_ae_title=calling, called_ae_title=called) as sender:
            assert sender.association.is_established is let_in
            assert sender.association.is_rejected is not let_in
            answer = sender.association.acceptor.primitive
            if not let_in:
                assert (answer.result, answer.result_source) == (1, 1)
                assert answer.diagnostic == (7 if called == "OTHERNODE" else 3)
    recorded = events(records, "association_rejected")
    assert len(recorded) == (0 if let_in else 1)
    if recorded:
        assert recorded[0].actor == calling
        assert recorded[0].detail["peer_address"] == "127.0.0.1"


def test_a_known_title_from_elsewhere_is_refused_even_where_strangers_are_let_in(
    start_receiver: Start,
) -> None:
    peers = [{"ae_title": "MODALITY", "addresses": ["10.0.0.0/8"]}]
    receiver = start_receiver(dicom={"allow_unknown_peers": True, "peers": peers})
    with associated(receiver.port) as sender:
        assert sender.association.is_rejected
    with associated(receiver.port, calling_ae_title="STRANGER") as sender:
        assert sender.association.is_established


def test_nobody_is_let_in_while_admission_fails(
    start_receiver: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = start_receiver()

    def fail(**_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(receiver._door._admission, "judge", fail)
    with associated(receiver.port) as sender:
        assert sender.association.is_rejected


# --- The disk and the records


def test_below_the_watermark_associations_and_objects_are_turned_away(
    start_receiver: Start, records: Records, node_spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_spool.low_watermark_bytes = 1000
    free = {"bytes": 2000}
    monkeypatch.setattr(node_spool, "free_bytes", lambda: free["bytes"])
    receiver = start_receiver()
    with associated(receiver.port) as sender:
        assert sender.store(make_object(1)) == 0x0000
        free["bytes"] = 999
        assert sender.store(make_object(2)) == 0xA700
        with associated(receiver.port) as other:
            answer = other.association.acceptor.primitive
            assert other.association.is_rejected
            assert (answer.result, answer.result_source, answer.diagnostic) == (2, 3, 2)
        free["bytes"] = 1000
        assert sender.store(make_object(2)) == 0x0000
        with associated(receiver.port) as other:
            assert other.association.is_established
    assert len(rows(records)) == 2
    assert len(files(node_spool)) == 2


def test_a_large_object_stops_at_the_reserve(
    start_receiver: Start, node_spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_spool.low_watermark_bytes = 1000
    node_spool.reserve_bytes = 500
    figures = iter([1500, 1500])  # as the association and the object begin; then the disk runs full
    monkeypatch.setattr(node_spool, "free_bytes", lambda: next(figures, 499))
    receiver = start_receiver()
    with associated(receiver.port) as sender:
        assert sender.store(make_object(PixelData=b"\0" * (9 << 20))) == 0xA700
        assert files(node_spool) == []
        assert sender.association.is_established


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_a_disk_that_fails_costs_no_association_and_leaves_nothing(
    start_receiver: Start, records: Records, node_spool: Spool, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    receiver = start_receiver()
    failing = {"now": True}
    if step == "write":
        original = incoming.tempfile.NamedTemporaryFile

        def open_failing(*args: Any, **kwargs: Any) -> Any:
            file = original(*args, **{**kwargs, "buffering": 0})
            if failing["now"]:

                def write(_: bytes) -> int:
                    raise OSError(errno.ENOSPC, "No space left on device")

                monkeypatch.setattr(file, "write", write, raising=False)
            return file

        monkeypatch.setattr(incoming.tempfile, "NamedTemporaryFile", open_failing)
    else:
        fsync = os.fsync

        def failing_fsync(descriptor: int) -> None:
            if failing["now"]:
                raise OSError(errno.EIO, "Input/output error")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", failing_fsync)
    with associated(receiver.port) as sender:
        assert sender.store(make_object()) == 0xA700
        assert rows(records) == []
        assert files(node_spool) == []
        failing["now"] = False
        assert sender.store(make_object()) == 0x0000
    assert len(rows(records)) == len(files(node_spool)) == 1


def _operational_error() -> OperationalError:
    return OperationalError("COMMIT", {}, Exception("disk I/O error"))


def test_records_that_fail_are_never_answered_with_success(
    start_receiver: Start, records: Records, node_spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = start_receiver()

    @contextmanager
    def failing() -> Iterator[Session]:
        raise _operational_error()
        yield

    with associated(receiver.port) as sender:
        with monkeypatch.context() as patch:
            patch.setattr(records, "write", failing)
            assert sender.store(make_object()) == 0xA700
        assert files(node_spool) == []
        assert sender.store(make_object()) == 0x0000
    assert len(rows(records)) == len(files(node_spool)) == 1


@pytest.mark.parametrize(("conflicts", "status"), [(2, 0x0000), (3, 0xA700)])
def test_a_conflict_with_another_association_is_tried_again(
    start_receiver: Start,
    records: Records,
    node_spool: Spool,
    monkeypatch: pytest.MonkeyPatch,
    conflicts: int,
    status: int,
) -> None:
    receiver = start_receiver()
    left = iter(range(conflicts))

    def conflicting(session: Session, received: ReceivedInstance) -> Recorded:
        if next(left, None) is not None:
            raise IntegrityError("INSERT", {}, Exception("UNIQUE constraint failed"))
        return record_instance(session, received)

    monkeypatch.setattr(object_store, "record_instance", conflicting)
    with associated(receiver.port) as sender:
        assert sender.store(make_object()) == status
    assert len(rows(records)) == len(files(node_spool)) == (status == 0x0000)


def test_a_commit_whose_answer_was_lost_keeps_its_file(
    start_receiver: Start, records: Records, node_spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = start_receiver()
    write = records.write

    @contextmanager
    def committing_then_failing() -> Iterator[Session]:
        with write() as session:
            yield session
        raise _operational_error()

    with associated(receiver.port) as sender:
        with monkeypatch.context() as patch:
            patch.setattr(records, "write", committing_then_failing)
            assert sender.store(make_object()) == 0xA700
        assert sender.store(make_object()) == 0x0000  # as the sender will
    (row,) = rows(records)
    assert files(node_spool) == [node_spool.absolute(row.path)]


# --- Associations that go wrong


def test_an_association_that_ends_in_the_middle_of_an_object_leaves_nothing(
    start_receiver: Start, records: Records, node_spool: Spool
) -> None:
    receiver = start_receiver()
    with associated(receiver.port) as sender:
        message = _store_message(make_object(PixelData=b"\0" * 500_000))
        fragments = list(
            message.encode_msg(sender.context_id(MR_IMAGE_STORAGE, ExplicitVRLittleEndian), 16384)
        )
        for fragment in fragments[:-3]:
            sender.association.dul.send_pdu(fragment)
        wait_until(lambda: len(files(node_spool)) == 1)
        sender.association.abort()
        wait_until(lambda: files(node_spool) == [])
    assert rows(records) == []
    with associated(receiver.port) as sender:
        assert sender.store(make_object()) == 0x0000


def _store_message(dataset: Any, **parameters: Any) -> Any:
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID = dataset.SOPClassUID
    request.AffectedSOPInstanceUID = dataset.SOPInstanceUID
    request.DataSet = BytesIO(encode(dataset))
    message = C_STORE_RQ()
    message.primitive_to_message(request)
    for keyword, value in parameters.items():
        if value is None:
            del message.command_set[keyword]
        else:
            setattr(message.command_set, keyword, value)
    return message


@pytest.mark.parametrize(
    "keyword", ["AffectedSOPInstanceUID", "AffectedSOPClassUID", "MessageID", "Priority"]
)
def test_a_command_without_a_mandatory_parameter_is_aborted_not_left_waiting(
    start_receiver: Start, node_spool: Spool, keyword: str
) -> None:
    receiver = start_receiver(dicom={"network_timeout_s": 60})
    with associated(receiver.port) as sender:
        message = _store_message(make_object(), **{keyword: None})
        context_id = sender.context_id(MR_IMAGE_STORAGE, ExplicitVRLittleEndian)
        for fragment in message.encode_msg(context_id, 16384):
            sender.association.dul.send_pdu(fragment)
        wait_until(lambda: not sender.association.is_established)
    assert files(node_spool) == []


def test_an_object_under_a_context_that_was_not_accepted_is_aborted(start_receiver: Start) -> None:
    receiver = start_receiver(dicom={"network_timeout_s": 60})
    with associated(receiver.port) as sender:
        for fragment in _store_message(make_object()).encode_msg(201, 16384):
            sender.association.dul.send_pdu(fragment)
        wait_until(lambda: not sender.association.is_established)


def test_a_command_without_end_is_aborted(start_receiver: Start) -> None:
    receiver = start_receiver(dicom={"network_timeout_s": 60})
    with associated(receiver.port) as sender:
        fragment = P_DATA()
        fragment.presentation_data_value_list.append((1, b"\x01" + b"\0" * 16000))
        for _ in range(6):
            sender.association.dul.send_pdu(fragment)
        wait_until(lambda: not sender.association.is_established)


def test_a_pdu_that_claims_four_gigabytes_closes_the_connection(start_receiver: Start) -> None:
    receiver = start_receiver(dicom={"network_timeout_s": 60})
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=20) as peer:
        peer.sendall(struct.pack(">BBL", 1, 0, 0xFFFFFFFF) + b"x" * 1000)
        assert _is_closed_by_peer(peer)


@pytest.mark.parametrize("start", [b"", b"\x01\x00\x00", struct.pack(">BBL", 1, 0, 200) + b"half of it"])
def test_a_peer_that_stalls_holds_nothing_for_long(start_receiver: Start, start: bytes) -> None:
    receiver = start_receiver(dicom={"network_timeout_s": 0.5})
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=20) as peer:
        peer.sendall(start)
        with associated(receiver.port) as sender:  # meanwhile others are served
            assert sender.store(make_object()) == 0x0000
        assert _is_closed_by_peer(peer)


def _is_closed_by_peer(peer: socket.socket) -> bool:
    try:
        while peer.recv(4096):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_probes_of_the_port_hold_no_association(start_receiver: Start) -> None:
    receiver = start_receiver(dicom={"network_timeout_s": 60, "maximum_associations": 2})
    for _ in range(10):  # as a load balancer does, for ever
        socket.create_connection(("127.0.0.1", receiver.port), timeout=20).close()
    wait_until(lambda: _can_associate(receiver.port))


def test_noise_on_the_port_is_survived(start_receiver: Start) -> None:
    receiver = start_receiver()
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", os.urandom(2000)):
        with socket.create_connection(("127.0.0.1", receiver.port), timeout=20) as peer:
            peer.sendall(noise)
    with associated(receiver.port) as sender:
        assert sender.store(make_object()) == 0x0000


def test_more_associations_than_allowed_are_rejected_as_transient(start_receiver: Start) -> None:
    receiver = start_receiver(dicom={"maximum_associations": 2})
    with associated(receiver.port), associated(receiver.port), associated(receiver.port) as third:
        answer = third.association.acceptor.primitive
        assert third.association.is_rejected
        assert (answer.result, answer.result_source, answer.diagnostic) == (2, 3, 2)
    wait_until(lambda: _can_associate(receiver.port))


def _can_associate(port: int) -> bool:
    with associated(port) as sender:
        return bool(sender.association.is_established)


@pytest.mark.slow
def test_hundreds_of_associations_leave_no_thread_no_file_and_no_memory(start_receiver: Start) -> None:
    receiver = start_receiver()
    idle = threading.active_count()

    def use(count: int) -> None:
        for number in range(count):
            with associated(receiver.port) as sender:
                if number % 10 == 0:
                    assert sender.store(make_object(number)) == 0x0000

    def kept() -> tuple[int, int, int]:
        gc.collect()
        alive = sum(issubclass(type(thing), Association) for thing in gc.get_objects())
        return alive, threading.active_count(), len(os.listdir("/proc/self/fd"))

    use(20)
    wait_until(lambda: threading.active_count() <= idle + 1)
    before = kept()
    use(180)
    wait_until(lambda: all(now <= then + 3 for now, then in zip(kept(), before, strict=True)))


def test_a_connection_whose_peer_has_gone_first_is_closed_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        connection, _ = listener.accept()
        assoc: Any = SimpleNamespace(dul=SimpleNamespace(event_queue=queue.Queue()))
        association_socket = AssociationSocket(assoc, client_socket=connection)
        incoming.arm_connection(association_socket, 5.0)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()  # by a reset: there is nothing left to shut down
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        with pytest.raises(OSError, match="not connected"):
            connection.shutdown(socket.SHUT_RDWR)
        association_socket.close()
    assert connection.fileno() == -1
