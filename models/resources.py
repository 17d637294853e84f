"""What this process may use: cores and memory, as the control group allows, not as the machine has them.

A container that is limited to two cores of sixty-four still sees sixty-four; running sixty-four threads on a
quota of two is slower than running two. Both versions of control groups are read
(https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/memory.html); a machine without any is
taken as it is.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """Number of cores that this process may keep busy: its affinity, cut by the control group's quota.

    A quota of 2.5 cores gives 2: a third thread would be stopped for half of every period.
    """
    try:
        cores = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # only Linux tells the affinity
        cores = float(os.cpu_count() or 1)
    for folder in _group_folders("cpu", root):
        quota = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us"),
            _read(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]) > 0:
            cores = min(cores, int(quota[0]) / int(quota[1]))
    return max(1, math.floor(cores))


def vector_lanes(root: Path = _ROOT) -> int:
    """Floats that the processor adds or multiplies at once: 16 with AVX-512, else taken to be 8."""
    flags = (line for line in _read(root / "proc/cpuinfo").splitlines() if line.startswith("flags"))
    return 16 if "avx512f" in next(flags, "").split() else 8


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Memory in bytes that can still be taken before the machine or a control group runs out.

    Page cache that can be dropped counts as available, as it does in the kernel's own ``MemAvailable``.
    """
    free = _of_machine("MemAvailable", root)
    for folder in _group_folders("memory", root):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        usage = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if not (limit.isdigit() and usage.isdigit()):  # "max", or not a limited group
            continue
        pairs = (line.split() for line in _read(folder / "memory.stat").splitlines())
        stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
        droppable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        free = min(free, max(0, int(limit) - int(usage) + droppable))
    return free


def memory_limit_bytes(root: Path = _ROOT) -> int:
    """Memory in bytes that this process could ever hold: the machine's, cut by its control groups' limits."""
    limit = _of_machine("MemTotal", root)
    for folder in _group_folders("memory", root):
        given = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if given.isdigit():
            limit = min(limit, int(given))
    return limit


def resident_bytes() -> int:
    """Memory in bytes that this process holds now; 0 where the kernel does not tell."""
    fields = _read(Path("/proc/self/statm")).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def peak_resident_bytes() -> int:
    """The most memory in bytes that this process has ever held; 0 where the kernel does not tell.

    ``getrusage`` will not do: its ``ru_maxrss`` starts at what the parent held when it forked.
    """
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def give_back_freed_memory() -> None:
    """Return to the system what the C library keeps of memory that was freed; glibc alone can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _of_machine(field: str, root: Path) -> int:
    """A field of /proc/meminfo in bytes; more than there is where the kernel does not tell."""
    meminfo = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    return int(meminfo[field].split()[0]) * 1024 if field in meminfo else 2**63


def _group_folders(controller: str, root: Path) -> Iterator[Path]:
    """Every control group of this process for a controller, from its own up to the mount's top.

    Inside a container the path in /proc/self/cgroup may be the host's and not exist; the mount's top is then
    the container's own group.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = next(
                (root / "sys/fs/cgroup" / name for name in (controllers, controller)
                 if (root / "sys/fs/cgroup" / name).is_dir()),
                root / "sys/fs/cgroup",
            )  # fmt: skip
        else:
            continue
        folder = mount / path.lstrip("/")
        while folder != mount:
            if folder.is_dir():
                yield folder
            folder = folder.parent
        yield mount


def _read(path: Path) -> str:
    """The text of a kernel file; empty where there is none, which every caller takes as "no limit"."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
