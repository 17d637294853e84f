"""Faults that a reader of series could have, planted in this one: each of them shows in the patient.

The series has all that such faults pass over where it is missing: files in no order, more columns than rows,
pixels that are no squares, slices thicker than the distance between them, and a rescale slope of its own for
each. Those of the writer are planted in test_proof, where the self-proof has to catch them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from phantom import (
    chiral_image,
    chiral_labels,
    oblique_affine,
    phantom_manifest,
    write_classic_series,
    write_enhanced_series,
)
from pydicom import Dataset

from models.volume import Labelmap
from service.dicom import series as reader
from service.dicom.geometry import Grid
from service.dicom.proof import prove_segmentation
from service.dicom.segmentation import build_segmentation, write_segmentation
from service.dicom.series import SourceSeries, read_series
from service.errors import ProofError

AFFINE = oblique_affine((0.9, 1.3, 2.0))
SLOPES = [(0.5 + 0.25 * z, 10.0 * z) for z in range(len(chiral_image()))]
MOMENT: dict[str, Any] = {
    "model_digest": "ab" * 32,
    "sop_instance_uid": "2.25.7001",
    "series_instance_uid": "2.25.7002",
    "content_datetime": datetime(2026, 2, 3, tzinfo=UTC),
}


def classic(folder: Path) -> list[Path]:
    def edit(dataset: Dataset, z: int) -> None:
        dataset.SliceThickness = "3.5"  # they overlap
        dataset.RescaleSlope, dataset.RescaleIntercept = map(str, SLOPES[z])
        dataset.RescaleType = "US"
        dataset.InstanceNumber = 1 + (5 * z) % 7

    paths = write_classic_series(folder, chiral_image(), AFFINE, edit=edit)
    random.Random(3).shuffle(paths)
    return paths


def enhanced(folder: Path) -> list[Path]:
    def edit(dataset: Dataset) -> None:
        dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness = "3.5"

    return write_enhanced_series(
        folder, chiral_image(), AFFINE, frame_order=[3, 0, 6, 1, 5, 2, 4], slope_intercept=SLOPES, edit=edit
    )


def assert_is_the_patient(source: SourceSeries) -> None:
    """Every value lies at the millimetres at which it was written."""
    slopes, intercepts = np.array(SLOPES).T[:, :, None, None]
    np.testing.assert_allclose(source.volume.affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(source.volume.array[0], chiral_image() * slopes + intercepts, rtol=1e-6)


def in_the_grid(change: Callable[[Grid], Grid]) -> Callable[..., Grid]:
    plain = reader.regular_grid
    return lambda *given: change(plain(*given))


def _reversed_sort(grid: Grid) -> Grid:
    return replace(grid, frames=grid.frames[::-1])


def _axes_swapped(grid: Grid) -> Grid:
    affine = grid.affine.copy()
    affine[:, [0, 1]] = affine[:, [1, 0]]
    return replace(grid, affine=affine)


def _spacings_swapped(grid: Grid) -> Grid:
    affine = grid.affine.copy()
    x_mm, y_mm = np.linalg.norm(affine[:3, :2], axis=0)
    affine[:3, 0] *= y_mm / x_mm
    affine[:3, 1] *= x_mm / y_mm
    return replace(grid, affine=affine)


def _thickness_as_spacing(grid: Grid) -> Grid:
    affine = grid.affine.copy()
    affine[:3, 2] *= grid.frames[0].slice_thickness_mm / np.linalg.norm(affine[:3, 2])
    return replace(grid, affine=affine)


def _one_slope(grid: Grid) -> Grid:
    first = grid.frames[0]
    same = [replace(frame, slope=first.slope, intercept=first.intercept) for frame in grid.frames]
    return replace(grid, frames=tuple(same))


FAULTS: dict[str, Callable[[Grid], Grid]] = {
    "reversed sort": _reversed_sort,
    "rows and columns swapped": _axes_swapped,
    "pixel spacing swapped": _spacings_swapped,
    "slice thickness taken for spacing": _thickness_as_spacing,
    "one rescale slope for all": _one_slope,
}


@pytest.mark.parametrize("write", [classic, enhanced])
def test_the_reader_as_it_is_has_none_of_them(tmp_path: Path, write: Callable[[Path], list[Path]]) -> None:
    assert_is_the_patient(read_series(write(tmp_path)))


@pytest.mark.parametrize("write", [classic, enhanced])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_the_reader_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, write: Callable[[Path], list[Path]]
) -> None:
    paths = write(tmp_path)
    monkeypatch.setattr(reader, "regular_grid", in_the_grid(FAULTS[fault]))
    source = read_series(paths)
    with pytest.raises(AssertionError):
        assert_is_the_patient(source)


@pytest.mark.parametrize("fault", ["rows and columns swapped", "pixel spacing swapped"])
def test_the_self_proof_stops_what_does_not_lie_as_its_images_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right = read_series(classic(tmp_path))
    labels: NDArray[np.uint8] = chiral_labels()
    labelmap = Labelmap(labels, right.volume.affine, right.frame_of_reference_uid)
    path = write_segmentation(
        build_segmentation(right, labelmap, phantom_manifest(), **MOMENT), tmp_path / "seg.dcm"
    )
    prove_segmentation(path, right, labelmap, phantom_manifest())
    monkeypatch.setattr(reader, "regular_grid", in_the_grid(FAULTS[fault]))
    wrong = read_series(sorted(tmp_path.glob("0*.dcm")))
    labelmap = Labelmap(labels, wrong.volume.affine, wrong.frame_of_reference_uid)
    with pytest.raises(ProofError, match="do not lie along those of the source"):
        prove_segmentation(path, wrong, labelmap, phantom_manifest())
