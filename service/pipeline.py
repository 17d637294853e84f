"""Study to results: a pure function of files.

It knows no queue, no database and no network. The inference process runs it, and so does
``segnode segment``. What it writes depends on its arguments alone: a second run gives the same bytes.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from models.manifest import Manifest, Precision
from models.nifti import write_nifti
from models.segmenter import Progress
from models.volume import Labelmap, Volume
from service.dicom.segmentation import require_encodable
from service.guard import guard_grid, guard_removed, guard_result
from service.inputs import PipelineInput, read_input
from service.overlay import draw_overlay
from service.pipeline_job import LABELMAP, MEASUREMENTS, PREVIEW, PipelineJob
from service.profiles import Profile
from service.rendering import Finding, OutputFile, describe, most_objects, render
from service.spool import fsync_directory, fsync_file

READ, WRITE, PROVE = "read", "write", "prove"

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
        With a labelmap, measurements and a preview always, and for DICOM input with the objects of every
        profile: segmentations where something was found, a report, a secondary capture.

    Raises
    ------
    Refusal
        If the input cannot be segmented, with the reason.
    SegnodeError
        If an object does not pass its proof, or the engine fails. Nothing is left in either case.
    """
    with _complete_or_nothing(job.output_dir) as unfinished:
        progress(Progress(READ, 0, 1))
        given = read_input(job, manifest, unfinished)
        doubts = guard_grid(manifest, given.volume, job.guard)
        if given.sources and job.profiles:
            require_encodable(given.sources[0])
        progress(Progress(READ, 1, 1))
        inferred = segmenter.segment(given.volume, progress=progress)
        assert inferred.array.shape == given.volume.shape_zyx
        labelmap = given.on_slices(inferred)
        doubts += guard_removed(manifest, inferred, job.guard)
        doubts += guard_result(manifest, labelmap, job.guard)
        rectangular = given.on_volume(labelmap)  # for readers that know no sheared grid
        progress(Progress(WRITE, 0, 1))
        write_nifti(rectangular, unfinished / LABELMAP)
        summary = _summary(given, labelmap, manifest, doubts)
        picture = draw_overlay(
            given.volume, rectangular, manifest.labels, title=f"{manifest.title} {manifest.version}"
        )
        _write(unfinished / PREVIEW, _png(picture))
        files: list[OutputFile] = []
        if given.sources and job.profiles:
            finding = Finding(
                sources=given.sources,
                labelmap=labelmap,
                manifest=manifest,
                digest=digest,
                runtime=segmenter.runtime_name,
                precision=segmenter.precision.value,
                created_at=job.created_at,
                settings_digest=job.alignment.mixed_into(job.reading.mixed_into(job.settings_digest)),
                comments=_comments(summary, given, job.supersedes),
                picture=np.asarray(picture),
                predecessors=job.predecessors,
            )
            files = _render_all(finding, job.profiles, unfinished, progress)
        model = {"name": manifest.name, "version": manifest.version, "digest": digest}
        measurements = summary | {
            "schema_version": 1,
            "model": model | {"runtime": segmenter.runtime_name, "precision": segmenter.precision.value},
            "segmentation_sop_instance_uid": _first_uid(files, "segmentation"),
            "report_sop_instance_uid": _first_uid(files, "report"),
            "supersedes_sop_instance_uids": list(job.supersedes),
        }
        _write(unfinished / MEASUREMENTS, _json(measurements))
        files += [
            describe("labelmap", unfinished / LABELMAP),
            describe("measurements", unfinished / MEASUREMENTS),
            describe("preview", unfinished / PREVIEW),
        ]
        progress(Progress(PROVE, 1, 1))
    return PipelineOutcome(tuple(files), segmenter.runtime_name, segmenter.precision.value, summary)


def overall_fraction(progress: Progress) -> float:
    """How far a whole run is, from 0 to 1, when one of its stages is this far."""
    start, end = _SPANS.get(progress.stage, (0.0, 0.0))
    return start + (end - start) * min(1.0, progress.done / max(1, progress.total))


def _render_all(
    finding: Finding, profiles: tuple[Profile, ...], folder: Path, progress: Callable[[Progress], None]
) -> list[OutputFile]:
    """The objects of every profile, each written and then proven from its file."""
    total = 1 + sum(most_objects(finding, profile) for profile in profiles)
    proven = count(1)
    progress(Progress(PROVE, 0, total))
    return [
        file
        for ordinal, profile in enumerate(profiles, 1)
        for file in render(
            finding, profile, folder, ordinal, lambda: progress(Progress(PROVE, next(proven), total))
        )
    ]


def _first_uid(files: list[OutputFile], kind: str) -> str | None:
    return next((file.sop_instance_uid for file in files if file.kind == kind), None)


def _comments(summary: dict[str, Any], given: PipelineInput, supersedes: tuple[str, ...]) -> tuple[str, ...]:
    """What the reader of the report is told: what was found, in what, what is doubtful, what it replaces."""
    replaced = (f"This result supersedes {', '.join(supersedes)}.",) if supersedes else ()
    reference = next((each.name for each in given.channels if each.reference), "")
    channels = (each.sentence(reference) for each in given.channels)
    return (summary["sentence"], *channels, *summary["warnings"], *replaced)


def _summary(
    given: PipelineInput, labelmap: Labelmap, manifest: Manifest, doubts: tuple[str, ...]
) -> dict[str, Any]:
    """Volumes per label in mL (absent labels are 0), warnings, and one sentence for a person."""
    by_value = labelmap.volumes_ml()
    volumes = {label.name: round(by_value.get(label.value, 0.0), 4) for label in manifest.labels}
    found = sum(1 for volume in by_value.values() if volume)
    sentence = f"{found} of {len(manifest.labels)} structures were found."
    if not found:
        sentence = f"Nothing was found: none of the {len(manifest.labels)} structures is in the volume."
    summary = {
        "volumes_ml": volumes,
        "found": found,
        "sentence": sentence,
        "warnings": [*given.warnings, *doubts],
    }
    if given.channels:
        summary["channels"] = [channel.figures() for channel in given.channels]
    return summary


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    fsync_file(path)


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
