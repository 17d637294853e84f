"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real test data; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SEGNODE_TEST_DATA", str(default))).resolve()
    if not folder.is_dir():
        pytest.skip("no real test data here: set SEGNODE_TEST_DATA to its folder")
    return folder
