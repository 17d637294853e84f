"""Which worker takes which job, which workers live, and what several processes may promise together."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select

from service.errors import StorageFullError
from service.lease import LeaseOwner
from service.liveness import judge_workers
from service.records.database import Records, utc_now
from service.records.fleet import DEAD_AFTER_S, beat, live_workers, note_need, sign_off
from service.records.fleet_tables import UploadPromise
from service.records.jobs import claim_job, enqueue
from service.records.promises import STEP_BYTES, SharedPromises
from service.records.supersession import enqueue_newest
from service.records.tables import Job, JobOrigin
from service.records.work import NewInput, NewJob
from service.spool import Spool
from service.uploads import UploadDesk

pytestmark = pytest.mark.both_engines

NOON = datetime(2026, 1, 1, 12)  # noqa: DTZ001 - the times of the records are naive, in UTC
NEW = NewJob(JobOrigin.DICOM, "small", "k", [NewInput("x")])


def put(records: Records, key: str, **changes: object) -> str:
    with records.write() as session:
        return enqueue(session, replace(NEW, input_key=key, **changes), at=NOON)[0].job_id


def take(records: Records, owner: str = "w", **limits: object) -> str | None:
    with records.write() as session:
        job = claim_job(session, owner=owner, lease_s=60, now=NOON, **limits)
        return job.job_id if job is not None else None


def tell(
    records: Records, owner: str, *, now: datetime = NOON, memory_bytes: int = 8, **values: object
) -> None:
    given = {"host": "host", "models": [], "bell_heard_at": None} | values
    with records.write() as session:
        beat(session, owner=owner, memory_bytes=memory_bytes, now=now, **given)


def test_a_worker_takes_jobs_of_its_models_alone_and_the_most_urgent_first(records: Records) -> None:
    put(records, "routine")
    large = put(records, "large", model_name="large")
    stat = put(records, "stat", priority=100)
    assert take(records, models=["large"]) == large
    assert take(records, models=["large"]) is None
    assert take(records, models=["small", "other"]) == stat


def test_what_is_urgent_comes_first_whichever_worker_asks(records: Records) -> None:
    routine = [put(records, f"routine {number}") for number in range(2)]
    urgent = [put(records, f"stat {number}", priority=100) for number in range(2)]
    late = put(records, "later", priority=-1)
    taken = [take(records, owner) for owner in ("one", "two", "two", "one", "two")]
    assert set(taken[:2]) == set(urgent)
    assert set(taken[2:4]) == set(routine)
    assert taken[4] == late


def test_an_urgent_route_makes_a_job_urgent_that_waits_already(records: Records) -> None:
    waiting = put(records, "a")
    first = put(records, "b", priority=50)
    for priority in (100, -100):  # the second takes nothing back
        with records.write() as session:
            again = replace(NEW, input_key="a", priority=priority)
            job, is_new = enqueue_newest(session, again, at=NOON)
            assert (job.job_id, is_new) == (waiting, False)
    assert [take(records), take(records)] == [waiting, first]


def test_a_job_that_ran_out_of_memory_is_left_to_a_larger_worker_while_there_is_one(records: Records) -> None:
    job_id = put(records, "a")
    with records.write() as session:
        note_need(session, job_id, more_than_bytes=8)
        note_need(session, job_id, more_than_bytes=4)  # the most counts
    tell(records, "larger for others", memory_bytes=16, models=["other"])
    tell(records, "gone", memory_bytes=16, now=NOON - timedelta(seconds=DEAD_AFTER_S + 1))
    tell(records, "larger", memory_bytes=16)
    assert take(records, memory_bytes=8) is None
    with records.write() as session:
        sign_off(session, "larger")
    assert take(records, memory_bytes=8) == job_id, "nobody else is there for it"


def test_a_larger_worker_takes_what_a_smaller_one_could_not(records: Records) -> None:
    job_id = put(records, "a")
    with records.write() as session:
        note_need(session, job_id, more_than_bytes=8)
    assert take(records, memory_bytes=16) == job_id


def test_a_worker_lives_while_it_looks_for_jobs_or_holds_one(records: Records) -> None:
    tell(records, "w", bell_heard_at=NOON)
    put(records, "a")
    for after_s, held, alive in ((59, False, True), (61, False, False), (61, True, True), (200, True, False)):
        now = NOON + timedelta(seconds=after_s)
        if held and after_s == 61:
            with records.write() as session:
                assert claim_job(session, owner="w", lease_s=60, now=NOON + timedelta(seconds=30))
        with records.read() as session:
            assert bool(live_workers(session, now=now)) is alive, (after_s, held)
            health = judge_workers(session, host="host", has_broker=True, now=now)
            assert health.is_healthy is alive
            assert ("The broker is silent" in health.message) == (alive and after_s > 60)
            assert not judge_workers(session, host="other", has_broker=False, now=now).is_healthy


def test_claims_side_by_side_never_give_one_job_to_two(records: Records) -> None:
    count = 24
    for number in range(count):
        put(records, str(number))
    taken: list[str] = []

    def work(owner: str) -> None:
        while (job_id := take(records, owner)) is not None:
            taken.append(job_id)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(taken) == len(set(taken)) == count
    with records.read() as session:
        assert set(session.scalars(select(Job.attempt))) == {1}


def test_the_same_upload_twice_at_once_is_one_job(records: Records) -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(put(records, "same"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 4
    assert len(set(made)) == 1


def test_whoever_queues_a_job_rings_once_it_is_committed(records: Records) -> None:
    rung: list[int] = []

    def ring() -> None:
        with records.read() as session:
            rung.append(len(session.scalars(select(Job.job_id)).all()))

    records.ring = ring
    put(records, "a")
    assert rung == [1]
    put(records, "a")  # it is there already
    with records.write() as session:
        session.execute(select(Job.job_id))
    assert rung == [1]


def test_two_desks_cannot_promise_the_same_space(records: Records, node_spool: Spool) -> None:
    spool = node_spool
    free = spool.free_bytes()
    spool.low_watermark_bytes = max(0, free - 5 * STEP_BYTES)
    one, two = UploadDesk(spool, records), UploadDesk(spool, records)
    one.promise(3 * STEP_BYTES)
    with pytest.raises(StorageFullError):
        two.promise(3 * STEP_BYTES)
    assert two.promised_bytes == 0
    one.promise(-3 * STEP_BYTES)
    two.promise(3 * STEP_BYTES)
    with records.read() as session:
        assert session.scalars(select(UploadPromise.size_bytes)).all() == [3 * STEP_BYTES]


def test_the_promises_of_the_dead_and_the_silent_do_not_count(records: Records) -> None:
    asked: list[int] = []
    with records.write() as session:
        for desk, age in (("dead", timedelta(0)), ("silent", timedelta(hours=2)), ("alive", timedelta(0))):
            owner = "elsewhere/-/1/-"
            if desk == "dead":
                owner = str(replace(LeaseOwner.of_this_process(), started="0"))
            session.add(
                UploadPromise(desk_id=desk, owner=owner, size_bytes=STEP_BYTES, renewed_at=utc_now() - age)
            )
    SharedPromises(records).share(1, asked.append)
    assert asked == [1 + STEP_BYTES]
