"""The scripts that carry a node to a hospital without internet, with a stand-in for the container engine."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = ("segnode:0.1.0", "docker.io/library/postgres:16-bookworm")
# Saves an image as its own name, and notes what it is given to load.
ENGINE = """#!/bin/sh
case "$1" in
save) printf 'image %s' "$2" ;;
load) cat >>"$LOADED" && echo >>"$LOADED" ;;
*) exit 1 ;;
esac
"""


class Engine:
    """A program in a folder that takes the place of the container engine, and what it was given to load."""

    def __init__(self, folder: Path) -> None:
        self.loaded = folder / "loaded"
        program = folder / "engine"
        program.write_text(ENGINE)
        program.chmod(0o755)
        self._environment = {
            **os.environ,
            "CONTAINER_ENGINE": str(program),
            "LOADED": str(self.loaded),
            "IMAGES": " ".join(IMAGES),
        }

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, check=False, env=self._environment, capture_output=True, text=True)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path)


@pytest.fixture
def saved(engine: Engine, tmp_path: Path) -> Path:
    folder = tmp_path / "segnode-offline"
    ended = engine.run(str(REPOSITORY / "deploy" / "offline" / "save"), str(folder))
    assert ended.returncode == 0, ended.stderr
    return folder


def test_what_was_saved_is_loaded_whole(engine: Engine, saved: Path) -> None:
    ended = engine.run(str(saved / "load"))
    assert ended.returncode == 0, ended.stderr
    assert set(engine.loaded.read_text().splitlines()) == {f"image {name}" for name in IMAGES}


def test_what_is_needed_to_set_up_comes_along_and_no_secret_of_the_site(saved: Path) -> None:
    with tarfile.open(saved / "segnode.tar.gz") as archive:
        names = set(archive.getnames())
    needed = {"docker-compose.yml", "docker-compose.gpu.yml", "deploy/setup", "deploy/install-models"}
    assert needed | {"deploy/proxy/Caddyfile", "deploy/examples/compose.yaml", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("deploy/site/", "deploy/wheelhouse/"))]


@pytest.mark.parametrize("what", ["images", "segnode.tar.gz", "load"])
def test_nothing_is_loaded_where_a_byte_has_changed(engine: Engine, saved: Path, what: str) -> None:
    changed = sorted((saved / what).iterdir())[0] if what == "images" else saved / what
    content = changed.read_bytes()
    changed.write_bytes(content + b"\n" if what == "load" else bytes([content[0] ^ 1]) + content[1:])
    ended = engine.run(str(saved / "load"))
    assert ended.returncode != 0
    assert changed.name in ended.stdout + ended.stderr
    assert not engine.loaded.exists()
