"""Whether a data folder fits what several hosts ask of it (deploy/SCALE-OUT.md), tried out from this one.

Files of the probe's own come and go in a folder of their own. What one host cannot see is told by the options
of the mount: locks that hold on this host alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from service.diagnosis import Finding, ok, problem, warning
from service.mounts import Mount
from service.spool import fsync_directory, fsync_file

WHAT = "shared folder"
_RENAMES = 100
_RESERVED_BYTES = 64 << 20
_CLOCK_WARNING_S = 2.0  # as between a worker and the database
_CLOCK_PROBLEM_S = 300.0  # well below the age at which what a dead receiver has left is cleared
_LOCKED, _FREE = 3, 0
# Locks that other hosts do not see: nfs(5) and mount.cifs(8).
_LOCAL_LOCKS = frozenset({"nolock", "local_lock=all", "local_lock=flock", "nobrl", "localflock"})
_LOCK = f"""
import fcntl, sys
with open(sys.argv[1], "a") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit({_LOCKED})
"""


def probe_shared_folder(folder: Path, mount: Mount) -> Iterator[Finding]:
    """Every requirement that the folder does not fit; one finding that all is well if there is none.

    Parameters
    ----------
    folder : Path
        A folder that can be written to. It is left as it was.
    mount : Mount
        Of that folder.
    """
    own = folder / f".segnode-doctor-{secrets.token_hex(4)}"
    own.mkdir(mode=0o700)
    try:
        wrong = [finding for probe in _PROBES if (finding := _tried(probe, own)) is not None]
        if local := mount.options & _LOCAL_LOCKS:
            wrong.append(
                _locks(f"it is mounted with {', '.join(sorted(local))}: locks hold on this host alone")
            )
    finally:
        shutil.rmtree(own, ignore_errors=True)  # of a file system that fails, something may stay
    yield from wrong
    if not wrong:
        kind = f" ({mount.kind})" if mount.kind else ""
        yield ok(WHAT, f"renames, fsync, exclusive files, locks, free space and clock are right here{kind}")


def probe_rename(folder: Path) -> Finding | None:
    """A file takes the place of another in one step: whoever opens the name finds the one or the other."""
    place, absent, done = folder / "place", threading.Event(), threading.Event()
    place.write_bytes(b"0")

    def look() -> None:
        while not done.is_set():
            try:
                if not place.read_bytes():
                    absent.set()
            except FileNotFoundError:
                absent.set()

    reader = threading.Thread(target=look, name="doctor-reader")
    reader.start()
    try:
        for number in range(1, _RENAMES + 1):
            new = folder / "new"
            new.write_bytes(b"%d" % number)
            new.rename(place)
            if absent.is_set() or new.exists() or place.read_bytes() != b"%d" % number:
                return _misfit(
                    "a file that is renamed onto another is not there in one step",
                    "Use a file system whose rename is atomic and seen at once, such as NFS 4.",
                )
    finally:
        done.set()
        reader.join()
    return None


def probe_fsync(folder: Path) -> Finding | None:
    """Files and folders can be forced to stable storage."""
    file = folder / "forced"
    file.write_bytes(b"x")
    try:
        fsync_file(file)
        fsync_directory(folder)
    except OSError as error:
        return _misfit(
            f"fsync fails ({_name(error)})",
            "Use a file system that forces files and folders to stable storage; export NFS with sync.",
        )
    return None


def probe_exclusive(folder: Path) -> Finding | None:
    """Of two that create one file exclusively, one fails."""
    path = folder / "exclusive"
    for attempt in range(2):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return None if attempt else _exclusive()
    return _exclusive()


def probe_locks(folder: Path) -> Finding | None:
    """What one process has locked, another cannot lock, until it is released."""
    path = folder / "lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return _locks(f"flock fails ({_name(error)})")
        if _try_lock(path) != _LOCKED:
            return _locks("two processes hold one lock at once")
    return None if _try_lock(path) == _FREE else _locks("a lock that was released is still held")


def probe_space(folder: Path) -> Finding | None:
    """What is told to be free can be had, up to a small part of it."""
    told = os.statvfs(folder)
    free_bytes, size_bytes = told.f_bavail * told.f_frsize, told.f_blocks * told.f_frsize
    remedy = "Use a file system that tells its free space, quotas included: the watermarks go by it."
    if not 0 <= free_bytes <= size_bytes or size_bytes == 0:
        return _misfit(f"it tells {free_bytes} bytes free of {size_bytes}", remedy)
    wanted_bytes = min(_RESERVED_BYTES, free_bytes // 2)
    if wanted_bytes == 0:
        return None  # full, and says so
    with (folder / "space").open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, wanted_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                return None  # it does not reserve, which nobody asks of it
            return _misfit(f"it tells {free_bytes} bytes free, and {wanted_bytes} cannot be had", remedy)
    return None


def probe_clock(folder: Path) -> Finding | None:
    """Files are dated by this host's time: what is old enough to be cleared goes by it."""
    path = folder / "dated"
    before = time.time()
    path.write_bytes(b"x")
    dated, after = path.stat().st_mtime, time.time()
    differs_s = dated - after if dated > after else min(0.0, dated - before)
    if abs(differs_s) <= _CLOCK_WARNING_S:
        return None
    message = f"its clock is {abs(differs_s):.0f} s {'ahead of' if differs_s > 0 else 'behind'} this host's."
    finding = problem if abs(differs_s) > _CLOCK_PROBLEM_S else warning
    return finding(WHAT, f"Of the file system: {message}", "Keep NTP on this host and on the file server.")


_PROBES: tuple[Callable[[Path], Finding | None], ...] = (
    probe_rename,
    probe_fsync,
    probe_exclusive,
    probe_locks,
    probe_space,
    probe_clock,
)


def _tried(probe: Callable[[Path], Finding | None], folder: Path) -> Finding | None:
    try:
        return probe(folder)
    except OSError as error:
        what = probe.__name__.removeprefix("probe_")
        return _misfit(
            f"the trial of {what} fails ({_name(error)})", "Look at the mount and at the file server's log."
        )


def _try_lock(path: Path) -> int:
    return subprocess.run([sys.executable, "-I", "-c", _LOCK, str(path)], check=False, timeout=60).returncode


def _locks(what: str) -> Finding:
    return _misfit(what, "Use NFS 4 mounted without nolock and local_lock, so that locks hold between hosts.")


def _exclusive() -> Finding:
    return _misfit(
        "exclusive creation (O_EXCL) does not hold", "Use a file system that keeps it (NFS 3 or 4)."
    )


def _misfit(what: str, remedy: str) -> Finding:
    return problem(WHAT, f"It does not fit several hosts: {what}.", remedy)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)
