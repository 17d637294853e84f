"""The folder in which received objects, uploads and results lie, and the rules of its disk.

A file comes into being in three steps, so that it is either whole and durable or not there: it is written
under a temporary name on the same file system, its bytes are forced to the disk, and it is renamed to its
final name, after which the folder that holds the name is forced to the disk too.

File names are the node's own identifiers; nothing that came over the network is ever part of a path.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

from service.errors import NotFoundError, StorageFullError


def fsync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    _fsync(path, os.O_RDONLY)


def fsync_directory(path: Path) -> None:
    """Force the names in a folder to the disk: a new file's name is safe only after this."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Spool:
    """The spool of one node. Making one creates its folders, readable by the node's user alone.

    Parameters
    ----------
    root : Path
        The spool's folder. Every folder of it must be on one file system: a local disk, or one that several
        hosts share and that fits what deploy/SCALE-OUT.md asks of it.
    low_watermark_bytes : int
        Nothing new is accepted while less than this is free.
    reserve_bytes : int
        What is being received stops before less than this is free: the rest is for results and the records.
    """

    def __init__(self, root: Path, *, low_watermark_bytes: int = 0, reserve_bytes: int = 0) -> None:
        self.root = root.resolve()
        self.low_watermark_bytes = max(low_watermark_bytes, reserve_bytes)
        self.reserve_bytes = reserve_bytes
        self._making_folders = threading.Lock()
        for folder in (self.incoming_dir, self.instances_dir, self.uploads_dir, self.results_dir):
            self.make_folder(folder)

    @property
    def incoming_dir(self) -> Path:
        """Temporary files of objects that are being received."""
        return self.root / "incoming"

    @property
    def instances_dir(self) -> Path:
        return self.root / "instances"

    @property
    def uploads_dir(self) -> Path:
        return self.root / "uploads"

    @property
    def results_dir(self) -> Path:
        return self.root / "results"

    def instance_path(self, instance_id: str) -> Path:
        """Where a received object lies: spread over 256 folders, so that none grows without limit."""
        return self.instances_dir / instance_id[:2] / f"{instance_id}.dcm"

    def relative(self, path: Path) -> str:
        """The path as the records keep it: relative to the spool, with forward slashes."""
        return path.relative_to(self.root).as_posix()

    def absolute(self, relative: str) -> Path:
        """The file that a path of the records names.

        Raises
        ------
        NotFoundError
            If the path leads out of the spool.
        """
        path = (self.root / relative).resolve()
        if not path.is_relative_to(self.root) or path == self.root:
            raise NotFoundError("A path in the records leads out of the spool.")
        return path

    def free_bytes(self) -> int:
        """What an ordinary user may still write to the spool's disk."""
        return shutil.disk_usage(self.root).free

    def check_space(self, needed_bytes: int = 0) -> None:
        """Ask before anything new is accepted: an association, an object, an upload.

        Raises
        ------
        StorageFullError
            If less than the low watermark would be free after ``needed_bytes`` more.
        """
        self._check(needed_bytes, self.low_watermark_bytes, "low watermark")

    def check_reserve(self, needed_bytes: int = 0) -> None:
        """Ask while something is being written that was accepted above the watermark.

        Raises
        ------
        StorageFullError
            If less than the reserve would be free after ``needed_bytes`` more.
        """
        self._check(needed_bytes, self.reserve_bytes, "reserve")

    def _check(self, needed_bytes: int, floor_bytes: int, floor_name: str) -> None:
        free_bytes = self.free_bytes()
        if free_bytes - needed_bytes < floor_bytes:
            raise StorageFullError(
                f"The spool's disk has {free_bytes} bytes free; {needed_bytes} more would leave less than "
                f"the {floor_name} of {floor_bytes} bytes.",
                remedy="Free space on the disk of the data folder, or give it a larger one.",
            )

    def make_folder(self, folder: Path) -> None:
        """Make a folder of the spool, and every folder above it, so that it outlives a power cut."""
        with self._making_folders:  # nobody may use a folder whose own name is not on the disk yet
            missing = []
            while not folder.is_dir():
                missing.append(folder)
                folder = folder.parent
            for each in reversed(missing):
                each.mkdir(mode=0o700, exist_ok=True)
                fsync_directory(each.parent)

    def adopt(self, temporary: Path, final: Path) -> None:
        """Give a finished temporary file its final name; when this returns, both are on the disk."""
        self.make_folder(final.parent)
        fsync_file(temporary)
        temporary.rename(final)
        fsync_directory(final.parent)

    def clear_orphans(self, *, older_than_s: float = 0.0) -> int:
        """Remove what a receiver that died was still receiving; return the number of files removed.

        Nothing in ``incoming_dir`` was ever acknowledged. Call it only before receiving starts, and where
        other receivers may be at work spare what is younger than any object takes.
        """
        orphans = [path for path in self.incoming_dir.iterdir() if is_older(path, older_than_s)]
        for orphan in orphans:
            orphan.unlink(missing_ok=True)
        return len(orphans)


def is_older(path: Path, age_s: float) -> bool:
    """True if a file was last written more than ``age_s`` seconds ago; False if it is gone."""
    if age_s == 0.0:
        return True
    try:
        return time.time() - path.stat().st_mtime > age_s
    except FileNotFoundError:
        return False
