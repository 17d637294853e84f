"""The last check before a report or a picture leaves, by another path than the writer's.

The files are decoded by pydicom's reader and NumPy alone. The volumes are counted anew from the labelmap and
the geometry of the source; the segments that a report names are looked up in the files that go with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from models.manifest import Manifest
from models.volume import Labelmap
from service.dicom.elements import PARSE_ERRORS, integer, item, items, quiet, raw, string, text
from service.dicom.identity import Identity
from service.dicom.predecessors import Predecessor
from service.dicom.proof import (
    Meaning,
    failed,
    meaning_of_label,
    meaning_of_segment,
    prove_identity,
    prove_predecessors,
)
from service.dicom.series import SourceSeries

_ENHANCED_SR = "1.2.840.10008.5.1.4.1.1.88.22"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_GROUP, _TRACKING, _FINDING = ("125007", "DCM"), ("112039", "DCM"), ("121071", "DCM")
_VOLUME, _SEGMENT, _COMMENT = ("118565006", "SCT"), ("121191", "DCM"), ("121106", "DCM")
_RELATIVE_TOLERANCE = 1e-6


def prove_measurements(
    path: Path,
    source: SourceSeries,
    labelmap: Labelmap,
    manifest: Manifest,
    *,
    segmentations: Sequence[Path],
    further_sources: Sequence[SourceSeries] = (),
    comments: Sequence[str] = (),
    predecessors: Sequence[Predecessor] = (),
) -> None:
    """Return only if the report gives every label its volume, and names the segment that shows it.

    Parameters
    ----------
    path : Path
        The Part 10 file that would be sent.
    source, labelmap, manifest
        What it was made from.
    segmentations : sequence of Path
        The segmentation objects that are sent with it.
    further_sources : sequence of SourceSeries
        The series of the model's other channels, which it must name too.
    comments : sequence of str
        Sentences that it must hold.
    predecessors : sequence of Predecessor
        What it has to say that it replaces, and nothing else.

    Raises
    ------
    ProofError
        With what differs.
    """
    with _decoding():
        dataset = dcmread(path)
        images = [uid for each in (source, *further_sources) for uid in each.sop_instance_uids]
        _prove_document(dataset, source.identity, images)
        prove_predecessors(dataset, predecessors)
        groups = {_text_of(group, _TRACKING): group for group in _contained(dataset, _GROUP)}
        if sorted(groups) != sorted(label.name for label in manifest.labels):
            raise failed("it does not have one measurement group for each label")
        shown = _segments_in(segmentations)
        voxel_ml = abs(float(np.linalg.det(source.volume.affine[:3, :3]))) / 1000.0
        counts = np.bincount(labelmap.array.ravel(), minlength=65536)
        for label in manifest.labels:
            group = groups[label.name]
            finding = item(_one(group, _FINDING), "ConceptCodeSequence")
            code = (
                (string(finding, "CodeValue"), string(finding, "CodingSchemeDesignator")) if finding else ()
            )
            if code != (label.type.value, label.type.scheme):
                raise failed(f"the finding of {label.name} is coded as something else")
            expected_ml = int(counts[label.value]) * voxel_ml
            stated_ml = _volume_ml(group)
            if not math.isclose(stated_ml, expected_ml, rel_tol=_RELATIVE_TOLERANCE, abs_tol=0.0):
                raise failed(f"it gives {label.name} {stated_ml:.6g} mL, which has {expected_ml:.6g} mL")
            found = bool(counts[label.value]) and bool(segmentations)
            _prove_segment(group, meaning_of_label(label) if found else None, shown, label.name)
        said = [text(each, "TextValue")[0] for each in _contained(dataset, _COMMENT)]
        if any(sentence not in said for sentence in comments):
            raise failed("a sentence for the reader is missing")


def prove_refusal(
    path: Path, identity: Identity, sop_instance_uids: Sequence[str], *, code: str, reason: str
) -> None:
    """Return only if the object tells this reason, of these images, to this patient. Raises ProofError."""
    with _decoding():
        dataset = dcmread(path)
        _prove_document(dataset, identity, sop_instance_uids)
        if _text_of(dataset, _FINDING) != f"Not segmented ({code}): {reason}":
            raise failed("it does not give the reason")
        if not text(dataset, "SeriesDescription")[0].startswith("Not segmented: "):
            raise failed("its description does not say what it is")


def prove_secondary_capture(path: Path, source: SourceSeries, picture: NDArray[np.uint8]) -> None:
    """Return only if the file holds this picture, (rows, columns, 3), of this patient. Raises ProofError."""
    with _decoding():
        dataset = dcmread(path)
        if string(dataset, "SOPClassUID") != _SECONDARY_CAPTURE:
            raise failed("it is no secondary capture")
        prove_identity(dataset, source.identity)
        _prove_references(items(dataset, "SourceImageSequence"), source.sop_instance_uids)
        form = (string(dataset, "PhotometricInterpretation"), integer(dataset, "PlanarConfiguration"))
        bits = [integer(dataset, k) for k in ("SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit")]
        if form != ("RGB", 0) or bits != [3, 8, 8, 7]:
            raise failed("its pixels are not 8-bit RGB, colour by pixel")
        rows, columns = integer(dataset, "Rows"), integer(dataset, "Columns")
        value = raw(dataset, "PixelData")
        if (rows, columns) != picture.shape[:2] or not isinstance(value, bytes) or len(value) < picture.size:
            raise failed(f"it has {rows} x {columns} pixels, or fewer than it says")
        decoded = np.frombuffer(value, np.uint8)[: picture.size].reshape(picture.shape)
        differing = int(np.count_nonzero((decoded != picture).any(axis=-1)))
        if differing:
            raise failed(f"{differing} of its pixels are not those of the picture")
        if string(dataset, "BurnedInAnnotation") != "NO":
            raise failed("it says that it shows who the patient is")
        if (string(dataset, "LossyImageCompression") == "01") is not source.lossy:
            raise failed("it does not say whether its source was compressed with loss")


def _prove_document(dataset: Dataset, identity: Identity, sop_instance_uids: Sequence[str]) -> None:
    if string(dataset, "SOPClassUID") != _ENHANCED_SR:
        raise failed("it is no Enhanced SR document")
    prove_identity(dataset, identity)
    flags = [string(dataset, k) for k in ("CompletionFlag", "VerificationFlag", "PreliminaryFlag")]
    if flags != ["COMPLETE", "UNVERIFIED", "PRELIMINARY"]:
        raise failed("it does not say that it is unverified")
    evidence = [
        reference
        for study in items(dataset, "CurrentRequestedProcedureEvidenceSequence")
        if string(study, "StudyInstanceUID") == identity.study_instance_uid
        for series in items(study, "ReferencedSeriesSequence")
        for reference in items(series, "ReferencedSOPSequence")
    ]
    _prove_references(evidence, sop_instance_uids)


def _prove_references(references: Sequence[Dataset], sop_instance_uids: Sequence[str]) -> None:
    named = {string(reference, "ReferencedSOPInstanceUID") for reference in references}
    if not named >= set(sop_instance_uids):
        raise failed("it does not name every image that it is about")


def _prove_segment(
    group: Dataset,
    meaning: Meaning | None,
    shown: dict[tuple[str | None, int | None], Meaning],
    name: str,
) -> None:
    reference = item(_one(group, _SEGMENT), "ReferencedSOPSequence")
    if reference is None and meaning is None:
        return
    segment = (
        (string(reference, "ReferencedSOPInstanceUID"), integer(reference, "ReferencedSegmentNumber"))
        if reference is not None
        else (None, None)
    )
    if meaning is None or shown.get(segment) != meaning:
        raise failed(f"the segment that it names for {name} is not the one that shows it")


def _segments_in(
    segmentations: Sequence[Path],
) -> dict[tuple[str | None, int | None], Meaning]:
    """What every segment of these files means, by SOP Instance UID and segment number."""
    shown = {}
    for path in segmentations:
        dataset = dcmread(path, stop_before_pixels=True)
        for segment in items(dataset, "SegmentSequence"):
            key = (string(dataset, "SOPInstanceUID"), integer(segment, "SegmentNumber"))
            shown[key] = meaning_of_segment(segment)
    return shown


def _volume_ml(group: Dataset) -> float:
    measured = item(_one(group, _VOLUME), "MeasuredValueSequence")
    unit = item(measured, "MeasurementUnitsCodeSequence")
    stated = string(measured, "NumericValue") if measured is not None else None
    if unit is None or string(unit, "CodeValue") != "mL" or stated is None:
        raise failed("a volume is missing, or not in mL")
    return float(stated)


def _is_named(node: Dataset, name: tuple[str, str]) -> bool:
    return _code(item(node, "ConceptNameCodeSequence")) == name


def _code(concept: Dataset | None) -> tuple[str | None, str | None]:
    if concept is None:
        return None, None
    return string(concept, "CodeValue"), string(concept, "CodingSchemeDesignator")


def _contained(node: Dataset, name: tuple[str, str]) -> Iterator[Dataset]:
    """Every content item of this concept name below a node."""
    for child in items(node, "ContentSequence"):
        if _is_named(child, name):
            yield child
        yield from _contained(child, name)


def _one(node: Dataset, name: tuple[str, str]) -> Dataset | None:
    found = list(_contained(node, name))
    if len(found) > 1:
        raise failed("a content item is there more than once")
    return found[0] if found else None


def _text_of(node: Dataset, name: tuple[str, str]) -> str:
    found = _one(node, name)
    return text(found, "TextValue")[0] if found is not None else ""


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        with quiet():
            yield
    except PARSE_ERRORS as error:
        raise failed(f"the file cannot be decoded ({type(error).__name__})") from error
