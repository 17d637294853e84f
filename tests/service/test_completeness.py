"""When a series is complete, and what is enqueued then."""

from __future__ import annotations

import contextlib
import tracemalloc
import zlib
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from phantom import write_classic_series, write_enhanced_series
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, JPEG2000Lossless
from small_node import AFFINE, SmallNode, image_array, make_node
from sqlalchemy import select

from models.errors import ReasonCode, Refusal
from service.completeness import Completeness
from service.errors import ConflictError
from service.headers import read_attributes
from service.records.database import utc_now
from service.records.jobs import claim_job, retry_job, succeed_job
from service.records.supersession import (
    cancel_superseded_deliveries,
    supersede,
    superseded_objects,
)
from service.records.tables import (
    Delivery,
    DeliveryState,
    Event,
    Job,
    JobState,
    ResultKind,
    Series,
    SeriesState,
)
from service.records.work import NewResult, Outcome

MR = {"name": "mr", "model": "threshold", "match": {"Modality": "MR"}, "quiet_time_s": 10.0}


def seconds(n: float) -> timedelta:
    return timedelta(seconds=n)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[SmallNode]]:
    made: list[SmallNode] = []
    yield made
    for node in made:
        node.records.close()


@pytest.fixture
def new_node(nodes: list[SmallNode], tmp_path: Path):
    def new(*routes: dict) -> tuple[SmallNode, Completeness]:
        destinations = [
            {"name": name, "ae_title": name, "host": "127.0.0.1", "port": 9} for name in ("PACS", "VNA")
        ]
        node = make_node(tmp_path / "node", routes=list(routes or (MR,)), destinations=destinations)
        nodes.append(node)
        return node, Completeness(node.settings, node.records, node.spool)

    return new


def series_states(node: SmallNode) -> list[SeriesState]:
    with node.records.read() as session:
        return list(session.scalars(select(Series.state).order_by(Series.first_instance_at)))


def events(node: SmallNode, kind: str | None = None) -> list[Event]:
    with node.records.read() as session:
        query = select(Event).order_by(Event.event_id)
        return list(session.scalars(query.where(Event.kind == kind) if kind else query))


def finish(node: SmallNode, *, uid: str = "2.25.9") -> Job:
    """Let the next job in the queue succeed."""
    with node.records.write() as session:
        job = claim_job(session, owner="w", lease_s=60, now=utc_now())
        assert job is not None
        result = NewResult(ResultKind.SEGMENTATION, f"results/{job.job_id}/1/s.dcm", 1, "0" * 64, "1.2", uid)
        succeed_job(session, job.job_id, job.attempt, Outcome([result], "r", "float32"), now=utc_now())
        cancel_superseded_deliveries(session, job.job_id, now=utc_now())
        return job


def test_a_series_is_complete_when_it_has_been_quiet_and_not_before(new_node, tmp_path: Path) -> None:
    node, completeness = new_node()
    node.receive_phantom(tmp_path / "s", ago_s=0)
    received = utc_now()
    assert completeness.sweep(received + seconds(9)) == 0
    assert series_states(node) == [SeriesState.RECEIVING]
    assert completeness.sweep(received + seconds(11)) == 1
    assert series_states(node) == [SeriesState.COMPLETE]
    (job,) = node.jobs()
    assert (job.state, job.model_name, job.route_name) == (JobState.QUEUED, "threshold", "mr")
    with node.records.read() as session:
        inputs = session.get_one(Job, job.job_id).inputs
        assert len(inputs) == 8
        assert all(each.instance_id in each.path for each in inputs)
    assert completeness.sweep(received + seconds(60)) == 0  # once is enough


def test_a_slow_series_keeps_itself_open(new_node, tmp_path: Path) -> None:
    node, completeness = new_node()
    paths = write_classic_series(tmp_path / "s", image_array(), AFFINE)
    node.receive(paths[:4], ago_s=30)
    node.receive(paths[4:], ago_s=5)
    assert completeness.sweep(utc_now()) == 0
    assert completeness.sweep(utc_now() + seconds(6)) == 1
    (job,) = node.jobs()
    with node.records.read() as session:
        assert len(session.get_one(Job, job.job_id).inputs) == 8


