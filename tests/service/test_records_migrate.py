"""The migrations make the tables that the code works on, keep the data, and can be undone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from service.errors import SettingsError
from service.records.database import Records, utc_now
from service.records.events import record_event
from service.records.migrate import current_revision, downgrade, head_revision, upgrade
from service.records.tables import Base, Event


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'records.sqlite'}"


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
        names = connection.scalars(text("SELECT name FROM sqlite_master WHERE type = 'table'")).all()
    records.close()
    assert set(names) <= {"alembic_version", "sqlite_sequence"}


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
