"""The audit trail shows if a line was removed, changed, moved, put in, or cut off at its end."""

from __future__ import annotations

import hashlib
import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from api_harness import ApiHarness, assert_problem
from sqlalchemy import select, text
from structlog.testing import capture_logs

from service.audit_trail import AuditBrokenError, Head, HeadKeeper, read_head, read_head_file, verify
from service.keys import create_key, revoke
from service.records import chain
from service.records.database import Records
from service.records.events import record_event
from service.records.migrate import downgrade, upgrade
from service.records.tables import Event, ResultKind, Role

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC).replace(tzinfo=None)
LINES = 6

BOTH_ENGINES = pytest.mark.parametrize("engine", ["sqlite", "postgresql"], indirect=True)
CHANGED = "Line {} is not what was written there."


def write_lines(records: Records, count: int = LINES) -> Head:
    for number in range(count):
        with records.write() as session:
            record_event(
                session,
                "test.line",
                actor=f"person {number}",
                at=NOW + timedelta(microseconds=number),
                subject=str(number),
                detail={"b": [1.5, None, "é"], "a": {"z": number, "y": True}},
            )
    with records.read() as session:
        return read_head(session)


def faults(records: Records, *heads: Head) -> list[str]:
    with records.read() as session:
        return verify(session, heads).faults


def run(records: Records, *statements: str) -> None:
    with records.engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


@BOTH_ENGINES
def test_a_trail_that_nobody_touched_is_whole(records: Records) -> None:
    assert faults(records) == []
    head = write_lines(records)
    assert head.chain_index == LINES
    assert faults(records, head) == []
    with records.read() as session:
        rows = session.scalars(select(Event).order_by(Event.chain_index)).all()
    assert [row.chain_index for row in rows] == list(range(1, LINES + 1))
    assert len({row.digest for row in rows}) == LINES


def test_the_digest_is_what_the_documentation_says(records: Records) -> None:
    write_lines(records, 1)
    with records.read() as session:
        row = session.scalars(select(Event)).one()
    line = {
        "index": 1,
        "at": "2026-03-01T12:00:00.000000",
        "kind": "test.line",
        "alert": False,
        "actor": "person 0",
        "origin": "",
        "outcome": "success",
        "subject": "0",
        "detail": {"b": [1.5, None, "é"], "a": {"z": 0, "y": True}},
    }
    written = "0" * 64 + "\n" + json.dumps(line, sort_keys=True, separators=(",", ":"))
    assert row.digest == hashlib.sha256(written.encode()).hexdigest()


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (["DELETE FROM event WHERE chain_index = 3"], ["Line 3 is missing."]),
        (["DELETE FROM event WHERE chain_index IN (1, 2)"], ["Lines 1 to 2 are missing."]),
        (["DELETE FROM event WHERE chain_index >= 5"], ["Lines 5 to 6 are missing at the end."]),
        (["DELETE FROM event"], ["Lines 1 to 6 are missing at the end."]),
        (["UPDATE event SET actor = 'nobody' WHERE chain_index = 4"], [CHANGED.format(4)]),
        (["UPDATE event SET outcome = 'x' WHERE chain_index = 6"], [CHANGED.format(6)]),
        (["UPDATE event SET origin = 'x' WHERE chain_index = 1"], [CHANGED.format(1)]),
        (["UPDATE event SET subject = 'x' WHERE chain_index = 2"], [CHANGED.format(2)]),
        (["UPDATE event SET kind = 'x' WHERE chain_index = 2"], [CHANGED.format(2)]),
        (["UPDATE event SET alert = true WHERE chain_index = 2"], [CHANGED.format(2)]),
        (["UPDATE event SET detail = '{}' WHERE chain_index = 2"], [CHANGED.format(2)]),
        (
            ["UPDATE event SET at = '2026-03-01 12:00:00.000009' WHERE chain_index = 2"],
            [CHANGED.format(2)],
        ),
        (
            [
                "UPDATE event SET chain_index = 99 WHERE chain_index = 2",
                "UPDATE event SET chain_index = 2 WHERE chain_index = 3",
                "UPDATE event SET chain_index = 3 WHERE chain_index = 99",
            ],
            # what follows the two is digested over the digest of the other
            [CHANGED.format(n) for n in (2, 3, 4)],
        ),
        (
            ["UPDATE event SET chain_index = NULL WHERE chain_index = 2"],
            ["Line 2 is missing.", "1 line(s) were put in beside the chain."],
        ),
    ],
)
def test_each_kind_of_tampering_is_found(records: Records, statements: list[str], said: list[str]) -> None:
    head = write_lines(records)
    run(records, *statements)
    assert faults(records, head) == said