def test_a_series_that_no_route_takes_is_closed_with_an_event(new_node, tmp_path: Path) -> None:
    node, completeness = new_node()
    node.receive_phantom(tmp_path / "s", modality="CT")
    assert completeness.sweep(utc_now()) == 0
    assert series_states(node) == [SeriesState.COMPLETE]
    assert node.jobs() == []
    assert len(events(node, "series.not_routed")) == 1


def test_two_routes_with_different_quiet_times_each_get_their_turn(new_node, tmp_path: Path) -> None:
    slow = {**MR, "name": "slow", "model": "careful", "quiet_time_s": 40.0}
    node, completeness = new_node(MR, slow)
    node.receive_phantom(tmp_path / "s", ago_s=0)
    received = utc_now()
    assert completeness.sweep(received + seconds(11)) == 1
    assert series_states(node) == [SeriesState.RECEIVING]
    assert completeness.sweep(received + seconds(20)) == 0
    assert completeness.sweep(received + seconds(41)) == 1
    assert series_states(node) == [SeriesState.COMPLETE]
    assert [job.model_name for job in node.jobs()] == ["threshold", "careful"]


def test_a_restart_between_two_turns_loses_and_doubles_nothing(new_node, tmp_path: Path) -> None:
    slow = {**MR, "name": "slow", "model": "careful", "quiet_time_s": 40.0}
    node, completeness = new_node(MR, slow)
    node.receive_phantom(tmp_path / "s", ago_s=0)
    received = utc_now()
    assert completeness.sweep(received + seconds(11)) == 1
    again = Completeness(node.settings, node.records, node.spool)
    assert again.sweep(received + seconds(12)) == 0
    assert again.sweep(received + seconds(41)) == 1
    assert [job.model_name for job in node.jobs()] == ["threshold", "careful"]


def test_two_routes_to_one_model_give_one_job_with_the_destinations_of_both(new_node, tmp_path: Path) -> None:
    first = {**MR, "destinations": ["PACS"]}
    second = {
        **MR,
        "name": "second",
        "quiet_time_s": 40.0,
        "destinations": ["PACS", "VNA"],
        "version": "2.0.0",
    }
    node, completeness = new_node(first, second)
    node.receive_phantom(tmp_path / "s", ago_s=0)
    received = utc_now()
    completeness.sweep(received + seconds(11))
    finish(node)
    completeness.sweep(received + seconds(41))
    (job,) = node.jobs()
    assert job.destinations == ["PACS", "VNA"]
    with node.records.read() as session:
        assert sorted(session.scalars(select(Delivery.destination))) == ["PACS", "VNA"]
    (ignored,) = events(node, "route.version_ignored")
    assert ignored.alert


def test_a_series_whose_instances_bear_the_uids_of_another_is_not_passed_over_in_silence(
    new_node, tmp_path: Path
) -> None:
    node, completeness = new_node()
    for name, series_instance_uid in (("a", "2.25.71"), ("b", "2.25.72")):
        paths = write_classic_series(tmp_path / name, image_array(), AFFINE)
        for path in paths:
            image = dcmread(path)
            image.SeriesInstanceUID = series_instance_uid
            image.save_as(path)
        node.receive(paths, ago_s=100)
        completeness.sweep(utc_now())
    (job,) = node.jobs()
    (told,) = events(node, "series.same_instances")
    assert told.alert
    assert told.detail["job_id"] == job.job_id
    with node.records.read() as session:
        names = dict(session.execute(select(Series.series_id, Series.series_instance_uid)).all())
    assert names[told.subject] == "2.25.72"


