"""Cores and memory as the control group allows, on made-up file systems of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from models.resources import (
    available_memory_bytes,
    memory_limit_bytes,
    peak_resident_bytes,
    resident_bytes,
    usable_cores,
    vector_lanes,
)

GIB = 2**30


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def files(root: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {16 * 2**20} kB\nMemAvailable: {12 * 2**20} kB\n"}


def test_without_control_groups_the_machine_is_taken_as_it_is(tmp_path: Path) -> None:
    root = files(tmp_path, MEMINFO)
    assert usable_cores(root) == 8
    assert available_memory_bytes(root) == 12 * GIB


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("1600000 100000", 8),
    ],
)
def test_the_quota_of_version_2(tmp_path: Path, quota: str, cores: int) -> None:
    group = {"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/cpu.max": quota}
    assert usable_cores(files(tmp_path, group)) == cores


def test_a_parents_quota_counts_too(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/cpu.max": "300000 100000",
        "sys/fs/cgroup/outer/inner/cpu.max": "max 100000",
    }
    assert usable_cores(files(tmp_path, group)) == 3


def test_the_quota_of_version_1(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n",
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "400000",
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    assert usable_cores(files(tmp_path, group)) == 4


def test_inside_a_container_the_mounts_top_is_the_group(tmp_path: Path) -> None:
    group = {"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/cpu.max": "200000 100000"}
    assert usable_cores(files(tmp_path, group)) == 2


def test_the_memory_of_version_2_and_what_its_cache_can_give_back(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "0::/box\n",
        "sys/fs/cgroup/box/memory.max": str(4 * GIB),
        "sys/fs/cgroup/box/memory.current": str(3 * GIB),
        "sys/fs/cgroup/box/memory.stat": f"anon 5\ninactive_file {GIB}\n",
    }
    assert available_memory_bytes(files(tmp_path, MEMINFO | group)) == 2 * GIB


def test_the_memory_of_version_1(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "4:memory:/box\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(4 * GIB),
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": str(3 * GIB),
        "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
    }
    assert available_memory_bytes(files(tmp_path, MEMINFO | group)) == 3 * GIB // 2


def test_a_group_without_a_limit_leaves_the_machines(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "0::/box\n",
        "sys/fs/cgroup/box/memory.max": "max",
        "sys/fs/cgroup/box/memory.current": str(3 * GIB),
    }
    assert available_memory_bytes(files(tmp_path, MEMINFO | group)) == 12 * GIB


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "0::/box\n",
        "sys/fs/cgroup/box/memory.max": "100",
        "sys/fs/cgroup/box/memory.current": "200",
        "sys/fs/cgroup/box/memory.stat": "",
    }
    assert available_memory_bytes(files(tmp_path, MEMINFO | group)) == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells")
def test_resident_memory_follows_what_is_touched() -> None:
    before = resident_bytes()
    block = bytearray(os.urandom(1)) * (64 * 2**20)
    assert resident_bytes() - before > 48 * 2**20
    del block


def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    block = np.ones(64 * 2**20, np.uint8)
    held, slack = resident_bytes(), 2**20  # the kernel counts pages in batches for each thread
    del block
    assert held > 64 * 2**20
    assert peak_resident_bytes() >= held - slack
    assert resident_bytes() < held - 32 * 2**20


def test_the_limit_is_the_machines_or_the_smallest_of_its_groups(tmp_path: Path) -> None:
    assert memory_limit_bytes(files(tmp_path / "bare", MEMINFO)) == 16 * GIB
    second = MEMINFO | {
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/memory.max": str(3 * GIB),
        "sys/fs/cgroup/outer/inner/memory.max": "max",
    }
    assert memory_limit_bytes(files(tmp_path / "second", second)) == 3 * GIB
    first = MEMINFO | {
        "proc/self/cgroup": "4:memory:/box\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),  # how version 1 says "none"
    }
    assert memory_limit_bytes(files(tmp_path / "first", first)) == 2 * GIB


@pytest.mark.parametrize(
    ("cpuinfo", "lanes"),
    [("flags\t: fpu avx2 avx512f amx_bf16\n", 16), ("flags\t: fpu avx2\n", 8), ("Features\t: asimd\n", 8)],
)
def test_how_many_floats_a_vector_holds(tmp_path: Path, cpuinfo: str, lanes: int) -> None:
    assert vector_lanes(files(tmp_path, {"proc/cpuinfo": "processor\t: 0\n" + cpuinfo})) == lanes
