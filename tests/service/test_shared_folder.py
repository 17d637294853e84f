"""What several hosts ask of the folder that they share is tried out; each fault of a file system is named."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service import shared_folder, spool
from service.diagnosis import Finding, Health
from service.mounts import Mount, mount_of
from service.shared_folder import probe_shared_folder

REPOSITORY = Path(__file__).resolve().parents[2]


def probed(folder: Path, mount: Mount | None = None) -> list[Finding]:
    """What is found; the folder is left as it was."""
    before = sorted(folder.iterdir())
    found = list(probe_shared_folder(folder, mount or Mount()))
    assert sorted(folder.iterdir()) == before
    return found


def the_problem(folder: Path, mount: Mount | None = None) -> str:
    (finding,) = probed(folder, mount)
    assert finding.health is Health.PROBLEM
    assert finding.remedy
    return finding.message


def test_a_file_system_that_fits(tmp_path: Path) -> None:
    (tmp_path / "something").write_text("kept")
    (finding,) = probed(tmp_path, Mount("nfs4", frozenset({"rw", "hard", "local_lock=none"})))
    assert finding.health is Health.OK
    assert "(nfs4)" in finding.message


def test_a_rename_that_is_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(self: Path, target: Path) -> None:
        content = self.read_bytes()
        target.unlink()
        time.sleep(0.01)  # for as long as that somebody who looks finds nothing
        target.write_bytes(content)
        self.unlink()

    monkeypatch.setattr(Path, "rename", rename)
    assert "not there in one step" in the_problem(tmp_path)


def test_a_rename_that_is_seen_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", lambda self, target: None)
    assert "not there in one step" in the_problem(tmp_path)


@pytest.mark.parametrize("opened", [os.O_RDONLY, os.O_RDONLY | os.O_DIRECTORY])
def test_an_fsync_that_fails_for_files_or_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: int
) -> None:
    real: Callable[..., None] = spool._fsync

    def fsync(path: Path, flags: int) -> None:
        if flags == opened:
            raise OSError(errno.EINVAL, "not here")
        real(path, flags)

    monkeypatch.setattr(spool, "_fsync", fsync)
    assert "fsync fails (EINVAL)" in the_problem(tmp_path)


def test_an_exclusive_creation_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *rest, **more: real(path, flags & ~os.O_EXCL, *rest, **more)
    )
    assert "O_EXCL" in the_problem(tmp_path)


def test_locks_that_no_other_process_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # in this process; the other asks in earnest
    assert "two processes hold one lock" in the_problem(tmp_path)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "flock fails (ENOLCK)" in the_problem(tmp_path)


@pytest.mark.parametrize("option", ["nolock", "local_lock=all", "local_lock=flock", "nobrl"])
def test_locks_that_hold_on_one_host_alone_are_told_by_the_mount(tmp_path: Path, option: str) -> None:
    assert f"mounted with {option}" in the_problem(tmp_path, Mount("nfs4", frozenset({"rw", option})))


@pytest.mark.parametrize(("blocks", "available"), [(0, 0), (10, 11)])
def test_free_space_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, available: int
) -> None:
    told = os.statvfs_result((4096, 4096, blocks, available, available, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: told)
    assert f"{available * 4096} bytes free of {blocks * 4096}" in the_problem(tmp_path)


@pytest.mark.parametrize(
    ("code", "fits"), [(errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EOPNOTSUPP, True)]
)
def test_free_space_that_is_told_and_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fits: bool
) -> None:
    def reserve(*_: Any) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    (finding,) = probed(tmp_path)
    assert (finding.health is Health.OK) == fits
    assert fits or "cannot be had" in finding.message


@pytest.mark.parametrize(
    ("ahead_s", "health", "said"),
    [
        (1, Health.OK, ""),
        (30, Health.WARNING, "behind"),
        (-30, Health.WARNING, "ahead of"),
        (3600, Health.PROBLEM, "behind"),
    ],
)
def test_a_file_server_whose_clock_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float, health: Health, said: str
) -> None:
    real = time.time
    monkeypatch.setattr(shared_folder.time, "time", lambda: real() + ahead_s)  # this host's
    (finding,) = probed(tmp_path)
    assert finding.health is health
    assert said in finding.message


def test_a_trial_that_the_file_system_breaks_off_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(self: Path, target: Path) -> None:
        raise OSError(errno.ESTALE, "stale")

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert [each.message.partition(": ")[2] for each in probed(tmp_path)] == [
        "the trial of rename fails (ESTALE).",
        "two processes hold one lock at once.",
    ]


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/x/y", "nfs4"), ("/x", "nfs4"), ("/xy", ""), ("/x/a b/c", "ext4"), ("/x/over", "cifs")],
)
def test_the_mount_of_a_folder(tmp_path: Path, folder: str, kind: str) -> None:
    table = tmp_path / "mounts"
    table.write_text(
        "srv:/a /x nfs4 rw,nolock 0 0\n/dev/sda1 /x/a\\040b ext4 rw 0 0\n"
        "none /x/over tmpfs rw 0 0\n//srv/b /x/over cifs rw 0 0\n"
    )
    assert mount_of(Path(folder), table).kind == kind
    assert ("nolock" in mount_of(Path(folder), table).options) == (kind == "nfs4")
    assert mount_of(Path(folder), tmp_path / "absent") == Mount()


def test_what_is_tried_is_what_the_papers_ask_for() -> None:
    paper = (REPOSITORY / "deploy/SCALE-OUT.md").read_text(encoding="utf-8")
    asked = paper.partition("## The shared file system")[2].partition("## ")[0]
    for word in (
        "rename",
        "fsync",
        "flock",
        "O_EXCL",
        "free space",
        "nolock",
        "local_lock",
        "segnode doctor",
    ):
        assert word in asked, word
