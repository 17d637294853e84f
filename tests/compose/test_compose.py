"""The shipped docker-compose.yml, brought up on images built from the shipped Dockerfile.

Runs where SEGNODE_COMPOSE=1 says so, as root, with podman and podman-compose: see tests/compose/README.md.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compose_site import START_TIMEOUT_S, ComposeSite, free_ports, patiently
from papers import commands
from pydicom import dcmread
from pydicom.uid import generate_uid
from storage_scp import StorageScp
from waiting import wait_until

from deploy.demo.study import hippocampus_crop, write_series
from models.volume import Volume

pytestmark = pytest.mark.skipif(
    os.environ.get("SEGNODE_COMPOSE") != "1" or shutil.which("podman") is None,
    reason="brings up containers: set SEGNODE_COMPOSE=1 where podman and podman-compose are installed",
)
RESULT_TIMEOUT_S = 900.0


@pytest.fixture(scope="module")
def destination() -> Iterator[StorageScp]:
    (port,) = free_ports(1)
    with StorageScp(ae_title="PACS", port=port, host="0.0.0.0") as scp:
        yield scp


@pytest.fixture(scope="module")
def site(destination: StorageScp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComposeSite]:
    compose = ComposeSite(
        tmp_path_factory.mktemp("compose"),
        podman=str(shutil.which("podman")),
        podman_compose=os.environ.get("SEGNODE_PODMAN_COMPOSE", "podman-compose"),
        base_image=os.environ.get("SEGNODE_BASE_IMAGE", "localhost/python:3.11"),
        destination_port=destination.port,
    )
    if os.environ.get("SEGNODE_COMPOSE_BUILT") != "1":
        compose.build()
    with compose:
        yield compose


class Studies:
    """Studies of their own patient each, with the same anatomy under a little noise."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._volume = hippocampus_crop()
        self._count = 0

    def new(self) -> tuple[str, list[Path]]:
        """The Study Instance UID of another study, and its files."""
        self._count += 1
        noise = np.random.default_rng(self._count).normal(0, 1, self._volume.array.shape)
        volume = Volume(np.maximum(self._volume.array + noise, 0).astype(np.float32), self._volume.affine)
        paths = write_series(volume, self._folder / str(self._count))
        study, series, frame = (generate_uid(prefix=None) for _ in range(3))
        for number, path in enumerate(paths, start=1):
            image = dcmread(path)
            image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"{series}.{number}"
            image.PatientID = f"COMPOSE-{self._count}"
            image.save_as(path)
        return str(study), paths


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Studies:
    return Studies(tmp_path_factory.mktemp("studies"))


def references(scp: StorageScp, study_instance_uid: str) -> list[str]:
    """The SOP Instance UIDs of the SEGs of a study that the destination was sent, each time that it was."""
    needle = study_instance_uid.encode()
    return [each.sop_instance_uid for each in scp.segmentations if needle in each.data_set]


def send_and_expect(site: ComposeSite, destination: StorageScp, study: tuple[str, list[Path]]) -> None:
    study_instance_uid, paths = study
    patiently(lambda: site.send(paths), START_TIMEOUT_S)
    wait_until(lambda: bool(references(destination, study_instance_uid)), RESULT_TIMEOUT_S, site.logs)


@pytest.mark.timeout(3600)
def test_a_study_goes_in_and_a_segmentation_comes_out(
    site: ComposeSite, destination: StorageScp, studies: Studies
) -> None:
    study_instance_uid, paths = studies.new()
    assert site.send(paths)
    wait_until(lambda: bool(references(destination, study_instance_uid)), RESULT_TIMEOUT_S, site.logs)
    (job,) = site.jobs_of(study_instance_uid)
    assert job["state"] == "succeeded"
    wait_until(lambda: site.orthanc_segmentations() == 1, RESULT_TIMEOUT_S, site.logs)


