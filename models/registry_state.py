"""What the registry knows of one model name, in one small file, and the lock around changing it.

``active.json`` says which versions were installed and with which digest, which one is active, what was
active before, and what is withdrawn. It is only ever replaced whole, so a reader needs no lock.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from models.bundle_files import write_atomically
from models.errors import RegistryBusyError, RegistryError
from models.manifest import SemanticVersion, Sha256

STATE_FILE = "active.json"
MAX_HISTORY = 100

_POLL_S = 0.02


class ModelState(BaseModel):
    """The whole of ``active.json``.

    ``installed`` gives the model digest of every version; a folder that it does not name is not installed.
    The last of ``history`` is active; the ones before it are where rolling back leads to.
    ``golden_checked`` names the versions whose golden case came out right on this machine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    installed: dict[SemanticVersion, Sha256] = {}
    golden_checked: tuple[SemanticVersion, ...] = ()
    withdrawn: tuple[SemanticVersion, ...] = ()
    history: tuple[SemanticVersion, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not {*self.golden_checked, *self.withdrawn, *self.history} <= set(self.installed):
            raise ValueError("names a version that is not installed")
        return self

    @property
    def active(self) -> str | None:
        """The active version; None before the first activation."""
        return self.history[-1] if self.history else None

    def with_installed(self, version: str, digest: str, *, golden_checked: bool) -> ModelState:
        """The state after a version was put in place."""
        checked = {*self.golden_checked, version} if golden_checked else self.golden_checked
        return self._with(installed={**self.installed, version: digest}, golden_checked=sorted(checked))

    def with_active(self, version: str) -> ModelState:
        """The state after a version, golden case checked, was activated."""
        history = (*self.history, version)[-MAX_HISTORY:]
        return self._with(history=history, golden_checked=sorted({*self.golden_checked, version}))

    def with_withdrawn(self, version: str) -> ModelState:
        """The state after a version was withdrawn."""
        return self._with(withdrawn=sorted({*self.withdrawn, version}))

    def rolled_back(self) -> ModelState | None:
        """The state after going back to what was active before, withdrawn versions left out; or None."""
        history = self.history
        while history and (history[-1] == self.active or history[-1] in self.withdrawn):
            history = history[:-1]
        return self._with(history=history) if history else None

    def _with(self, **changes: object) -> ModelState:
        return ModelState.model_validate({**dict(self), **changes})


def load_state(folder: Path) -> ModelState:
    """Read ``active.json`` of one model's folder; an empty state where there is none.

    Raises
    ------
    RegistryError
        If the file is damaged or cannot be read.
    """
    try:
        return ModelState.model_validate_json((folder / STATE_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return ModelState()
    except (OSError, ValidationError) as error:
        raise RegistryError(
            f"{STATE_FILE} of the model {folder.name!r} cannot be read ({type(error).__name__}).",
            remedy="Restore the file from a backup, or remove the model's folder and add its bundles again.",
        ) from error


def save_state(folder: Path, state: ModelState) -> None:
    """Replace ``active.json`` of one model's folder, atomically and durably."""
    write_atomically(folder / STATE_FILE, f"{state.model_dump_json(indent=2)}\n".encode())


@contextmanager
def file_lock(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Hold an exclusive lock (flock) among all threads and processes; the system frees it when one dies.

    Raises
    ------
    RegistryBusyError
        If it is not free within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise RegistryBusyError(
                    f"The model registry has been held by another process for {timeout_s:g} s.",
                    remedy="Try again; if it stays, look for a process that hangs while adding a model.",
                )
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)  # frees the lock


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
