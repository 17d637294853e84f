"""The spool: names, durability and the rules of its disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.errors import NotFoundError, StorageFullError
from service.spool import Spool, fsync_directory, fsync_file


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def test_folders_are_for_the_nodes_user_alone(spool: Spool) -> None:
    for folder in (spool.root, spool.incoming_dir, spool.instances_dir, spool.uploads_dir, spool.results_dir):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_relative_and_absolute_are_inverse(spool: Spool) -> None:
    path = spool.instance_path("ab" + 30 * "0")
    assert spool.relative(path) == f"instances/ab/ab{30 * '0'}.dcm"
    assert spool.absolute(spool.relative(path)) == path


@pytest.mark.parametrize("path", ["../secret", "instances/../../secret", "/etc/passwd", "", "."])
def test_a_path_that_leads_out_is_refused(spool: Spool, path: str) -> None:
    with pytest.raises(NotFoundError):
        spool.absolute(path)


def test_a_link_that_leads_out_is_refused(spool: Spool, tmp_path: Path) -> None:
    (spool.uploads_dir / "link").symlink_to(tmp_path)
    with pytest.raises(NotFoundError):
        spool.absolute("uploads/link/secret")


def test_adopt_forces_file_then_name_then_folder(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def traced_fsync(descriptor: int) -> None:
        steps.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def traced_rename(self: Path, target: Path) -> Path:
        steps.append(("rename", str(target)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(Path, "rename", traced_rename)
    temporary = spool.incoming_dir / "x"
    temporary.write_bytes(b"data")
    final = spool.instance_path("cd" + 30 * "0")
    spool.adopt(temporary, final)

    assert steps == [
        ("fsync", str(spool.instances_dir)),  # the new folder's own name
        ("fsync", str(temporary)),
        ("rename", str(final)),
        ("fsync", str(final.parent)),
    ]
    assert final.read_bytes() == b"data"
    assert not temporary.exists()


def test_fsync_of_what_is_not_there_is_an_error(spool: Spool) -> None:
    with pytest.raises(FileNotFoundError):
        fsync_file(spool.incoming_dir / "nothing")
    (spool.incoming_dir / "file").touch()
    with pytest.raises(NotADirectoryError):
        fsync_directory(spool.incoming_dir / "file")


def test_watermark_and_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "spool", low_watermark_bytes=100, reserve_bytes=40)
    free = {"bytes": 100}
    monkeypatch.setattr(spool, "free_bytes", lambda: free["bytes"])
    spool.check_space()
    with pytest.raises(StorageFullError, match=r"100 bytes free; 1 more .* low watermark of 100"):
        spool.check_space(1)
    free["bytes"] = 99
    with pytest.raises(StorageFullError):
        spool.check_space()
    spool.check_reserve(59)
    with pytest.raises(StorageFullError, match="reserve of 40"):
        spool.check_reserve(60)


def test_a_watermark_below_the_reserve_is_raised_to_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", low_watermark_bytes=10, reserve_bytes=40)
    assert spool.low_watermark_bytes == 40


def test_free_bytes_is_what_the_disk_says(spool: Spool) -> None:
    figures = os.statvfs(spool.root)
    assert abs(spool.free_bytes() - figures.f_bavail * figures.f_frsize) < 1 << 30


def test_orphans_are_cleared_and_instances_stay(spool: Spool) -> None:
    kept = spool.instance_path("ef" + 30 * "0")
    temporary = spool.incoming_dir / "a"
    temporary.touch()
    spool.adopt(temporary, kept)
    for name in ("b", "c"):
        (spool.incoming_dir / name).touch()
    assert spool.clear_orphans() == 2
    assert list(spool.incoming_dir.iterdir()) == []
    assert kept.exists()
