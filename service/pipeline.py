"""Study to results: a pure function of files.

It knows no queue, no database and no network. The inference process runs it, and so does
``segnode segment``. What it writes depends on its arguments alone: a second run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

from pydicom.uid import SegmentationStorage

from models.manifest import Manifest, Precision
from models.nifti import write_nifti
from models.segmenter import Progress
from models.volume import Labelmap, Volume
from service.dicom.identifiers import result_uid
from service.dicom.proof import prove_segmentation
from service.dicom.segmentation import build_segmentation, write_segmentation
from service.inputs import PipelineInput, read_input
from service.limits import check_grid
from service.spool import fsync_directory, fsync_file

SEGMENTATION, LABELMAP, MEASUREMENTS = "segmentation.dcm", "labelmap.nii.gz", "measurements.json"
READ, WRITE, PROVE = "read", "write", "prove"

Kind = Literal["segmentation", "labelmap", "measurements"]

# Where each stage lies on the way from 0 to 1; forward is nearly all of it.
_SPANS = {
    READ: (0.0, 0.05),
    "preprocess": (0.05, 0.10),
    "forward": (0.10, 0.85),
    "export": (0.85, 0.90),
    WRITE: (0.90, 0.95),
    PROVE: (0.95, 1.0),
}


class SegmentsVolumes(Protocol):
    """What the pipeline needs of a :class:`models.segmenter.Segmenter`."""

    @property
    def runtime_name(self) -> str: ...
    @property
    def precision(self) -> Precision: ...
    def segment(self, volume: Volume, *, progress: Callable[[Progress], None] | None = None) -> Labelmap: ...


@dataclass(frozen=True)
class PipelineJob:
    """What is to be segmented, and where the results go.

    Parameters
    ----------
    channels : tuple of tuples of Path
        The files of each channel, in the manifest's order: DICOM files, or one zip archive or folder of
        them, or one NIfTI file.
    created_at : datetime
        When the job came into being, UTC and naive: the date in everything that is written.
    output_dir : Path
        The folder that will hold the results. It must not exist; it appears at once, complete.
    settings_digest : str
        SHA-256 of the settings that can change a result; part of every derived UID.
    supersedes : tuple of str
        SOP Instance UIDs of the segmentations that this result replaces.
    unpack_limit_bytes : int
        How much an archive may unpack to.
    """

    channels: tuple[tuple[Path, ...], ...]
    created_at: datetime
    output_dir: Path
    settings_digest: str = ""
    supersedes: tuple[str, ...] = ()
    destination_profile: str = "binary"
    unpack_limit_bytes: int = 16 * 1024**3


@dataclass(frozen=True)
class OutputFile:
    """A file that a run has written, by its place in the job's ``output_dir``."""

    kind: Kind
    name: str
    size_bytes: int
    sha256: str
    sop_class_uid: str | None = None
    sop_instance_uid: str | None = None


@dataclass(frozen=True)
class PipelineOutcome:
    """What a run has made. ``summary`` is JSON: volumes per label in mL, warnings, a sentence."""

    files: tuple[OutputFile, ...]
    runtime: str
    precision: str
    summary: dict[str, Any]


def run(
    job: PipelineJob,
    segmenter: SegmentsVolumes,
    manifest: Manifest,
    digest: str,
    *,
    progress: Callable[[Progress], None] = lambda _: None,
) -> PipelineOutcome:
    """Read, segment, write and prove.

    Parameters
    ----------
    segmenter : Segmenter
        The model, loaded.
    manifest, digest : Manifest and str
        Of the bundle that ``segmenter`` was made from.
    progress : callable, optional
        Called with a `Progress`; stages ``read``, those of the segmenter, ``write`` and ``prove``.

    Returns
    -------
    PipelineOutcome
        With a labelmap and measurements always, and a segmentation for DICOM input in which something was
        found.

    Raises
    ------
    Refusal
        If the input cannot be segmented, with the reason.
    SegnodeError
        If the segmentation does not pass its proof, or the engine fails. Nothing is left in either case.
    """
    with _complete_or_nothing(job.output_dir) as unfinished:
        progress(Progress(READ, 0, 1))
        given = read_input(job.channels, manifest, unfinished, unpack_limit_bytes=job.unpack_limit_bytes)
        check_grid(manifest, given.volume)
        progress(Progress(READ, 1, 1))
        labelmap = segmenter.segment(given.volume, progress=progress)
        assert labelmap.array.shape == given.volume.shape_zyx
        progress(Progress(WRITE, 0, 1))
        write_nifti(labelmap, unfinished / LABELMAP)
        files = [_output("labelmap", unfinished / LABELMAP)]
        if given.sources and labelmap.array.any():
            files.insert(
                0, _write_dicom(job, given, labelmap, segmenter, manifest, digest, unfinished, progress)
            )
        summary = _summary(given, labelmap, manifest)
        model = {"name": manifest.name, "version": manifest.version, "digest": digest}
        measurements = summary | {
            "schema_version": 1,
            "model": model | {"runtime": segmenter.runtime_name, "precision": segmenter.precision.value},
            "segmentation_sop_instance_uid": files[0].sop_instance_uid,
            "supersedes_sop_instance_uids": list(job.supersedes),
        }
        _write_json(unfinished / MEASUREMENTS, measurements)
        files.append(_output("measurements", unfinished / MEASUREMENTS))
    return PipelineOutcome(tuple(files), segmenter.runtime_name, segmenter.precision.value, summary)


