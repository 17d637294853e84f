"""The drill of deploy/operation.md without containers, run as it is written there, on either engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from papers import commands
from places import write_study
from postgresql import PostgresServer
from running_node import ROUTE
from small_node import make_node
from waiting import wait_until

from service.records.tables import JobState


@pytest.mark.both_engines
def test_the_documented_drill_brings_a_node_back(
    engine: str, models_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server: PostgresServer | None = request.getfixturevalue("postgresql") if engine == "postgresql" else None
    data, backups, config = tmp_path / "data", tmp_path / "backups", tmp_path / "node.yaml"
    configuration = {
        "data_dir": str(data),
        "database_url": server.new_database() if server else None,
        "dicom": {"port": 0, "peers": [{"ae_title": "PACS"}]},
        "http": {"port": 0},
        "storage": {"low_watermark_bytes": 0, "reserve_bytes": 0},
        "routes": [ROUTE | {"destinations": []}],
    }
    config.write_text(yaml.safe_dump(configuration))

    def run(block: list[str]) -> str:
        script = "\n".join(block)
        for written, here in {
            "/var/backups/segnode": backups,
            "/var/lib/segnode": data,
            "node.yaml": config,
        }.items():
            script = script.replace(written, str(here))
        assert "/var/" not in script
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ended = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", script],
            check=False,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ended.returncode == 0, ended.stdout
        return ended.stdout

    backup, back = commands("operation.md", "### Without containers")
    backups.mkdir()
    node = make_node(data, **configuration)
    shutil.copytree(models_dir, node.registry.root, dirs_exist_ok=True)
    node.receive(write_study(tmp_path / "study", 1))
    with node.working():
        (job,) = node.wait_for_jobs(JobState.SUCCEEDED)
    node.records.close()
    run(backup)
    if server:
        configuration["database_url"] = server.new_database()
        config.write_text(yaml.safe_dump(configuration))
    said = run(back)
    assert "line(s) are as they were written" in said
    assert (tmp_path / "data.before").is_dir()

    again = make_node(data, **configuration)
    (restored,) = again.jobs()
    assert (restored.job_id, restored.model_digest) == (job.job_id, job.model_digest)
    again.receive(write_study(tmp_path / "another", 2))
    with again.working():  # and it goes on
        wait_until(lambda: [j.state for j in again.jobs()] == 2 * [JobState.SUCCEEDED], 60, again._describe)
    again.records.close()