def test_a_late_slice_cancels_what_has_not_ended_and_makes_a_new_job(new_node, tmp_path: Path) -> None:
    node, completeness = new_node()
    paths = write_classic_series(tmp_path / "s", image_array(), AFFINE)
    node.receive(paths[:7], ago_s=100)
    completeness.sweep(utc_now())
    node.receive(paths[7:], ago_s=50)
    completeness.sweep(utc_now())
    old, new = node.jobs()
    assert (old.state, new.state) == (JobState.CANCELLED, JobState.QUEUED)
    assert new.supersedes_job_id == old.job_id


def test_a_late_slice_after_a_result_supersedes_it_and_recalls_what_has_not_left(
    new_node, tmp_path: Path
) -> None:
    node, completeness = new_node({**MR, "destinations": ["PACS", "VNA"]})
    paths = write_classic_series(tmp_path / "s", image_array(), AFFINE)
    node.receive(paths[:7], ago_s=100)
    completeness.sweep(utc_now())
    old = finish(node, uid="2.25.1")
    with node.records.write() as session:  # one has left, the other waits
        session.scalars(
            select(Delivery).where(Delivery.destination == "PACS")
        ).one().state = DeliveryState.SENT
    node.receive(paths[7:], ago_s=50)
    completeness.sweep(utc_now())
    _, new = node.jobs()
    assert new.supersedes_job_id == old.job_id
    with node.records.read() as session:
        assert superseded_objects(session, new.job_id) == ["2.25.1"]
        of_old = select(Delivery).where(Delivery.job_id == old.job_id).order_by(Delivery.destination)
        states = [delivery.state for delivery in session.scalars(of_old)]
    assert states == [DeliveryState.SENT, DeliveryState.PENDING]  # still the only result there is
    finish(node, uid="2.25.2")
    with node.records.read() as session:
        states = [delivery.state for delivery in session.scalars(of_old)]
    assert states == [DeliveryState.SENT, DeliveryState.CANCELLED]


def test_a_job_that_is_superseded_cannot_be_retried(new_node, tmp_path: Path) -> None:
    node, completeness = new_node({**MR, "maximum_study_age_days": 30})
    paths = write_classic_series(tmp_path / "s", image_array(), AFFINE, StudyDate="20010101")
    node.receive(paths[:7], ago_s=100)
    completeness.sweep(utc_now())
    node.receive(paths[7:], ago_s=50)
    completeness.sweep(utc_now())
    old, new = node.jobs()
    with pytest.raises(ConflictError, match="superseded"), node.records.write() as session:
        retry_job(session, old.job_id)
    with node.records.write() as session:
        assert retry_job(session, new.job_id).state is JobState.QUEUED


def test_a_delivery_that_is_being_sent_is_not_recalled(new_node, tmp_path: Path) -> None:
    node, completeness = new_node({**MR, "destinations": ["PACS"]})
    paths = write_classic_series(tmp_path / "s", image_array(), AFFINE)
    node.receive(paths[:7], ago_s=100)
    completeness.sweep(utc_now())
    old = finish(node, uid="2.25.1")
    with node.records.write() as session:
        delivery = session.scalars(select(Delivery)).one()
        delivery.lease_owner, delivery.lease_expires_at = "sender", utc_now() + seconds(60)
    node.receive(paths[7:], ago_s=50)
    completeness.sweep(utc_now())
    finish(node, uid="2.25.2")
    with node.records.read() as session:
        of_old = session.scalars(select(Delivery).where(Delivery.job_id == old.job_id)).one()
        assert of_old.state is DeliveryState.PENDING


def test_a_repeated_series_is_not_computed_twice(new_node, tmp_path: Path) -> None:
    node, completeness = new_node()
    paths = node.receive_phantom(tmp_path / "s")
    completeness.sweep(utc_now())
    node.receive(paths, ago_s=40)
    completeness.sweep(utc_now())
    assert len(node.jobs()) == 1