def test_a_chain_that_was_made_anew_is_found_by_any_head_that_was_kept(records: Records) -> None:
    early = write_lines(records, 2)
    late = write_lines(records, 4)
    with records.engine.begin() as connection:
        connection.execute(text("DELETE FROM event WHERE chain_index = 2"))
        previous = chain.GENESIS
        rows = connection.execute(select(Event).order_by(Event.chain_index)).all()
        for index, row in enumerate(rows, 1):
            previous = chain.line_digest(
                previous,
                chain_index=index,
                **{
                    name: getattr(row, name)
                    for name in ("at", "kind", "alert", "actor", "origin", "outcome", "subject", "detail")
                },
            )
            connection.execute(
                text("UPDATE event SET chain_index = :i, digest = :d WHERE event_id = :e"),
                {"i": index, "d": previous, "e": row.event_id},
            )
    assert faults(records) == []  # in itself it is whole
    assert faults(records, early) == ["The chain up to line 2 was made anew: its head was another."]
    assert faults(records, late) == ["Line 6 is missing at the end."]


def test_nothing_of_a_transaction_that_was_rolled_back_is_in_the_chain(records: Records) -> None:
    write_lines(records, 1)

    def fail() -> None:
        with records.write() as session:
            record_event(session, "test.lost", actor="a", at=NOW)
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    head = write_lines(records, 1)
    assert head.chain_index == 2
    assert faults(records, head) == []


def test_several_lines_of_one_transaction_stand_in_their_order(records: Records) -> None:
    with records.write() as session:
        for number in range(3):
            record_event(session, f"test.{number}", actor="a", at=NOW)
            if number == 1:
                session.flush()  # as a query in between does
    with records.read() as session:
        assert session.scalars(select(Event.kind).order_by(Event.chain_index)).all() == [
            "test.0",
            "test.1",
            "test.2",
        ]
    assert faults(records) == []


