"""``segnode audit`` and the end of a key, on the command line."""

from __future__ import annotations

import logging
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.audit_trail import HEAD_FILE, AuditBrokenError, HeadKeeper
from service.cli import app
from service.records.database import Records, utc_now

Run = Callable[..., Result]
DATABASE = Path("segnode-data/segnode.sqlite")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level, hook, show = root.handlers[:], root.level, sys.excepthook, warnings.showwarning
    yield lambda *arguments: CliRunner().invoke(app, [str(each) for each in arguments])
    root.handlers[:], sys.excepthook, warnings.showwarning = handlers, hook, show
    root.setLevel(level)


def change(statement: str) -> None:
    with sqlite3.connect(DATABASE) as connection:
        connection.execute(statement)
    connection.close()


def test_a_key_ends_on_the_day_that_was_said(run: Run) -> None:
    made = run("keys", "create", "notebook", "--expires", "2999-12-31")
    assert made.exit_code == 0, made.stderr
    assert "2999-12-31 00:00" in run("keys", "list").stdout
    both = run("keys", "create", "other", "--expires", "2999-12-31", "--days", "3")
    assert both.exit_code == 2
    assert "not both" in both.stderr
    past = run("keys", "create", "other", "--expires", "2000-01-01")
    assert "would have expired already" in str(past.exception)


def test_a_trail_is_whole_until_somebody_touches_it(run: Run) -> None:
    for name in ("a", "b", "c"):
        assert run("keys", "create", name).exit_code == 0
    head = run("audit", "head").stdout.strip()
    assert head.startswith("3:")
    whole = run("audit", "verify", "--head", head)
    assert whole.exit_code == 0, whole.stderr
    assert "All 3 line(s) are as they were written." in whole.stderr
    assert whole.stdout.strip() == head
    assert run("audit", "head").stdout.startswith("4:")  # that it was verified stands in it too
    change("DELETE FROM event WHERE chain_index = 2")
    broken = run("audit", "verify", "--head", head)
    assert broken.exit_code == 1
    assert isinstance(broken.exception, AuditBrokenError)
    assert "Line 2 is missing." in broken.stderr


def test_the_head_that_the_node_kept_shows_a_trail_that_was_cut_off(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        run("keys", "create", name)
    records = Records(f"sqlite:///{DATABASE}")
    assert HeadKeeper(records, DATABASE.parent / HEAD_FILE).keep(utc_now())
    heads = tmp_path / "heads.txt"
    heads.write_text(run("audit", "head").stdout)
    records.close()
    change("DELETE FROM event WHERE chain_index = 3")
    for options in ((), ("--head-file", heads)):
        broken = run("audit", "verify", *options)
        assert isinstance(broken.exception, AuditBrokenError)
        assert "Line 3 is missing at the end." in broken.stderr or "was made anew" in broken.stderr


@pytest.mark.parametrize("head", ["3", "x:y", "3:abc"])
def test_what_is_no_head_is_not_understood(run: Run, head: str) -> None:
    assert run("audit", "verify", "--head", head).exit_code == 2
