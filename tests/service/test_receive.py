"""The storage SCP: what is acknowledged is kept, once, whole and as it came; what is not leaves nothing."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from dicom_peer import (
    CALLING_AE_TITLE,
    MR_IMAGE_STORAGE,
    associated,
    data_set_of,
    encode,
    make_object,
)
from phantom import write_classic_series
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless
from pynetdicom.presentation import AllStoragePresentationContexts
from sqlalchemy import select

from service.dicom.contexts import TRANSFER_SYNTAXES
from service.dicom.receive import Receiver
from service.records.database import Records, utc_now
from service.records.jobs import enqueue
from service.records.tables import (
    Delivery,
    DeliveryState,
    Event,
    Instance,
    InstanceKind,
    Job,
    JobOrigin,
    JobState,
    Result,
    ResultKind,
    Series,
    SeriesState,
)
from service.records.work import NewInput, NewJob
from service.spool import Spool

Start = Callable[..., Receiver]

DESIGNED_SYNTAXES = [
    f"1.2.840.10008.1.{suffix}"
    for suffix in (
        *("2", "2.1", "2.1.99", "2.2"),
        *(f"2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91, 201, 202, 203)),
        "2.5",
    )
]


@pytest.fixture
def spool(node_spool: Spool) -> Spool:
    return node_spool


@pytest.fixture
def start(start_receiver: Start) -> Start:
    return start_receiver


def instances(records: Records) -> list[Instance]:
    with records.read() as session:
        return list(session.scalars(select(Instance).order_by(Instance.received_at)))


def events(records: Records, kind: str) -> list[Event]:
    with records.read() as session:
        return list(session.scalars(select(Event).where(Event.kind == kind)))


def stored_files(spool: Spool) -> list[Path]:
    assert list(spool.incoming_dir.iterdir()) == []
    return sorted(path for path in spool.instances_dir.rglob("*") if path.is_file())


# --- What is kept


def test_echo(start: Start) -> None:
    receiver = start()
    with associated(receiver.port, [("1.2.840.10008.1.1", [ImplicitVRLittleEndian])]) as sender:
        assert sender.association.send_c_echo().Status == 0x0000


def test_an_object_is_kept_with_its_row(start: Start, records: Records, spool: Spool) -> None:
    receiver = start()
    dataset = make_object()
    with associated(receiver.port) as sender:
        assert sender.store(dataset) == 0x0000
    (row,) = instances(records)
    path = spool.absolute(row.path)
    data = path.read_bytes()
    assert data_set_of(data) == encode(dataset)
    assert row.size_bytes == len(data)
    assert row.sha256 == hashlib.sha256(data).hexdigest()
    assert path.stem == row.instance_id
    assert path.stat().st_mode & 0o077 == 0
    assert (row.sop_class_uid, row.sop_instance_uid) == (MR_IMAGE_STORAGE, dataset.SOPInstanceUID)
    assert (row.study_instance_uid, row.series_instance_uid) == ("2.25.1", "2.25.2")
    assert (row.patient_id, row.kind) == ("P-0815", InstanceKind.IMAGE)
    assert (row.calling_ae_title, row.called_ae_title) == (CALLING_AE_TITLE, "SEGNODE")
    assert row.peer_address == "127.0.0.1"
    meta = dcmread(path).file_meta
    assert meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
    assert meta.MediaStorageSOPClassUID == dataset.SOPClassUID
    assert meta.TransferSyntaxUID == ExplicitVRLittleEndian
    with records.read() as session:
        (series,) = session.scalars(select(Series))
    assert (series.state, series.instance_count) == (SeriesState.RECEIVING, 1)


def test_every_transfer_syntax_is_kept_as_it_came(
    start: Start, records: Records, spool: Spool, tmp_path: Path
) -> None:
    receiver = start()
    array = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    sent = {}
    with associated(receiver.port, [(MR_IMAGE_STORAGE, [s]) for s in DESIGNED_SYNTAXES]) as sender:
        assert not sender.association.rejected_contexts
        for number, syntax in enumerate(DESIGNED_SYNTAXES):
            folder = tmp_path / syntax
            (path,) = write_classic_series(
                folder, array, np.eye(4), transfer_syntax=syntax, SOPInstanceUID=f"2.25.7.{number}"
            )
            sent[syntax] = data_set_of(path.read_bytes())
            status = sender.store(
                sent[syntax], sop_instance_uid=f"2.25.7.{number}", transfer_syntax_uid=syntax
            )
            assert status == 0x0000, syntax
    kept = {row.transfer_syntax_uid: spool.absolute(row.path) for row in instances(records)}
    assert {syntax: data_set_of(path.read_bytes()) for syntax, path in kept.items()} == sent
    for syntax, path in kept.items():
        assert dcmread(path).file_meta.TransferSyntaxUID == syntax


def test_every_storage_class_is_accepted(start: Start) -> None:
    receiver = start()
    classes = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
    classes += [
        "1.3.46.670589.11.0.0.12.1",  # private
        "1.2.840.113619.4.26",
        "1.2.840.10008.5.1.4.1.1.6",  # retired
        "1.2.840.10008.5.1.1.29",
        "1.2.840.10008.5.1.4.1.1.999.1",  # of some later edition of the standard
    ]
    for at in range(0, len(classes), 100):
        chunk = classes[at : at + 100]
        with associated(receiver.port, [(uid, [ExplicitVRLittleEndian]) for uid in chunk]) as sender:
            assert len(sender.association.accepted_contexts) == len(chunk)


def test_other_services_are_not_accepted(start: Start) -> None:
    receiver = start()
    query = "1.2.840.10008.5.1.4.1.2.1.1"
    commitment = "1.2.840.10008.1.20.1"
    contexts = [(uid, [ImplicitVRLittleEndian]) for uid in (query, commitment, MR_IMAGE_STORAGE)]
    with associated(receiver.port, contexts) as sender:
        assert {c.abstract_syntax for c in sender.association.rejected_contexts} == {query, commitment}


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        ([JPEG2000Lossless, ImplicitVRLittleEndian, ExplicitVRLittleEndian], ExplicitVRLittleEndian),
        (["1.2.840.10008.1.2.4.50", JPEG2000Lossless], JPEG2000Lossless),  # lossless before lossy
        (["1.2.840.113619.5.2", ImplicitVRLittleEndian], ImplicitVRLittleEndian),
    ],
)
def test_what_loses_nothing_is_preferred(start: Start, offered: list[str], taken: str) -> None:
    receiver = start()
    with associated(receiver.port, [(MR_IMAGE_STORAGE, offered)]) as sender:
        (context,) = sender.association.accepted_contexts
        assert context.transfer_syntax == [taken]


def test_no_transfer_syntax_stands_twice() -> None:
    assert len(set(TRANSFER_SYNTAXES)) == len(TRANSFER_SYNTAXES)
    assert set(DESIGNED_SYNTAXES) <= set(TRANSFER_SYNTAXES)


@pytest.mark.parametrize("sop_class_uid", ["1.3.46.670589.11.0.0.12.1", "1.2.840.10008.5.1.4.1.1.999.1"])
def test_an_object_of_an_unknown_class_is_kept_and_opens_nothing(
    start: Start, records: Records, sop_class_uid: str
) -> None:
    receiver = start()
    with associated(receiver.port, [(sop_class_uid, [ExplicitVRLittleEndian])]) as sender:
        assert sender.store(make_object(SOPClassUID=sop_class_uid)) == 0x0000
    (row,) = instances(records)
    assert row.kind is InstanceKind.OTHER
    assert row.series_id is None


def test_a_study_without_patient_id_is_kept(start: Start, records: Records) -> None:
    receiver = start()
    with associated(receiver.port) as sender:
        assert sender.store(make_object(PatientID=None)) == 0x0000
    assert instances(records)[0].patient_id is None


def test_the_same_object_again_is_kept_once(start: Start, records: Records, spool: Spool) -> None:
    receiver = start()
    with associated(receiver.port) as sender:
        assert sender.store(make_object()) == 0x0000
        assert sender.store(make_object(InstanceNumber=5)) == 0x0000  # other bytes, the same identity
    assert len(instances(records)) == 1
    assert len(stored_files(spool)) == 1


def test_the_same_object_over_many_associations_is_kept_once(
    start: Start, records: Records, spool: Spool
) -> None:
    receiver = start()
    together = threading.Barrier(6)

    def send(_: int) -> int | None:
        with associated(receiver.port) as sender:
            together.wait(20)
            return sender.store(make_object())

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(send, range(6))) == [0x0000] * 6
    assert len(instances(records)) == 1
    assert len(stored_files(spool)) == 1


def test_one_sop_instance_in_two_series_is_kept_twice(start: Start, records: Records, spool: Spool) -> None:
    receiver = start()
    with associated(receiver.port) as sender:
        assert sender.store(make_object()) == 0x0000
        assert sender.store(make_object(SeriesInstanceUID="2.25.77")) == 0x0000
    assert {row.series_instance_uid for row in instances(records)} == {"2.25.2", "2.25.77"}
    assert len(stored_files(spool)) == 2


def _deliver(records: Records, instance: Instance) -> str:
    """A job of the instance whose result has been sent to PACS; returns the delivery's identifier."""
    now = utc_now()
    with records.write() as session:
        new = NewJob(
            origin=JobOrigin.DICOM,
            model_name="brain",
            input_key="key",
            inputs=[NewInput(path=instance.path, instance_id=instance.instance_id)],
            series_id=instance.series_id,
        )
        job_id = enqueue(session, new, at=now)[0].job_id
        job = session.get_one(Job, job_id)
        job.state = JobState.SUCCEEDED
        result = Result(
            job_id=job_id,
            kind=ResultKind.SEGMENTATION,
            path="results/x.dcm",
            size_bytes=1,
            sha256="0" * 64,
            sop_instance_uid="2.25.4242",
            created_at=now,
        )
        session.add(result)
        session.flush()
        sent = Delivery(
            result_id=result.result_id,
            job_id=job_id,
            destination="PACS",
            state=DeliveryState.SENT,
            next_attempt_at=now,
            created_at=now,
            sent_at=now + timedelta(seconds=1),
        )
        session.add(sent)
        session.flush()
        return sent.delivery_id


