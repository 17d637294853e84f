"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from postgresql import PostgresServer
from programs import program

from service.records.migrate import upgrade


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has its share of the cores; OpenMP would take all of them
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    config.addinivalue_line("markers", "both_engines: runs with the records on SQLite and on PostgreSQL")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames and metafunc.definition.get_closest_marker("both_engines"):
        metafunc.parametrize("engine", ["sqlite", "postgresql"], indirect=True)


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


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """A PostgreSQL server for the whole run; ``database`` gives a test one of its own."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """Which database the records of a test are kept in; SQLite, or what SEGNODE_TEST_ENGINE says.

    Tests with the mark ``both_engines`` run on either.
    """
    return str(getattr(request, "param", os.environ.get("SEGNODE_TEST_ENGINE", "sqlite")))


@pytest.fixture
def empty_url(engine: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database without tables."""
    if engine == "postgresql":
        return str(request.getfixturevalue("postgresql").new_database())
    return f"sqlite:///{tmp_path / 'records.sqlite'}"


@pytest.fixture
def records_url(engine: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database with the tables of this release and nothing in them."""
    if engine == "postgresql":
        with request.getfixturevalue("postgresql").database() as url:
            yield url
        return
    url = f"sqlite:///{tmp_path / 'records.sqlite'}"
    upgrade(url)
    yield url
