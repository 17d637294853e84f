"""A node without its network: records, spool and models in a folder, series put there as if received."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
from bundle_factory import make_threshold_bundle
from numpy.typing import NDArray
from phantom import write_classic_series
from waiting import wait_until

from models.registry import Registry
from service.records.database import Records, utc_now
from service.records.instances import ReceivedInstance, Recorded, record_instance
from service.records.migrate import upgrade
from service.records.tables import InstanceKind, Job, JobState, new_identifier
from service.settings import Settings
from service.spool import Spool
from service.worker import Worker

AFFINE = np.array([[1.5, 0, 0, -12], [0, 1.25, 0, -9], [0, 0, 2, 30], [0, 0, 0, 1]], float)


def image_array(shape_zyx: tuple[int, int, int] = (8, 12, 14), seed: int = 0) -> NDArray[np.int16]:
    """Intensities in which both labels of the threshold model occur, in boxes, over noise below them."""
    array = np.random.default_rng(seed).integers(1, 60, shape_zyx, np.int16)
    z, y, x = shape_zyx
    array[z // 4 : z // 2, y // 4 : y // 2, x // 4 : x // 2] = 200
    array[z // 2 : 3 * z // 4, y // 2 : y - 2, x // 2 : x - 3] = 400
    return array


@dataclass
class SmallNode:
    """The parts of a node over one folder."""

    settings: Settings
    records: Records
    spool: Spool
    registry: Registry

    def add_model(self, folder: Path, **arguments: object) -> str:
        """Install and activate a threshold model on the grid of the phantoms; its digest."""
        arguments.setdefault("spacing_mm", (2.0, 1.25, 1.5))
        bundle = make_threshold_bundle(folder, **arguments)  # type: ignore[arg-type]
        self.registry.add(bundle.folder, check_golden=False)
        manifest = bundle.manifest
        self.registry.activate(manifest.name, manifest.version, accept_changed_labels=True)
        return bundle.digest

    def receive(self, paths: list[Path], *, ago_s: float = 60.0) -> list[Recorded]:
        """Put DICOM files on the spool and into the records, as the receiver does, but all at one moment."""
        at = utc_now() - timedelta(seconds=ago_s)
        with self.records.write() as session:
            return [record_instance(session, self._take(path, at)) for path in paths]

    def _take(self, path: Path, at: datetime) -> ReceivedInstance:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        instance_id = new_identifier()
        final = self.spool.instance_path(instance_id)
        self.spool.make_folder(final.parent)
        shutil.copyfile(path, final)
        identity = f"{header.PatientID}|{header.StudyInstanceUID}"
        return ReceivedInstance(
            instance_id=instance_id,
            study_instance_uid=header.StudyInstanceUID,
            series_instance_uid=header.SeriesInstanceUID,
            sop_instance_uid=header.SOPInstanceUID,
            sop_class_uid=header.SOPClassUID,
            transfer_syntax_uid=header.file_meta.TransferSyntaxUID,
            kind=InstanceKind.IMAGE,
            modality=header.Modality,
            patient_id=header.PatientID,
            identity_digest=hashlib.sha256(identity.encode()).hexdigest(),
            path=self.spool.relative(final),
            size_bytes=final.stat().st_size,
            sha256=hashlib.sha256(final.read_bytes()).hexdigest(),
            calling_ae_title="MODALITY",
            called_ae_title="SEGNODE",
            peer_address="127.0.0.1",
            received_at=at,
        )

    def receive_phantom(
        self,
        folder: Path,
        array_zyx: NDArray[np.int16] | None = None,
        *,
        ago_s: float = 60.0,
        **attributes: object,
    ) -> list[Path]:
        """Make a phantom series and receive it; its files."""
        array_zyx = image_array() if array_zyx is None else array_zyx
        paths = write_classic_series(folder, array_zyx, AFFINE, **attributes)  # type: ignore[arg-type]
        self.receive(paths, ago_s=ago_s)
        return paths

    def jobs(self) -> list[Job]:
        with self.records.read() as session:
            return list(session.query(Job).order_by(Job.created_at, Job.job_id))

    def worker(self) -> Worker:
        return Worker(self.settings, self.records, self.spool, self.registry)

    @contextmanager
    def working(self) -> Iterator[Worker]:
        """A worker that runs in a thread while the block does."""
        worker, stop = self.worker(), threading.Event()
        thread = threading.Thread(target=worker.run, args=(stop,))
        thread.start()
        try:
            yield worker
        finally:
            stop.set()
            thread.join(30)
            assert not thread.is_alive()

    def wait_for_jobs(self, *states: JobState, within_s: float = 60.0) -> list[Job]:
        """Wait until there are as many jobs as states, in these states by age."""
        wait_until(lambda: [job.state for job in self.jobs()] == list(states), within_s, self._describe)
        return self.jobs()

    def _describe(self) -> str:
        return str([(j.state, j.reason_code, j.reason, j.progress_stage) for j in self.jobs()])


def make_node(folder: Path, **changes: object) -> SmallNode:
    """A new node with one route: MR to the threshold model, results to the destination PACS."""
    values: dict[str, object] = {
        "data_dir": folder,
        "storage": {"low_watermark_bytes": 0, "reserve_bytes": 0},
        "worker": {"poll_interval_s": 0.02, "threads": 1, "runtime": "onnxruntime", "first_retry_s": 0.0},
        "destinations": [{"name": "PACS", "ae_title": "PACS", "host": "127.0.0.1", "port": 9}],
        "routes": [
            {
                "name": "mr",
                "model": "threshold",
                "match": {"Modality": "MR"},
                "quiet_time_s": 1.0,
                "destinations": ["PACS"],
            }
        ],
    }
    settings = Settings(**{**values, **changes})  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    upgrade(settings.records_url)
    return SmallNode(
        settings,
        Records(settings.records_url),
        Spool(settings.spool_dir),
        Registry(settings.registry_dir, runtimes=("onnxruntime",)),
    )
