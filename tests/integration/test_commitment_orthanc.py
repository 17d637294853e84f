"""A real PACS confirms what it keeps: Orthanc, asked by N-ACTION, reports on an association of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_harness import ApiHarness
from dicom_peer import make_object
from orthanc import Orthanc
from programs import program
from pydicom import dcmwrite
from waiting import wait_until

from service.commitment import Committer
from service.dicom.receive import Receiver
from service.records.database import Records, utc_now
from service.records.migrate import upgrade
from service.records.tables import Delivery, DeliveryState, Job, JobOrigin, JobState, Result, ResultKind


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[Orthanc]:
    program("Orthanc", "orthanc")
    with Orthanc(tmp_path / "orthanc") as server:
        yield server


def record_sent(api: ApiHarness, path: Path, sop_class_uid: str, sop_instance_uid: str) -> str:
    """Write down that a file has been sent to the PACS; its delivery's identifier."""
    now = utc_now()
    with api.records.write() as session:
        job = Job(
            origin=JobOrigin.DICOM,
            model_name="threshold",
            input_key=sop_instance_uid,
            state=JobState.SUCCEEDED,
            created_at=now,
            finished_at=now,
        )
        session.add(job)
        session.flush()
        result = Result(
            job_id=job.job_id,
            kind=ResultKind.SEGMENTATION,
            path=api.spool.relative(path),
            size_bytes=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            created_at=now,
        )
        session.add(result)
        session.flush()
        delivery = Delivery(
            result_id=result.result_id,
            job_id=job.job_id,
            destination="pacs",
            state=DeliveryState.SENT,
            next_attempt_at=now,
            created_at=now,
            sent_at=now,
        )
        session.add(delivery)
        session.flush()
        return delivery.delivery_id


def test_orthanc_commits_what_it_has_and_names_what_it_has_not(orthanc: Orthanc, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'records.sqlite'}"
    upgrade(url)
    records = Records(url)
    api = ApiHarness(
        tmp_path,
        records,
        storage={"low_watermark_bytes": 0, "reserve_bytes": 0},
        dicom={"port": 0, "peers": [{"ae_title": "ORTHANC"}]},
        commitment={"listen_s": 0.0},
        destinations=[
            {
                "name": "pacs",
                "ae_title": "ORTHANC",
                "host": "127.0.0.1",
                "port": orthanc.dicom_port,
                "storage_commitment": True,
            }
        ],
    )
    receiver = Receiver(api.settings, records, api.spool)
    receiver.start()
    try:
        orthanc.start(node_port=receiver.port)
        deliveries = []
        for number in (1, 2):
            path = api.spool.results_dir / f"{number}.dcm"
            dataset = make_object(number)
            dcmwrite(path, dataset, enforce_file_format=True)
            deliveries.append(record_sent(api, path, str(dataset.SOPClassUID), str(dataset.SOPInstanceUID)))
        orthanc.upload([api.spool.results_dir / "1.dcm"])
        assert Committer(api.settings, records).run_once(utc_now())

        def states() -> list[DeliveryState]:
            with records.read() as session:
                return [session.get_one(Delivery, each).state for each in deliveries]

        wait_until(lambda: states() == [DeliveryState.COMMITTED, DeliveryState.PENDING], 90, orthanc.log)
    finally:
        receiver.stop()
        records.close()
