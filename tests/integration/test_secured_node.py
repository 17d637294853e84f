"""A node whose DICOM goes over TLS both ways, and nothing of a patient where it does not belong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from phantom import test_uid as make_uid
from phantom import write_classic_series
from places import AFFINE, image
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset
from running_node import CALLING_AE_TITLE, ROUTE, SEGNODE, RunningNode
from storage_scp import StorageScp
from waiting import wait_until

from service.dicom.send import OutcomeKind, send_files
from service.records.tables import Role
from service.tls import server_context

PATIENT = {
    "PatientName": "Zebrafink^Quirina",
    "PatientID": "PID-77-SECRET",
    "PatientBirthDate": "19431217",
    "AccessionNumber": "ACC-9917-X",
    "ReferringPhysicianName": "Obermoser^Ludolf",
    "PatientAddress": "Kastanienallee 97",
    "OtherPatientIDs": "OPID-4242",
}
SECRETS = [part for value in PATIENT.values() for part in value.split("^")]
SECRETS += ["Quirina Zebrafink", "OTHER-PID-88", "1943-12-17", "Umlaufstochter"]

Nodes = tuple[RunningNode, StorageScp, Authority]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Nodes]:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    node, pacs = authority.issue("node"), authority.issue("pacs")
    own = {"certificate": str(node.certificate), "key": str(node.key), "trusted": str(authority.trusted)}
    context = server_context(pacs.certificate, pacs.key, authority.trusted)
    with StorageScp(ssl_context=context) as scp:
        destination = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": scp.port, "tls": own}
        peers = [{"ae_title": CALLING_AE_TITLE, "certificates": ["modality"]}]
        with RunningNode(
            tmp_path_factory.mktemp("node"),
            models=models_dir,
            dicom={"tls": own, "peers": peers},
            routes=[{**ROUTE, "refusal_objects": False}],
            log_level="DEBUG",
            environment={"SEGNODE_DESTINATIONS": json.dumps([destination])},
        ) as running:
            yield running, scp, authority


def send(secured: Nodes, paths: list[Path], who: str = "modality") -> list[OutcomeKind]:
    node, _, authority = secured
    pair = authority.issue(who)
    tls = {"certificate": pair.certificate, "key": pair.key, "trusted": authority.trusted}
    to = node.destination.model_validate({**node.destination.model_dump(), "tls": tls})
    return [outcome.kind for _, outcome in send_files(paths, to, calling_ae_title=CALLING_AE_TITLE)]


def write(folder: Path, name: str, **more: Any) -> list[Path]:
    return write_classic_series(
        folder / name,
        image(3),
        AFFINE,
        study_instance_uid=make_uid("secured", name),
        series_instance_uid=make_uid("secured series", name),
        **{**PATIENT, **more},
    )


@pytest.mark.slow
def test_a_study_goes_in_and_its_result_out_over_tls(secured: Nodes, tmp_path: Path) -> None:
    node, pacs, _ = secured
    paths = write(tmp_path, "good")
    assert set(send(secured, paths, "stranger")) == {OutcomeKind.RETRY}  # another's certificate
    assert node.items("/studies") == []
    assert set(send(secured, paths)) == {OutcomeKind.DELIVERED}
    (job,) = node.wait_for_jobs(1)
    assert job["state"] == "succeeded", job
    wait_until(lambda: len(pacs.segmentations) == 1, 60, node.log)


@pytest.mark.slow
def test_nothing_of_a_patient_is_where_it_does_not_belong(secured: Nodes, tmp_path: Path) -> None:
    """After all that a node meets: corrections, two patients in a series, values that break their VR."""
    node, _, _ = secured

    def another(dataset: Dataset, z: int) -> None:
        if z % 2:
            dataset.PatientID, dataset.PatientName = "OTHER-PID-88", "Umlaufstochter^Berta"

    first = write(tmp_path, "first")
    send(secured, first)
    corrected = dcmread(first[0])
    corrected.PatientID = "OTHER-PID-88"
    dcmwrite(tmp_path / "corrected.dcm", corrected)
    broken = first[1].read_bytes()
    (tmp_path / "cut.dcm").write_bytes(broken[: len(broken) // 2])
    (tmp_path / "date.dcm").write_bytes(broken.replace(b"19431217", b"1943-12-"))
    (tmp_path / "text.dcm").write_bytes(broken.replace(b"Zebrafink^", b"\xff\x1b$)\x0fink^"))
    send(secured, [tmp_path / name for name in ("corrected.dcm", "cut.dcm", "date.dcm", "text.dcm")])
    send(secured, write(tmp_path, "two", edit=another))
    send(secured, write(tmp_path, "nobody", PatientID=None))
    jobs = node.wait_for_jobs(3)
    assert {"succeeded", "refused"} <= {job["state"] for job in jobs}
    assert "receive.refused" in node.log()  # what was cut short
    answers = []
    with node.client(Role.ADMIN) as client:
        for path in first[:2]:
            answers.append(node.post_files(client, [path], model="threshold").text)
        answers.append(node.post_files(client, [tmp_path / "cut.dcm"], model="threshold").text)
        answers += [client.get(f"/studies/{value}").text for value in ("PID-77-SECRET", "1.2.3")]
        answers += [
            client.get(f"/{what}?limit=200").text for what in ("jobs", "studies", "deliveries", "audit")
        ]
        answers.append(client.get("/../../metrics").text)
        answers.append(client.get(f"http://127.0.0.1:{node.http_port}/metrics").text)
    for secret in SECRETS:
        assert secret not in node.log(), secret
        for answer in answers:
            assert secret not in answer, (secret, answer)


@pytest.mark.slow
def test_the_audit_trail_of_all_this_is_whole(secured: Nodes) -> None:
    node, _, _ = secured
    verify = [*SEGNODE, "audit", "verify", "--config", str(node.config)]
    found = subprocess.run(verify, capture_output=True, text=True, check=False, env=node.environment)
    assert found.returncode == 0, found.stderr
    lines = node.items("/audit")
    assert {"association_rejected", "key.created", "delivery_sent"} <= {line["kind"] for line in lines}
    rejected = [line for line in lines if line["kind"] == "association_rejected"]
    assert {line["detail"]["reason"] for line in rejected} == {"certificate-not-of-this-ae-title"}
    assert {line["origin"] for line in rejected} == {"127.0.0.1"}
