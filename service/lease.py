"""Who holds a lease, written so that another process on the same host can prove that the holder is dead.

Proof needs the same boot of the same kernel and the same PID namespace: then a process identifier that is
gone, or that belongs to a process started at another time, cannot be the holder. Where there is no proof
(another host, another container, no /proc) the lease simply runs out.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_PROC = Path("/proc")
_UNKNOWN = "-"


@dataclass(frozen=True)
class LeaseOwner:
    """A process as it stands in ``lease_owner``: host, boot and PID namespace, process, start time."""

    host: str
    space: str  # boot identifier and PID namespace; "-" where they are not known
    pid: int
    started: str  # in clock ticks after the boot; "-" where it is not known

    def __str__(self) -> str:
        return f"{self.host}/{self.space}/{self.pid}/{self.started}"

    @classmethod
    def of_this_process(cls) -> Self:
        pid = os.getpid()
        return cls(socket.gethostname()[:40].replace("/", "_"), _space(), pid, _start_time(pid) or _UNKNOWN)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The owner that a text names; None for a text that some other program has written."""
        parts = text.split("/")
        if len(parts) != 4 or not parts[2].isdigit():
            return None
        return cls(parts[0], parts[1], int(parts[2]), parts[3])

    def is_dead(self) -> bool:
        """True only if it is proven that the process does not run any more."""
        if _UNKNOWN in (self.space, self.started) or self.space != _space():
            return False
        return _start_time(self.pid) != self.started


def is_proven_dead(owner: str) -> bool:
    """True only if a ``lease_owner`` names a process that provably does not run any more."""
    parsed = LeaseOwner.parse(owner)
    return parsed is not None and parsed.is_dead()


def _space() -> str:
    """What must be equal for two processes to see each other's identifiers."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        namespace = os.readlink(_PROC / "self/ns/pid").removeprefix("pid:[").rstrip("]")
    except OSError:
        return _UNKNOWN
    return f"{boot}:{namespace}"


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks after the boot; None if there is no such process.

    Field 22 of /proc/PID/stat, counted after the command's name, which may hold anything but ends at the
    last parenthesis (proc(5)). A zombie is dead: it holds nothing and does nothing.
    """
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
