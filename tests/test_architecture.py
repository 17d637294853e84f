"""What holds the house up: what may be imported where, and what may not stand in a tracked file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("models", "service", "training")


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def modules(package: str) -> list[str]:
    names = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "migrations" not in parts and parts[-1] != "__main__":
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def test_nothing_that_runs_in_a_hospital_imports_torch() -> None:
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "import openvino, onnxruntime\n"
        "print(sorted({'torch', 'torchvision', 'nnunetv2', 'training', 'nilearn'} & set(sys.modules)))"
    )
    wanted = [*modules("models"), *modules("service")]
    assert "service.worker" in wanted
    done = subprocess.run(
        [sys.executable, "-c", script, *wanted], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr[-2000:]


def test_importing_a_module_writes_connects_and_starts_nothing(tmp_path: Path) -> None:
    script = (
        "import importlib, sys, threading\n"
        "def watch(event, args):\n"
        "    if event in ('socket.connect', 'socket.bind', 'sqlite3.connect', 'subprocess.Popen'):\n"
        "        ours = sys._getframe()\n"
        "        while ours:\n"
        "            if ours.f_globals.get('__name__', '').split('.')[0] in ('models', 'service'):\n"
        "                seen.add((event, ours.f_globals['__name__']))\n"
        "                break\n"
        "            ours = ours.f_back\n"
        "seen = set()\n"
        "import models  # it forbids telemetry, which would write\n"
        "import numpy, highdicom, openvino, onnxruntime, numba, nibabel, pynetdicom, uvicorn, fastapi\n"
        "before = threading.active_count()\n"
        "sys.addaudithook(watch)\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(sorted(seen), threading.active_count() - before)"
    )
    wanted = [*modules("models"), *modules("service")]
    done = subprocess.run(
        [sys.executable, "-c", script, *wanted],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("[] 0", 0), done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


def test_the_arrows_of_the_house_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_no_tracked_file_holds_a_path_of_somebodys_machine() -> None:
    wrong = []
    places = re.compile(r"(?<![A-Za-z0-9_.])/(?:work|root|home)/[A-Za-z]")
    for name in tracked():
        data = (ROOT / name).read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
            if places.search(line):
                wrong.append(f"{name}:{number}: {line.strip()[:100]}")
    assert wrong == []


def test_modules_stay_small() -> None:
    """Past 400 lines a module wants to be two; past 450 it must."""
    long = {
        name: count
        for name in tracked()
        if name.endswith(".py") and name.split("/")[0] in OURS
        if (count := len((ROOT / name).read_text().splitlines())) > 450
    }
    assert long == {}


def test_what_is_pinned_is_what_is_asked_for() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = (ROOT / "pyproject.toml").read_text()
    block = project[project.index("dependencies = [") : project.index("[project.scripts]")]
    asked = {
        canonicalize_name(Requirement(text).name)
        for text in re.findall(r'^\s+"([A-Za-z][^"]*)",?$', block, re.MULTILINE)
    } - {"segnode"}
    pinned = {
        canonicalize_name(Requirement(line).name)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    assert asked - pinned - {"onnxruntime-gpu"} == set()
