"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import program


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real test data; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SEGNODE_TEST_DATA", str(default))).resolve()
    if not folder.is_dir():
        pytest.skip("no real test data here: set SEGNODE_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], Path]:
    """Find a program of the machine. Where it is absent the test skips, or fails if CI is set."""

    def find(name: str) -> Path:
        return Path(program(name, "see .ci/run"))

    return find
