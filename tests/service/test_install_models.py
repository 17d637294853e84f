"""The script that installs what ships, with stand-ins for the container engine and for compose."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# In the image the node lies in /opt/segnode: what is asked of a shell there is asked of the repository here.
ENGINE = """#!/bin/sh
for last; do :; done
case "$*" in
*"--entrypoint sh"*) sh -c "$(echo "$last" | sed "s:/opt/segnode:$REPOSITORY:")" ;;
*" models sign "*) echo "$last" >>"$SIGNED" && : >"$SEGNODE_SITE/models/${last#/models/}" ;;
*) exit 1 ;;
esac
"""
COMPOSE = """#!/bin/sh
echo "$*" >>"$ASKED"
"""


@pytest.mark.parametrize("named", [(), ("mine@2.0.0",)])
def test_what_ships_is_signed_and_installed_unless_something_else_is_named(
    tmp_path: Path, named: tuple[str, ...]
) -> None:
    for name, content in (("engine", ENGINE), ("compose", COMPOSE)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    for folder in ("signing", "models"):
        (tmp_path / "site" / folder).mkdir(parents=True)
    environment = {
        **os.environ,
        "CONTAINER_ENGINE": str(tmp_path / "engine"),
        "COMPOSE": str(tmp_path / "compose"),
        "SEGNODE_SITE": str(tmp_path / "site"),
        "REPOSITORY": str(REPOSITORY),
        "SIGNED": str(tmp_path / "signed"),
        "ASKED": str(tmp_path / "asked"),
    }
    script = REPOSITORY / "deploy" / "install-models"
    ended = subprocess.run([script, *named], check=False, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr

    shipped = [f"{path.parent.name}@{path.name}" for path in REPOSITORY.glob("models/bundles/*/*")]
    expected = list(named) or sorted(shipped)
    signed = (tmp_path / "signed").read_text().split()
    assert signed == [f"/models/{each.replace('@', '-')}.zip" for each in expected]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sum("segnode models add --activate" in line for line in asked) == len(expected)