def test_a_corrected_series_is_computed_again_and_the_old_job_is_cancelled(new_node, tmp_path: Path) -> None:
    node, completeness = new_node()
    node.receive_phantom(tmp_path / "s", patient_id="WRONG")
    completeness.sweep(utc_now())
    node.receive_phantom(tmp_path / "t", patient_id="RIGHT", ago_s=40)
    completeness.sweep(utc_now())
    old, new = node.jobs()
    assert (old.state, new.state) == (JobState.CANCELLED, JobState.QUEUED)
    with node.records.read() as session:
        paths = {each.path for each in session.get_one(Job, new.job_id).inputs}
    assert len(paths) == 8
    assert all(
        read_attributes(node.spool.absolute(p), ["PatientID"])["PatientID"] == ("RIGHT",) for p in paths
    )


def test_a_correction_into_another_study_supersedes_what_was_made_of_the_images(
    new_node, tmp_path: Path
) -> None:
    node, completeness = new_node({**MR, "destinations": ["PACS"]})
    node.receive_phantom(tmp_path / "s", study_instance_uid="2.25.5", patient_id="WRONG")
    completeness.sweep(utc_now())
    old = finish(node)
    with node.records.write() as session:
        session.scalars(select(Delivery)).one().state = DeliveryState.SENT
    node.receive_phantom(tmp_path / "t", study_instance_uid="2.25.6", patient_id="RIGHT", ago_s=40)
    node.receive_phantom(
        tmp_path / "u", study_instance_uid="2.25.7", series_instance_uid="2.25.8", ago_s=40
    )  # another study, corrected by nobody
    completeness.sweep(utc_now())
    newer = {job.study_instance_uid: job for job in node.jobs() if job.job_id != old.job_id}
    assert newer["2.25.6"].supersedes_job_id == old.job_id
    assert newer["2.25.7"].supersedes_job_id is None
    with node.records.write() as session:
        assert superseded_objects(session, newer["2.25.6"].job_id) == ["2.25.9"]
        supersede(session, newer["2.25.6"].job_id, now=utc_now())
        assert session.get_one(Job, old.job_id).summary["superseded_by_job_id"] == newer["2.25.6"].job_id
    (alert,) = events(node, "result.superseded")
    assert [each["sop_instance_uid"] for each in alert.detail["delivered"]] == ["2.25.9"]


class TestOneSeriesOfAStudy:
    @staticmethod
    def receive(node: SmallNode, folder: Path, uid: str, slices: int, ago_s: float) -> None:
        array = image_array((slices, 12, 14))
        node.receive_phantom(folder / uid, array, series_instance_uid=uid, ago_s=ago_s)

    def test_the_best_is_taken_once_the_whole_study_is_quiet(self, new_node, tmp_path: Path) -> None:
        node, completeness = new_node({**MR, "several": "best"})
        self.receive(node, tmp_path, "2.25.1", 8, ago_s=30)
        self.receive(node, tmp_path, "2.25.2", 9, ago_s=5)
        assert completeness.sweep(utc_now()) == 0
        assert completeness.sweep(utc_now() + seconds(6)) == 1
        (job,) = node.jobs()
        with node.records.read() as session:
            assert len(session.get_one(Job, job.job_id).inputs) == 9
        assert series_states(node) == [SeriesState.COMPLETE] * 2

    def test_a_better_one_that_comes_later_supersedes(self, new_node, tmp_path: Path) -> None:
        node, completeness = new_node({**MR, "several": "best"})
        self.receive(node, tmp_path, "2.25.1", 8, ago_s=60)
        completeness.sweep(utc_now())
        old = finish(node)
        self.receive(node, tmp_path, "2.25.2", 9, ago_s=30)
        self.receive(node, tmp_path, "2.25.3", 7, ago_s=30)
        completeness.sweep(utc_now())
        _, new = node.jobs()
        assert new.supersedes_job_id == old.job_id

    def test_several_are_refused_in_one_visible_job(self, new_node, tmp_path: Path) -> None:
        node, completeness = new_node({**MR, "several": "refuse"})
        self.receive(node, tmp_path, "2.25.1", 8, ago_s=30)
        self.receive(node, tmp_path, "2.25.2", 9, ago_s=30)
        completeness.sweep(utc_now())
        (job,) = node.jobs()
        assert (job.state, job.reason_code) == (JobState.REFUSED, "AMBIGUOUS_SERIES")
        assert "2 series" in (job.reason or "")
        assert job.remedy
        with node.records.read() as session:
            assert len(session.get_one(Job, job.job_id).inputs) == 17
        assert len(events(node, "job.refused")) == 1


