"""A model is swapped through gate and admin endpoints while 20 jobs run, and rolled back the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bundle_factory import make_threshold_bundle
from places import places_in_seg, write_study
from pydicom import dcmread
from running_node import ROUTE, RunningNode
from storage_scp import StorageScp
from waiting import wait_until

from models.bundle import Bundle
from models.bundle_zip import pack_zip

JOBS = 20
NEWER = (100.5, 600.5)  # what was the second label is the first to the newer model


@pytest.fixture(scope="module")
def swapped_node(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path
) -> Iterator[tuple[RunningNode, StorageScp]]:
    with (
        StorageScp() as pacs,
        RunningNode(
            tmp_path_factory.mktemp("node"),
            models=models_dir,
            destinations={"pacs": pacs.port},
            routes=[ROUTE | {"quiet_time_s": 8.0}],
            gate={"longest_wait_s": 0.0},  # the queue is never empty here
        ) as node,
    ):
        yield node, pacs


def seg_of(node: RunningNode, job: dict[str, Any], folder: Path) -> Path:
    path = folder / f"{job['job_id']}.dcm"
    path.write_bytes(node.fetch(job, "segmentation"))
    return path


def digest_in(seg: Path) -> str:
    """The model digest that a SEG names as its contributing equipment."""
    (equipment,) = (
        item
        for item in dcmread(seg, stop_before_pixels=True).ContributingEquipmentSequence
        if len(str(item.get("SoftwareVersions", ""))) == 64
    )
    return str(equipment.SoftwareVersions)


def swap_while_jobs_run(
    node: RunningNode, folder: Path, first_seed: int, change: Callable[[], None]
) -> list[dict[str, Any]]:
    """Send 20 studies, call ``change`` when a few are done, and give the jobs in the order they started."""
    already = {job["job_id"] for job in node.jobs()}
    for seed in range(first_seed, first_seed + JOBS):
        node.send(write_study(folder / str(seed), seed))

    def done() -> int:
        return sum(j["state"] == "succeeded" for j in node.jobs() if j["job_id"] not in already)

    wait_until(lambda: done() >= 4, 120, node.log)
    change()
    jobs = [j for j in node.wait_for_jobs(len(already) + JOBS, within_s=240) if j["job_id"] not in already]
    return sorted(jobs, key=lambda j: j["started_at"] or "")


def test_swap_and_roll_back_while_jobs_run(
    swapped_node: tuple[RunningNode, StorageScp], tmp_path: Path
) -> None:
    node, pacs = swapped_node
    newer = make_threshold_bundle(tmp_path / "newer", version="1.1.0", thresholds=NEWER)
    pack_zip(newer, tmp_path / "newer.zip")
    old_digest = Bundle.open(node.data_dir / "models" / "threshold" / "1.0.0").digest

    def at_the_gate(client: Any) -> dict[str, Any]:
        return dict(client.get("/models/threshold/1.1.0/gate").json())

    def upload_and_activate() -> None:
        with node.client() as client, (tmp_path / "newer.zip").open("rb") as archive:
            response = client.post("/models", files={"bundle": ("newer.zip", archive, "application/zip")})
            assert response.status_code == 201, response.text
            response = client.post("/models/threshold/1.1.0/gate", json={})
            assert response.status_code == 202, response.text
            wait_until(lambda: at_the_gate(client)["state"] in ("passed", "failed"), 120, node.log)
            assert at_the_gate(client)["state"] == "passed", at_the_gate(client)
            response = client.post("/models/threshold/activate", json={"version": "1.1.0"})
            assert response.is_success, response.text

    def roll_back() -> None:
        with node.client() as client:
            response = client.post("/models/threshold/rollback")
            assert response.is_success, response.text

    for first_seed, change, before, after in (
        (100, upload_and_activate, old_digest, newer.digest),
        (200, roll_back, newer.digest, old_digest),
    ):
        jobs = swap_while_jobs_run(node, tmp_path / f"studies{first_seed}", first_seed, change)
        assert [job["state"] for job in jobs] == ["succeeded"] * JOBS
        digests = [job["model"]["digest"] for job in jobs]
        turn = digests.index(after)  # a job after the change there must be, and none of the old after it
        assert digests == [before] * turn + [after] * (JOBS - turn)
        assert turn >= 1
        labels = {old_digest: {1, 2}, newer.digest: {1}}
        for job in (jobs[0], jobs[turn - 1], jobs[turn], jobs[-1]):
            seg = seg_of(node, job, tmp_path)
            assert digest_in(seg) == job["model"]["digest"]  # it says what it was made with
            assert set(places_in_seg(seg)) == labels[job["model"]["digest"]]  # and was made with it
    wait_until(lambda: len(pacs.segmentations) == 2 * JOBS, 60, node.log)
    touched = node.get("/models/threshold/1.1.0/studies")["items"]
    assert {job["model_digest"] for job in touched} == {newer.digest}
