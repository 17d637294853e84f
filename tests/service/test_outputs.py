"""Files of one run take the place of those of another together, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.commands.outputs import replace_together

OLD = {"seg.dcm": "old seg", "sr.dcm": "old sr"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    for name, text in OLD.items():
        (tmp_path / "out" / name).write_text(text)
        (tmp_path / name).write_text(text.replace("old", "new"))
    return tmp_path / "out"


def wanted(folder: Path, *made: str) -> dict[Path, Path | None]:
    return {folder / name: folder.parent / name if name in made else None for name in OLD}


def held(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("made", [("seg.dcm", "sr.dcm"), ("sr.dcm",), ()])
def test_paths_hold_what_the_run_has_made_and_nothing_else(folder: Path, made: tuple[str, ...]) -> None:
    replace_together(wanted(folder, *made))
    assert held(folder) == {name: OLD[name].replace("old", "new") for name in made}


def test_what_was_not_there_before_comes_to_be(folder: Path) -> None:
    (folder / "seg.dcm").unlink()
    replace_together(wanted(folder, *OLD))
    assert held(folder).keys() == OLD.keys()


@pytest.mark.parametrize("stopped_by", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("moves", range(4))
def test_whatever_fails_all_is_as_before_and_never_of_two_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moves: int, stopped_by: type[BaseException]
) -> None:
    replace = os.replace
    done: list[Path] = []

    def stopping(source: Path, target: Path) -> None:
        seen = {text.split()[0] for name, text in held(folder).items() if not name.startswith(".")}
        assert seen != {"old", "new"}
        if len(done) == moves:
            done.append(target)
            raise stopped_by("stopped")
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(stopped_by):
        replace_together(wanted(folder, *OLD))
    assert held(folder) == OLD


def test_a_file_that_cannot_be_copied_changes_nothing(folder: Path) -> None:
    (folder.parent / "sr.dcm").unlink()
    with pytest.raises(FileNotFoundError):
        replace_together(wanted(folder, *OLD))
    assert held(folder) == OLD


def test_what_a_killed_process_left_is_cleared_by_the_next(folder: Path) -> None:
    (folder / "seg.dcm").rename(folder / ".seg.dcm.former")
    (folder / ".sr.dcm.part").write_text("half")
    replace_together(wanted(folder, *OLD))
    assert held(folder).keys() == OLD.keys()
