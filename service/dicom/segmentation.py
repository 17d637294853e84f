"""The labelmap of a series as a BINARY DICOM Segmentation (PS3.3 A.51) on the planes of its source.

Every frame takes position and orientation from the header of the slice that it covers: nothing is flipped,
resampled or recomputed. Two builds of the same result are byte-identical.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version as version_of
from pathlib import Path

import highdicom as hd
import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from models.errors import ReasonCode, Refusal, SegnodeError
from models.manifest import Label, Laterality, Manifest
from models.volume import Labelmap
from service.dicom.coding import LONGEST_TEXT, code_sequence, decimal_strings
from service.dicom.elements import quiet, string
from service.dicom.identifiers import derived_uid
from service.dicom.segment_frames import functional_groups, pack_frames
from service.dicom.series import SourceSeries

_LATERALITY = {
    Laterality.LEFT: Code("7771000", "SCT", "Left"),
    Laterality.RIGHT: Code("24028007", "SCT", "Right"),
    Laterality.BOTH: Code("51440002", "SCT", "Right and left"),
}
_CODE_STRING = re.compile(r"[A-Z0-9_ ]{1,16}")
_ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")
_PROCESSING_EQUIPMENT = Code("109102", "DCM", "Processing Equipment")
_SEGMENTATION = Code("113076", "DCM", "Segmentation")
_SOURCE_IMAGE = Code("121322", "DCM", "Source image for image processing operation")


class SegmentationError(SegnodeError):
    """Raised when a labelmap does not belong to its series or to its model."""

    code = "SEGMENTATION_INVALID"


class EmptySegmentationError(SegmentationError):
    """Raised when no label was found: there is no segment to encode, and only a report leaves."""

    code = "SEGMENTATION_EMPTY"


def segment_labels(labelmap: Labelmap, manifest: Manifest) -> tuple[Label, ...]:
    """The labels that occur, in the manifest's order: label i of this tuple is Segment Number i + 1.

    Raises
    ------
    SegmentationError
        If a value of the labelmap is none of the manifest's.
    """
    occurring = set(np.flatnonzero(np.bincount(labelmap.array.ravel())).tolist()) - {0}
    labels = tuple(label for label in manifest.labels if label.value in occurring)
    unknown = occurring - {label.value for label in labels}
    if unknown:
        raise SegmentationError(
            f"The labelmap holds values that the model does not define: {sorted(unknown)}."
        )
    return labels


def build_segmentation(
    source: SourceSeries,
    labelmap: Labelmap,
    manifest: Manifest,
    *,
    model_digest: str,
    sop_instance_uid: str,
    series_instance_uid: str,
    content_datetime: datetime,
    series_number: int = 900,
    pipeline_version: str | None = None,
    device_serial_number: str = "segnode",
) -> Dataset:
    """Encode a labelmap as a Segmentation object of its source series.

    Parameters
    ----------
    source : SourceSeries
        The series that was segmented.
    labelmap : Labelmap
        Labels on the very grid of ``source.volume``.
    manifest : Manifest
        Names, codes and colours of the labels.
    model_digest : str
        SHA-256 of the bundle, 64 hexadecimal digits.
    sop_instance_uid, series_instance_uid : str
        UIDs of the new object; inner UIDs are derived from the first.
    content_datetime : datetime
        When the job ran, by its row in the records: the clock is not read here.
    series_number : int
        Number of the new series.
    pipeline_version : str, optional
        Software version; that of the installed distribution by default.
    device_serial_number : str
        Name of the node.

    Returns
    -------
    Dataset
        With ``file_meta``, in explicit VR little endian.

    Raises
    ------
    EmptySegmentationError
        If the labelmap is background throughout.
    SegmentationError
        If the grids differ, or a value is not the model's.
    Refusal
        IDENTITY_MISSING, or INVALID_GEOMETRY without a frame of reference: nothing could be overlaid.
    """
    require_encodable(source)
    _require_same_grid(source, labelmap)
    labels = segment_labels(labelmap, manifest)
    if not labels:
        raise EmptySegmentationError("None of the model's labels was found.")

    software = pipeline_version or version_of("segnode")
    with quiet():  # identifiers that break their VR are passed on as they are
        dataset = _skeleton(
            source, manifest, labels, sop_instance_uid, series_instance_uid, series_number, software,
            device_serial_number,
        )  # fmt: skip
        _set_dates(dataset, content_datetime)
        _set_texts(dataset, source, manifest, software)
        _set_equipment(dataset, manifest, model_digest, content_datetime)
        _set_references(dataset, source)
        _set_dimensions(dataset, sop_instance_uid)
        _set_lossy(dataset, source)
        _set_shared_groups(dataset, source)
        _set_frames(dataset, source, labelmap, labels)
    return dataset


def write_segmentation(dataset: Dataset, path: Path) -> Path:
    """Write a Part 10 file that is on the disk when this returns, and whole or not there at all."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        dcmwrite(file, dataset, enforce_file_format=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return path


