"""Fixtures of the service's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.records.database import Records
from service.records.migrate import upgrade


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    """Empty records on SQLite, as a new node has them."""
    url = f"sqlite:///{tmp_path / 'records.sqlite'}"
    upgrade(url)
    opened = Records(url)
    yield opened
    opened.close()
