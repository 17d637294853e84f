"""Run as a program by the registry's tests: changes a registry until it dies.

    registry_crasher.py loop ROOT BUNDLE...      add, activate, roll back, for ever; prints a line a round
    registry_crasher.py sweep FOLDER BUNDLE...   die before every change to the file system of every operation

``sweep`` forks a child for each point at which an operation creates, fills, renames or removes something,
lets it end there as kill -9 would (no handler, no ``finally``), and checks what is left. It prints how many
points there were for each operation. The interpreter's own hooks find the points, so none can be forgotten.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from models import registry
from models.registry import Registry
from models.registry_state import ModelState

NAME = "threshold"
CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
}
DIED = 99


def skip_golden_cases() -> None:
    """Crashes are about files; running the network each time would only take longer."""
    registry.check_golden_case_everywhere = lambda bundle, **_: {}


def loop(root: Path, bundles: list[Path]) -> None:
    models = Registry(root)
    choose = random.Random(os.getpid())
    while True:
        bundle = models.add(choose.choice(bundles))
        models.activate(NAME, bundle.manifest.version)
        if models._state(NAME).rolled_back() is not None:
            models.rollback(NAME)
        print("round", flush=True)


def damage(root: Path) -> None:
    (root / NAME / "1.0.0" / "card.md").write_text("damaged")


def sweep(folder: Path, bundles: list[Path]) -> None:
    os.fsync = lambda _: None  # what a dead process wrote is in the system's cache; this saves minutes
    first, second = bundles
    steps: list[tuple[str, Callable[[Registry], object]]] = [
        ("add to nothing", lambda models: models.add(first)),
        ("activate the first", lambda models: models.activate(NAME, "1.0.0")),
        ("add another", lambda models: models.add(second)),
        ("activate another", lambda models: models.activate(NAME, "1.1.0")),
        ("roll back", lambda models: models.rollback(NAME)),
        ("withdraw", lambda models: models.withdraw(NAME, "1.1.0")),
        ("add what is there", lambda models: models.add(first)),
        ("repair", lambda models: models.add(first)),
        ("seed", lambda models: models.seed([first, second])),
    ]
    before = folder / "before"
    before.mkdir()
    for name, operation in steps:
        if name == "seed":
            shutil.rmtree(before)
            before.mkdir()
        if name == "repair":
            damage(before)
        after = folder / "after"
        shutil.copytree(before, after)
        operation(Registry(after))
        points = 0
        while crash(before, folder / "crashed", operation, points):
            check(folder / "crashed", before, after, operation, damaged=name == "repair")
            shutil.rmtree(folder / "crashed")
            points += 1
        shutil.rmtree(folder / "crashed")
        shutil.rmtree(before)
        after.rename(before)
        print(f"{name}: {points}", flush=True)


def crash(before: Path, root: Path, operation: Callable[[Registry], object], point: int) -> bool:
    """Run an operation on a copy in a child that dies before change ``point`` of it; False if it ended."""
    shutil.copytree(before, root)
    child = os.fork()
    if child == 0:
        die_before_change(point)
        operation(Registry(root))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, DIED), f"the operation failed with {code}"
    return code == DIED


def die_before_change(point: int) -> None:
    """End this process just before it changes the file system for the time number ``point``, from 0."""
    left = point

    def change() -> None:
        nonlocal left
        if left == 0:
            os._exit(DIED)
        left -= 1

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        creates = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event in CHANGES or creates:
            change()

    def profile(_: object, event: str, function: object) -> None:
        # What was written to a file reaches it when its buffer is flushed, at the latest by closing it.
        if event == "c_call" and getattr(function, "__name__", "") in ("flush", "close", "__exit__"):
            file = getattr(function, "__self__", None)
            if isinstance(file, io.BufferedWriter) and not file.closed:
                change()

    sys.addaudithook(audit)
    sys.setprofile(profile)


def state(root: Path) -> ModelState:
    return registry.load_state(root / NAME)


def check(
    root: Path, before: Path, after: Path, operation: Callable[[Registry], object], *, damaged: bool
) -> None:
    """What a crash left is the state before or after (a seed: or on the way), is whole, and can go on."""
    models = Registry(root)
    found = state(root)
    if found not in (state(before), state(after)):
        assert set(found.installed) <= set(state(after).installed)
        assert found.history == ()
    for version in models.versions(NAME):
        if not (damaged and version == "1.0.0"):
            models.get(NAME, version)
    assert models.names() == ([NAME] if found.installed else [])
    if found not in (state(before), state(after)) or found == state(before):
        operation(models)
    elif damaged:
        models.get(NAME, "1.0.0")
    assert state(root) == state(after)
    for version in models.versions(NAME):
        models.get(NAME, version)
    kept = sorted(path.name for path in (root / NAME).iterdir())
    assert kept == sorted(["active.json", *models.versions(NAME)])


if __name__ == "__main__":
    skip_golden_cases()
    {"loop": loop, "sweep": sweep}[sys.argv[1]](
        Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]]
    )