def test_an_old_study_is_refused_in_a_visible_job(new_node, tmp_path: Path) -> None:
    node, completeness = new_node({**MR, "maximum_study_age_days": 30})
    node.receive_phantom(tmp_path / "s", StudyDate="20010101")
    completeness.sweep(utc_now())
    (job,) = node.jobs()
    assert (job.state, job.reason_code) == (JobState.REFUSED, "STUDY_TOO_OLD")
    assert series_states(node) == [SeriesState.COMPLETE]


def test_a_full_queue_lets_series_wait_alerts_once_and_loses_nothing(new_node, tmp_path: Path) -> None:
    node, completeness = new_node({**MR, "queue_limit": 2})
    for i in range(5):
        node.receive_phantom(tmp_path / str(i), series_instance_uid=f"2.25.{i}", ago_s=100 - i)
    assert completeness.sweep(utc_now()) == 2
    assert completeness.sweep(utc_now()) == 0
    assert completeness.sweep(utc_now()) == 0
    (alert,) = events(node, "route.queue_full")
    assert alert.alert
    assert series_states(node) == [SeriesState.COMPLETE] * 2 + [SeriesState.RECEIVING] * 3
    finish(node)
    assert completeness.sweep(utc_now()) == 1
    finish(node, uid="2.25.91")
    finish(node, uid="2.25.92")
    assert completeness.sweep(utc_now()) == 2
    assert series_states(node) == [SeriesState.COMPLETE] * 5
    assert len(node.jobs()) == 5


def test_a_header_that_cannot_be_read_alerts_and_does_not_hold_up_others(new_node, tmp_path: Path) -> None:
    node, completeness = new_node()
    node.receive_phantom(tmp_path / "bad", series_instance_uid="2.25.1", ago_s=90)
    with node.records.read() as session:
        for series in session.scalars(select(Series)):
            for instance in series.instances:
                node.spool.absolute(instance.path).write_bytes(b"nothing like DICOM" * 20)
    node.receive_phantom(tmp_path / "good", series_instance_uid="2.25.2")
    assert completeness.sweep(utc_now()) == 1
    (alert,) = events(node, "series.unreadable")
    assert alert.alert
    assert series_states(node) == [SeriesState.COMPLETE] * 2


def test_a_series_that_was_corrected_into_another_study_is_closed_empty(new_node, tmp_path: Path) -> None:
    node, completeness = new_node()
    node.receive_phantom(tmp_path / "s", study_instance_uid="2.25.5")
    node.receive_phantom(tmp_path / "t", study_instance_uid="2.25.6")
    assert completeness.sweep(utc_now()) == 1
    assert len(events(node, "series.empty")) == 1


def test_an_instance_that_arrives_under_the_sweep_keeps_the_series_open(new_node, tmp_path: Path) -> None:
    node, completeness = new_node()
    paths = write_classic_series(tmp_path / "s", image_array(), AFFINE)
    node.receive(paths[:7])
    take_a_turn = completeness._apply

    def apply_late(session, route, facts, now: datetime) -> int:
        assert take_a_turn(session, route, facts, now) == 1
        session.rollback()
        node.receive(paths[7:], ago_s=20)
        raise OSError(5, "the turn is lost")

    completeness._apply = apply_late  # type: ignore[method-assign]
    assert completeness.sweep(utc_now()) == 0
    assert series_states(node) == [SeriesState.RECEIVING]
    completeness._apply = take_a_turn  # type: ignore[method-assign]
    assert completeness.sweep(utc_now()) == 1
    (job,) = node.jobs()
    with node.records.read() as session:
        assert len(session.get_one(Job, job.job_id).inputs) == 8