def test_a_correction_keeps_both_and_names_what_has_left(
    start: Start, records: Records, spool: Spool
) -> None:
    receiver = start()
    with associated(receiver.port) as sender:
        assert sender.store(make_object()) == 0x0000
        delivery_id = _deliver(records, instances(records)[0])
        assert sender.store(make_object(PatientID="P-0816")) == 0x0000
    old, new = instances(records)
    assert (old.current, old.revision, old.patient_id) == (False, 1, "P-0815")
    assert (new.current, new.revision, new.patient_id) == (True, 2, "P-0816")
    assert len(stored_files(spool)) == 2
    (event,) = events(records, "instance_corrected")
    assert event.alert
    assert event.subject == new.instance_id
    assert event.detail["delivered"] == [{"delivery_id": delivery_id, "destination": "PACS"}]
    assert "0816" not in str(event.detail)


def test_an_object_of_the_nodes_own_opens_nothing(start: Start, records: Records) -> None:
    receiver = start()
    with associated(receiver.port) as sender:
        assert sender.store(make_object()) == 0x0000
        _deliver(records, instances(records)[0])
        assert sender.store(make_object(SOPInstanceUID="2.25.4242", SeriesInstanceUID="2.25.9")) == 0x0000
    row = instances(records)[1]
    assert row.kind is InstanceKind.OWN
    assert row.series_id is None