@BOTH_ENGINES
def test_many_writers_at_once_make_one_chain(records: Records) -> None:
    others = [Records(records.url) for _ in range(4)]  # as other processes have them
    start = threading.Barrier(len(others))

    def write(mine: Records, number: int) -> None:
        start.wait()
        for line in range(10):
            with mine.write() as session:
                record_event(session, "test.line", actor=f"{number}", at=NOW, subject=str(line))

    threads = [threading.Thread(target=write, args=(each, n)) for n, each in enumerate(others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in others:
        each.close()
    with records.read() as session:
        head = read_head(session)
    assert head.chain_index == 40
    assert faults(records, head) == []


def test_lines_from_before_the_chain_get_their_places_at_the_upgrade(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.sqlite'}"
    upgrade(url, "0004")
    records = Records(url)
    for number in range(3):
        run(
            records,
            "INSERT INTO event (at, kind, alert, actor, subject, detail) VALUES "
            f"('2026-01-0{number + 1} 00:00:00.000000', 'old.line', {number % 2}, 'a', 's', "
            f'\'{{"n": {number}, "é": 1.50}}\')',
        )
    upgrade(url)
    assert faults(records) == []
    assert write_lines(records, 1).chain_index == 4
    assert faults(records) == []
    downgrade(url, "0004")
    with records.engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM event")) == 4
    records.close()


# --- The head


def test_the_head_is_kept_and_never_goes_back(records: Records, tmp_path: Path) -> None:
    path = tmp_path / "head.json"
    keeper = HeadKeeper(records, path)
    assert read_head_file(path) is None
    first = write_lines(records)
    with capture_logs() as logs:
        assert keeper.keep(NOW)
        assert keeper.keep(NOW)
    assert [line["digest"] for line in logs if line["event"] == "audit.head"] == [first.digest]
    assert read_head_file(path) == first
    run(records, "DELETE FROM event WHERE chain_index > 3")
    with capture_logs() as logs:
        assert not keeper.keep(NOW)
        assert not keeper.keep(NOW)
    assert [line["event"] for line in logs] == ["audit.broken"]
    assert read_head_file(path) == first
    with records.read() as session:
        (alert,) = session.scalars(select(Event).where(Event.kind == "audit.broken"))
    assert alert.alert
    assert alert.detail["kept"]["chain_index"] == LINES


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"chain_index": 1, "digest": "x"}', "\xff"])
def test_a_head_file_that_somebody_spoiled_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "head.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(AuditBrokenError, match=r"head\.json cannot be read"):
        read_head_file(path)


@pytest.mark.parametrize("head", ["", "1", "1:x", "x:" + "0" * 64, "1:" + "G" * 64, "1:" + "0" * 63])
def test_what_is_no_head_is_refused(head: str) -> None:
    with pytest.raises(ValueError, match="INDEX:DIGEST"):
        Head.parse(head)
    assert Head.parse(f"7:{'a' * 64}\n") == Head(7, "a" * 64)


# --- What is in it


def test_who_did_what_from_where_and_with_what_outcome(api: ApiHarness) -> None:
    job = api.enqueue(owner="uploader")
    api.succeed(job)
    api.get(f"/api/v1/segmentations/{job}/labelmap", key="uploader")
    api.get(f"/api/v1/segmentations/{job}/labelmap", key="uploader")  # again within the hour: one line
    api.get(f"/api/v1/segmentations/{job}/measurements", key="operator")
    assert_problem(api.get("/api/v1/audit", key="uploader"), 403, "ROLE_TOO_LOW")
    assert_problem(api.get("/api/v1/jobs", key=None), 401, "KEY_MISSING")
    api.delete(f"/api/v1/segmentations/{job}", key="admin")
    with api.records.read() as session:
        rows = session.scalars(select(Event).order_by(Event.chain_index)).all()
    told = [
        (row.kind, row.actor, row.outcome, row.origin, row.subject, row.detail.get("operation"))
        for row in rows
        if row.kind != "key.created"
    ]
    assert told == [
        ("result.read", "uploader", "success", "127.0.0.1", job, "read_labelmap"),
        ("result.read", "operator", "success", "127.0.0.1", job, "read_measurements"),
        ("access.refused", "uploader", "refused", "127.0.0.1", "", "list_events"),
        ("access.refused", "", "refused", "127.0.0.1", "", "list_jobs"),
        ("job.deleted", "admin", "success", "127.0.0.1", job, None),
    ]
    assert faults(api.records) == []


def test_what_cannot_be_recorded_is_not_handed_out(api: ApiHarness) -> None:
    job = api.enqueue(owner="uploader")
    labelmap = api.succeed(job)[ResultKind.LABELMAP]
    run(api.records, "ALTER TABLE event RENAME TO gone")
    response = api.get(f"/api/v1/segmentations/{job}/labelmap", key="uploader")
    assert response.status_code >= 500
    assert labelmap not in response.content


def test_the_trail_is_paged_with_its_chain(api: ApiHarness) -> None:
    with api.records.write() as session:
        key_id, _ = create_key(session, "x", Role.UPLOADER, now=NOW)
        revoke(session, key_id, now=NOW)
    first = api.get("/api/v1/audit?limit=2").json()
    assert [item["kind"] for item in first["items"]] == ["key.revoked", "key.created"]
    assert [item["chain_index"] for item in first["items"]] == [5, 4]
    assert {item["outcome"] for item in first["items"]} == {"success"}
    assert all(len(item["digest"]) == 64 for item in first["items"])
    second = api.get(f"/api/v1/audit?limit=2&after={first['next']}").json()
    assert [item["chain_index"] for item in second["items"]] == [3, 2]
