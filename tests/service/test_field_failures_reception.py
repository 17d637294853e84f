"""What receivers in hospitals have failed on: resets, objects of some vendors, and long service."""

from __future__ import annotations

import gc
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_peer import MR_IMAGE_STORAGE, associated, data_set_of, make_object
from phantom import chiral_image, write_enhanced_series
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE
from sqlalchemy import select
from waiting import wait_until

from models.errors import ReasonCode, Refusal
from service.dicom.receive import Receiver
from service.dicom.series import read_series
from service.records.database import Records
from service.records.tables import Instance
from service.spool import Spool

Start = Callable[..., Receiver]

ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"


# --- Resets


@pytest.fixture(scope="module")
def association_request() -> bytes:
    """An A-ASSOCIATE-RQ for MR images, as it goes over the wire."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        entity = AE(ae_title="MODALITY")
        entity.add_requested_context(MR_IMAGE_STORAGE, ExplicitVRLittleEndian)
        where = listener.getsockname()[1]
        thread = threading.Thread(target=entity.associate, args=("127.0.0.1", where))
        thread.start()
        connection, _ = listener.accept()
        with connection:
            request = connection.recv(65536)
        thread.join(20)
    assert request[0] == 1
    return request


def reset(peer: socket.socket) -> None:
    """Close with a TCP reset, as a firewall or a machine that went down does."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


@pytest.mark.parametrize("after", ["the request", "the acceptance", "half a PDU"])
def test_resets_cost_later_associations_nothing(
    start_receiver: Start, association_request: bytes, after: str
) -> None:
    """A minute, where each of them holds a place until a time-out, or the answer is sent to nobody."""
    receiver = start_receiver(dicom={"network_timeout_s": 60, "maximum_associations": 2})
    for _ in range(6):
        peer = socket.create_connection(("127.0.0.1", receiver.port), timeout=10)
        peer.sendall(association_request)
        if after != "the request":
            assert peer.recv(1) in (b"\x02", b"\x03")  # let in, or too many at this moment
        if after == "half a PDU":
            peer.sendall(struct.pack(">BBL", 4, 0, 5000) + b"x" * 100)
        reset(peer)
    deadline = time.monotonic() + 20
    while True:
        with associated(receiver.port, timeout_s=10) as sender:
            if sender.association.is_established:
                assert sender.store(make_object()) == 0x0000
                return
        assert time.monotonic() < deadline, "the places of those who were reset are still taken"


# --- Objects


def _item_that_is_too_long(data: bytes) -> bytes:
    """The first item of the frames' functional groups says that it goes on beyond the object."""
    at = data.index(b"\x00\x52\x30\x92SQ") + 12
    assert data[at : at + 4] == b"\xfe\xff\x00\xe0"
    return data[: at + 4] + struct.pack("<L", 0x7FFFFFF0) + data[at + 8 :]


def _no_value_representation(data: bytes) -> bytes:
    at = data.index(b"\x20\x00\x32\x00DS")  # of the first frame's position
    return data[: at + 4] + b"\x00\x01" + data[at + 6 :]


def _an_item_that_is_none(data: bytes) -> bytes:
    at = data.index(b"\x00\x52\x30\x92SQ") + 12
    return data[:at] + b"\x12\x34\x56\x78" + data[at + 4 :]


def _words_for_numbers(data: bytes) -> bytes:
    at = data.index(b"\x20\x00\x32\x00DS") + 8
    return data[:at] + b"\xff\x00\\\\" + data[at + 4 :]


@pytest.mark.parametrize(
    "damage", [_item_that_is_too_long, _no_value_representation, _an_item_that_is_none, _words_for_numbers]
)
def test_a_multi_frame_object_that_cannot_be_parsed_costs_no_association(
    start_receiver: Start,
    records: Records,
    node_spool: Spool,
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
) -> None:
    """What no part of filing needs is kept as it came; it is read rightly, or refused by name."""
    image = chiral_image()
    (path,) = write_enhanced_series(tmp_path / "vendor", image, np.eye(4), SOPInstanceUID="2.25.3.1")
    sent = damage(data_set_of(path.read_bytes()))
    contexts = [(uid, [ExplicitVRLittleEndian]) for uid in (ENHANCED_MR, MR_IMAGE_STORAGE)]
    with associated(start_receiver().port, contexts) as sender:
        assert sender.store(sent, sop_class_uid=ENHANCED_MR, sop_instance_uid="2.25.3.1") == 0x0000
        assert sender.store(make_object(2)) == 0x0000
        assert sender.association.is_established
    with records.read() as session:
        kept = {row.sop_class_uid: node_spool.absolute(row.path) for row in session.scalars(select(Instance))}
    assert kept.keys() == {ENHANCED_MR, MR_IMAGE_STORAGE}
    assert data_set_of(kept[ENHANCED_MR].read_bytes()) == sent
    try:
        read = read_series([kept[ENHANCED_MR]]).volume
    except Refusal as refusal:
        assert refusal.reason in (ReasonCode.UNREADABLE, ReasonCode.INVALID_GEOMETRY)  # noqa: PT017
        assert refusal.remedy  # noqa: PT017
    else:  # the damage has no part in what is read
        np.testing.assert_array_equal(read.array[0], image)
        np.testing.assert_array_equal(read.affine, np.eye(4))


# --- Long service


def test_an_association_leaves_nothing_in_the_memory(start_receiver: Start) -> None:
    receiver = start_receiver()
    idle = threading.active_count()

    def use(count: int) -> int:
        for number in range(count):
            with associated(receiver.port) as sender:
                assert sender.store(make_object(number % 3, PixelData=bytes(100_000))) == 0x0000
        wait_until(lambda: threading.active_count() <= idle + 1)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = use(10)
        grown = use(25) - before
    finally:
        tracemalloc.stop()
    assert grown < 25 * 10_000  # one association that is kept is 100,000 and more, its objects beside
