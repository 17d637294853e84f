"""An approved labelmap as a person brings it, NIfTI or DICOM-SEG, on the grid of the node's own.

Viewers turn and flip what they save: a NIfTI file may have its axes in another order, a segmentation its
frames. Both are brought back by their geometry, without interpolation; what does not lie on the same voxels
is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from models.errors import ReasonCode, Refusal
from models.manifest import Label, Manifest
from models.nifti import read_labelmap
from models.volume import Labelmap, Reorientation, axis_codes
from service.archive import is_dicom
from service.dicom.elements import PARSE_ERRORS, integer, item, items, macro_decimals, quiet, string
from service.dicom.proof import meaning_of_label, meaning_of_segment

_TOLERANCE_MM = 0.1
_TOLERANCE_VOXELS = 0.05
_SEGMENTATIONS = {
    "1.2.840.10008.5.1.4.1.1.66.4": "BINARY",
    "1.2.840.10008.5.1.4.1.1.66.7": "LABELMAP",
}
_GRID_REMEDY = "Save the labels on the grid of the images that were segmented, without resampling."


def read_approved(path: Path, grid: Labelmap, manifest: Manifest) -> Labelmap:
    """Read a labelmap that a person approved.

    Parameters
    ----------
    path : Path
        NIfTI with the model's label values, or a BINARY or LABELMAP segmentation with its codes.
    grid : Labelmap
        The node's own result for the same images: its array's shape and its affine are the grid.
    manifest : Manifest
        Of the model.

    Returns
    -------
    Labelmap
        On ``grid``, with the model's label values.

    Raises
    ------
    Refusal
        UNREADABLE, CHANNEL_GRIDS_DIFFER or INVALID_VALUES, with what is wrong.
    """
    found = _read_segmentation(path, grid, manifest) if is_dicom(path) else _read_nifti(path, grid)
    unknown = sorted(set(np.unique(found.array).tolist()) - {0} - {label.value for label in manifest.labels})
    if unknown:
        raise Refusal(
            ReasonCode.INVALID_VALUES,
            f"The labelmap holds values that are no labels of {manifest.name}: {unknown[:10]}.",
            remedy="Use the label values of the model.",
        )
    if not found.array.any():
        raise Refusal(
            ReasonCode.INVALID_VALUES,
            "The labelmap is empty, which proves nothing.",
            remedy="Approve a study in which something was found.",
        )
    return found


def _read_nifti(path: Path, grid: Labelmap) -> Labelmap:
    given = read_labelmap(_with_suffix(path))
    change = Reorientation.between(axis_codes(given.affine), axis_codes(grid.affine))
    shape = (given.array.shape[0], given.array.shape[1], given.array.shape[2])
    affine = change.apply_affine(given.affine, shape)
    array = np.ascontiguousarray(change.apply(given.array))
    corner = [*grid.array.shape[::-1], 1.0]
    if array.shape != grid.array.shape or np.abs((affine - grid.affine) @ corner).max() > _TOLERANCE_MM:
        raise _other_grid("The labelmap does not lie on the grid of the study")
    return Labelmap(array, grid.affine, grid.frame_of_reference_uid)


def _with_suffix(path: Path) -> Path:
    """The file under a name that says what it is: uploads have none, and nibabel goes by it."""
    if path.name.endswith((".nii", ".nii.gz")):
        return path
    with path.open("rb") as file:
        suffix = ".nii.gz" if file.read(2) == b"\x1f\x8b" else ".nii"
    named = path.with_name(f"{path.name}{suffix}")
    if not named.exists():
        named.hardlink_to(path)
    return named


def _read_segmentation(path: Path, grid: Labelmap, manifest: Manifest) -> Labelmap:
    try:
        with quiet():
            return _paint(dcmread(path), grid, manifest)
    except PARSE_ERRORS as error:
        raise _unreadable(f"it cannot be decoded ({type(error).__name__})") from error


def _paint(dataset: Dataset, grid: Labelmap, manifest: Manifest) -> Labelmap:
    form = _SEGMENTATIONS.get(string(dataset, "SOPClassUID") or "")
    if form is None or string(dataset, "SegmentationType") != form:
        raise _unreadable("it is no BINARY and no LABELMAP segmentation")
    label_of = _labels_of_segments(dataset, manifest, form)
    per_frame = items(dataset, "PerFrameFunctionalGroupsSequence")
    rows, columns = integer(dataset, "Rows"), integer(dataset, "Columns")
    if not per_frame or not rows or not columns:
        raise _unreadable("it has no frames")
    if len(per_frame) * rows * columns > grid.array.size * max(1, len(manifest.labels)) * 2:
        raise _unreadable(f"it has {len(per_frame)} frames, more than the study can have")
    pixels = dataset.pixel_array.reshape(len(per_frame), rows, columns)
    shared = item(dataset, "SharedFunctionalGroupsSequence")
    dtype = np.uint8 if max(label.value for label in manifest.labels) < 256 else np.uint16
    array = np.zeros(grid.array.shape, dtype)
    to_index = np.linalg.inv(grid.affine)
    for frame, own in zip(pixels, per_frame, strict=True):
        geometry = _pixel_to_index(own, shared, to_index)
        for number, mask in _masks(frame, own, shared, form):
            if number not in label_of:
                raise _unreadable("a frame shows a segment that is not described")
            _place(array, mask, label_of[number].value, geometry)
    return Labelmap(array, grid.affine, grid.frame_of_reference_uid)


def _masks(
    frame: NDArray[Any], own: Dataset, shared: Dataset | None, form: str
) -> list[tuple[int | None, NDArray[np.bool_]]]:
    """The segments that a frame shows, by number, with the pixels of each."""
    if form == "LABELMAP":
        return [(int(number), frame == number) for number in np.unique(frame) if number]
    keyword = "SegmentIdentificationSequence"
    identification = item(own, keyword) or item(shared, keyword)
    number = integer(identification, "ReferencedSegmentNumber") if identification is not None else None
    return [(number, frame != 0)]


def _labels_of_segments(dataset: Dataset, manifest: Manifest, form: str) -> dict[int, Label]:
    """The label that each segment number means, by name, codes and side, or by codes and side alone."""
    whole = {meaning_of_label(label): label for label in manifest.labels}
    by_codes: dict[tuple[str | None, ...], list[Label]] = {}
    for meaning, label in whole.items():
        by_codes.setdefault(meaning[1:], []).append(label)
    label_of: dict[int, Label] = {}
    for segment in items(dataset, "SegmentSequence"):
        number, meaning = integer(segment, "SegmentNumber"), meaning_of_segment(segment)
        if number is None or (form == "LABELMAP" and number == 0):
            continue
        candidates = by_codes.get(meaning[1:], [])
        found = whole.get(meaning) or (candidates[0] if len(candidates) == 1 else None)
        if found is None:
            raise _unreadable(f"the codes of segment {number} are those of no label of {manifest.name}")
        label_of[number] = found
    return label_of


def _pixel_to_index(
    own: Dataset, shared: Dataset | None, to_index: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Voxel index (x, y, z) of a frame's first pixel, and the steps to its next column and next row."""

    def values(macro: str, keyword: str, count: int) -> NDArray[np.float64]:
        found = macro_decimals(own, shared, macro, keyword, count)
        if found is None:
            raise _unreadable(f"a frame does not state its {keyword}")
        return np.array(found)

    spacing = values("PixelMeasuresSequence", "PixelSpacing", 2)  # between rows, between columns
    cosines = values("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    position = values("PlanePositionSequence", "ImagePositionPatient", 3)
    first = (to_index @ [*position, 1.0])[:3]
    return first, to_index[:3, :3] @ (cosines[:3] * spacing[1]), to_index[:3, :3] @ (cosines[3:] * spacing[0])


def _place(
    array: NDArray[np.uint8 | np.uint16],
    mask: NDArray[np.bool_],
    value: int,
    geometry: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
) -> None:
    """Write a label at every voxel that a frame's pixels cover."""
    first, per_column, per_row = geometry
    rows, columns = np.nonzero(mask)
    if not rows.size:
        return
    exact = first + np.outer(columns, per_column) + np.outer(rows, per_row)
    index = np.rint(exact).astype(np.int64)
    if np.abs(exact - index).max() > _TOLERANCE_VOXELS:
        raise _other_grid("A frame of the segmentation does not lie on the voxels of the study")
    if index.min() < 0 or (index >= array.shape[::-1]).any():
        raise _other_grid("A frame of the segmentation reaches out of the study")
    x, y, z = index.T
    array[z, y, x] = value


def _other_grid(what: str) -> Refusal:
    return Refusal(ReasonCode.CHANNEL_GRIDS_DIFFER, f"{what}.", remedy=_GRID_REMEDY)


def _unreadable(what: str) -> Refusal:
    return Refusal(
        ReasonCode.UNREADABLE,
        f"The file is no segmentation that can be used: {what}.",
        remedy="Save it again as DICOM-SEG with the codes of the node's own, or as NIfTI.",
    )
