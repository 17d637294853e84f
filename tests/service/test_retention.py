"""Retention: what is done goes in its time, what is not stays, and a recall still finds what went."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from api_harness import STUDY, ApiHarness, assert_problem, nifti
from sqlalchemy import func, select, update

from service.errors import AttemptError, ConflictError
from service.records.database import Records
from service.records.deliveries import claim_delivery, mark_sent, park
from service.records.governance_tables import Purge, SiteCase
from service.records.instances import complete_series
from service.records.jobs import cancel_jobs_of_instance, enqueue, fail_attempt, refuse_job, retry_job
from service.records.tables import (
    Delivery,
    DeliveryState,
    Event,
    Instance,
    Job,
    JobInput,
    JobOrigin,
    JobState,
    Series,
)
from service.records.work import NewInput, NewJob
from service.retention import Purged, Retention

DAY = timedelta(days=1)


@pytest.fixture
def api(tmp_path: Any, records: Records) -> ApiHarness:
    return ApiHarness(
        tmp_path,
        records,
        storage={"low_watermark_bytes": 0, "reserve_bytes": 0},
        retention={"maximum_age_days": 30},
        destinations=[
            {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 1},
            {
                "name": "vna",
                "ae_title": "VNA",
                "host": "127.0.0.1",
                "port": 1,
                "storage_commitment": True,
            },
        ],
    )


def complete(api: ApiHarness) -> None:
    with api.records.write() as session:
        for series in session.scalars(select(Series)):
            complete_series(session, series.series_id, last_instance_at=series.last_instance_at, at=api.now)


def received(api: ApiHarness, *, destinations: tuple[str, ...] = ("pacs",), study: str = STUDY) -> str:
    """A study whose series is complete, with a job in the queue; the job's identifier."""
    instances = [api.receive_instance(str(i), study=study) for i in range(2)]
    complete(api)
    return api.enqueue(instances=instances, destinations=destinations, study=study)


def done(api: ApiHarness, **arguments: Any) -> str:
    """The same, segmented and sent."""
    job_id = received(api, **arguments)
    api.succeed(job_id)
    send(api)
    return job_id


def send(api: ApiHarness) -> None:
    with api.records.write() as session:
        while (delivery := claim_delivery(session, owner="w", lease_s=60, now=api.now)) is not None:
            mark_sent(session, delivery.delivery_id, delivery.attempt, status=0, note=None, now=api.now)


def sweep(api: ApiHarness, *, after: timedelta = 31 * DAY, **rules: Any) -> Purged:
    settings = api.settings.model_copy(update={"retention": api.settings.retention.model_copy(update=rules)})
    return Retention(settings, api.records, api.spool).sweep(api.now + after)


def kept(api: ApiHarness) -> set[str]:
    return {path for path in api.spool_files() if not path.startswith("cases/")}


def test_a_done_study_goes_after_its_time_and_its_rows_tell_of_it(api: ApiHarness) -> None:
    job_id = done(api)
    assert sweep(api, after=29 * DAY) == Purged()
    assert len(kept(api)) == 5
    purged = sweep(api)
    assert (purged.studies, purged.files) == (1, 5)
    assert purged.size_bytes > 16
    assert kept(api) == set()
    with api.records.read() as session:
        assert session.scalar(select(func.count()).select_from(Instance)) == 0
        assert session.scalar(select(func.count()).select_from(Series)) == 0
        assert session.get(Purge, job_id) is not None
        (event,) = session.scalars(select(Event).where(Event.kind == "study.purged"))
        assert (event.subject, event.actor) == (STUDY, "retention")
    api.install()
    (recalled,) = api.get("/api/v1/models/threshold/1.0.0/studies").json()["items"]
    assert (recalled["job_id"], recalled["study_instance_uid"]) == (job_id, STUDY)
    assert recalled["deliveries"][0]["state"] == "sent"
    assert api.get(f"/api/v1/segmentations/{job_id}/labelmap").status_code == 410
    assert sweep(api) == Purged()


def unfinished_delivery(api: ApiHarness) -> None:
    api.succeed(received(api))


def parked_delivery(api: ApiHarness) -> None:
    api.succeed(received(api))
    with api.records.write() as session:
        delivery = claim_delivery(session, owner="w", lease_s=60, now=api.now)
        assert delivery is not None
        park(session, delivery.delivery_id, delivery.attempt, status=None, error="No.")


def uncommitted_delivery(api: ApiHarness) -> None:
    done(api, destinations=("vna",))


def one_of_two_sent(api: ApiHarness) -> None:
    api.succeed(received(api, destinations=("pacs", "vna")))
    send(api)


def queued_job(api: ApiHarness) -> None:
    received(api)


def running_job(api: ApiHarness) -> None:
    api.claim(received(api))


def failed_job(api: ApiHarness) -> None:
    job = api.claim(received(api))
    with api.records.write() as session:
        error = AttemptError("CHILD_DIED", "It died.")
        fail_attempt(
            session, job.job_id, job.attempt, error, retry_after_s=0, maximum_failures=1, now=api.now
        )


def receiving_series(api: ApiHarness) -> None:
    done(api)
    with api.records.write() as session:
        session.execute(update(Series).values(state="receiving"))


def late_instance(api: ApiHarness) -> None:
    done(api)
    api.receive_instance("late", at=api.now + 5 * DAY)
    complete(api)


