"""A PostgreSQL server of the tests' own: a cluster in a temporary folder, reached by a socket in it alone."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from programs import program
from psycopg import sql
from sqlalchemy import make_url

from service.records.migrate import upgrade
from service.records.tables import Base

_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",  # a test's database need not outlive the machine
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "timezone": "Asia/Kathmandu",  # a server's own zone must not matter
}


class PostgresServer:
    """A running server. Its collation is a language's and not the bytes': what depends on that shows."""

    def __init__(self) -> None:
        # Not below pytest's folder: that one is closed to the user that the server has to run as, and the
        # path of a socket may have 107 bytes only.
        self.folder = Path(tempfile.mkdtemp(prefix="segnode-pg-", dir="/tmp"))
        self._user: str | None = None
        if os.geteuid() == 0:  # the server refuses to run as root
            self._user = "postgres" if _is_user("postgres") else "nobody"
            shutil.chown(self.folder, self._user)
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self._clean: list[str] = []

    def __enter__(self) -> Self:
        initdb = program("initdb", "postgresql")
        options = ["--auth=trust", "--username=segnode", "--encoding=UTF8", "--no-sync", "--locale=C.UTF-8"]
        collation = ["--locale-provider=icu", "--icu-locale=en"]
        self._run(initdb, *options, *collation, "-D", str(self.folder / "data"))
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(at_once=True)
        shutil.rmtree(self.folder)

    def start(self) -> None:
        options = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program("postgres", "postgresql"), "-D", self.folder / "data", "-k", self.folder, *options],
                stdout=log,
                stderr=log,
                user=self._user,
                cwd=self.folder,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                self._connect("postgres").close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.05)

    def stop(self, *, at_once: bool = False) -> None:
        """Close every connection and end; ``at_once`` as if it had been killed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT if at_once else signal.SIGINT)
        self._process.wait(60)

    @contextmanager
    def database(self) -> Iterator[str]:
        """URL of a database with the tables of this release, empty; others use it again afterwards."""
        url = self._clean.pop() if self._clean else None
        if url is None:
            url = self.new_database()
            upgrade(url)
        yield url
        self._empty(make_url(url).database or "")
        self._clean.append(url)

    def new_database(self, *, encoding: str | None = None) -> str:
        """Make a database without tables; its URL."""
        self._databases += 1
        name = f"node{self._databases}"
        command = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if encoding is not None:
            options = sql.SQL(" TEMPLATE template0 LOCALE_PROVIDER libc LOCALE 'C' ENCODING {}")
            command += options.format(sql.Literal(encoding))
        with self._connect("postgres") as connection:
            connection.execute(command)
        return f"postgresql+psycopg://segnode@/{name}?host={self.folder}"

    def _empty(self, database: str) -> None:
        with self._connect(database) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            tables = sql.SQL(", ").join(sql.Identifier(name) for name in Base.metadata.tables)
            connection.execute(sql.SQL("TRUNCATE {} RESTART IDENTITY").format(tables))

    def _connect(self, database: str) -> psycopg.Connection:
        return psycopg.connect(host=str(self.folder), user="segnode", dbname=database, autocommit=True)

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, user=self._user, cwd=self.folder, stdout=subprocess.DEVNULL)


def _is_user(name: str) -> bool:
    return any(entry.pw_name == name for entry in pwd.getpwall())
