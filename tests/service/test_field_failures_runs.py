"""What went wrong elsewhere between a series and its result: errors swallowed, models that never left."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import scripted_child
from bundle_factory import make_threshold_bundle
from command_line import Segnode, command_line
from dicom_peer import associated, data_set_of
from phantom import write_classic_series
from pydicom import dcmread
from small_node import AFFINE, SmallNode, image_array, make_node
from sqlalchemy import select
from storage_scp import StorageScp
from waiting import wait_until

from models.errors import ReasonCode, Refusal
from service import inference
from service.completeness import Completeness
from service.dicom.receive import Receiver
from service.dicom.series import read_series
from service.records.database import utc_now
from service.records.jobs import retry_job
from service.records.tables import Delivery, DeliveryState, Event, Instance, Job, JobState, Result
from service.retention import Retention

NEVER = threading.Event()


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SmallNode]]:
    """A node with a model, whose inference process does with each job what it is told."""
    made: list[SmallNode] = []

    def node_that(*acts: str) -> SmallNode:
        folder = tmp_path / "script"
        folder.mkdir()
        (folder / "script.json").write_text(json.dumps(acts))
        monkeypatch.setattr(inference, "COMMAND", (sys.executable, scripted_child.__file__, str(folder)))
        node = make_node(tmp_path / "node")
        node.add_model(tmp_path / "bundle")
        made.append(node)
        return node

    yield node_that
    for node in made:
        node.records.close()


def complete(node: SmallNode) -> None:
    Completeness(node.settings, node.records, node.spool).sweep(utc_now())


def instance_files(node: SmallNode) -> dict[Path, bytes]:
    with node.records.read() as session:
        paths = [node.spool.absolute(path) for path in session.scalars(select(Instance.path))]
    return {path: path.read_bytes() for path in paths}


def of_job(node: SmallNode, kind: type[Result] | type[Delivery], job: Job) -> int:
    with node.records.read() as session:
        return len(session.scalars(select(kind).where(kind.job_id == job.job_id)).all())


# --- Errors


def test_a_failure_is_seen_and_costs_no_instance(scripted: Callable[..., SmallNode], tmp_path: Path) -> None:
    node = scripted("fail never", "succeed")
    node.receive_phantom(tmp_path / "s")
    before = instance_files(node)
    assert len(before) == 8
    complete(node)
    worker = node.worker()
    assert worker.run_one(NEVER)
    (job,) = node.jobs()
    assert (job.state, job.reason_code, job.reason) == (JobState.FAILED, "BROKEN", "It broke.")
    with node.records.read() as session:
        assert [e.subject for e in session.scalars(select(Event).where(Event.alert))] == [job.job_id]
    assert (of_job(node, Result, job), of_job(node, Delivery, job)) == (0, 0)
    rules = node.settings.retention.model_copy(update={"maximum_age_days": 1})
    settings = node.settings.model_copy(update={"retention": rules})
    Retention(settings, node.records, node.spool).sweep(utc_now() + timedelta(days=99))
    assert instance_files(node) == before
    with node.records.write() as session:
        retry_job(session, job.job_id)
    assert worker.run_one(NEVER)
    worker.runner.close()
    (job,) = node.jobs()
    assert (job.state, job.reason_code) == (JobState.SUCCEEDED, None)
    assert of_job(node, Result, job) == 2


def test_the_result_before_a_failure_is_not_taken_for_its_own(
    scripted: Callable[..., SmallNode], tmp_path: Path
) -> None:
    """A late slice makes a new job, which fails: what there is stays the result of the first slices alone."""
    node = scripted("succeed", "fail never")
    paths = write_classic_series(tmp_path / "s", image_array(), AFFINE)
    node.receive(paths[:7], ago_s=100)
    complete(node)
    worker = node.worker()
    assert worker.run_one(NEVER)
    node.receive(paths[7:], ago_s=50)
    complete(node)
    assert worker.run_one(NEVER)
    worker.runner.close()
    old, new = node.jobs()
    assert (old.state, new.state) == (JobState.SUCCEEDED, JobState.FAILED)
    assert new.supersedes_job_id == old.job_id
    assert (of_job(node, Result, new), of_job(node, Delivery, new), new.summary) == (0, 0, {})
    assert of_job(node, Result, old) == 2
    assert not (node.spool.results_dir / new.job_id).exists() or not any(
        path.is_file() for path in (node.spool.results_dir / new.job_id).rglob("*")
    )
    with node.records.read() as session:
        counts = [len(session.get_one(Job, job.job_id).inputs) for job in (old, new)]
    assert counts == [7, 8]


def test_a_command_that_fails_says_nothing_of_the_file_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle")
    whole = write_classic_series(tmp_path / "whole", image_array(), AFFINE)
    gap = write_classic_series(tmp_path / "gap", image_array(seed=1), AFFINE)
    gap[3].unlink()

    def segment(run: Segnode, source: Path) -> tuple[int, str, str]:
        result = run("segment", source, "--bundle", bundle.folder, "-o", "out.nii.gz")
        return result.status, result.out, result.err

    with command_line(tmp_path, monkeypatch, capfd) as run:
        status, volumes, _ = segment(run, whole[0].parent)
        assert (status, "low" in volumes) == (0, True)
        first = Path("out.nii.gz").read_bytes()
        status, volumes, said = segment(run, gap[0].parent)
        assert (status, volumes) == (3, "")
        assert said.startswith("MISSING_SLICE: ")
        assert "out.nii.gz" not in said
        assert Path("out.nii.gz").read_bytes() == first  # the earlier case's, whole, and told of by nobody
        assert [path.name for path in Path().glob("*out*")] == ["out.nii.gz"]


# --- Models


def test_the_process_of_a_model_that_is_replaced_ends_and_takes_its_memory_with_it(
    scripted: Callable[..., SmallNode], tmp_path: Path
) -> None:
    node = scripted("succeed", "succeed")
    for number in range(2):
        node.receive_phantom(tmp_path / str(number), series_instance_uid=f"2.25.{number}", ago_s=90 - number)
    complete(node)
    worker = node.worker()
    assert worker.run_one(NEVER)
    node.add_model(tmp_path / "newer", version="1.1.0")
    assert worker.run_one(NEVER)
    given = [json.loads((tmp_path / "script" / f"{i}.given").read_text()) for i in range(2)]
    assert given[0]["digest"] != given[1]["digest"]
    with pytest.raises(ProcessLookupError):
        os.kill(given[0]["pid"], 0)
    os.kill(given[1]["pid"], 0)
    worker.runner.close()
    with pytest.raises(ProcessLookupError):
        os.kill(given[1]["pid"], 0)


# --- Character sets

UNDECODABLE = [
    (b"NO SUCH SET ", b"M\xfcller^J\xfcrgen "),
    (b"ISO_IR 192", b"M\xfcller^J\xfcrgen "),
    (b"\\ISO 2022 IR 87", b"Yamada=\x1b$B;3\x1b(Z\xff"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of what cannot be decoded
def test_what_cannot_be_decoded_is_segmented_once_and_filed(tmp_path: Path) -> None:
    """Received, completed, routed by a text that cannot be decoded either, written, sent: no step repeats."""
    with StorageScp() as pacs:
        route = {
            "name": "mr",
            "model": "threshold",
            "match": {"Modality": "MR", "SeriesDescription": {"regex": "^T1"}},
            "quiet_time_s": 3.0,
            "destinations": ["PACS"],
        }
        node = make_node(
            tmp_path / "node",
            dicom={"port": 0, "allow_unknown_peers": True},
            destinations=[{"name": "PACS", "ae_title": "PACS", "host": "127.0.0.1", "port": pacs.port}],
            routes=[route],
        )
        node.add_model(tmp_path / "bundle")
        receiver = Receiver(node.settings, node.records, node.spool)
        receiver.start()
        try:
            with node.working():
                for number, (character_set, name) in enumerate(UNDECODABLE):
                    send(receiver.port, tmp_path / str(number), number, character_set, name)
                node.wait_for_jobs(*[JobState.SUCCEEDED] * 3)
                wait_until(lambda: delivered(node) == 6, 30)
        finally:
            receiver.stop()
        assert [(job.attempt, job.failures, job.lapses) for job in node.jobs()] == [(1, 0, 0)] * 3
        assert sorted({each.sop_class_uid for each in pacs.objects}) == [
            "1.2.840.10008.5.1.4.1.1.66.4",
            "1.2.840.10008.5.1.4.1.1.88.22",
        ]
        with node.records.read() as session:
            written = [
                dcmread(node.spool.absolute(p))
                for p in session.scalars(select(Result.path))
                if p.endswith(".dcm")
            ]
        assert sorted(d.PatientID for d in written) == sorted(f"P{n}" for n in range(3) for _ in range(2))
        assert all(str(d.PatientName)[0] in "MY" for d in written)
    node.records.close()


@pytest.mark.parametrize("keyword", ["PatientID", "IssuerOfPatientID"])
def test_bytes_that_cannot_be_decoded_identify_nobody(tmp_path: Path, keyword: str) -> None:
    """A name may come out with replacement characters; whose images these are may not."""
    paths = write_classic_series(
        tmp_path, image_array(), AFFINE, SpecificCharacterSet="ISO_IR 192", **{keyword: "N" * 6}
    )
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"NNNNNN", b"M\xfcller"))
    with pytest.raises(Refusal) as caught:
        read_series(paths)
    assert caught.value.reason is ReasonCode.IDENTITY_MISSING


def send(port: int, folder: Path, number: int, character_set: bytes, name: bytes) -> None:
    """A series of which every text is of a character set that cannot decode it."""
    character_set += b" " * (len(character_set) % 2)
    name += b" " * (len(name) % 2)
    description = b"T1 Sch\xe4del\xff\xfe "
    paths = write_classic_series(
        folder,
        image_array(seed=number),
        AFFINE,
        patient_id=f"P{number}",
        study_instance_uid=f"2.25.90{number}",
        series_instance_uid=f"2.25.91{number}",
        SpecificCharacterSet=None,
        PatientName="N" * len(name),
        SeriesDescription="D" * len(description),
    )
    with associated(port) as sender:
        for path in paths:
            data = data_set_of(path.read_bytes())
            data = data.replace(b"N" * len(name), name).replace(b"D" * len(description), description)
            declared = b"\x08\x00\x05\x00CS" + len(character_set).to_bytes(2, "little") + character_set
            uid = dcmread(path, stop_before_pixels=True).SOPInstanceUID
            assert sender.store(declared + data, sop_instance_uid=uid) == 0x0000


def delivered(node: SmallNode) -> int:
    with node.records.read() as session:
        return len(session.scalars(select(Delivery).where(Delivery.state == DeliveryState.SENT)).all())
