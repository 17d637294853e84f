"""The HTTP interface in the test's own process, with one key for each role and a clock that stands still."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from bundle_factory import make_threshold_bundle, write_nifti_ras

from models.bundle import pack_zip
from models.registry import Registry
from service.api import create_app
from service.keys import create_key
from service.records.database import Records
from service.records.instances import ReceivedInstance, record_instance
from service.records.jobs import bind_model, claim_job, enqueue, succeed_job
from service.records.tables import InstanceKind, Job, JobOrigin, ResultKind, Role, new_identifier
from service.records.work import NewInput, NewJob, NewResult, Outcome
from service.settings import Settings
from service.spool import Spool

START = datetime(2026, 3, 1, 12, tzinfo=UTC).replace(tzinfo=None)
STUDY = "1.2.826.0.1.3680043.8.498.1"
MEDIA_TYPE = "application/problem+json"


class ApiHarness:
    """A node without its processes: the application, and what it works on."""

    def __init__(self, folder: Path, records: Records, **settings: Any) -> None:
        self.folder = folder
        self.now = START
        self.settings = Settings(data_dir=folder / "data", **settings)
        self.records = records
        storage = self.settings.storage
        self.spool = Spool(
            self.settings.spool_dir,
            low_watermark_bytes=storage.low_watermark_bytes,
            reserve_bytes=storage.reserve_bytes,
        )
        self.registry = Registry(self.settings.registry_dir, runtimes=["onnxruntime"])
        self.app = create_app(self.settings, records, self.spool, self.registry, clock=lambda: self.now)
        self.secrets: dict[str, str] = {}
        self.key_ids: dict[str, str] = {}
        for role in Role:
            self.make_key(role.value, role)

    def make_key(self, name: str, role: Role) -> None:
        with self.records.write() as session:
            self.key_ids[name], self.secrets[name] = create_key(session, name, role, now=self.now)

    def headers(self, key: str | None) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secrets[key]}"} if key else {}

    def request(
        self,
        method: str,
        path: str,
        *,
        key: str | None = "admin",
        headers: dict[str, str] | None = None,
        **arguments: Any,
    ) -> httpx.Response:
        """One request; an exception that leaves the application fails the test."""

        async def send() -> httpx.Response:
            sent = {**self.headers(key), **(headers or {})}
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", verify=False) as c:
                return await c.request(method, path, headers=sent, **arguments)

        return asyncio.run(send())

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        return self.request("GET", path, **arguments)

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        return self.request("POST", path, **arguments)

    def delete(self, path: str, **arguments: Any) -> httpx.Response:
        return self.request("DELETE", path, **arguments)

    def upload(
        self,
        *contents: bytes,
        model: str | None = "threshold",
        version: str | None = None,
        key: str | None = "uploader",
        name: str = "image.nii.gz",
        **arguments: Any,
    ) -> httpx.Response:
        data = {k: v for k, v in (("model", model), ("version", version)) if v is not None}
        files = [("files", (name, content, "application/octet-stream")) for content in contents]
        return self.post("/api/v1/segmentations", key=key, data=data, files=files, **arguments)

    def install(self, *, activate: bool = True, **bundle: Any) -> str:
        """Install a threshold bundle without its golden case, which is tested elsewhere; its version."""
        made = make_threshold_bundle(self.folder / f"bundle-{new_identifier()}", **bundle)
        self.registry.add(made.folder, check_golden=False)
        if activate:
            self.registry.activate(made.manifest.name, made.manifest.version, accept_changed_labels=True)
        return made.manifest.version

    def receive_instance(self, sop: str = "1", *, study: str = STUDY, at: datetime | None = None) -> str:
        """Record an instance whose file lies in the spool; its identifier."""
        instance_id = new_identifier()
        path = self.spool.instance_path(instance_id)
        self.spool.make_folder(path.parent)
        path.write_bytes(b"instance")
        received = ReceivedInstance(
            instance_id=instance_id,
            study_instance_uid=study,
            series_instance_uid=f"{study}.1",
            sop_instance_uid=f"{study}.1.{sop}",
            sop_class_uid="1.2.840.10008.5.1.4.1.1.4",
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            kind=InstanceKind.IMAGE,
            modality="MR",
            patient_id="SECRET-PATIENT",
            identity_digest="0" * 64,
            path=self.spool.relative(path),
            size_bytes=8,
            sha256="0" * 64,
            calling_ae_title="PACS",
            called_ae_title="SEGNODE",
            peer_address="127.0.0.1",
            received_at=at or self.now,
        )
        with self.records.write() as session:
            record_instance(session, received)
        return instance_id

    def enqueue(
        self,
        *,
        instances: Sequence[str] = (),
        owner: str | None = None,
        destinations: Sequence[str] = (),
        study: str | None = STUDY,
        model: str = "threshold",
        age: timedelta = timedelta(0),
    ) -> str:
        """Put a job into the queue, of received instances or of nothing; its identifier."""
        with self.records.write() as session:
            new = NewJob(
                origin=JobOrigin.DICOM if owner is None else JobOrigin.UPLOAD,
                model_name=model,
                input_key=new_identifier(),
                inputs=[
                    NewInput(self.spool.relative(self.spool.instance_path(each)), instance_id=each)
                    for each in instances
                ],
                destinations=destinations,
                study_instance_uid=study,
                owner_key_id=self.key_ids[owner] if owner else None,
            )
            return enqueue(session, new, at=self.now - age)[0].job_id

    def claim(self, job_id: str, *, version: str = "1.0.0") -> Job:
        """Have a worker take a job: every job that waits before it is taken too."""
        while True:
            with self.records.write() as session:
                job = claim_job(session, owner="worker", lease_s=60, now=self.now)
                assert job is not None
                bind_model(session, job.job_id, job.attempt, version=version, digest="d" * 64)
            if job.job_id == job_id:
                return job

    def succeed(
        self, job_id: str, *, dicom: bool = True, preview: bool = False, version: str = "1.0.0"
    ) -> dict[ResultKind, bytes]:
        """Have a worker end a job with results; their contents by kind."""
        job = self.claim(job_id, version=version)
        folder = self.spool.results_dir / job_id
        self.spool.make_folder(folder)
        labelmap = b"labelmap of " + job_id.encode()
        contents = {ResultKind.LABELMAP: labelmap, ResultKind.MEASUREMENTS: b'{"ml": 1}'}
        if dicom:
            contents[ResultKind.SEGMENTATION] = b"segmentation"
        if preview:
            contents[ResultKind.PREVIEW] = b"preview"
        results = []
        for kind, content in contents.items():
            path = folder / kind.value
            path.write_bytes(content)
            is_object = kind is ResultKind.SEGMENTATION
            results.append(
                NewResult(
                    kind=kind,
                    path=self.spool.relative(path),
                    size_bytes=len(content),
                    sha256=hashlib.sha256(content).hexdigest(),
                    sop_class_uid="1.2.840.10008.5.1.4.1.1.66.4" if is_object else None,
                    sop_instance_uid=f"2.25.{int(job_id, 16)}" if is_object else None,
                )
            )
        with self.records.write() as session:
            outcome = Outcome(results, "onnxruntime", "float32", {"volumes_ml": {"low": 1.5}})
            succeed_job(session, job_id, job.attempt, outcome, now=self.now)
        return contents

    def spool_files(self) -> set[str]:
        return {self.spool.relative(p) for p in self.spool.root.rglob("*") if p.is_file()}


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The response is the problem that it should be, whole; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    problem = response.json()
    assert problem["code"] == code, problem
    assert problem["status"] == status
    assert problem["title"]
    assert problem["type"] == "about:blank"
    assert problem["detail"].endswith((".", "!", "?"))
    assert isinstance(problem["retryable"], bool)
    assert "Traceback" not in response.text
    return dict(problem)


def nifti(folder: Path, array: np.ndarray | None = None, *, seed: int = 0) -> bytes:
    """The bytes of a small .nii.gz; (Z, Y, X), other numbers of dimensions too."""
    if array is None:
        array = np.random.default_rng(seed).integers(0, 400, (6, 7, 8)).astype(np.float32)
    path = folder / f"{new_identifier()}.nii.gz"
    write_nifti_ras(path, array, (1.0, 1.0, 1.0))
    return path.read_bytes()


def bundle_zip(folder: Path, **bundle: Any) -> bytes:
    """A threshold bundle as the bytes of its .zip."""
    name = new_identifier()
    pack_zip(make_threshold_bundle(folder / name, **bundle), folder / f"{name}.zip")
    return (folder / f"{name}.zip").read_bytes()