@pytest.mark.slow
def test_five_hundred_slices_in_one_association(start: Start, records: Records, spool: Spool) -> None:
    receiver = start()
    with associated(receiver.port) as sender:
        for number in range(500):
            assert sender.store(make_object(number)) == 0x0000
    assert len(instances(records)) == 500
    assert len(stored_files(spool)) == 500


def test_nothing_of_the_patient_is_logged(
    start: Start, records: Records, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver = start()
    with associated(receiver.port) as sender:
        sender.store(make_object())
        sender.store(make_object(PatientID="P-0816"))
        sender.store(make_object(StudyInstanceUID=None))
        sender.store(make_object(2, PatientName="Phantom^Petra"), sop_instance_uid="2.25.888")
        sender.store(encode(make_object())[:150])
    written = caplog.text + "".join(capsys.readouterr())
    assert written
    for row in events(records, "instance_refused") + events(records, "instance_corrected"):
        written += str(row.detail)
    for secret in ("Petra", "P-081", "19700101"):
        assert secret not in written


# --- Restarts


def test_a_restart_clears_what_was_never_acknowledged(start: Start, records: Records, spool: Spool) -> None:
    receiver = start()
    with associated(receiver.port) as sender:
        assert sender.store(make_object()) == 0x0000
    receiver.stop()
    (kept,) = stored_files(spool)
    (spool.incoming_dir / "half.dcm").write_bytes(b"x")
    unrecorded = spool.instance_path("ab" + "0" * 30)  # named, and then the power went
    spool.make_folder(unrecorded.parent)
    unrecorded.write_bytes(b"x")
    start()
    assert stored_files(spool) == [kept]


def test_the_port_is_free_at_once_after_a_stop(start: Start, records: Records) -> None:
    receiver = start()
    with associated(receiver.port) as sender:
        assert sender.store(make_object(1)) == 0x0000
        port = receiver.port
        receiver.stop()
        start(dicom={"port": port})
        with associated(port) as other:
            assert other.store(make_object(2)) == 0x0000
    assert len(instances(records)) == 2
