"""The labelmap of a series as a DICOM Segmentation (PS3.3 A.51) on the planes of its source.

A BINARY one has a frame for each plane and segment; a LABELMAP one has a frame for each plane, in which the
value of a pixel is its segment's number, and 0 a segment for the background.


Every frame takes position and orientation from the header of the slice that it covers: nothing is flipped,
resampled or recomputed. Two builds of the same result are byte-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from models.errors import ReasonCode, Refusal, SegnodeError
from models.manifest import Label, Manifest
from models.volume import Labelmap
from service.dicom.coding import LONGEST_TEXT, code_sequence, decimal_strings
from service.dicom.derived import (
    ARTIFICIAL_INTELLIGENCE,
    LATERALITY,
    Making,
    category_code,
    plane_header,
    references_of,
    set_dates,
    set_equipment,
    set_identity,
    set_implementation,
    set_lossy,
    type_code,
    unverified,
    write_object,
)
from service.dicom.elements import quiet
from service.dicom.identifiers import derived_uid
from service.dicom.segment_frames import (
    FrameList,
    functional_groups,
    pack_frames,
    pack_labelmap_frames,
)
from service.dicom.series import SourceSeries

SegmentationForm = Literal["binary", "labelmap"]

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
    pipeline_version: str = "",
    device_serial_number: str = "segnode",
    form: SegmentationForm = "binary",
    keep_empty_frames: bool = False,
    instance_number: int = 1,
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
    form : str
        BINARY or LABELMAP.
    keep_empty_frames : bool
        Whether planes on which a segment is nowhere get a frame too.
    instance_number : int
        Number of the object in its series.

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

    making = Making(
        sop_instance_uid,
        series_instance_uid,
        content_datetime,
        model_digest,
        pipeline_version,
        device_serial_number,
    )
    with quiet():  # identifiers that break their VR are passed on as they are
        dataset = _skeleton(source, manifest, labels, making, form, series_number, instance_number)
        set_dates(dataset, content_datetime)
        set_identity(dataset, source.identity, source.headers)
        dataset.ContentDescription = f"{manifest.name} {manifest.version}"[:LONGEST_TEXT]
        dataset.ContentCreatorName = None
        set_implementation(dataset, making)
        set_equipment(dataset, making, manifest)
        _set_references(dataset, source)
        _set_dimensions(dataset, sop_instance_uid)
        set_lossy(dataset, source)
        _set_shared_groups(dataset, source)
        _set_frames(dataset, source, labelmap, labels, form, keep_empty_frames)
    return dataset


def write_segmentation(dataset: Dataset, path: Path) -> Path:
    """Write a Part 10 file that is on the disk when this returns, and whole or not there at all."""
    return write_object(dataset, path)


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
            remedy="Send the series from its original source, or ask for a NIfTI file (segnode segment).",
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
    making: Making,
    form: SegmentationForm,
    series_number: int,
    instance_number: int,
) -> Dataset:
    """All modules as highdicom makes them, for a segmentation of one plane with one pixel in it."""
    algorithm = hd.AlgorithmIdentificationSequence(
        name=manifest.title, family=ARTIFICIAL_INTELLIGENCE, version=manifest.version, source="segnode"
    )
    plane = np.zeros((1, *source.volume.shape_zyx[1:]), np.uint16 if len(labels) > 255 else np.uint8)
    plane[0, 0, 0] = 1
    made = hd.seg.Segmentation(
        source_images=[plane_header(source, 0)],
        pixel_array=plane,
        segmentation_type=hd.seg.SegmentationTypeValues[form.upper()],
        segment_descriptions=[_describe(number, label, algorithm) for number, label in enumerate(labels, 1)],
        series_instance_uid=making.series_instance_uid,
        series_number=series_number,
        sop_instance_uid=making.sop_instance_uid,
        instance_number=instance_number,
        manufacturer="segnode",
        manufacturer_model_name="segnode",
        software_versions=making.software_version,
        device_serial_number=making.device_serial_number[:LONGEST_TEXT],
        content_label="AI_SEGMENTATION",
        series_description=unverified(manifest.title),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    dataset = Dataset()
    dataset.update(made)
    dataset.file_meta = made.file_meta
    return dataset


def _describe(
    number: int, label: Label, algorithm: hd.AlgorithmIdentificationSequence
) -> hd.seg.SegmentDescription:
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label.name,
        segmented_property_category=category_code(label),
        segmented_property_type=type_code(label),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        display_color=hd.color.CIELabColor.from_rgb(*label.color_rgb),
    )
    if label.laterality is not None:
        coded = description.SegmentedPropertyTypeCodeSequence[0]
        coded.SegmentedPropertyTypeModifierCodeSequence = code_sequence(LATERALITY[label.laterality])
    return description


def _set_references(dataset: Dataset, source: SourceSeries) -> None:
    """The series and all its instances: viewers find the images of a segmentation by this sequence."""
    series = Dataset()
    series.SeriesInstanceUID = source.series_instance_uid
    series.ReferencedInstanceSequence = DicomSequence([each.item() for each in references_of(source)])
    dataset.ReferencedSeriesSequence = DicomSequence([series])
    if "SourceImageSequence" in dataset:
        del dataset.SourceImageSequence  # names the skeleton's one plane; every frame names its own


def _set_dimensions(dataset: Dataset, sop_instance_uid: str) -> None:
    organization = derived_uid("dimension-organization", sop_instance_uid=sop_instance_uid)
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization


def _set_shared_groups(dataset: Dataset, source: SourceSeries) -> None:
    measures, orientation, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = decimal_strings(source.pixel_spacing_mm)
    measures.SpacingBetweenSlices = decimal_strings([source.slice_spacing_mm])[0]
    measures.SliceThickness = decimal_strings([source.slice_thickness_mm or source.slice_spacing_mm])[0]
    orientation.ImageOrientationPatient = decimal_strings(source.orientation)
    shared.PixelMeasuresSequence = DicomSequence([measures])
    shared.PlaneOrientationSequence = DicomSequence([orientation])
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])


def _set_frames(
    dataset: Dataset,
    source: SourceSeries,
    labelmap: Labelmap,
    labels: Sequence[Label],
    form: SegmentationForm,
    keep_empty_frames: bool,
) -> None:
    segments = _segment_numbers(labelmap, labels)
    if form == "binary":
        frames, pixel_data = pack_frames(segments, len(labels), keep_empty=keep_empty_frames)
        dataset.add_new("PixelData", "OB", pixel_data)
    else:
        frames, pixel_data = pack_labelmap_frames(segments, keep_empty=keep_empty_frames)
        bits = 8 * segments.dtype.itemsize
        assert dataset.BitsAllocated == bits, "highdicom allocates what the largest segment number needs"
        dataset.add_new("PixelPaddingValue", "US", 0)  # the background
        dataset.add_new("PixelData", "OB" if bits == 8 else "OW", pixel_data)
    _set_frame_groups(dataset, source, frames)


def _segment_numbers(labelmap: Labelmap, labels: Sequence[Label]) -> NDArray[np.unsignedinteger]:
    """(Z, Y, X): the segment number of every voxel, 0 for the background."""
    number_of = np.zeros(int(labelmap.array.max()) + 1, np.uint16 if len(labels) > 255 else np.uint8)
    for number, label in enumerate(labels, 1):
        number_of[label.value] = number
    numbers: NDArray[np.unsignedinteger] = number_of[labelmap.array]
    return numbers


def _set_frame_groups(dataset: Dataset, source: SourceSeries, frames: FrameList) -> None:
    references = references_of(source)
    positions, derivations = [], []
    for z, position_mm in enumerate(source.positions_mm):
        position, derivation = Dataset(), Dataset()
        position.ImagePositionPatient = decimal_strings(position_mm)
        positions.append(position)
        index, frame_number = source.frame_numbers[z]
        image = references[index].item()
        if "NumberOfFrames" in source.headers[index]:
            image.ReferencedFrameNumber = frame_number
        image.SpatialLocationsPreserved = "YES"
        image.PurposeOfReferenceCodeSequence = code_sequence(_SOURCE_IMAGE)
        derivation.SourceImageSequence = DicomSequence([image])
        derivation.DerivationCodeSequence = code_sequence(_SEGMENTATION)
        derivations.append(derivation)

    dataset.NumberOfFrames = len(frames)
    groups = functional_groups(frames, positions, derivations)
    del dataset[groups.tag]
    dataset.set_original_encoding(
        False, True, dataset._character_set
    )  # or the raw groups would be re-encoded
    dataset[groups.tag] = groups
