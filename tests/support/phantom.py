"""DICOM series made from arrays: small, valid, deterministic, and free of anybody's data.

Every array is indexed ``(Z, Y, X)``; every affine maps the voxel index (x, y, z) to LPS millimetres. The
affine may be oblique, left-handed, or sheared (which is a gantry tilt): positions are written as it says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from models.manifest import Manifest

UNCOMPRESSED = (
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
)
LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K)

_STORAGE = {
    ("MR", False): "1.2.840.10008.5.1.4.1.1.4",
    ("CT", False): "1.2.840.10008.5.1.4.1.1.2",
    ("PT", False): "1.2.840.10008.5.1.4.1.1.128",
    ("MR", True): "1.2.840.10008.5.1.4.1.1.4.1",
    ("CT", True): "1.2.840.10008.5.1.4.1.1.2.1",
}

STUDY_INSTANCE_UID = "2.25.101"
SERIES_INSTANCE_UID = "2.25.102"
FRAME_OF_REFERENCE_UID = "2.25.103"


def test_uid(*parts: object) -> str:
    """A UID that is always the same for the same parts."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:15], 'big')}"


test_uid.__test__ = False  # type: ignore[attr-defined]  # a builder, not a test


def write_classic_series(
    folder: Path,
    array_zyx: NDArray[Any],
    affine_lps: NDArray[np.float64],
    *,
    modality: str = "MR",
    patient_id: str = "PHANTOM-1",
    study_instance_uid: str = STUDY_INSTANCE_UID,
    series_instance_uid: str = SERIES_INSTANCE_UID,
    frame_of_reference_uid: str = FRAME_OF_REFERENCE_UID,
    transfer_syntax: str = ExplicitVRLittleEndian,
    bits_stored: int | None = None,
    edit: Callable[[Dataset, int], None] | None = None,
    **attributes: Any,
) -> list[Path]:
    """Write one single-frame object per slice and return their paths in the order of z.

    ``array_zyx`` is uint8, uint16 or int16 and holds stored values. ``attributes`` are set on every object
    by keyword (None deletes); ``edit(dataset, z)`` may change each one just before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    array_zyx = np.asarray(array_zyx)
    paths = []
    for z, plane in enumerate(array_zyx):
        dataset = _composite(
            _STORAGE.get((modality, False), "1.2.840.10008.5.1.4.1.1.7"),
            test_uid(series_instance_uid, z),
            modality,
            patient_id,
            study_instance_uid,
            series_instance_uid,
            frame_of_reference_uid,
        )
        _add_pixel_module(dataset, plane.shape, array_zyx.dtype, bits_stored)
        dataset.InstanceNumber = z + 1
        dataset.ImagePositionPatient = _decimals(affine_lps[:3, 2] * z + affine_lps[:3, 3])
        dataset.ImageOrientationPatient = _orientation(affine_lps)
        dataset.PixelSpacing = _pixel_spacing(affine_lps)
        dataset.SliceThickness = _decimals([_normal_step(affine_lps)])[0]
        if modality == "CT":
            dataset.KVP = "120"
            dataset.AcquisitionNumber = 1
            dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "HU"
        elif modality == "MR":
            dataset.ScanningSequence, dataset.SequenceVariant = "GR", "SP"
            dataset.ScanOptions, dataset.MRAcquisitionType = None, "3D"
            dataset.EchoTime, dataset.EchoTrainLength, dataset.RepetitionTime = "3", 1, "2000"
        _set(dataset, attributes)
        _add_pixels(dataset, [plane], transfer_syntax)
        if edit is not None:
            edit(dataset, z)
        path = folder / f"{z + 1:04d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def write_enhanced_series(
    folder: Path,
    array_zyx: NDArray[Any],
    affine_lps: NDArray[np.float64],
    *,
    modality: str = "MR",
    patient_id: str = "PHANTOM-1",
    study_instance_uid: str = STUDY_INSTANCE_UID,
    series_instance_uid: str = SERIES_INSTANCE_UID,
    frame_of_reference_uid: str = FRAME_OF_REFERENCE_UID,
    transfer_syntax: str = ExplicitVRLittleEndian,
    bits_stored: int | None = None,
    frame_order: Sequence[int] | None = None,
    slope_intercept: Sequence[tuple[float, float]] | None = None,
    orientation_per_frame: bool = False,
    edit: Callable[[Dataset], None] | None = None,
    **attributes: Any,
) -> list[Path]:
    """Write one enhanced multi-frame object and return its path alone in a list.

    ``frame_order`` says which z each frame holds (default: as they come); ``slope_intercept`` gives one
    pair per z, and makes the pixel value transformation per frame, as Philips does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    array_zyx = np.asarray(array_zyx)
    order = list(frame_order) if frame_order is not None else list(range(len(array_zyx)))
    dataset = _composite(
        _STORAGE[modality, True],
        test_uid(series_instance_uid, "enhanced"),
        modality,
        patient_id,
        study_instance_uid,
        series_instance_uid,
        frame_of_reference_uid,
    )
    _add_pixel_module(dataset, array_zyx.shape[1:], array_zyx.dtype, bits_stored)
    dataset.NumberOfFrames = len(order)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.InstanceNumber = 1
    dataset.AcquisitionNumber = 1
    dataset.AcquisitionDateTime = "20200101120000"
    dataset.AcquisitionDuration = 1.0
    dataset.PixelPresentation, dataset.VolumetricProperties = "MONOCHROME", "VOLUME"
    dataset.VolumeBasedCalculationTechnique = "NONE"
    dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "00"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.ContentQualification = "RESEARCH"

    orientation = Dataset()
    orientation.ImageOrientationPatient = _orientation(affine_lps)
    measures = Dataset()
    measures.PixelSpacing = _pixel_spacing(affine_lps)
    measures.SliceThickness = _decimals([_normal_step(affine_lps)])[0]

    shared = Dataset()
    shared.PixelMeasuresSequence = DicomSequence([measures])
    if not orientation_per_frame:
        shared.PlaneOrientationSequence = DicomSequence([orientation])
    if slope_intercept is None:
        shared.PixelValueTransformationSequence = DicomSequence([_transformation(1.0, 0.0)])
    dataset.SharedFunctionalGroupsSequence = DicomSequence([shared])

    frames = []
    for z in order:
        frame, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = _decimals(affine_lps[:3, 2] * z + affine_lps[:3, 3])
        frame.PlanePositionSequence = DicomSequence([position])
        if orientation_per_frame:
            frame.PlaneOrientationSequence = DicomSequence([orientation])
        if slope_intercept is not None:
            frame.PixelValueTransformationSequence = DicomSequence([_transformation(*slope_intercept[z])])
        content.StackID, content.InStackPositionNumber = "1", z + 1
        content.FrameAcquisitionNumber = 1
        frame.FrameContentSequence = DicomSequence([content])
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    _set(dataset, attributes)
    _add_pixels(dataset, [array_zyx[z] for z in order], transfer_syntax)
    if edit is not None:
        edit(dataset)
    path = folder / "enhanced.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return [path]