def test_what_enhanced_objects_say_in_their_functional_groups_is_read(tmp_path: Path) -> None:
    def edit(dataset: Dataset) -> None:
        agent, echo = Dataset(), Dataset()
        agent.CodeValue, agent.CodingSchemeDesignator, agent.CodeMeaning = "1", "99X", "Gadolinium"
        dataset.ContrastBolusAgentSequence = [agent]
        echo.EffectiveEchoTime = 95.0
        dataset.SharedFunctionalGroupsSequence[0].MREchoSequence = [echo]
        for number, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
            diffusion = Dataset()
            diffusion.DiffusionBValue = 1000.0 * (number % 2)
            frame.MRDiffusionSequence = [diffusion]

    (path,) = write_enhanced_series(tmp_path, image_array(), AFFINE, edit=edit)
    wanted = ["ContrastBolusAgent", "EchoTime", "DiffusionBValue", "Modality", "ScanningSequence"]
    assert read_attributes(path, wanted) == {
        "ContrastBolusAgent": ("Gadolinium",),
        "EchoTime": ("95.0",),
        "DiffusionBValue": ("0.0", "1000.0"),
        "Modality": ("MR",),
        "ScanningSequence": (),
    }


@pytest.mark.parametrize(
    "transfer_syntax", [DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, JPEG2000Lossless]
)
def test_attributes_are_read_in_every_kind_of_transfer_syntax(transfer_syntax: str, tmp_path: Path) -> None:
    (path, *_) = write_classic_series(
        tmp_path,
        image_array().astype("uint16"),
        AFFINE,
        transfer_syntax=transfer_syntax,
        ImageType=["ORIGINAL", "PRIMARY"],
        SeriesNumber=7,
    )
    keywords = ("Modality", "ImageType", "Rows", "EchoTime", "SeriesNumber", "ContrastBolusAgent")
    assert read_attributes(path, keywords) == {
        "Modality": ("MR",),
        "ImageType": ("ORIGINAL", "PRIMARY"),
        "Rows": ("12",),
        "EchoTime": ("3",),
        "SeriesNumber": ("7",),
        "ContrastBolusAgent": (),
    }


@pytest.mark.parametrize("content", [b"", b"x" * 300])
def test_a_header_of_rubbish_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(Refusal, match="header") as caught:
        read_attributes(path, ["Modality"])
    assert caught.value.reason is ReasonCode.UNREADABLE


def test_a_file_that_is_gone_is_a_refusal_and_not_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no longer on the spool"):
        read_attributes(tmp_path / "gone", ["Modality"])


def test_a_deflated_bomb_is_not_inflated(tmp_path: Path) -> None:
    (path, *_) = write_classic_series(
        tmp_path, image_array(), AFFINE, transfer_syntax=DeflatedExplicitVRLittleEndian
    )
    whole = path.read_bytes()
    start = 144 + int.from_bytes(whole[140:144], "little")
    deflater = zlib.compressobj(9, wbits=-15)
    element = b"\x09\x00\x01\x00OB\0\0" + (2**31).to_bytes(4, "little")
    bomb = deflater.compress(element) + b"".join(deflater.compress(bytes(2**20)) for _ in range(256))
    path.write_bytes(whole[:start] + bomb + deflater.flush())
    tracemalloc.start()
    with contextlib.suppress(Refusal):
        read_attributes(path, ["Modality"])
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 200 * 2**20


CHANNELS = {"T1": {"SeriesDescription": "T1"}, "FLAIR": {"SeriesDescription": "FLAIR"}}
BRAIN = {**MR, "name": "brain", "channels": CHANNELS, "reference": "FLAIR", "settled_after_s": 4.0}


