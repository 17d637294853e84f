"""What may happen to instances, jobs and deliveries, and what may not."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from models.errors import SegnodeError
from service.errors import ConflictError, LostClaimError, NotFoundError
from service.records.database import Records
from service.records.deliveries import claim_delivery, mark_sent, park, retry_delivery, retry_later
from service.records.instances import (
    Arrival,
    ReceivedInstance,
    complete_series,
    current_instances,
    quiet_series,
    record_instance,
    study_is_quiet,
)
from service.records.jobs import (
    bind_model,
    claim_job,
    enqueue,
    fail_attempt,
    queue_length,
    refuse_job,
    release_job,
    renew_lease,
    retry_job,
    succeed_job,
)
from service.records.leases import reap_lapsed_jobs
from service.records.tables import (
    Delivery,
    DeliveryState,
    Instance,
    InstanceKind,
    Job,
    JobOrigin,
    JobState,
    Result,
    ResultKind,
    Series,
    SeriesState,
    new_identifier,
)
from service.records.work import NewInput, NewJob, NewResult, Outcome, input_key

pytestmark = pytest.mark.both_engines

NOON = datetime(2026, 1, 1, 12)  # noqa: DTZ001 - the times of the records are naive, in UTC
LEASE_S = 60.0


def received(
    sop: str = "1.2.3.1", *, identity: str = "a", at: datetime = NOON, **changes: object
) -> ReceivedInstance:
    instance = ReceivedInstance(
        instance_id=new_identifier(),
        study_instance_uid="1.2",
        series_instance_uid="1.2.3",
        sop_instance_uid=sop,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.4",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        kind=InstanceKind.IMAGE,
        modality="MR",
        patient_id="P1",
        identity_digest=identity * 64,
        path="instances/x.dcm",
        size_bytes=10,
        sha256="0" * 64,
        calling_ae_title="PACS",
        called_ae_title="SEGNODE",
        peer_address="127.0.0.1",
        received_at=at,
    )
    return replace(instance, **changes)  # type: ignore[arg-type]


def new_job(key: str = "k", **changes: object) -> NewJob:
    job = NewJob(
        origin=JobOrigin.DICOM,
        model_name="hippocampus",
        input_key=key,
        inputs=[NewInput("instances/x.dcm")],
        destinations=["pacs", "archive"],
    )
    return replace(job, **changes)  # type: ignore[arg-type]


SEG = NewResult(ResultKind.SEGMENTATION, "results/a.dcm", 5, "1" * 64, "1.2.840", "2.25.1")
LABELMAP = NewResult(ResultKind.LABELMAP, "results/a.nii.gz", 5, "2" * 64)
OUTCOME = Outcome([SEG, LABELMAP], runtime="openvino", precision="float32")


def claimed(records: Records, *, now: datetime = NOON) -> Job:
    with records.write() as session:
        job = claim_job(session, owner="w1", lease_s=LEASE_S, now=now)
    assert job is not None
    return job


def state_of(records: Records, job_id: str) -> JobState:
    with records.read() as session:
        return session.get_one(Job, job_id).state


def enqueued(records: Records, key: str = "k", **changes: object) -> str:
    with records.write() as session:
        job, _ = enqueue(session, new_job(key, **changes), at=NOON)
        return job.job_id


# --- the database itself ------------------------------------------------------------------------------


def test_a_block_that_raises_leaves_nothing_behind(records: Records) -> None:
    def break_in_the_middle() -> None:
        with records.write() as session:
            record_instance(session, received())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_in_the_middle()
    with records.read() as session:
        assert session.scalar(select(func.count()).select_from(Instance)) == 0


def test_a_second_writer_waits_instead_of_failing(records: Records) -> None:
    first_holds_the_lock, errors = threading.Event(), []

    def second() -> None:
        first_holds_the_lock.wait(10)
        try:
            with records.write() as session:
                record_instance(session, received("1.2.3.2"))
        except SQLAlchemyError as error:
            errors.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    with records.write(alone=True) as session:
        first_holds_the_lock.set()
        thread.join(0.2)
        assert thread.is_alive(), "the second writer did not wait"
        record_instance(session, received("1.2.3.1"))
    thread.join(10)
    assert errors == []
    with records.read() as session:
        assert session.scalar(select(func.count()).select_from(Instance)) == 2


# --- instances and series -----------------------------------------------------------------------------


def test_an_image_opens_its_series_and_a_late_one_opens_it_again(records: Records) -> None:
    with records.write() as session:
        assert record_instance(session, received()).arrival is Arrival.NEW
        (series,) = quiet_series(session, quiet_since=NOON)
        assert complete_series(session, series.series_id, last_instance_at=NOON, at=NOON)
        assert quiet_series(session, quiet_since=NOON) == []
    later = NOON + timedelta(minutes=5)
    with records.write() as session:
        record_instance(session, received("1.2.3.2", at=later))
        assert quiet_series(session, quiet_since=NOON) == []
        (series,) = quiet_series(session, quiet_since=later)
        assert (series.state, series.instance_count) == (SeriesState.RECEIVING, 2)
        assert not study_is_quiet(session, "1.2", now=later, quiet_time_s=1)
        assert study_is_quiet(session, "1.2", now=later + timedelta(seconds=2), quiet_time_s=1)


def test_a_series_is_not_closed_under_an_instance_that_has_just_arrived(records: Records) -> None:
    with records.write() as session:
        record_instance(session, received())
        (series,) = quiet_series(session, quiet_since=NOON)
        record_instance(session, received("1.2.3.2", at=NOON + timedelta(seconds=1)))
        assert not complete_series(session, series.series_id, last_instance_at=NOON, at=NOON)


def test_the_same_object_again_changes_nothing(records: Records) -> None:
    with records.write() as session:
        first = record_instance(session, received())
        again = record_instance(session, received(at=NOON + timedelta(hours=1), sha256="f" * 64))
        assert (again.arrival, again.instance_id) == (Arrival.REPEATED, first.instance_id)
        assert session.query(Series).one().last_instance_at == NOON


def test_one_sop_instance_in_two_series_is_two_instances(records: Records) -> None:
    with records.write() as session:
        record_instance(session, received())
        other = record_instance(session, received(series_instance_uid="1.2.4"))
        assert other.arrival is Arrival.NEW
        assert session.query(Series).count() == 2


@pytest.mark.parametrize("kind", [InstanceKind.OTHER, InstanceKind.OWN])
def test_what_is_no_image_opens_no_series(records: Records, kind: InstanceKind) -> None:
    with records.write() as session:
        record_instance(session, received(kind=kind))
        assert session.query(Series).count() == 0
        assert session.query(Instance).one().kind is kind


def test_the_nodes_own_object_is_known_when_it_comes_back(records: Records) -> None:
    enqueued(records)
    job = claimed(records)
    with records.write() as session:
        succeed_job(session, job.job_id, job.attempt, OUTCOME, now=NOON)
    with records.write() as session:
        record_instance(session, received("2.25.1"))
        assert session.query(Instance).one().kind is InstanceKind.OWN
        assert session.query(Series).count() == 0


def test_a_correction_keeps_both_revisions_and_cancels_what_has_not_left(records: Records) -> None:
    with records.write() as session:
        old = record_instance(session, received())
    for key, inputs in (("done", old.instance_id), ("waiting", old.instance_id)):
        enqueued(records, key, inputs=[NewInput("x", instance_id=inputs)])
    done = claimed(records)
    with records.write() as session:
        succeed_job(session, done.job_id, done.attempt, OUTCOME, now=NOON)
        sent = claim_delivery(session, owner="d", lease_s=LEASE_S, now=NOON)
        assert sent is not None
        mark_sent(session, sent.delivery_id, sent.attempt, status=0, note=None, now=NOON)
    with records.write() as session:
        new = record_instance(session, received(identity="b", at=NOON + timedelta(hours=1)))
    assert new.arrival is Arrival.CORRECTION
    assert len(new.cancelled_job_ids) == 2
    with records.read() as session:
        revisions = {i.revision: i.current for i in session.query(Instance)}
        assert revisions == {1: False, 2: True}
        assert sorted(d.state for d in session.query(Delivery)) == [
            DeliveryState.CANCELLED,
            DeliveryState.SENT,
        ]
        assert sorted(j.state for j in session.query(Job)) == [JobState.CANCELLED, JobState.SUCCEEDED]
        series = session.query(Series).one()
        assert (series.state, series.instance_count) == (SeriesState.RECEIVING, 1)
        assert [i.instance_id for i in current_instances(session, series.series_id)] == [new.instance_id]


# --- jobs ---------------------------------------------------------------------------------------------


def test_an_unchanged_input_is_never_queued_twice(records: Records) -> None:
    first, again = enqueued(records), enqueued(records)
    other_model = enqueued(records, model_name="other")
    assert first == again != other_model
    with records.read() as session:
        assert queue_length(session) == 2


def test_the_input_key_depends_on_every_part_and_not_on_the_order() -> None:
    pairs = [("1.1", "1:a"), ("1.2", "1:b")]
    assert input_key(pairs) == input_key(pairs[::-1])
    assert len({input_key(pairs), input_key(pairs[:1]), input_key([("1.1", "2:a"), ("1.2", "1:b")])}) == 3


def test_a_newer_job_of_a_series_names_the_one_it_supersedes(records: Records) -> None:
    with records.write() as session:
        record_instance(session, received())
        series_id = session.query(Series).one().series_id
    old = enqueued(records, "old", series_id=series_id)
    new = enqueued(records, "new", series_id=series_id)
    with records.read() as session:
        assert session.get_one(Job, new).supersedes_job_id == old


def test_jobs_are_claimed_by_priority_then_age_and_once(records: Records) -> None:
    low = enqueued(records, "low")
    high = enqueued(records, "high", priority=10)
    assert [claimed(records).job_id, claimed(records).job_id] == [high, low]
    with records.write() as session:
        assert claim_job(session, owner="w2", lease_s=LEASE_S, now=NOON) is None


def test_success_makes_one_delivery_per_dicom_result_and_destination(records: Records) -> None:
    job_id = enqueued(records)
    job = claimed(records)
    with records.write() as session:
        bind_model(session, job_id, job.attempt, version="1.0.0", digest="d" * 64)
        succeed_job(session, job_id, job.attempt, OUTCOME, now=NOON)
    with records.read() as session:
        done = session.get_one(Job, job_id)
        assert (done.state, done.model_digest, done.lease_owner) == (JobState.SUCCEEDED, "d" * 64, None)
        assert {d.destination for d in session.query(Delivery)} == {"pacs", "archive"}
        assert session.query(Result).count() == 2


def test_a_worker_whose_lease_lapsed_can_report_nothing(records: Records) -> None:
    job_id = enqueued(records)
    old = claimed(records)
    after = NOON + timedelta(seconds=LEASE_S + 1)
    with records.write() as session:
        assert reap_lapsed_jobs(session, maximum_lapses=10, now=NOON) == []
        assert reap_lapsed_jobs(session, maximum_lapses=10, now=after) == [job_id]
    new = claimed(records, now=after)
    assert new.attempt == old.attempt + 1
    reports = (
        lambda s: renew_lease(s, job_id, old.attempt, lease_s=1, now=after, stage="forward", fraction=0.5),
        lambda s: bind_model(s, job_id, old.attempt, version="1", digest="d"),
        lambda s: succeed_job(s, job_id, old.attempt, OUTCOME, now=after),
        lambda s: refuse_job(s, job_id, old.attempt, code="X", reason="x", remedy="", now=after),
        lambda s: release_job(s, job_id, old.attempt),
    )
    for report in reports:
        with pytest.raises(LostClaimError), records.write() as session:
            report(session)
    with records.write() as session:
        succeed_job(session, job_id, new.attempt, OUTCOME, now=after)
    with records.read() as session:
        assert session.query(Result).count() == 2


def test_a_renewed_lease_does_not_lapse(records: Records) -> None:
    job_id = enqueued(records)
    job = claimed(records)
    later = NOON + timedelta(seconds=LEASE_S - 1)
    with records.write() as session:
        renew_lease(session, job_id, job.attempt, lease_s=LEASE_S, now=later, stage="forward", fraction=0.5)
        assert reap_lapsed_jobs(session, maximum_lapses=10, now=NOON + timedelta(seconds=LEASE_S + 1)) == []


def test_lapses_and_failures_are_counted_apart_and_both_end(records: Records) -> None:
    job_id = enqueued(records)
    now = NOON
    for _ in range(2):
        claimed(records, now=now)
        now += timedelta(seconds=LEASE_S + 1)
        with records.write() as session:
            reap_lapsed_jobs(session, maximum_lapses=10, now=now)
    states = []
    for _ in range(3):
        job = claimed(records, now=now)
        with records.write() as session:
            states.append(
                fail_attempt(
                    session,
                    job_id,
                    job.attempt,
                    SegnodeError("it broke", remedy="mend it"),
                    retry_after_s=10,
                    maximum_failures=3,
                    now=now,
                )
            )
        with records.write() as session:
            assert claim_job(session, owner="w", lease_s=1, now=now) is None, "the back-off is not kept"
        now += timedelta(seconds=10)
    assert states == [JobState.QUEUED, JobState.QUEUED, JobState.FAILED]
    with records.read() as session:
        job = session.get_one(Job, job_id)
        assert (job.lapses, job.failures, job.reason, job.remedy) == (2, 3, "it broke", "mend it")


def test_a_job_whose_workers_always_die_fails_for_good(records: Records) -> None:
    job_id = enqueued(records)
    now = NOON
    for _ in range(2):
        claimed(records, now=now)
        now += timedelta(seconds=LEASE_S + 1)
        with records.write() as session:
            reap_lapsed_jobs(session, maximum_lapses=2, now=now)
    with records.read() as session:
        job = session.get_one(Job, job_id)
        assert (job.state, job.reason_code) == (JobState.FAILED, "WORKER_LOST")


def test_only_what_ended_badly_can_be_retried(records: Records) -> None:
    job_id = enqueued(records)
    with pytest.raises(ConflictError), records.write() as session:
        retry_job(session, job_id)
    job = claimed(records)
    with records.write() as session:
        refuse_job(session, job_id, job.attempt, code="GANTRY_TILT", reason="18.5", remedy="", now=NOON)
    with records.write() as session:
        assert retry_job(session, job_id).reason_code is None
    assert state_of(records, job_id) is JobState.QUEUED
    with pytest.raises(NotFoundError), records.write() as session:
        retry_job(session, "no such job")


def test_a_released_job_is_queued_again_and_nothing_is_counted(records: Records) -> None:
    job_id = enqueued(records)
    job = claimed(records)
    with records.write() as session:
        release_job(session, job_id, job.attempt)
    with records.read() as session:
        job = session.get_one(Job, job_id)
        assert (job.state, job.failures, job.lapses) == (JobState.QUEUED, 0, 0)


# --- deliveries ---------------------------------------------------------------------------------------


@pytest.fixture
def with_deliveries(records: Records) -> Records:
    enqueued(records)
    job = claimed(records)
    with records.write() as session:
        succeed_job(session, job.job_id, job.attempt, OUTCOME, now=NOON)
    return records


def claim_one(records: Records, now: datetime = NOON) -> Delivery | None:
    with records.write() as session:
        return claim_delivery(session, owner="d", lease_s=LEASE_S, now=now)


def test_a_delivery_is_held_by_one_at_a_time_and_taken_over_from_the_dead(with_deliveries: Records) -> None:
    first, second = claim_one(with_deliveries), claim_one(with_deliveries)
    assert first is not None
    assert second is not None
    assert first.delivery_id != second.delivery_id
    assert claim_one(with_deliveries) is None
    after = NOON + timedelta(seconds=LEASE_S + 1)
    taken_over = claim_one(with_deliveries, after)
    assert taken_over is not None
    assert taken_over.attempt == 2
    old = first if taken_over.delivery_id == first.delivery_id else second
    with pytest.raises(LostClaimError), with_deliveries.write() as session:
        mark_sent(session, old.delivery_id, old.attempt, status=0, note=None, now=after)


def test_a_delivery_waits_for_its_next_attempt(with_deliveries: Records) -> None:
    for _ in range(2):
        delivery = claim_one(with_deliveries)
        assert delivery is not None
        with with_deliveries.write() as session:
            retry_later(
                session,
                delivery.delivery_id,
                delivery.attempt,
                after_s=30,
                status=0xC000,
                error="cannot understand",
                failure_status=True,
                now=NOON,
            )
    assert claim_one(with_deliveries, NOON + timedelta(seconds=29)) is None
    again = claim_one(with_deliveries, NOON + timedelta(seconds=30))
    assert again is not None
    assert (again.failure_statuses, again.last_status) == (1, 0xC000)


def test_a_parked_delivery_stays_until_a_person_asks(with_deliveries: Records) -> None:
    delivery = claim_one(with_deliveries)
    assert delivery is not None
    with with_deliveries.write() as session:
        park(session, delivery.delivery_id, delivery.attempt, status=0x0122, error="refused")
    other = claim_one(with_deliveries)
    assert other is not None
    with with_deliveries.write() as session:
        mark_sent(session, other.delivery_id, other.attempt, status=0, note=None, now=NOON)
    assert claim_one(with_deliveries, NOON + timedelta(days=365)) is None
    with pytest.raises(ConflictError), with_deliveries.write() as session:
        retry_delivery(session, other.delivery_id, now=NOON)
    with with_deliveries.write() as session:
        retry_delivery(session, delivery.delivery_id, now=NOON)
    assert claim_one(with_deliveries) is not None
    with pytest.raises(NotFoundError), with_deliveries.write() as session:
        retry_delivery(session, "none", now=NOON)
