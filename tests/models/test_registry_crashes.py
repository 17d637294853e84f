"""Whatever dies at any moment, the registry is as before a change or as after it, and goes on."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_factory import make_threshold_bundle

from models import registry
from models.registry import Registry

REPOSITORY = Path(__file__).resolve().parents[2]
CRASHER = REPOSITORY / "tests" / "support" / "registry_crasher.py"


@pytest.fixture
def bundles(tmp_path: Path) -> list[Path]:
    return [
        make_threshold_bundle(tmp_path / version, version=version).folder for version in ("1.0.0", "1.1.0")
    ]


def _start(*arguments: object) -> subprocess.Popen[str]:
    # Forks: one thread only. Numerical libraries would start more.
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(CRASHER), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def test_dying_before_any_change_to_the_file_system_is_harmless(tmp_path: Path, bundles: list[Path]) -> None:
    (tmp_path / "sweep").mkdir()
    process = _start("sweep", tmp_path / "sweep", *bundles)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    points = {name: int(count) for name, count in (line.split(": ") for line in output.splitlines())}
    assert points.keys() >= {"add to nothing", "activate another", "roll back", "repair", "seed"}
    assert all(count >= 2 for count in points.values()), points


def test_kill_9_at_random_moments_of_two_processes_is_harmless(tmp_path: Path, bundles: list[Path]) -> None:
    root = tmp_path / "registry"
    choose = random.Random(7)
    for _ in range(3):
        processes = [_start("loop", root, *bundles) for _ in range(2)]
        try:
            for process in processes:
                for _ in range(choose.randint(1, 4)):  # die in the middle of the round after this many
                    assert process.stdout is not None
                    assert process.stdout.readline() == "round\n"
        finally:
            for process in processes:
                process.kill()
            tails = [process.communicate()[0] for process in processes]
        assert all(set(tail.splitlines()) <= {"round"} for tail in tails), tails
        models = Registry(root)
        assert models.versions("threshold") == ["1.0.0", "1.1.0"][: len(models.versions("threshold"))]
        assert models.active("threshold").manifest.version == models.active_version("threshold")
        for version in models.versions("threshold"):
            models.get("threshold", version)
    for folder in bundles:
        models.add(folder, check_golden=False)
    assert models.versions("threshold") == ["1.0.0", "1.1.0"]
    assert list((root / ".incoming").iterdir()) == []
    assert sorted(p.name for p in (root / "threshold").iterdir()) == ["1.0.0", "1.1.0", "active.json"]


def test_everything_is_on_the_disk_before_it_is_renamed_into_place(
    tmp_path: Path, bundles: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut is worse than kill -9: what was not flushed is gone. The order counts."""
    monkeypatch.setattr(registry, "check_golden_case_everywhere", lambda *_, **__: {})
    flushed: set[int] = set()
    missing: list[str] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def check(source: Path, target: Path) -> None:
        flushed.discard(target.parent.stat().st_ino)  # the folder's entry is new and not flushed yet
        parts = [source, *source.rglob("*")] if source.is_dir() else [source]
        missing.extend(str(part) for part in parts if part.stat().st_ino not in flushed)

    def rename(source: Path, target: Path) -> None:
        check(Path(source), Path(target))
        real_rename(source, target)

    def replace(source: Path, target: Path) -> None:
        check(Path(source), Path(target))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    models = Registry(tmp_path / "registry")
    for folder in bundles:
        bundle = models.add(folder)
        assert bundle.folder.parent.stat().st_ino in flushed
        models.activate("threshold", bundle.manifest.version)
        assert bundle.folder.parent.stat().st_ino in flushed
    assert missing == []
    assert (tmp_path / "registry").stat().st_ino in flushed
