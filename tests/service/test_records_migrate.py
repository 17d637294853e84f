"""The migrations make the tables that the code works on, keep the data, and can be undone."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import JSON, Column, Enum, MetaData, inspect, select, text

from service.errors import SettingsError
from service.records.database import Records, utc_now
from service.records.events import record_event
from service.records.migrate import current_revision, downgrade, head_revision, upgrade
from service.records.tables import Base, Event, Instance, Job

pytestmark = pytest.mark.both_engines


@pytest.fixture
def url(empty_url: str) -> str:
    return empty_url


def test_an_empty_database_gets_the_tables_of_the_code(url: str) -> None:
    assert current_revision(url) is None
    upgrade(url)
    assert current_revision(url) == head_revision()
    records = Records(url)
    with records.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    records.close()


def test_upgrading_twice_keeps_the_data(url: str) -> None:
    upgrade(url)
    records = Records(url)
    with records.write() as session:
        record_event(session, "test.event", actor="somebody", at=utc_now())
    upgrade(url)
    with records.read() as session:
        assert session.query(Event).one().kind == "test.event"
    records.close()


def test_the_first_migration_can_be_undone(url: str) -> None:
    upgrade(url)
    downgrade(url, "base")
    records = Records(url)
    with records.engine.connect() as connection:
        names = inspect(connection).get_table_names()
    records.close()
    assert set(names) <= {"alembic_version"}


AT = datetime(2026, 1, 1, 12)  # noqa: DTZ001 - the times of the records are naive, in UTC
FIRST_ROWS: dict[str, dict[str, Any]] = {
    "api_key": {"key_id": "k", "name": "n", "role": "admin", "key_hash": "h", "created_at": AT},
    "event": {"at": AT, "kind": "k", "alert": True, "actor": "a", "subject": "", "detail": {"ü": 1}},
    "series": {
        "series_id": "s",
        "study_instance_uid": "1.2",
        "series_instance_uid": "1.2.3",
        "state": "complete",
        "instance_count": 1,
        "first_instance_at": AT,
        "last_instance_at": AT,
    },
    "instance": {
        "instance_id": "i",
        "series_id": "s",
        "study_instance_uid": "1.2",
        "series_instance_uid": "1.2.3",
        "sop_instance_uid": "1.2.3.4",
        "sop_class_uid": "1",
        "transfer_syntax_uid": "1",
        "kind": "image",
        "identity_digest": "d",
        "revision": 1,
        "current": True,
        "path": "p",
        "size_bytes": 2**31 - 1,
        "sha256": "d",
        "received_at": AT,
    },
    "job": {
        "job_id": "j",
        "origin": "dicom",
        "model_name": "m",
        "destinations": ["pacs"],
        "input_key": "k",
        "series_id": "s",
        "owner_key_id": "k",
        "priority": 0,
        "state": "succeeded",
        "attempt": 1,
        "failures": 0,
        "lapses": 0,
        "progress_fraction": 1.0,
        "summary": {"volume_ml": 1.5},
        "created_at": AT,
    },
    "job_input": {"job_id": "j", "position": 0, "channel": 0, "instance_id": "i", "path": "p"},
    "result": {
        "result_id": "r",
        "job_id": "j",
        "kind": "segmentation",
        "path": "p",
        "size_bytes": 1,
        "sha256": "d",
        "created_at": AT,
    },
    "delivery": {
        "delivery_id": "d",
        "result_id": "r",
        "job_id": "j",
        "destination": "pacs",
        "state": "sent",
        "attempt": 1,
        "failure_statuses": 0,
        "next_attempt_at": AT,
        "created_at": AT,
    },
}


def _first_rows(records: Records, *, put: bool = False) -> dict[str, list[dict[str, Any]]]:
    """What stands in the columns of the first tables, after putting a row into each if told to."""
    metadata = MetaData()
    found = {}
    with records.engine.connect() as connection:
        metadata.reflect(connection)
        for name, row in FIRST_ROWS.items():
            table = metadata.tables[name]
            if put:
                connection.execute(table.insert(), row)
            columns = [table.c[column] for column in row]
            found[name] = [dict(each._mapping) for each in connection.execute(select(*columns))]
        connection.commit()
    return found


def _put_later_rows(records: Records) -> int:
    """A row in each table that the first release did not have, of the first rows where it refers to some."""
    later = [table for table in Base.metadata.sorted_tables if table.name not in FIRST_ROWS]
    rows: dict[str, dict[str, Any]] = dict(FIRST_ROWS)
    with records.engine.begin() as connection:
        for table in later:
            rows[table.name] = {column.name: _value(column, rows) for column in table.columns}
            connection.execute(table.insert(), rows[table.name])
    return len(later)


def _value(column: Column[Any], rows: dict[str, dict[str, Any]]) -> Any:
    for key in column.foreign_keys:
        return rows[key.column.table.name][key.column.name]
    if isinstance(column.type, Enum):
        assert column.type.enum_class is not None
        return next(iter(column.type.enum_class))
    if isinstance(column.type, JSON):
        return {}
    values: dict[type, Any] = {str: "x", int: 1, float: 1.0, bool: True, datetime: AT}
    return values[column.type.python_type]


def test_the_first_tables_come_up_to_this_release_and_back_with_what_is_in_them(url: str) -> None:
    upgrade(url, "0001")
    records = Records(url)
    assert _first_rows(records, put=True) == {name: [row] for name, row in FIRST_ROWS.items()}
    for move, revision in ((upgrade, "head"), (downgrade, "0001"), (upgrade, "head")):
        move(url, revision)
        assert _first_rows(records) == {name: [row] for name, row in FIRST_ROWS.items()}, revision
        if move is upgrade:
            assert _put_later_rows(records) > 5
    with records.write() as session:
        session.query(Instance).one().size_bytes = 2**33  # past what an integer of four bytes holds
        assert session.query(Job).one().summary == {"volume_ml": 1.5}
    downgrade(url, "0001")
    (instance,) = _first_rows(records)["instance"]
    assert instance == FIRST_ROWS["instance"] | {"size_bytes": 2**33}
    records.close()


def test_a_database_of_a_newer_release_is_refused(url: str) -> None:
    upgrade(url)
    records = Records(url)
    with records.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    records.close()
    with pytest.raises(SettingsError, match="9999, which this release does not know"):
        upgrade(url)


def test_several_processes_may_upgrade_at_once(url: str) -> None:
    program = f"from service.records.migrate import upgrade; upgrade({url!r})"
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [p.wait(timeout=60) for p in processes] == [0, 0, 0, 0]
    assert current_revision(url) == head_revision()