@pytest.mark.parametrize("service", ["receiver", "api", "worker", "postgres", "broker", "proxy", "orthanc"])
def test_a_container_has_no_root_no_capabilities_and_nothing_to_write_on(
    site: ComposeSite, service: str
) -> None:
    found: dict[str, Any] = site.inspect(service)
    assert found["Config"]["User"] not in ("", "root", "0")
    assert found["HostConfig"]["ReadonlyRootfs"]
    assert not found["HostConfig"]["Privileged"]
    assert set(found["EffectiveCaps"] or ()) <= {"CAP_NET_BIND_SERVICE"}
    assert "no-new-privileges" in found["HostConfig"]["SecurityOpt"]
    assert found["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"


@pytest.mark.parametrize("service", ["receiver", "api", "worker", "postgres", "broker", "proxy", "orthanc"])
def test_a_health_check_passes(site: ComposeSite, service: str) -> None:
    patiently(lambda: site.healthy(service), 300)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("service", ["receiver", "api", "worker", "postgres", "broker", "proxy", "orthanc"])
def test_a_container_that_is_killed_comes_back_and_studies_go_on(
    site: ComposeSite, destination: StorageScp, studies: Studies, service: str
) -> None:
    site.until_back(service, site.kill(service))
    send_and_expect(site, destination, studies.new())
    site.until_ready()


@pytest.mark.timeout(600)
def test_the_audit_trail_has_the_address_of_the_client_and_not_what_it_says_of_itself(
    site: ComposeSite,
) -> None:
    told = "203.0.113.5"
    before = len(site.origins_of("access.refused"))
    assert site.status_of("/api/v1/jobs", **{"X-Forwarded-For": told}) == 401
    # Past the proxy, from a container beside it: its word does not count either.
    ask = (
        "import urllib.request, urllib.error\n"
        "asked = urllib.request.Request('http://api:8080/api/v1/jobs')\n"
        f"asked.add_header('X-Forwarded-For', '{told}')\n"
        "try: urllib.request.urlopen(asked)\n"
        "except urllib.error.HTTPError as error: print(error.code)"
    )
    assert site.compose("exec", "-T", "worker", "python3", "-c", ask).split() == ["401"]
    client, neighbour = site.origins_of("access.refused")[before:]
    assert client == site.host
    assert neighbour == site.address_of("worker")


@pytest.mark.timeout(1800)
def test_the_documented_acceptance_passes(site: ComposeSite, tmp_path: Path) -> None:
    (block,) = commands("acceptance.md", "# Site acceptance")
    site.run_as_written([*block[:-1], block[-1].replace("acceptance.pdf", str(tmp_path / "acceptance.pdf"))])
    assert (
        (tmp_path / "acceptance.pdf").read_bytes().startswith(b"%PDF-")
    )  # a failed check is an exit status 1


def test_the_image_tells_what_is_inside(site: ComposeSite) -> None:
    bill = json.loads(site.script("deploy/sbom"))
    named = {component["name"] for component in bill["components"]}
    assert {"pydicom", "openvino", "libc6", "segnode"} <= named
    assert "torch" not in named


@pytest.mark.timeout(3600)
def test_the_documented_backup_is_restored_as_documented(
    site: ComposeSite, destination: StorageScp, studies: Studies, tmp_path: Path
) -> None:
    study = studies.new()
    send_and_expect(site, destination, study)
    wait_until(lambda: not site.get("/api/v1/deliveries?state=pending")["items"], RESULT_TIMEOUT_S, site.logs)
    (before,) = site.jobs_of(study[0])
    sent = references(destination, study[0])

    def of_today(heading: str) -> list[str]:
        (block,) = commands("operation.md", heading)
        written = (("/var/backups/segnode", str(tmp_path / "backups")), ("2026-01-01", "$(date +%F)"))
        for old, new in written:
            block = [line.replace(old, new) for line in block]
        return block

    site.run_as_written(of_today("## Back up"))
    lost = studies.new()
    send_and_expect(site, destination, lost)
    drill = of_today("## Restore")
    checks = [line for line in drill if " exec -T worker " in line]
    site.run_as_written(drill[: -len(checks)])
    site.until_ready()
    for line in checks:  # whether the PACS answers by now is up to it
        patiently(lambda line=line: succeeds(site, line), START_TIMEOUT_S)  # type: ignore[misc]

    (after,) = site.jobs_of(study[0])
    assert (after["job_id"], after["state"]) == (before["job_id"], "succeeded")
    send_and_expect(site, destination, studies.new())
    assert references(destination, study[0]) == sent, "it had arrived before the backup"
    assert site.status_of(f"/api/v1/studies/{lost[0]}", Authorization=site.authorization) == 404
    arrived = references(destination, lost[0])
    assert site.send(lost[1])
    again = 2 * arrived  # what is sent again is computed again, and is the same object
    wait_until(lambda: references(destination, lost[0]) == again, RESULT_TIMEOUT_S, site.logs)


def succeeds(site: ComposeSite, line: str) -> bool:
    try:
        site.run_as_written([line])
    except AssertionError:
        return False
    return True


@pytest.mark.timeout(3600)
def test_the_broker_may_lose_everything(site: ComposeSite, destination: StorageScp, studies: Studies) -> None:
    study = studies.new()
    assert site.send(study[1])
    flush = 'REDISCLI_AUTH="$(cat /run/secrets/broker_password)" valkey-cli flushall'
    assert "OK" in site.compose("exec", "-T", "broker", "sh", "-c", flush)
    wait_until(lambda: bool(references(destination, study[0])), RESULT_TIMEOUT_S, site.logs)


@pytest.mark.timeout(5400)
def test_twenty_studies_wait_for_a_destination_and_are_delivered_exactly_once(
    site: ComposeSite, destination: StorageScp, studies: Studies
) -> None:
    waiting = [studies.new() for _ in range(20)]
    with destination.down():
        for _, paths in waiting:
            assert site.send(paths)

        def computed() -> bool:
            jobs = [site.jobs_of(study) for study, _ in waiting]
            return all(len(each) == 1 and each[0]["state"] == "succeeded" for each in jobs)

        wait_until(computed, RESULT_TIMEOUT_S, site.logs)
        assert not any(references(destination, study) for study, _ in waiting)

    def settled() -> bool:
        pending = site.get("/api/v1/deliveries?state=pending")["items"]
        return not pending and all(references(destination, study) for study, _ in waiting)

    wait_until(settled, RESULT_TIMEOUT_S, site.logs)
    for study, _ in waiting:
        assert len(references(destination, study)) == 1
    ours = [study.encode() for study, _ in waiting]
    sent = [o.sop_instance_uid for o in destination.objects if any(study in o.data_set for study in ours)]
    assert set(Counter(sent).values()) == {1}  # reports too
