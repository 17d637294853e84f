"""What a file system refuses, in a line for whoever gave the command."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import typer

from models.errors import SegnodeError

_FREE_SPACE = (
    "Free some space: where the output goes, in the data folder or the cache, and in the folder of temporary "
    "files (TMPDIR)."
)
_RIGHTS = "Give the user who runs this the right to it, or name another place."
_REMEDIES = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "Name a place that can be written to.",
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
}


class FilesError(SegnodeError):
    """Told when a file or a folder cannot be used as a command must use it."""

    code = "FILES"


def files_error_of(error: OSError) -> FilesError | None:
    """What an error of the file system means for whoever asked; None for one that names no file.

    A disk that is full is told without a file too: the system does not say which one was written.
    """
    remedy = _REMEDIES.get(error.errno or 0)
    if error.filename is None and remedy is not _FREE_SPACE:
        return None
    what = f"{error.filename}: " if error.filename is not None else ""
    reason = error.strerror or type(error).__name__
    return FilesError(f"{what}{reason}.", remedy=remedy or "Check the path, and the disk that it is on.")


def check_place(path: Path, option: str) -> None:
    """Say before the work, and not after it, that a file could not be written. Raises typer.BadParameter."""
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}", param_hint=option)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"the folder {path.parent} cannot be written to", param_hint=option)
