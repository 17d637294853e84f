"""kill -9 of each process of a node in the middle of 20 studies: every study ends with exactly one result."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundle_factory import make_threshold_bundle
from places import write_study
from running_node import ROUTE, RunningNode, is_alive, is_listening
from storage_scp import StorageScp
from waiting import wait_until

from models.registry import Registry

STUDIES = 20
OBJECTS = 2 * STUDIES  # a segmentation and a report each
# Longer than a sender needs to come back to a series after the receiver was killed under it.
QUIET_TIME_S = {"receive": 40.0}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry whose threshold model takes long enough to be killed at it."""
    root = tmp_path_factory.mktemp("models")
    registry = Registry(root / "registry", runtimes=("onnxruntime",))
    registry.seed()
    bundle = make_threshold_bundle(root / "slow", slow_convolutions=12)
    registry.add(bundle.folder, check_golden=False)
    registry.activate("threshold", "1.0.0")
    return registry.root


def send_until_taken(node: RunningNode, paths: list[Path]) -> None:
    """Send as a PACS does: what was not answered with success is sent again."""
    left = set(paths)

    def all_taken() -> bool:
        if is_listening(node.dicom_port):
            left.difference_update(node.send(sorted(left)))
        return not left

    wait_until(all_taken, 120, node.log)


@pytest.mark.slow
@pytest.mark.filterwarnings(  # pynetdicom leaves the socket of a refused connection to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("victim", ["receive", "api", "worker", "inference", "serve"])
def test_every_study_ends_with_one_result(victim: str, models_dir: Path, tmp_path: Path) -> None:
    studies = [write_study(tmp_path / str(seed), seed) for seed in range(STUDIES)]
    with StorageScp() as pacs:
        node = RunningNode(
            tmp_path / "node",
            models=models_dir,
            destinations={"pacs": pacs.port},
            routes=[ROUTE | {"quiet_time_s": QUIET_TIME_S.get(victim, 8.0)}],
        )
        node.start()
        kills = 0
        try:
            for number, paths in enumerate(studies):
                if victim == "receive" and number in (5, 12):
                    acknowledged = node.send(paths[:4])
                    assert len(acknowledged) == 4
                    kills += node.kill_part("receive")
                send_until_taken(node, paths)
                if victim == "serve" and number == 10:
                    wait_until(lambda: len(pacs.objects) > 0, 120, node.log)
                    ends = list(node.processes().values())
                    node.kill()
                    kills += 1
                    wait_until(lambda ends=ends: not any(map(is_alive, ends)), 60)  # nobody is orphaned
                    node.start()
                elif victim in ("api", "worker", "inference") and number in (6, 12, 19):
                    wait_until(lambda: victim in node.processes(), 60, node.log)
                    kills += node.kill_part(victim)
            assert kills
            wait_until(lambda: len({o.sop_instance_uid for o in pacs.objects}) >= OBJECTS, 240, node.log)
            wait_until(lambda: is_listening(node.http_port), 60, node.log)
            jobs = node.wait_for_jobs(STUDIES)
            deliveries = node.items("/deliveries")
        finally:
            node.stop()
    assert sorted(j["study_instance_uid"] for j in jobs) == sorted({j["study_instance_uid"] for j in jobs})
    assert [j["state"] for j in jobs] == ["succeeded"] * STUDIES
    assert [d["state"] for d in deliveries] == ["sent"] * OBJECTS
    # A delivery whose answer was lost is sent again: the same object, which a PACS keeps once.
    assert len({o.sop_instance_uid for o in pacs.objects}) == OBJECTS
    assert len({o.data_set for o in pacs.objects}) == OBJECTS
