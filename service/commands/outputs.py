"""The files that a command was asked for, put in their places together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from service.spool import fsync_directory, fsync_file


def replace_together(wanted: Mapping[Path, Path | None]) -> None:
    """Make paths hold what one run has made, and nothing that an earlier run has left there.

    Former files are moved aside before the first new one is put in place, so that files of two runs never
    stand beside each other. Whatever fails, every path holds afterwards what it held before. A process that
    is killed right in between leaves paths empty, their former files as ``.NAME.former`` beside them.

    Parameters
    ----------
    wanted : mapping of Path to Path or None
        For every path the file that is copied to it; None where the run has made none: it is empty then.

    Raises
    ------
    OSError
        If a file cannot be copied or moved.
    """
    unfinished = {path: _beside(path, "part") for path in wanted}
    former = {path: _beside(path, "former") for path in wanted}
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        os.replace(source, target)
        moved.append((source, target))

    try:
        for path, made in wanted.items():
            if made is not None:
                shutil.copyfile(made, unfinished[path])
                fsync_file(unfinished[path])
        for path in wanted:
            if os.path.lexists(path):
                move(path, former[path])
        for path, made in wanted.items():
            if made is not None:
                move(unfinished[path], path)
    except BaseException:
        for source, target in reversed(moved):
            os.replace(target, source)
        raise
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
    for path in former.values():
        path.unlink(missing_ok=True)
    for folder in {path.parent for path in wanted}:
        fsync_directory(folder)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")
