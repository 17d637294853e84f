"""The objects of one result, as a destination's profile wants them: written, then proven from their files.

Nothing is listed before its proof has passed. What it writes depends on its arguments alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from models.manifest import Label, Manifest
from models.volume import Labelmap
from service.dicom.derived import Making, Reference, write_object
from service.dicom.identifiers import result_uid
from service.dicom.measurements import Segment, build_measurements
from service.dicom.predecessors import Predecessor, reports_of, segmentations_of, set_predecessors
from service.dicom.proof import prove_segmentation
from service.dicom.report_proof import prove_measurements, prove_secondary_capture
from service.dicom.secondary_capture import build_secondary_capture
from service.dicom.segmentation import build_segmentation, segment_labels, write_segmentation
from service.dicom.series import SourceSeries
from service.profiles import Profile

Kind = Literal["segmentation", "labelmap", "measurements", "report", "capture", "preview"]


@dataclass(frozen=True)
class OutputFile:
    """A file that a run has written, by its place in the job's ``output_dir``.

    ``profile`` is the key of the profile whose destinations get the object; None for what stays here.
    ``withheld`` says why it is not to be sent unless a person asks for it.
    """

    kind: Kind
    name: str
    size_bytes: int
    sha256: str
    sop_class_uid: str | None = None
    sop_instance_uid: str | None = None
    profile: str | None = None
    withheld: str | None = None


@dataclass(frozen=True, eq=False)
class Finding:
    """A result, and all that its objects say of it.

    Parameters
    ----------
    sources : tuple of SourceSeries
        The series of every channel; objects refer to the first.
    labelmap : Labelmap
        On the grid of the first source.
    manifest, digest, runtime, precision
        The model, and how it was run.
    created_at : datetime
        The date in everything that is written.
    settings_digest : str
        Part of every derived UID.
    comments : tuple of str
        Sentences for the reader of the report.
    picture : (rows, columns, 3) array, uint8
        Three planes with the labels.
    predecessors : tuple of Predecessor
        The objects of older results that these replace.
    """

    sources: tuple[SourceSeries, ...]
    labelmap: Labelmap
    manifest: Manifest
    digest: str
    runtime: str
    precision: str
    created_at: datetime
    settings_digest: str
    comments: tuple[str, ...]
    picture: NDArray[np.uint8]
    predecessors: tuple[Predecessor, ...] = ()

    @property
    def source(self) -> SourceSeries:
        return self.sources[0]

    def making(self, profile: Profile, kind: str, series_kind: str) -> Making:
        """The UIDs of one object of a profile, from all that it depends on."""
        sop_instance_uid, series_instance_uid = (
            result_uid(
                each,
                sop_instance_uids={uid for source in self.sources for uid in source.sop_instance_uids},
                study_instance_uid=self.source.study_instance_uid,
                patient_id=self.source.patient_id,
                issuer_of_patient_id=self.source.identity.elements["IssuerOfPatientID"],
                weights_digest=self.digest,
                runtime=self.runtime,
                precision=self.precision,
                pipeline_version=version("segnode"),
                settings_digest=self.settings_digest,
                destination_profile=profile.key,
            )
            for each in (kind, series_kind)
        )
        return Making(sop_instance_uid, series_instance_uid, self.created_at, self.digest)


def render(
    finding: Finding, profile: Profile, folder: Path, ordinal: int, proven: Callable[[], None]
) -> list[OutputFile]:
    """Write and prove every object of one profile: segmentations, report, picture.

    Parameters
    ----------
    ordinal : int
        Which of the job's profiles it is, from 1: part of the files' names.
    proven : callable
        Called after each object.

    Raises
    ------
    ProofError
        If an object does not say what the result says.
    """
    files: list[OutputFile] = []
    paths: list[Path] = []
    segments: dict[int, Segment] = {}
    suffix = "" if ordinal == 1 else f"_p{ordinal}"
    for part in _segmentations(finding, profile, folder, suffix):
        files.append(part.file)
        paths.append(folder / part.file.name)
        segments |= {
            label.value: Segment(part.reference, number) for number, label in enumerate(part.labels, 1)
        }
        proven()
    if profile.measurements or not (files or profile.secondary_capture):  # something tells of every result
        files.append(_measurements(finding, profile, folder / f"report{suffix}.dcm", segments, paths))
        proven()
    if profile.secondary_capture:
        files.append(_secondary_capture(finding, profile, folder / f"capture{suffix}.dcm"))
        proven()
    return files


def most_objects(finding: Finding, profile: Profile) -> int:
    """How many objects :func:`render` may write for a profile, at most."""
    return max(1, len(finding.manifest.labels)) + profile.measurements + profile.secondary_capture


def describe(
    kind: Kind,
    path: Path,
    dataset: Dataset | None = None,
    *,
    profile: str | None = None,
    withheld: str | None = None,
) -> OutputFile:
    """A file that lies in its place, with its size and digest."""
    data = path.read_bytes()
    return OutputFile(
        kind,
        path.name,
        len(data),
        hashlib.sha256(data).hexdigest(),
        str(dataset.SOPClassUID) if dataset is not None else None,
        str(dataset.SOPInstanceUID) if dataset is not None else None,
        profile,
        withheld,
    )


@dataclass(frozen=True)
class _Part:
    """A segmentation object: its file, its reference, and the labels it shows, by segment number."""

    file: OutputFile
    reference: Reference
    labels: tuple[Label, ...]


def _segmentations(finding: Finding, profile: Profile, folder: Path, suffix: str) -> Iterator[_Part]:
    """The whole as one object, or one for each label where the profile or its limit of frames wants that."""
    labels = segment_labels(finding.labelmap, finding.manifest)
    if profile.segmentation == "none" or not labels:
        return
    limit = profile.maximum_frames
    if not profile.one_per_label:
        making = finding.making(profile, "segmentation", "segmentation-series")
        dataset = _build(finding, profile, finding.labelmap, making, 1)
        if limit is None or dataset.NumberOfFrames <= limit or len(labels) == 1:
            yield _finish(
                finding, profile, finding.labelmap, dataset, folder / f"segmentation{suffix}.dcm", labels
            )
            return
    for number, label in enumerate(labels, 1):
        array = np.where(finding.labelmap.array == label.value, finding.labelmap.array, 0)
        alone = Labelmap(array, finding.labelmap.affine, finding.labelmap.frame_of_reference_uid)
        making = finding.making(profile, f"segmentation-of-label-{label.value}", "segmentation-series")
        dataset = _build(finding, profile, alone, making, number)
        path = folder / f"segmentation{suffix}_l{label.value:05d}.dcm"
        yield _finish(finding, profile, alone, dataset, path, (label,))


def _build(
    finding: Finding, profile: Profile, labelmap: Labelmap, making: Making, instance_number: int
) -> Dataset:
    assert profile.segmentation != "none"
    dataset = build_segmentation(
        finding.source,
        labelmap,
        finding.manifest,
        model_digest=making.model_digest,
        sop_instance_uid=making.sop_instance_uid,
        series_instance_uid=making.series_instance_uid,
        content_datetime=making.content_datetime,
        form=profile.segmentation,
        keep_empty_frames=profile.empty_frames == "keep",
        instance_number=instance_number,
    )
    set_predecessors(dataset, segmentations_of(finding.predecessors, profile.key))
    return dataset


def _finish(
    finding: Finding,
    profile: Profile,
    labelmap: Labelmap,
    dataset: Dataset,
    path: Path,
    labels: tuple[Label, ...],
) -> _Part:
    assert profile.segmentation != "none"
    write_segmentation(dataset, path)
    prove_segmentation(
        path,
        finding.source,
        labelmap,
        finding.manifest,
        form=profile.segmentation,
        predecessors=segmentations_of(finding.predecessors, profile.key),
    )
    frames, limit = int(dataset.NumberOfFrames), profile.maximum_frames
    withheld = None
    if limit is not None and frames > limit:
        withheld = (
            f"The segmentation of {labels[0].name} alone has {frames} frames; the destination takes {limit}. "
            "Retry the delivery to send it all the same."
        )
    file = describe("segmentation", path, dataset, profile=profile.key, withheld=withheld)
    reference = Reference(
        str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), str(dataset.SeriesInstanceUID)
    )
    return _Part(file, reference, labels)


def _measurements(
    finding: Finding, profile: Profile, path: Path, segments: dict[int, Segment], segmentations: list[Path]
) -> OutputFile:
    dataset = build_measurements(
        finding.source,
        finding.labelmap,
        finding.manifest,
        finding.making(profile, "measurements", "measurements-series"),
        segments=segments,
        further_sources=finding.sources[1:],
        comments=finding.comments,
        parameters=(f"{finding.runtime} {finding.precision}",),
    )
    predecessors = reports_of(finding.predecessors, profile.key)
    set_predecessors(dataset, predecessors)
    write_object(dataset, path)
    prove_measurements(
        path,
        finding.source,
        finding.labelmap,
        finding.manifest,
        segmentations=segmentations,
        further_sources=finding.sources[1:],
        comments=finding.comments,
        predecessors=predecessors,
    )
    return describe("report", path, dataset, profile=profile.key)


def _secondary_capture(finding: Finding, profile: Profile, path: Path) -> OutputFile:
    making = finding.making(profile, "secondary-capture", "secondary-capture-series")
    dataset = build_secondary_capture(finding.source, finding.picture, finding.manifest, making)
    write_object(dataset, path)
    prove_secondary_capture(path, finding.source, finding.picture)
    return describe("capture", path, dataset, profile=profile.key)