def all_orientations(
    spacing_xyz_mm: tuple[float, float, float] = (1.0, 1.25, 2.5),
    origin_lps_mm: tuple[float, float, float] = (-31.0, 17.0, 250.5),
) -> list[NDArray[np.float64]]:
    """The 48 affines whose axes lie along the patient's, left-handed ones included."""
    affines = []
    for directions, signs in product(permutations(range(3)), product((1.0, -1.0), repeat=3)):
        affine = np.eye(4)
        affine[:3, :3] = 0.0
        for axis, (direction, sign) in enumerate(zip(directions, signs, strict=True)):
            affine[direction, axis] = sign * spacing_xyz_mm[axis]
        affine[:3, 3] = origin_lps_mm
        affines.append(affine)
    return affines


def oblique_affine(
    spacing_xyz_mm: tuple[float, float, float] = (0.9, 1.1, 2.0),
    angles_degrees: tuple[float, float, float] = (11.0, -23.0, 37.0),
    origin_lps_mm: tuple[float, float, float] = (12.5, -80.25, 33.0),
) -> NDArray[np.float64]:
    """A doubly oblique affine: rotations about the patient's x, y and z axes, in this order."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.radians(angles_degrees)):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        rotation = turn @ rotation
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.asarray(spacing_xyz_mm)
    affine[:3, 3] = origin_lps_mm
    return affine


def chiral_labels(shape_zyx: tuple[int, int, int] = (7, 11, 13)) -> NDArray[np.uint8]:
    """Labels 1, 2 and 3 so placed that no flip, transposition or shift maps the array to itself."""
    z, y, x = shape_zyx
    labels = np.zeros(shape_zyx, np.uint8)
    labels[1 : z - 2, 2 : y - 3, 1:3] = 1  # a slab at low x
    labels[1, 2 : y - 5, 3 : x - 2] = 2  # a foot at low z and low y
    labels[z - 3, y - 4, 3:8] = 3  # a short bar at high z
    labels[2, y - 2, x - 1] = 3  # and one voxel at the very edge of x
    return labels


def chiral_image(shape_zyx: tuple[int, int, int] = (7, 11, 13)) -> NDArray[np.int16]:
    """Stored values that differ for every voxel, some of them negative."""
    return (np.arange(int(np.prod(shape_zyx)), dtype=np.int16) - 300).reshape(shape_zyx)


def _composite(
    sop_class_uid: str,
    sop_instance_uid: str,
    modality: str,
    patient_id: str,
    study_instance_uid: str,
    series_instance_uid: str,
    frame_of_reference_uid: str,
) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID = sop_class_uid
    dataset.SOPInstanceUID = sop_instance_uid
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if modality == "CT" else "OTHER"]
    for keyword in ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"):
        setattr(dataset, keyword, "20200101")
    for keyword in ("StudyTime", "SeriesTime", "AcquisitionTime", "ContentTime"):
        setattr(dataset, keyword, "120000")
    dataset.AccessionNumber, dataset.ReferringPhysicianName = "ACC1", None
    dataset.Modality, dataset.Manufacturer = modality, "segnode tests"
    dataset.ManufacturerModelName, dataset.DeviceSerialNumber, dataset.SoftwareVersions = "phantom", "1", "1"
    dataset.StudyDescription, dataset.SeriesDescription = "Phantom study", "Phantom series"
    dataset.PatientName, dataset.PatientID = "Phantom^Test", patient_id
    dataset.PatientBirthDate, dataset.PatientSex = "19700101", "O"
    dataset.PatientPosition, dataset.BodyPartExamined = "HFS", "HEAD"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_instance_uid, series_instance_uid
    dataset.StudyID, dataset.SeriesNumber = "1", 1
    if frame_of_reference_uid:
        dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = frame_of_reference_uid, None
    return dataset


def _add_pixel_module(
    dataset: Dataset, shape_yx: tuple[int, ...], dtype: np.dtype[Any], bits_stored: int | None
) -> None:
    assert dtype in (np.uint8, np.uint16, np.int16), f"stored values cannot be {dtype}"
    bits = dtype.itemsize * 8
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = shape_yx
    dataset.BitsAllocated, dataset.BitsStored = bits, bits_stored or bits
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(dtype.kind == "i")


def _add_pixels(dataset: Dataset, planes: list[NDArray[Any]], transfer_syntax: str) -> None:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    syntax = UID(transfer_syntax)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    raw = np.stack(planes)
    data = raw.astype(raw.dtype.newbyteorder(order)).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW" if dataset.BitsAllocated > 8 else "OB"
    if syntax in UNCOMPRESSED:
        dataset.file_meta.TransferSyntaxUID = syntax
        return
    if syntax in (JPEGLSLossless, JPEGLSNearLossless):
        options = {"jls_error": 2} if syntax == JPEGLSNearLossless else {}
        dataset.compress(syntax, generate_instance_uid=False, **options)
    elif syntax == RLELossless:
        dataset.compress(syntax, generate_instance_uid=False, encoding_plugin="pydicom")
    else:
        dataset.PixelData = encapsulate([_encode(plane, syntax, dataset.BitsStored) for plane in planes])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    if syntax in LOSSY:
        dataset.LossyImageCompression, dataset.LossyImageCompressionRatio = "01", "4"


def _encode(plane: NDArray[Any], syntax: UID, bits_stored: int) -> bytes:
    plane = np.ascontiguousarray(plane)
    if syntax in (HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL):
        return bytes(imagecodecs.htj2k_encode(plane))
    if syntax in (JPEG2000, JPEG2000Lossless):
        level = 0 if syntax == JPEG2000Lossless else 90  # 0 is lossless, otherwise decibels
        return bytes(imagecodecs.jpeg2k_encode(plane, level=level, codecformat="j2k", resolutions=1))
    unsigned = plane.view(f"u{plane.dtype.itemsize}")
    if syntax in (JPEGLossless, JPEGLosslessSV1):
        lossless = {"lossless": True, "predictor": 1}
        return bytes(imagecodecs.jpeg8_encode(unsigned, bitspersample=bits_stored, **lossless))
    assert syntax in (JPEGBaseline8Bit, JPEGExtended12Bit), f"no encoder here for {syntax.name}"
    return bytes(imagecodecs.jpeg8_encode(unsigned, level=100, bitspersample=bits_stored))


def _transformation(slope: float, intercept: float) -> Dataset:
    item = Dataset()
    item.RescaleIntercept, item.RescaleSlope = _decimals([intercept, slope])
    item.RescaleType = "US"
    return item


def _set(dataset: Dataset, attributes: dict[str, Any]) -> None:
    for keyword, value in attributes.items():
        if value is None:
            if keyword in dataset:
                delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)


def _decimals(values: Sequence[float] | NDArray[np.float64]) -> list[str]:
    """As decimal strings of at most 16 characters (PS3.5 table 6.2-1)."""
    return [next(t for d in range(12, 0, -1) if len(t := f"{float(v) + 0.0:.{d}g}") <= 16) for v in values]


def _orientation(affine: NDArray[np.float64]) -> list[str]:
    columns = affine[:3, :2] / np.linalg.norm(affine[:3, :2], axis=0)
    return _decimals([*columns[:, 0], *columns[:, 1]])


def _pixel_spacing(affine: NDArray[np.float64]) -> list[str]:
    x, y = np.linalg.norm(affine[:3, :2], axis=0)
    return _decimals([y, x])


def _normal_step(affine: NDArray[np.float64]) -> float:
    """Distance between slices along the normal, in millimetres."""
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    return float(abs(normal @ affine[:3, 2]) / np.linalg.norm(normal))


def phantom_manifest(
    count: int = 3, *, laterality: Sequence[str | None] = (), title: str = "Phantom parts"
) -> Manifest:
    """A manifest with ``count`` labels 1, 2, 3, ... whose codes tell them apart."""
    sides = [*laterality, *[None] * count]
    concept = {"value": "123037004", "meaning": "Anatomical Structure"}
    labels = [
        {
            "value": value,
            "name": f"part {value}",
            "category": concept,
            "type": {"value": f"99{value:06d}", "scheme": "99SEGNODE", "meaning": f"Part {value}"},
            "laterality": sides[value - 1],
            "color_rgb": (value * 40 % 256, value * 90 % 256, 200),
        }
        for value in range(1, count + 1)
    ]
    return Manifest.model_validate(
        {
            "name": "phantom",
            "version": "1.2.3",
            "title": title,
            "intended_use": "Tests",
            "licence": "Apache-2.0",
            "channels": [{"name": "image", "normalization": "ZScoreNormalization"}],
            "labels": labels,
            "orientation": "RAS",
            "preprocessing": {
                "spacing_mm": (1, 1, 1),
                "resampling_data": {"order": 3},
                "resampling_probabilities": {"order": 1},
            },
            "inference": {"patch_size": (8, 8, 8)},
            "weights": [{"file": "student.onnx", "sha256": "0" * 64}],
            "golden": {"images": ["image.nii.gz"], "labelmap": "labelmap.nii.gz"},
            "provenance": {"method": "none", "data": "none"},
        }
    )
