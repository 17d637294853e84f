"""Workers that claim, report, die and come back in any order: each job still ends once, and as one attempt.

A model of the rules runs beside the records. It knows of each worker which attempt it believes to hold, and
of each job which attempt really holds it. A worker that is wrong must be told so, and change nothing.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)
from sqlalchemy import select

from service.errors import AttemptError, ConflictError, LostClaimError
from service.records.database import Records
from service.records.jobs import (
    claim_job,
    fail_attempt,
    refuse_job,
    release_job,
    renew_lease,
    retry_job,
    succeed_job,
)
from service.records.leases import expire_leases, reap_lapsed_jobs
from service.records.migrate import upgrade
from service.records.supersession import cancel_superseded_deliveries, enqueue_newest
from service.records.tables import (
    Delivery,
    DeliveryState,
    Job,
    JobOrigin,
    JobState,
    Result,
    ResultKind,
    Series,
    SeriesState,
)
from service.records.work import NewInput, NewJob, NewResult, Outcome

NOON = datetime(2026, 1, 1, 12)  # noqa: DTZ001  # times in the records are naive
LEASE_S = 60.0
MAXIMUM_FAILURES, MAXIMUM_LAPSES = 3, 4
WORKERS = ("w0", "w1", "w2")
ENDED = (JobState.SUCCEEDED, JobState.REFUSED, JobState.FAILED, JobState.CANCELLED)


@dataclass
class Expected:
    """What the rules say of one job."""

    state: JobState = JobState.QUEUED
    attempt: int = 0
    owner: str | None = None
    lease_ends: datetime = NOON
    failures: int = 0
    lapses: int = 0
    results_of: list[int] = field(default_factory=list)
    series: int = 0


class Interleavings(RuleBasedStateMachine):
    claims = Bundle("claims")  # what workers believe to hold: (worker, job, attempt), never forgotten
    jobs = Bundle("jobs")

    @initialize()
    def open(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        url = f"sqlite:///{Path(self.folder.name) / 'records.sqlite'}"
        upgrade(url)
        self.records = Records(url)
        self.now = NOON
        self.expected: dict[str, Expected] = {}
        self.order: list[str] = []
        with self.records.write() as session:
            session.add_all(
                Series(
                    series_id=str(i),
                    study_instance_uid="1",
                    series_instance_uid=str(i),
                    state=SeriesState.COMPLETE,
                    first_instance_at=NOON,
                    last_instance_at=NOON,
                )
                for i in range(2)
            )

    def teardown(self) -> None:
        if hasattr(self, "records"):
            self.records.close()
            self.folder.cleanup()

    @rule(target=jobs, series=st.integers(0, 1))
    def a_series_is_complete_again(self, series: int) -> str:
        self.now += timedelta(seconds=1)
        key = str(len(self.expected))
        new = NewJob(JobOrigin.DICOM, "m", key, [NewInput("x")], destinations=["PACS"], series_id=str(series))
        with self.records.write() as session:
            job, is_new = enqueue_newest(session, new, at=self.now)
        assert is_new
        for older in self.expected.values():
            if older.series == series and older.state in (JobState.QUEUED, JobState.RUNNING):
                older.state, older.owner = JobState.CANCELLED, None
        self.expected[job.job_id] = Expected(series=series)
        self.order.append(job.job_id)
        return job.job_id

    @rule(target=claims, worker=st.sampled_from(WORKERS))
    def claim(self, worker: str):  # type: ignore[no-untyped-def]
        return self._claim(worker) or multiple()

    def _claim(self, worker: str) -> tuple[str, str, int] | None:
        with self.records.write() as session:
            job = claim_job(session, owner=worker, lease_s=LEASE_S, now=self.now)
        queued = [e for e in self.expected.values() if e.state is JobState.QUEUED]
        if job is None:
            assert not queued
            return None
        expected = self.expected[job.job_id]
        assert expected.state is JobState.QUEUED
        expected.state, expected.owner = JobState.RUNNING, worker
        expected.attempt += 1
        expected.lease_ends = self.now + timedelta(seconds=LEASE_S)
        assert job.attempt == expected.attempt
        return (worker, job.job_id, job.attempt)

    @rule(worker=st.sampled_from(WORKERS))
    def do_a_whole_job(self, worker: str) -> None:
        claim = self._claim(worker)
        if claim is not None:
            self._succeed(claim)

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def report(self, claim: tuple[str, str, int], transition) -> Expected | None:  # type: ignore[no-untyped-def]
        """Make a report; the job's expectation if it must have been taken, None if it must not."""
        _, job_id, attempt = claim
        expected = self.expected[job_id]
        holds = expected.state is JobState.RUNNING and expected.attempt == attempt
        if holds:
            with self.records.write() as session:
                transition(session, job_id, attempt)
            return expected
        with pytest.raises(LostClaimError), self.records.write() as session:
            transition(session, job_id, attempt)
        return None

    @rule(claim=claims)
    def renew(self, claim: tuple[str, str, int]) -> None:
        expected = self.report(
            claim,
            lambda s, j, a: renew_lease(
                s, j, a, lease_s=LEASE_S, now=self.now, stage="forward", fraction=0.5
            ),
        )
        if expected:
            expected.lease_ends = self.now + timedelta(seconds=LEASE_S)

    @rule(claim=claims)
    def succeed(self, claim: tuple[str, str, int]) -> None:
        self._succeed(claim)

    def _succeed(self, claim: tuple[str, str, int]) -> None:
        def transition(session, job_id: str, attempt: int) -> None:  # type: ignore[no-untyped-def]
            result = NewResult(
                ResultKind.SEGMENTATION, f"{job_id}/{attempt}", 1, "0", "1.2", f"{job_id}.{attempt}"
            )
            succeed_job(session, job_id, attempt, Outcome([result], "r", "float32"), now=self.now)
            cancel_superseded_deliveries(session, job_id, now=self.now)

        if expected := self.report(claim, transition):
            expected.state, expected.owner = JobState.SUCCEEDED, None
            expected.results_of.append(claim[2])

    @rule(claim=claims)
    def refuse(self, claim: tuple[str, str, int]) -> None:
        if expected := self.report(
            claim, lambda s, j, a: refuse_job(s, j, a, code="C", reason="R", remedy="M", now=self.now)
        ):
            expected.state, expected.owner = JobState.REFUSED, None

    @rule(claim=claims)
    def fail(self, claim: tuple[str, str, int]) -> None:
        error = AttemptError("X", "It broke.")
        if expected := self.report(
            claim,
            lambda s, j, a: fail_attempt(
                s, j, a, error, retry_after_s=0.0, maximum_failures=MAXIMUM_FAILURES, now=self.now
            ),
        ):
            expected.failures += 1
            final = expected.failures >= MAXIMUM_FAILURES
            expected.state, expected.owner = (JobState.FAILED if final else JobState.QUEUED), None

    @rule(claim=claims)
    def release(self, claim: tuple[str, str, int]) -> None:
        if expected := self.report(claim, release_job):
            expected.state, expected.owner = JobState.QUEUED, None

    @rule(dead=st.sets(st.sampled_from(WORKERS)))
    def reap(self, dead: set[str]) -> None:
        with self.records.write() as session:
            expire_leases(session, dead, now=self.now)
            reaped = reap_lapsed_jobs(session, maximum_lapses=MAXIMUM_LAPSES, now=self.now)
        lapsed = {
            job_id
            for job_id, e in self.expected.items()
            if e.state is JobState.RUNNING and (e.owner in dead or e.lease_ends < self.now)
        }
        assert set(reaped) == lapsed
        for job_id in lapsed:
            expected = self.expected[job_id]
            expected.lapses += 1
            final = expected.lapses >= MAXIMUM_LAPSES
            expected.state, expected.owner = (JobState.FAILED if final else JobState.QUEUED), None

    @rule(job_id=jobs)
    def a_person_retries(self, job_id: str) -> None:
        expected = self.expected[job_id]
        newest = max(
            (j for j, e in self.expected.items() if e.series == expected.series), key=self.order.index
        )
        if expected.state in (JobState.REFUSED, JobState.FAILED) and job_id == newest:
            with self.records.write() as session:
                retry_job(session, job_id)
            expected.state, expected.failures, expected.lapses = JobState.QUEUED, 0, 0
        else:
            with pytest.raises(ConflictError), self.records.write() as session:
                retry_job(session, job_id)

    @invariant()
    def the_records_say_what_the_rules_say(self) -> None:
        if not hasattr(self, "records"):
            return
        with self.records.read() as session:
            for job in session.scalars(select(Job)):
                expected = self.expected[job.job_id]
                assert (job.state, job.attempt, job.lease_owner, job.failures, job.lapses) == (
                    expected.state,
                    expected.attempt,
                    expected.owner,
                    expected.failures,
                    expected.lapses,
                )
                assert (job.finished_at is not None) == (job.state in ENDED)
            results = list(session.scalars(select(Result)))
            deliveries = list(session.scalars(select(Delivery)))
        # Results come from the winning attempt, and from that alone.
        written = sorted(result.path for result in results)
        assert written == sorted(f"{j}/{a}" for j, e in self.expected.items() for a in e.results_of)
        for expected in self.expected.values():
            assert len(expected.results_of) == (expected.state is JobState.SUCCEEDED)
        # At most one result of a series is on its way: that of the newest job that has succeeded.
        on_the_way = [self.expected[d.job_id].series for d in deliveries if d.state is DeliveryState.PENDING]
        assert len(on_the_way) == len(set(on_the_way))


Interleavings.TestCase.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestInterleavings = Interleavings.TestCase