def require_encodable(source: SourceSeries) -> None:
    """Raise unless a Segmentation of this series could be filed and overlaid; worth asking before the work.

    Raises
    ------
    Refusal
        IDENTITY_MISSING, or INVALID_GEOMETRY where no frame of reference is named.
    """
    source.identity.require_whole()
    if source.frame_of_reference_uid is None:
        raise Refusal(
            ReasonCode.INVALID_GEOMETRY,
            "The series has no Frame of Reference UID: no overlay can be registered with it.",
            remedy="Send the series from its original source.",
        )


def _require_same_grid(source: SourceSeries, labelmap: Labelmap) -> None:
    here, there = source.volume.shape_zyx, labelmap.array.shape
    if here != there:
        raise SegmentationError(f"The labelmap has {there} voxels (z, y, x), its series {here}.")
    corner = np.array([*here[::-1], 1.0])
    apart = float(np.abs((source.volume.affine - labelmap.affine) @ corner).max())
    if apart > 0.01:
        raise SegmentationError(f"The labelmap lies up to {apart:.3f} mm away from its series.")


def _skeleton(
    source: SourceSeries,
    manifest: Manifest,
    labels: Sequence[Label],
    sop_instance_uid: str,
    series_instance_uid: str,
    series_number: int,
    software: str,
    device_serial_number: str,
) -> Dataset:
    """All modules as highdicom makes them, for a segmentation of one plane with one pixel in it."""
    algorithm = hd.AlgorithmIdentificationSequence(
        name=manifest.title, family=_ARTIFICIAL_INTELLIGENCE, version=manifest.version, source="segnode"
    )
    plane = np.zeros((1, *source.volume.shape_zyx[1:]), np.uint8)
    plane[0, 0, 0] = 1
    made = hd.seg.Segmentation(
        source_images=[_plane_header(source, 0)],
        pixel_array=plane,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_describe(number, label, algorithm) for number, label in enumerate(labels, 1)],
        series_instance_uid=series_instance_uid,
        series_number=series_number,
        sop_instance_uid=sop_instance_uid,
        instance_number=1,
        manufacturer="segnode",
        manufacturer_model_name="segnode",
        software_versions=software[:LONGEST_TEXT],
        device_serial_number=device_serial_number[:LONGEST_TEXT],
        content_label="AI_SEGMENTATION",
        series_description=f"AI, unverified: {manifest.title}"[:LONGEST_TEXT],
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    dataset = Dataset()
    dataset.update(made)
    dataset.file_meta = made.file_meta
    return dataset


def _plane_header(source: SourceSeries, z: int) -> Dataset:
    """What highdicom reads of a source image, and nothing that a vendor may have got wrong."""
    index, _ = source.frame_numbers[z]
    header = Dataset()
    source.identity.write(header)
    header.SOPClassUID = MRImageStorage  # any single-frame class: all references are written anew below
    header.SOPInstanceUID = source.sop_instance_uids[index]
    header.SeriesInstanceUID = source.series_instance_uid
    header.Modality = source.modality
    header.FrameOfReferenceUID = source.frame_of_reference_uid
    header.PositionReferenceIndicator = None
    header.Rows, header.Columns = source.volume.shape_zyx[1:]
    header.ImagePositionPatient = decimal_strings(source.positions_mm[z])
    header.ImageOrientationPatient = decimal_strings(source.orientation)
    header.PixelSpacing = decimal_strings(source.pixel_spacing_mm)
    header.SliceThickness = decimal_strings([source.slice_spacing_mm])[0]
    return header


def _describe(
    number: int, label: Label, algorithm: hd.AlgorithmIdentificationSequence
) -> hd.seg.SegmentDescription:
    category, kind = label.category, label.type
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label.name,
        segmented_property_category=Code(category.value, category.scheme, category.meaning),
        segmented_property_type=Code(kind.value, kind.scheme, kind.meaning),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        display_color=hd.color.CIELabColor.from_rgb(*label.color_rgb),
    )
    if label.laterality is not None:
        coded = description.SegmentedPropertyTypeCodeSequence[0]
        coded.SegmentedPropertyTypeModifierCodeSequence = code_sequence(_LATERALITY[label.laterality])
    return description


def _set_dates(dataset: Dataset, moment: datetime) -> None:
    date, time = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S.%f")
    for keyword in ("InstanceCreation", "Content", "Series"):
        setattr(dataset, f"{keyword}Date", date)
        setattr(dataset, f"{keyword}Time", time)


def _set_texts(dataset: Dataset, source: SourceSeries, manifest: Manifest, software: str) -> None:
    source.identity.write(dataset)
    dataset.ContentDescription = f"{manifest.name} {manifest.version}"[:LONGEST_TEXT]
    dataset.ContentCreatorName = None
    body_part = string(source.headers[0], "BodyPartExamined")
    if body_part is not None and _CODE_STRING.fullmatch(body_part):
        dataset.BodyPartExamined = body_part
    meta = dataset.file_meta
    meta.ImplementationClassUID = derived_uid("implementation", name="segnode")
    meta.ImplementationVersionName = f"SEGNODE {software}"[:16]


