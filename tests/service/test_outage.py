"""A database that is away, not made yet or of the wrong kind: one clear line, and never a traceback."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_harness import ApiHarness, assert_problem
from command_line import Segnode, command_line
from postgresql import PostgresServer
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError
from structlog.testing import capture_logs

from service.doctor import check_database
from service.errors import SettingsError
from service.records import outage
from service.records.database import Records
from service.records.migrate import upgrade
from service.records.outage import outage_of, reason_of, wait_for_records
from service.settings import Settings

NOBODY = "postgresql+psycopg://segnode:hush@127.0.0.1:1/segnode"


@pytest.fixture
def segnode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Segnode]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(outage, "PATIENCE_S", 0.0)
    with command_line(tmp_path, monkeypatch, capfd) as run:
        yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- Tables that are not there


@pytest.mark.both_engines
@pytest.mark.parametrize(
    ("change", "undo", "path"),
    [
        ("job RENAME TO gone", "gone RENAME TO job", "/api/v1/jobs"),
        ("job RENAME COLUMN priority TO gone", "job RENAME COLUMN gone TO priority", "/api/v1/jobs"),
        ("api_key RENAME TO gone", "gone RENAME TO api_key", "/api/v1/jobs"),
        ("event RENAME TO gone", "gone RENAME TO event", "/api/v1/audit"),
    ],
)
def test_tables_of_another_release_are_a_problem_with_its_remedy(
    api: ApiHarness, change: str, undo: str, path: str
) -> None:
    with api.records.write() as session:
        session.execute(text(f"ALTER TABLE {change}"))
    response = api.get(path)
    with api.records.write() as session:  # other tests use the database again
        session.execute(text(f"ALTER TABLE {undo}"))
    problem = assert_problem(response, 503, "RECORDS_UNAVAILABLE")
    assert "a table or a column is missing" in problem["detail"]
    assert "Start the processes of the node again" in problem["remedy"]


@pytest.mark.both_engines
def test_what_cannot_be_audited_is_told_as_an_outage(api: ApiHarness) -> None:
    job = api.enqueue(owner="uploader")
    labelmap = api.succeed(job)
    with api.records.write() as session:
        session.execute(text("ALTER TABLE event RENAME TO gone"))
    response = api.get(f"/api/v1/segmentations/{job}/labelmap", key="uploader")
    with api.records.write() as session:
        session.execute(text("ALTER TABLE gone RENAME TO event"))
    assert_problem(response, 503, "RECORDS_UNAVAILABLE")
    assert not any(content in response.content for content in labelmap.values())


@pytest.mark.both_engines
def test_a_node_without_tables_is_not_ready(api: ApiHarness) -> None:
    with api.records.write() as session:
        session.execute(text("ALTER TABLE job RENAME TO gone"))
    readiness = api.get("/readyz", key=None)
    with api.records.write() as session:
        session.execute(text("ALTER TABLE gone RENAME TO job"))
    assert readiness.status_code == 503
    assert readiness.json()["records"] is False


@pytest.mark.both_engines
def test_a_fault_of_the_program_is_no_outage(records: Records) -> None:
    for statement in ("SELECT nonsense(", "INSERT INTO event (chain_index) VALUES (NULL)"):
        with (
            pytest.raises((OperationalError, ProgrammingError, IntegrityError)) as raised,
            records.write() as s,
        ):
            s.execute(text(statement))
        if not records.is_sqlite or isinstance(raised.value, IntegrityError):  # SQLite has one class for both
            assert outage_of(raised.value) is None, statement
        assert reason_of(raised.value) == "", "it could quote a row"
    assert outage_of(TypeError("x")) is None


# --- A server that is away


@pytest.mark.parametrize("role", ["receive", "api", "worker", "serve"])
def test_each_role_ends_with_one_line_where_the_server_is_away(
    segnode: Segnode, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setenv("SEGNODE_DATABASE_URL", NOBODY)
    ended = segnode(role)
    lines = [line for line in ended.err.splitlines() if not line.startswith("{")]
    assert ended.status == 1  # compose starts it again
    assert lines[0].startswith(
        "RECORDS_UNAVAILABLE: The database postgresql+psycopg://segnode:***@127.0.0.1:1"
    )
    assert "Connection refused" in lines[0]
    assert len(lines) == 2  # the other one is the remedy
    assert "hush" not in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    "command", [("keys", "list"), ("models", "rollback", "threshold"), ("audit", "verify")]
)
def test_a_command_says_why_the_records_cannot_be_reached(
    segnode: Segnode, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("SEGNODE_DATABASE_URL", NOBODY)
    ended = segnode(*command)
    assert ended.status == 1
    assert "RECORDS_UNAVAILABLE" in ended.err
    assert "Connection refused" in ended.err
    assert "Traceback" not in ended.err


def test_an_error_of_the_program_keeps_its_traceback(
    segnode: Segnode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "wait_for_records", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        segnode("receive")


def test_a_server_that_comes_up_is_waited_for(postgresql: PostgresServer) -> None:
    url = postgresql.new_database()
    postgresql.stop()
    stop, reached = threading.Event(), []
    with capture_logs() as logs:
        waiting = threading.Thread(target=lambda: reached.append(wait_for_records(url, stop)))
        waiting.start()
        postgresql.start()
        waiting.join(60)
    assert reached == [True]
    assert [line["event"] for line in logs] in ([], ["records.away"])  # once, if it had to wait at all


def test_a_process_that_is_told_to_stop_does_not_wait_on() -> None:
    stop = threading.Event()
    stop.set()
    with capture_logs() as logs:
        assert wait_for_records(NOBODY, stop) is False
    assert [line["event"] for line in logs] == ["records.away"]
    assert "hush" not in json.dumps(logs)


def test_a_file_is_not_waited_for(tmp_path: Path) -> None:
    assert wait_for_records(f"sqlite:///{tmp_path / 'none.sqlite'}", threading.Event())


# --- A database of the wrong kind


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_without_unicode_is_refused_at_the_start(
    postgresql: PostgresServer, segnode: Segnode, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    url = postgresql.new_database(encoding=encoding)
    for begin in (upgrade, lambda url: wait_for_records(url, threading.Event())):
        with pytest.raises(SettingsError, match=f"encoded in {encoding}; the records need UTF8") as raised:
            begin(url)
        assert "ENCODING 'UTF8'" in raised.value.remedy
    (finding,) = check_database(Settings(database_url=url))
    assert encoding in finding.message
    monkeypatch.setenv("SEGNODE_DATABASE_URL", url)
    ended = segnode("worker")
    assert (ended.status, ended.err.splitlines()[0].partition(":")[0]) == (1, "SETTINGS_INVALID")