def overall_fraction(progress: Progress) -> float:
    """How far a whole run is, from 0 to 1, when one of its stages is this far."""
    start, end = _SPANS.get(progress.stage, (0.0, 0.0))
    return start + (end - start) * min(1.0, progress.done / max(1, progress.total))


def _write_dicom(
    job: PipelineJob,
    given: PipelineInput,
    labelmap: Labelmap,
    segmenter: SegmentsVolumes,
    manifest: Manifest,
    digest: str,
    unfinished: Path,
    progress: Callable[[Progress], None],
) -> OutputFile:
    """Write the segmentation, and prove from its file that it says what the labelmap says."""
    source = given.sources[0]
    sop_instance_uid, series_instance_uid = (
        result_uid(
            kind,
            sop_instance_uids={uid for each in given.sources for uid in each.sop_instance_uids},
            study_instance_uid=source.study_instance_uid,
            patient_id=source.patient_id,
            issuer_of_patient_id=source.identity.elements["IssuerOfPatientID"],
            weights_digest=digest,
            runtime=segmenter.runtime_name,
            precision=segmenter.precision.value,
            pipeline_version=version("segnode"),
            settings_digest=job.settings_digest,
            destination_profile=job.destination_profile,
        )
        for kind in ("segmentation", "segmentation-series")
    )
    dataset = build_segmentation(
        source,
        labelmap,
        manifest,
        model_digest=digest,
        sop_instance_uid=sop_instance_uid,
        series_instance_uid=series_instance_uid,
        content_datetime=job.created_at,
    )
    path = write_segmentation(dataset, unfinished / SEGMENTATION)
    progress(Progress(PROVE, 0, 1))
    prove_segmentation(path, source, labelmap, manifest)
    progress(Progress(PROVE, 1, 1))
    return _output("segmentation", path, str(SegmentationStorage), sop_instance_uid)


def _summary(given: PipelineInput, labelmap: Labelmap, manifest: Manifest) -> dict[str, Any]:
    """Volumes per label in mL (absent labels are 0), warnings, and one sentence for a person."""
    by_value = labelmap.volumes_ml()
    volumes = {label.name: round(by_value.get(label.value, 0.0), 4) for label in manifest.labels}
    warnings = [*given.warnings]
    for label in manifest.labels:
        limits, volume = label.volume_range_ml, volumes[label.name]
        if volume and limits is not None and not limits[0] <= volume <= limits[1]:
            warnings.append(
                f"{label.name} has {volume:.4g} mL; the training cases had {limits[0]:g} to {limits[1]:g} mL."
            )
    found = sum(1 for volume in by_value.values() if volume)
    sentence = f"{found} of {len(manifest.labels)} structures were found."
    if not found:
        sentence = f"Nothing was found: none of the {len(manifest.labels)} structures is in the volume."
    return {"volumes_ml": volumes, "found": found, "sentence": sentence, "warnings": warnings}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(
        json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    fsync_file(path)


def _output(
    kind: Kind, path: Path, sop_class_uid: str | None = None, sop_instance_uid: str | None = None
) -> OutputFile:
    data = path.read_bytes()
    return OutputFile(
        kind, path.name, len(data), hashlib.sha256(data).hexdigest(), sop_class_uid, sop_instance_uid
    )


@contextmanager
def _complete_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``folder`` when the block has ended well, and vanishes if not."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)  # of a run that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        fsync_directory(unfinished)
        unfinished.rename(folder)
        fsync_directory(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