def golden_case(api: ApiHarness) -> None:
    job_id = done(api)
    with api.records.write() as session:
        session.add(
            SiteCase(
                job_id=job_id,
                model_name="threshold",
                path="cases/x.nii.gz",
                sha256="0" * 64,
                source="as_produced",
                labels=[],
                approved_by="operator",
                created_at=api.now,
            )
        )


@pytest.mark.parametrize(
    "make",
    [
        unfinished_delivery,
        parked_delivery,
        uncommitted_delivery,
        one_of_two_sent,
        queued_job,
        running_job,
        failed_job,
        receiving_series,
        late_instance,
        golden_case,
    ],
)
def test_what_is_not_done_stays(api: ApiHarness, make: Callable[[ApiHarness], None]) -> None:
    make(api)
    before = kept(api)
    assert sweep(api) == Purged()
    assert kept(api) == before


def test_a_committed_study_goes(api: ApiHarness) -> None:
    done(api, destinations=("vna",))
    with api.records.write() as session:
        session.execute(update(Delivery).values(state=DeliveryState.COMMITTED))
    assert sweep(api).studies == 1


def test_a_refused_study_goes_and_cannot_be_retried(api: ApiHarness) -> None:
    job = api.claim(received(api))
    with api.records.write() as session:
        refuse_job(session, job.job_id, job.attempt, code="GANTRY_TILT", reason="x", remedy="", now=api.now)
    assert sweep(api).studies == 1
    with pytest.raises(ConflictError, match="no longer on the node"), api.records.write() as session:
        retry_job(session, job.job_id)


def test_a_study_without_a_route_goes_too(api: ApiHarness) -> None:
    api.receive_instance()
    complete(api)
    assert sweep(api).studies == 1
    assert kept(api) == set()


def test_a_cancelled_job_holds_nothing_up(api: ApiHarness) -> None:
    received(api)
    with api.records.write() as session:
        first = session.scalars(select(Instance)).first()
        assert first is not None
        cancel_jobs_of_instance(session, first.instance_id, at=api.now)
    assert sweep(api).studies == 1


def test_a_job_of_two_studies_goes_with_the_last_of_them(api: ApiHarness) -> None:
    other = f"{STUDY}.2"
    instances = [api.receive_instance("a", study=STUDY), api.receive_instance("a", study=other)]
    complete(api)
    api.succeed(api.enqueue(instances=instances, destinations=["pacs"]))
    late = received(api, study=other)
    assert sweep(api).studies == 0  # the other has a job that waits, and this one's rests on it
    with api.records.write() as session:
        session.execute(
            update(Job).where(Job.job_id == late).values(state=JobState.CANCELLED, finished_at=api.now)
        )
    send(api)
    assert sweep(api).studies == 2


def test_the_same_study_that_comes_again_is_known(api: ApiHarness) -> None:
    job_id = done(api)
    with api.records.read() as session:
        key = session.get_one(Job, job_id).input_key
    assert sweep(api).studies == 1
    api.receive_instance("0")
    with api.records.write() as session:
        again, is_new = enqueue(
            session, NewJob(JobOrigin.DICOM, "threshold", key, [NewInput("x")]), at=api.now
        )
    assert (again.job_id, is_new) == (job_id, False)


def test_an_upload_goes_and_may_be_computed_again(api: ApiHarness, tmp_path: Any) -> None:
    api.install()
    content = nifti(tmp_path)
    first = api.upload(content).json()["job_id"]
    api.succeed(first, dicom=False)
    assert sweep(api).uploads == 1
    assert kept(api) == set()
    assert sweep(api).uploads == 0
    assert_problem(api.get(f"/api/v1/segmentations/{first}/labelmap", key="uploader"), 410, "RESULT_GONE")
    assert api.upload(content).json()["job_id"] != first
    with api.records.read() as session:
        assert session.scalar(select(func.count()).select_from(JobInput)) == 1


def test_below_the_watermark_the_oldest_go_until_there_is_room(
    api: ApiHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = api.now
    for number in range(4):
        api.now = start + number * timedelta(hours=1)
        done(api, study=f"{STUDY}.{number}")
    full = len(kept(api))
    monkeypatch.setattr(api.spool, "free_bytes", lambda: 100 + (full - len(kept(api))) * 10)
    rules = {"maximum_age_days": None, "purge_below_free_bytes": 150, "purge_up_to_free_bytes": 160}
    assert sweep(api, after=timedelta(hours=1), **rules) == Purged()  # all younger than a day
    purged = sweep(api, after=2 * DAY, **rules)
    assert purged.studies == 2
    with api.records.read() as session:
        left = set(session.scalars(select(Instance.study_instance_uid)))
    assert left == {f"{STUDY}.2", f"{STUDY}.3"}
    assert sweep(api, after=2 * DAY, **rules) == Purged()


def test_nothing_goes_unless_it_is_configured(api: ApiHarness) -> None:
    done(api)
    assert sweep(api, after=10_000 * DAY, maximum_age_days=None) == Purged()


def test_it_looks_now_and_then(api: ApiHarness) -> None:
    retention = Retention(api.settings, api.records, api.spool)
    assert retention.sweep(api.now) == Purged()
    done(api)
    later = api.now + 31 * DAY
    assert retention.sweep(later).studies == 1
    done(api, study=f"{STUDY}.9")
    assert retention.sweep(later + timedelta(seconds=1)) == Purged()
