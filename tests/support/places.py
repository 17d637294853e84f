"""Studies for tests of a whole node, and where their labels are: read by nibabel, pydicom and numpy alone."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from phantom import test_uid as make_uid
from phantom import write_classic_series
from pydicom import dcmread

from models.volume import Affine

# Oblique, left-handed in index space, anisotropic: nothing that a flip could get right by chance.
TURN = np.deg2rad(20.0)
AFFINE = np.array(
    [
        [1.5 * np.cos(TURN), 0.0, -2.5 * np.sin(TURN), -31.0],
        [0.0, -1.2, 0.0, 17.0],
        [1.5 * np.sin(TURN), 0.0, 2.5 * np.cos(TURN), 44.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)


def image(seed: int = 0, shape_zyx: tuple[int, int, int] = (9, 14, 18)) -> NDArray[np.int16]:
    """Noise under the thresholds, and a box of each label that no symmetry maps onto itself."""
    array = np.random.default_rng(seed).integers(1, 60, shape_zyx, np.int16)
    array[1:4, 2:6, 3:9] = 200
    array[4:6, 3:5, 3:5] = 200
    array[5:8, 8:13, 10:16] = 400
    return array


def write_study(folder: Path, seed: int, **attributes: object) -> list[Path]:
    """A series of its own in a study of its own."""
    return write_classic_series(
        folder,
        image(seed),
        AFFINE,
        patient_id=f"P{seed}",
        study_instance_uid=make_uid("study", seed),
        series_instance_uid=make_uid("series", seed),
        **attributes,  # type: ignore[arg-type]
    )


def places_of_labels(array_zyx: NDArray[np.integer], affine: Affine) -> dict[int, NDArray[np.float64]]:
    """The places in LPS mm, rounded to micrometres and sorted, of every label."""
    found = {}
    for value in np.unique(array_zyx):
        if value:
            zyx = np.argwhere(array_zyx == value)
            mm = (affine @ np.c_[zyx[:, ::-1], np.ones(len(zyx))].T)[:3].T
            rounded = np.round(mm, 3) + 0.0
            found[int(value)] = rounded[np.lexsort(rounded.T)]
    return found


def places_in_nifti(path_or_bytes: Path | bytes) -> dict[int, NDArray[np.float64]]:
    """Read by nibabel alone: RAS, and turned to LPS here."""
    if isinstance(path_or_bytes, bytes):
        loaded = nibabel.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(path_or_bytes)))
    else:
        loaded = nibabel.load(path_or_bytes)
    array_xyz = np.asanyarray(loaded.dataobj)
    return places_of_labels(array_xyz.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ loaded.affine)


def places_in_seg(path_or_bytes: Path | bytes) -> dict[int, NDArray[np.float64]]:
    """Every frame of a binary SEG by its own position and orientation, with nothing but pydicom and numpy."""
    dataset = dcmread(io.BytesIO(path_or_bytes) if isinstance(path_or_bytes, bytes) else path_or_bytes)
    frames = np.atleast_3d(dataset.pixel_array).reshape(-1, dataset.Rows, dataset.Columns)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    labels: dict[int, list[NDArray[np.float64]]] = {}
    names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in dataset.SegmentSequence}
    value_of = {"low": 1, "high": 2, "Anterior hippocampus": 1, "Posterior hippocampus": 2}
    for frame, own in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        orientation = (
            own.PlaneOrientationSequence
            if "PlaneOrientationSequence" in own
            else shared.PlaneOrientationSequence
        )[0].ImageOrientationPatient
        spacing = shared.PixelMeasuresSequence[0].PixelSpacing
        position = np.array(own.PlanePositionSequence[0].ImagePositionPatient, float)
        rows, columns = np.nonzero(frame)
        along_row, along_column = np.array(orientation[:3], float), np.array(orientation[3:], float)
        mm = (
            position
            + columns[:, None] * float(spacing[1]) * along_row
            + rows[:, None] * float(spacing[0]) * along_column
        )
        number = int(own.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        labels.setdefault(value_of[names[number]], []).append(mm)
    found = {}
    for value, parts in labels.items():
        rounded = np.round(np.concatenate(parts), 3) + 0.0
        found[value] = rounded[np.lexsort(rounded.T)]
    return found


def assert_same_places(a: dict[int, NDArray[np.float64]], b: dict[int, NDArray[np.float64]]) -> None:
    assert a.keys() == b.keys()
    for value, places in a.items():
        assert places.shape == b[value].shape, value
        # Files hold positions in decimals or float32: half a voxel would be 600 micrometres.
        np.testing.assert_allclose(places, b[value], atol=0.02)