class TestStudiesOfSeveralChannels:
    @staticmethod
    def receive(node: SmallNode, folder: Path, description: str, uid: str, *, ago_s: float) -> None:
        node.receive_phantom(
            folder / uid, ago_s=ago_s, series_instance_uid=uid, SeriesDescription=description
        )

    def test_one_job_is_made_when_all_channels_are_there(self, new_node, tmp_path: Path) -> None:
        node, completeness = new_node(BRAIN)
        self.receive(node, tmp_path, "T1", "2.25.11", ago_s=9)
        self.receive(node, tmp_path, "localizer", "2.25.13", ago_s=0)  # it keeps coming, and nobody waits
        assert completeness.sweep(utc_now()) == 0
        self.receive(node, tmp_path, "FLAIR", "2.25.12", ago_s=3)
        assert completeness.sweep(utc_now()) == 0  # it may still be arriving
        assert completeness.sweep(utc_now() + seconds(2)) == 1
        (job,) = node.jobs()
        with node.records.read() as session:
            session.add(job)
            roles = {(each.channel, each.channel_name) for each in job.inputs}
            reference = session.get_one(Series, job.series_id)
            assert len(job.inputs) == 16
        assert roles == {(0, "T1"), (1, "FLAIR")}
        assert reference.series_instance_uid == "2.25.12"
        assert completeness.sweep(utc_now() + seconds(60)) == 0
        assert len(node.jobs()) == 1

    def test_a_channel_that_does_not_come_is_refused_by_name_and_made_good_when_it_does(
        self, new_node, tmp_path: Path
    ) -> None:
        node, completeness = new_node(BRAIN)
        self.receive(node, tmp_path, "T1", "2.25.11", ago_s=20)
        assert completeness.sweep(utc_now()) == 1
        (refused,) = node.jobs()
        assert (refused.state, refused.reason_code) == (JobState.REFUSED, "MISSING_CHANNEL")
        assert "the channel FLAIR" in refused.reason
        self.receive(node, tmp_path, "FLAIR", "2.25.12", ago_s=15)
        assert completeness.sweep(utc_now()) == 1
        newer = node.jobs()[-1]
        assert (newer.state, newer.supersedes_job_id) == (JobState.QUEUED, refused.job_id)

    def test_a_second_series_for_a_channel_is_refused_by_name(self, new_node, tmp_path: Path) -> None:
        node, completeness = new_node(BRAIN)
        for uid, description in (("2.25.11", "T1"), ("2.25.12", "FLAIR"), ("2.25.14", "FLAIR")):
            self.receive(node, tmp_path, description, uid, ago_s=20)
        assert completeness.sweep(utc_now()) == 1
        (job,) = node.jobs()
        assert (job.state, job.reason_code) == (JobState.REFUSED, "AMBIGUOUS_CHANNEL")
        assert "2 match FLAIR" in job.reason

    def test_a_late_slice_of_any_channel_supersedes_the_result(self, new_node, tmp_path: Path) -> None:
        node, completeness = new_node(BRAIN)
        for uid, description in (("2.25.11", "T1"), ("2.25.12", "FLAIR")):
            self.receive(node, tmp_path, description, uid, ago_s=50)
        completeness.sweep(utc_now())
        first = finish(node)
        late = write_classic_series(
            tmp_path / "late", image_array((9, 12, 14)), AFFINE,
            series_instance_uid="2.25.11", SeriesDescription="T1",
        )  # fmt: skip
        node.receive(late, ago_s=20)
        assert completeness.sweep(utc_now()) == 1
        assert node.jobs()[-1].supersedes_job_id == first.job_id

    def test_series_in_other_roles_are_another_job(self, new_node, tmp_path: Path) -> None:
        node, completeness = new_node(BRAIN)
        for uid, description in (("2.25.11", "T1"), ("2.25.12", "FLAIR")):
            self.receive(node, tmp_path, description, uid, ago_s=50)
        completeness.sweep(utc_now())
        swapped = {"T1": CHANNELS["FLAIR"], "FLAIR": CHANNELS["T1"]}
        settings = make_node(tmp_path / "other", routes=[{**BRAIN, "channels": swapped}]).settings
        with node.records.write() as session:
            for series in session.scalars(select(Series)):
                series.state = SeriesState.RECEIVING
        assert Completeness(settings, node.records, node.spool).sweep(utc_now()) == 1
        assert len({job.input_key for job in node.jobs()}) == 2
