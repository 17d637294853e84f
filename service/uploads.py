"""Files that come over HTTP: taken into the spool under a quota, judged, and made into a job.

Bytes go straight to the node's own file names in a folder of the spool, never to a default temporary
folder. Space is promised before the first byte is read, so that uploads side by side cannot fill the disk
that each of them alone would have fitted on. A folder is locked while its upload lives; after a crash it
is the folder that nobody holds and no row speaks of, and :func:`clear_abandoned` removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Self

from sqlalchemy import select

from models.bundle import Bundle
from models.errors import ModelWithdrawnError, SegnodeError
from models.registry import Registry
from service.records.database import Records
from service.records.events import record_event
from service.records.jobs import enqueue, retry_job
from service.records.promises import SharedPromises
from service.records.tables import JobInput, JobOrigin, JobState, new_identifier
from service.records.work import NewInput, NewJob, input_key
from service.spool import Spool, fsync_directory, fsync_file
from service.upload_inputs import take_inputs

_STEP_BYTES = 64 << 20  # what an upload of unknown length is promised at a time


class UploadTooLargeError(SegnodeError):
    """Raised when an upload is larger than the node accepts."""

    code = "UPLOAD_TOO_LARGE"


@dataclass(frozen=True)
class ReceivedFile:
    """A file of an upload, as it came."""

    path: Path
    size_bytes: int
    sha256: str


class UploadDesk:
    """Takes uploads into the spool; one for a process.

    Parameters
    ----------
    spool : Spool
    records : Records or None
        Where the desks of several processes tell each other what they have promised; None for a desk that
        has the spool to itself.
    """

    def __init__(self, spool: Spool, records: Records | None = None) -> None:
        self.spool = spool
        self._lock = threading.Lock()
        self._promised_bytes = 0  # to uploads that are under way, and not yet written by them
        self._promises = SharedPromises(records) if records is not None else None

    def begin(self, declared_bytes: int | None, *, maximum_bytes: int) -> Upload:
        """Open an upload, before its first byte is read.

        Parameters
        ----------
        declared_bytes : int or None
            What the request says it will bring; None where it does not say.

        Raises
        ------
        UploadTooLargeError
            If it says more than ``maximum_bytes``.
        StorageFullError
            If that much is not free, above the low watermark and beside what others were promised.
        """
        if declared_bytes is not None and declared_bytes > maximum_bytes:
            raise _too_large(f"has {declared_bytes} bytes", maximum_bytes)
        promised_bytes = min(_STEP_BYTES, maximum_bytes) if declared_bytes is None else declared_bytes
        self.promise(promised_bytes)
        try:
            return Upload(self, promised_bytes, maximum_bytes)
        except BaseException:
            self.promise(-promised_bytes)
            raise

    def promise(self, size_bytes: int) -> None:
        """Promise more bytes of the disk, or (negative) give some back. Raises StorageFullError."""
        with self._lock:
            promised_bytes = self._promised_bytes + size_bytes
            if self._promises is not None:
                self._promises.share(promised_bytes, self.spool.check_space)
            elif size_bytes > 0:
                self.spool.check_space(promised_bytes)
            self._promised_bytes = promised_bytes

    @property
    def promised_bytes(self) -> int:
        """Bytes that uploads under way may still write."""
        return self._promised_bytes


class Upload:
    """One upload: a folder of its own, which is removed at the end unless :meth:`keep` was called."""

    def __init__(self, desk: UploadDesk, promised_bytes: int, maximum_bytes: int) -> None:
        self._desk = desk
        self._promised_bytes = promised_bytes
        self._maximum_bytes = maximum_bytes
        self._received_bytes = 0
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._kept = False
        self.files: list[ReceivedFile] = []
        self.folder = desk.spool.uploads_dir / new_identifier()
        self._lock = _lock_of(self.folder)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        desk.spool.make_folder(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End it: give the rest of its promise back, and remove its folder unless it was kept."""
        if self._file is not None:
            self._file.close()
        if not self._kept:
            shutil.rmtree(self.folder)
        self._desk.promise(-self._promised_bytes)
        _unlock(self.folder, self._lock)

    def account(self, size_bytes: int) -> None:
        """Count bytes of the request's body before they are used.

        Raises
        ------
        UploadTooLargeError, StorageFullError
            As :meth:`UploadDesk.begin`, for what the request did not say beforehand.
        """
        self._received_bytes += size_bytes
        if self._received_bytes > self._maximum_bytes:
            raise _too_large(f"goes on after {self._maximum_bytes} bytes", self._maximum_bytes)
        self._desk.spool.check_reserve(size_bytes)
        if size_bytes > self._promised_bytes:
            self._desk.promise(_STEP_BYTES + size_bytes)
            self._promised_bytes += _STEP_BYTES + size_bytes
        self._desk.promise(-size_bytes)
        self._promised_bytes -= size_bytes

    def start_file(self) -> None:
        """Begin the next file."""
        assert self._file is None
        self._hash = hashlib.sha256()
        self._file = open(self.folder / f"{len(self.files):04d}.part", "xb")  # noqa: SIM115

    def write(self, data: bytes) -> None:
        """Append to the file that was begun."""
        assert self._file is not None
        self._hash.update(data)
        self._file.write(data)

    def end_file(self) -> None:
        """End the file that was begun."""
        assert self._file is not None
        size_bytes = self._file.tell()
        self._file.close()
        path, self._file = Path(self._file.name), None
        self.files.append(ReceivedFile(path, size_bytes, self._hash.hexdigest()))

    def keep(self) -> None:
        """Leave the folder where it is: the records speak of it now."""
        self._kept = True


