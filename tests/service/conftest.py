"""Fixtures of the service's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_harness import ApiHarness

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


@pytest.fixture
def api(tmp_path: Path, records: Records) -> ApiHarness:
    """The HTTP interface over empty records, with a key for each role."""
    return ApiHarness(tmp_path, records, storage={"low_watermark_bytes": 0, "reserve_bytes": 0})
