"""Deliveries: nothing is dropped, nothing is sent that is not what was made, and back-off has its bounds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from dicom_peer import make_object
from pydicom import dcmwrite
from sqlalchemy import select
from storage_scp import StorageScp

from service.delivery import Deliverer
from service.dicom.send import OutcomeKind, SendOutcome, judge_status
from service.records.database import Records
from service.records.deliveries import retry_delivery
from service.records.jobs import enqueue
from service.records.tables import Delivery, DeliveryState, Event, JobOrigin, Result, ResultKind
from service.records.work import NewInput, NewJob
from service.settings import Settings
from service.spool import Spool

START = datetime(2025, 1, 1)  # noqa: DTZ001 - times in the records are UTC and naive
SILENCE = SendOutcome(OutcomeKind.RETRY, error="No connection.")
HOURS_72 = timedelta(hours=72)
HOUR_S = 3600


def settings_of(tmp_path: Path, port: int = 104, **delivery: Any) -> Settings:
    return Settings(
        data_dir=tmp_path,
        delivery=delivery,
        destinations=[
            {"name": name, "ae_title": "PACS", "host": "127.0.0.1", "port": port, "timeout_s": 10}
            for name in ("pacs", "other")
        ],
    )


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def deliver(records: Records, spool: Spool) -> Callable[..., str]:
    """Put a delivery of a new result into the queue; returns its identifier."""
    count = 0

    def put(destination: str = "pacs", *, at: datetime = START) -> str:
        nonlocal count
        count += 1
        path = spool.results_dir / f"{count}.dcm"
        dcmwrite(path, make_object(count), enforce_file_format=True)
        with records.write() as session:
            new = NewJob(
                origin=JobOrigin.DICOM, model_name="m", input_key=str(count), inputs=[NewInput(path="x")]
            )
            job, _ = enqueue(session, new, at=at)
            result = Result(
                job_id=job.job_id,
                kind=ResultKind.SEGMENTATION,
                path=spool.relative(path),
                size_bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                created_at=at,
            )
            session.add(result)
            session.flush()
            delivery = Delivery(
                result_id=result.result_id,
                job_id=job.job_id,
                destination=destination,
                next_attempt_at=at,
                created_at=at,
            )
            session.add(delivery)
            session.flush()
            return delivery.delivery_id

    return put


class Script:
    """A send function that gives the outcomes it is told, then the last one for ever."""

    def __init__(self, *outcomes: SendOutcome) -> None:
        self.outcomes = list(outcomes)
        self.calls: list[tuple[str, str]] = []

    def __call__(self, path: Path, destination: Any, *, calling_ae_title: str) -> SendOutcome:
        self.calls.append((destination.name, calling_ae_title))
        return self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]


def look(records: Records, delivery_id: str) -> Delivery:
    with records.read() as session:
        return session.get_one(Delivery, delivery_id)


def events(records: Records, kind: str) -> list[Event]:
    with records.read() as session:
        return list(session.scalars(select(Event).where(Event.kind == kind)))


def run_until_idle(deliverer: Deliverer, records: Records, now: datetime, until: datetime) -> datetime:
    """Let a fake clock jump from one due delivery to the next; returns the time of the last try."""
    last = now
    while now <= until:
        while deliverer.run_once(now):
            last = now
        with records.read() as session:
            due = session.scalars(
                select(Delivery.next_attempt_at).where(Delivery.state == DeliveryState.PENDING)
            ).all()
        if not due:
            return last
        now = max(min(due), now + timedelta(microseconds=1))
    return last


def test_a_result_is_sent_and_recorded(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    delivery_id = deliver()
    with StorageScp() as scp:
        deliverer = Deliverer(settings_of(tmp_path, scp.port), records, spool)
        assert deliverer.run_once(START)
        assert not deliverer.run_once(START)
    sent = look(records, delivery_id)
    assert (sent.state, sent.last_status, sent.last_error) == (DeliveryState.SENT, 0, None)
    assert sent.sent_at is not None
    assert sent.sent_at >= START
    assert sent.lease_owner is None
    assert [stored.sop_instance_uid for stored in scp.objects] == ["2.25.3.1"]
    assert scp.objects[0].calling_ae_title == "SEGNODE"
    (event,) = events(records, "delivery_sent")
    assert (event.subject, event.detail["destination"]) == (delivery_id, "pacs")


@pytest.mark.parametrize(
    ("status", "state"),
    [
        (0x0111, DeliveryState.SENT),
        (0xB007, DeliveryState.SENT),
        (0xA900, DeliveryState.PARKED),
        (0x0122, DeliveryState.PARKED),
        (0x0124, DeliveryState.PARKED),
        (0xA700, DeliveryState.PENDING),
        (0xC001, DeliveryState.PENDING),
    ],
)
def test_what_a_status_does(
    tmp_path: Path,
    records: Records,
    spool: Spool,
    deliver: Callable[..., str],
    status: int,
    state: DeliveryState,
) -> None:
    delivery_id = deliver()
    with StorageScp(statuses=[status]) as scp:
        Deliverer(settings_of(tmp_path, scp.port), records, spool).run_once(START)
    delivery = look(records, delivery_id)
    assert (delivery.state, delivery.last_status) == (state, status)
    assert f"0x{status:04X}" in (delivery.last_error or "")
    assert delivery.failure_statuses == (status == 0xC001)
    assert (delivery.next_attempt_at > START) is (state is DeliveryState.PENDING)
    assert len(events(records, "delivery_parked")) == (state is DeliveryState.PARKED)


def test_a_context_that_is_not_accepted_parks(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    delivery_id = deliver()
    with StorageScp(sop_class_uids=["1.2.840.10008.5.1.4.1.1.2"]) as scp:
        Deliverer(settings_of(tmp_path, scp.port), records, spool).run_once(START)
    delivery = look(records, delivery_id)
    assert delivery.state is DeliveryState.PARKED
    assert "presentation context" in (delivery.last_error or "")
    (event,) = events(records, "delivery_parked")
    assert event.alert


def test_ten_failures_of_the_peer_park(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    delivery_id = deliver()
    script = Script(judge_status(0xA700), judge_status(0xC000))  # 0xA700 does not count
    deliverer = Deliverer(settings_of(tmp_path), records, spool, send=script)
    run_until_idle(deliverer, records, START, START + HOURS_72)
    delivery = look(records, delivery_id)
    assert delivery.state is DeliveryState.PARKED
    assert len(script.calls) == 11
    assert delivery.last_error == "The peer answered 0xC000. So it did 10 times."


def test_a_pacs_that_is_down_for_72_hours_gets_everything(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    ids = [deliver(at=START + timedelta(minutes=n)) for n in range(3)]
    script = Script(SILENCE)
    settings = settings_of(tmp_path, maximum_retry_s=HOUR_S)
    down = Deliverer(settings, records, spool, send=script)
    end = START + HOURS_72 - timedelta(seconds=1)
    run_until_idle(down, records, START, end)
    assert {look(records, i).state for i in ids} == {DeliveryState.PENDING}
    assert 72 < len(script.calls) < 72 * 5  # every hour or so, not every second
    with StorageScp() as scp:
        up = Deliverer(settings_of(tmp_path, scp.port), records, spool)
        run_until_idle(up, records, START + HOURS_72, START + HOURS_72 + timedelta(hours=2))
    assert {look(records, i).state for i in ids} == {DeliveryState.SENT}
    assert sorted(stored.sop_instance_uid for stored in scp.objects) == [f"2.25.3.{n}" for n in (1, 2, 3)]


def test_after_the_last_try_a_delivery_is_parked_and_can_be_retried(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    ids = [deliver(), deliver()]
    script = Script(SILENCE)
    settings = settings_of(tmp_path, maximum_retry_s=HOUR_S)
    deliverer = Deliverer(settings, records, spool, send=script)
    last = run_until_idle(deliverer, records, START, START + 2 * HOURS_72)
    assert timedelta() <= last - (START + HOURS_72) <= timedelta(seconds=HOUR_S * 1.2)
    for delivery_id in ids:
        delivery = look(records, delivery_id)
        assert delivery.state is DeliveryState.PARKED
        assert delivery.last_error == "No connection. Tried for 72 hours."  # and not: was not tried
    assert all(event.alert for event in events(records, "delivery_parked"))
    with records.write() as session:
        retry_delivery(session, ids[0], now=last)
    script.outcomes = [judge_status(0)]
    assert deliverer.run_once(last + timedelta(minutes=1))
    assert look(records, ids[0]).state is DeliveryState.SENT


def test_the_wait_doubles_within_its_bounds(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    delivery_id = deliver()
    deliverer = Deliverer(
        settings_of(tmp_path, first_retry_s=10, maximum_retry_s=100), records, spool, send=Script(SILENCE)
    )
    waits, now = [], START
    for _ in range(12):
        assert deliverer.run_once(now)
        due = look(records, delivery_id).next_attempt_at
        age_s = (now - START).total_seconds()
        waits.append((due - now).total_seconds())
        expected = min(max(age_s, 10), 100)
        assert 0.8 * expected <= waits[-1] <= 1.2 * expected + 1
        now = due
    assert waits[0] < 13
    assert waits[-1] > 79
    assert len({round(wait, 3) for wait in waits[-3:]}) == 3  # jitter


def test_a_silent_destination_does_not_hold_up_the_others(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    for _ in range(20):
        deliver("pacs")
    healthy = deliver("other", at=START + timedelta(seconds=1))

    def send(path: Path, destination: Any, *, calling_ae_title: str) -> SendOutcome:
        calls.append(destination.name)
        return judge_status(0) if destination.name == "other" else SILENCE

    calls: list[str] = []
    deliverer = Deliverer(settings_of(tmp_path), records, spool, send=send)
    while deliverer.run_once(START + timedelta(seconds=2)):
        pass
    assert calls == ["pacs", "other"]
    assert look(records, healthy).state is DeliveryState.SENT
    later = START + timedelta(minutes=5)
    while deliverer.run_once(later):
        pass
    assert calls.count("pacs") == 2  # one more try, now that it is due again


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_file_that_is_not_what_was_made_is_never_sent(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str], damage: str
) -> None:
    delivery_id = deliver()
    path = spool.results_dir / "1.dcm"
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    script = Script(judge_status(0))
    Deliverer(settings_of(tmp_path), records, spool, send=script).run_once(START)
    assert script.calls == []
    delivery = look(records, delivery_id)
    assert delivery.state is DeliveryState.PARKED
    assert delivery.last_error
    (event,) = events(records, "delivery_parked")
    assert event.alert


def test_a_path_that_leads_out_of_the_spool_is_never_sent(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    delivery_id = deliver()
    with records.write() as session:
        session.get_one(Delivery, delivery_id).result.path = "../secret"
    script = Script(judge_status(0))
    Deliverer(settings_of(tmp_path), records, spool, send=script).run_once(START)
    assert script.calls == []
    assert look(records, delivery_id).state is DeliveryState.PARKED


def test_a_destination_that_was_removed_parks_with_a_sentence(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    delivery_id = deliver("gone")
    Deliverer(settings_of(tmp_path), records, spool, send=Script(judge_status(0))).run_once(START)
    delivery = look(records, delivery_id)
    assert delivery.state is DeliveryState.PARKED
    assert delivery.last_error == "There is no destination gone in the configuration any more."


def test_what_left_after_its_input_was_corrected_raises_an_alert(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    delivery_id = deliver()

    def send_while_cancelled(path: Path, destination: Any, *, calling_ae_title: str) -> SendOutcome:
        with records.write() as session:
            session.get_one(Delivery, delivery_id).state = DeliveryState.CANCELLED
        return judge_status(0)

    Deliverer(settings_of(tmp_path), records, spool, send=send_while_cancelled).run_once(START)
    assert look(records, delivery_id).state is DeliveryState.CANCELLED
    (event,) = events(records, "delivery_sent_without_claim")
    assert event.alert
    assert event.subject == delivery_id


def test_a_deliverer_that_died_loses_nothing(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    delivery_id = deliver()

    class Died(BaseException):
        pass

    def die(path: Path, destination: Any, *, calling_ae_title: str) -> SendOutcome:
        raise Died

    settings = settings_of(tmp_path, lease_s=60)
    with pytest.raises(Died):
        Deliverer(settings, records, spool, send=die).run_once(START)
    successor = Deliverer(settings, records, spool, send=Script(judge_status(0)))
    assert not successor.run_once(START + timedelta(seconds=50))
    assert successor.run_once(START + timedelta(seconds=70))
    assert look(records, delivery_id).state is DeliveryState.SENT


def test_the_lease_of_a_large_object_lasts_as_long_as_a_slow_line_takes(
    tmp_path: Path, records: Records, spool: Spool, deliver: Callable[..., str]
) -> None:
    delivery_id = deliver()
    with records.write() as session:
        session.get_one(Delivery, delivery_id).result.size_bytes = 1 << 30
    seen: list[datetime | None] = []

    def send(path: Path, destination: Any, *, calling_ae_title: str) -> SendOutcome:
        seen.append(look(records, delivery_id).lease_expires_at)
        return judge_status(0)

    Deliverer(settings_of(tmp_path, lease_s=60), records, spool, send=send).run_once(START)
    assert seen[0] is not None
    assert seen[0] - START > timedelta(hours=2)