def _too_large(what: str, maximum_bytes: int) -> UploadTooLargeError:
    return UploadTooLargeError(
        f"The upload {what}; at most {maximum_bytes} bytes are accepted.",
        remedy="Send less, compress it, or have the node's limit raised.",
    )


def find_bundle(registry: Registry, model_name: str, version: str | None) -> Bundle:
    """The bundle that an upload asks for: the version named, or the active one.

    Raises
    ------
    ModelUnknownError, ModelWithdrawnError
    """
    if version is None:
        return registry.active(model_name)
    bundle = registry.get(model_name, version)
    if registry.is_withdrawn(model_name, version):
        raise ModelWithdrawnError(
            f"Version {version} of {model_name!r} is withdrawn.",
            remedy="Leave the version out, or name another.",
        )
    return bundle


def submit(
    upload: Upload,
    records: Records,
    spool: Spool,
    bundle: Bundle,
    *,
    requested_version: str | None,
    whole_study: bool = False,
    key_id: str,
    actor: str,
    now: datetime,
) -> str:
    """Judge what was uploaded by what is cheap to see, and put a job for it into the queue.

    The same files, sent again with the same key for the same model and version, give the job that is there
    already; where it had failed it is queued again. Voxels are judged later, by the job.

    Parameters
    ----------
    whole_study : bool
        Whether one archive of a study may stand for all channels of the model.

    Returns
    -------
    str
        The job's identifier.

    Raises
    ------
    Refusal
        If the files are not what the model takes.
    """
    paths, study_instance_uid = take_inputs(
        [file.path for file in upload.files], bundle.manifest, whole_study=whole_study
    )
    for path in paths:
        fsync_file(path)
    fsync_directory(upload.folder)
    # The job's version is bound when it starts. The active version is part of what makes two uploads the
    # same, so that the same image can be segmented anew after an activation.
    identity = f"{key_id}:{requested_version or ''}:{bundle.manifest.version}"
    key = input_key((f"{i}:{file.sha256}", identity) for i, file in enumerate(upload.files))
    with records.write(alone=True) as session:
        new = NewJob(
            origin=JobOrigin.UPLOAD,
            model_name=bundle.manifest.name,
            input_key=key,
            inputs=[NewInput(spool.relative(path), channel=i) for i, path in enumerate(paths)],
            requested_version=requested_version,
            study_instance_uid=study_instance_uid,
            owner_key_id=key_id,
        )
        job, is_new = enqueue(session, new, at=now)
        if not is_new and job.state is JobState.FAILED:
            job = retry_job(session, job.job_id)
        record_event(
            session,
            "segmentation.uploaded",
            actor=actor,
            at=now,
            subject=job.job_id,
            detail={"files": len(upload.files), "repeated": not is_new},
        )
    if is_new:
        upload.keep()
    return job.job_id


def clear_abandoned(records: Records, spool: Spool) -> int:
    """Remove the folders of uploads whose process died before their job was recorded; how many."""
    removed = 0
    for folder in [each for each in spool.uploads_dir.iterdir() if each.is_dir()]:
        descriptor = _lock_of(folder)
        try:
            # The lock first: an upload holds it until its row is committed, so then the row can be seen.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        try:
            if not _is_recorded(records, spool.relative(folder)):
                shutil.rmtree(folder)
                removed += 1
        finally:
            _unlock(folder, descriptor)
    return removed


def _lock_of(folder: Path) -> int:
    """Descriptor of the file beside an upload's folder that is locked while the upload lives.

    A file, and open for writing: NFS has no exclusive lock for anything else.
    """
    return os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)


def _unlock(folder: Path, descriptor: int) -> None:
    folder.with_suffix(".lock").unlink(missing_ok=True)
    os.close(descriptor)


def _is_recorded(records: Records, relative: str) -> bool:
    with records.read() as session:
        query = (
            select(JobInput.job_id).where(JobInput.path.startswith(f"{relative}/", autoescape=True)).limit(1)
        )
        return session.scalar(query) is not None