def _set_equipment(dataset: Dataset, manifest: Manifest, model_digest: str, moment: datetime) -> None:
    """Which weights made this: the digest stands alone in Software Versions, 64 characters of 64."""
    assert len(model_digest) == LONGEST_TEXT, "a model digest is 64 hexadecimal digits"
    weights = Dataset()
    weights.Manufacturer = "segnode"
    weights.ManufacturerModelName = f"{manifest.name} {manifest.version}"[:LONGEST_TEXT]
    weights.SoftwareVersions = model_digest
    weights.ContributionDateTime = moment.strftime("%Y%m%d%H%M%S.%f")
    weights.ContributionDescription = "Model; the software version is the SHA-256 of its bundle"
    library = Dataset()
    library.Manufacturer = "Highdicom open-source contributors"
    library.ManufacturerModelName = "highdicom"
    library.SoftwareVersions = version_of("highdicom")
    library.ContributionDescription = "Software library used to create this instance"
    for item in (weights, library):
        item.PurposeOfReferenceCodeSequence = code_sequence(_PROCESSING_EQUIPMENT)
    dataset.ContributingEquipmentSequence = DicomSequence([weights, library])


def _set_references(dataset: Dataset, source: SourceSeries) -> None:
    """The series and all its instances: viewers find the images of a segmentation by this sequence."""
    series = Dataset()
    series.SeriesInstanceUID = source.series_instance_uid
    series.ReferencedInstanceSequence = DicomSequence(
        [_reference(source, index) for index in range(len(source.headers))]
    )
    dataset.ReferencedSeriesSequence = DicomSequence([series])
    if "SourceImageSequence" in dataset:
        del dataset.SourceImageSequence  # names the skeleton's one plane; every frame names its own


def _set_dimensions(dataset: Dataset, sop_instance_uid: str) -> None:
    organization = derived_uid("dimension-organization", sop_instance_uid=sop_instance_uid)
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization


def _set_lossy(dataset: Dataset, source: SourceSeries) -> None:
    dataset.LossyImageCompression = "01" if source.lossy else "00"
    if source.lossy:
        dataset.LossyImageCompressionRatio = source.lossy_ratio
        dataset.LossyImageCompressionMethod = source.lossy_method


def _set_shared_groups(dataset: Dataset, source: SourceSeries) -> None:
    measures, orientation, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = decimal_strings(source.pixel_spacing_mm)
    measures.SpacingBetweenSlices = decimal_strings([source.slice_spacing_mm])[0]
    measures.SliceThickness = decimal_strings([source.slice_thickness_mm or source.slice_spacing_mm])[0]
    orientation.ImageOrientationPatient = decimal_strings(source.orientation)
    shared.PixelMeasuresSequence = DicomSequence([measures])
    shared.PlaneOrientationSequence = DicomSequence([orientation])
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])


def _set_frames(dataset: Dataset, source: SourceSeries, labelmap: Labelmap, labels: Sequence[Label]) -> None:
    number_of = np.zeros(int(labelmap.array.max()) + 1, np.uint16 if len(labels) > 255 else np.uint8)
    for number, label in enumerate(labels, 1):
        number_of[label.value] = number
    frames, pixel_data = pack_frames(number_of[labelmap.array], len(labels))

    positions, derivations = [], []
    for z, position_mm in enumerate(source.positions_mm):
        position, derivation = Dataset(), Dataset()
        position.ImagePositionPatient = decimal_strings(position_mm)
        positions.append(position)
        index, frame_number = source.frame_numbers[z]
        image = _reference(source, index)
        if "NumberOfFrames" in source.headers[index]:
            image.ReferencedFrameNumber = frame_number
        image.SpatialLocationsPreserved = "YES"
        image.PurposeOfReferenceCodeSequence = code_sequence(_SOURCE_IMAGE)
        derivation.SourceImageSequence = DicomSequence([image])
        derivation.DerivationCodeSequence = code_sequence(_SEGMENTATION)
        derivations.append(derivation)

    dataset.NumberOfFrames = len(frames)
    dataset.add_new("PixelData", "OB", pixel_data)
    groups = functional_groups(frames, positions, derivations)
    del dataset[groups.tag]
    dataset.set_original_encoding(
        False, True, dataset._character_set
    )  # or the raw groups would be re-encoded
    dataset[groups.tag] = groups


def _reference(source: SourceSeries, index: int) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = _sop_class_uid(source.headers[index])
    item.ReferencedSOPInstanceUID = source.sop_instance_uids[index]
    return item


def _sop_class_uid(header: Dataset) -> str:
    return string(header, "SOPClassUID") or ""
