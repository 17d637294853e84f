"""A tilted gantry: the model sees a rectangular grid, and what leaves lies on the slices as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from bundle_factory import make_threshold_bundle
from phantom import chiral_labels, oblique_affine, write_classic_series, write_enhanced_series
from places import assert_same_places, places_in_nifti, places_in_seg, places_of_labels
from pydicom import dcmread

from models.bundle import Bundle
from models.errors import ReasonCode, Refusal
from models.segmenter import Segmenter
from models.volume import Affine, Labelmap, Volume
from service.pipeline import PipelineOutcome, run
from service.pipeline_job import PipelineJob
from service.reading import AS_USUAL, ReadingRules
from service.straightening import Straightening, background_of

RESAMPLE = ReadingRules(gantry_tilt="resample")
SHAPE = (9, 14, 16)


def sheared(x: float, y: float, *, mirror: float = 1.0) -> Affine:
    """An oblique grid of 0.9 x 1.1 x 2 mm, each slice moved by so many pixels along x and y."""
    affine = oblique_affine()
    affine[:3, 2] = mirror * affine[:3, 2] + x * affine[:3, 0] + y * affine[:3, 1]
    return affine


SHEARS = [(0.0, 0.53), (0.0, -0.53), (1.37, 0.0), (-0.25, 0.75), (0.4, -2.0), (0.0, 0.0)]


def places_mm(affine: Affine, shape_zyx: tuple[int, int, int]) -> np.ndarray:
    """(Z, Y, X, 3): where every voxel of a grid lies."""
    zyx = np.stack(np.meshgrid(*map(np.arange, shape_zyx), indexing="ij"), axis=-1)
    return zyx[..., ::-1] @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize(("x", "y"), SHEARS)
def test_an_image_keeps_its_places_on_a_rectangular_grid(x: float, y: float) -> None:
    affine = sheared(x, y)
    slope = np.array([3.0, -2.0, 5.0])  # per mm: linear interpolation has no error on it
    array = (places_mm(affine, SHAPE) @ slope)[None].astype(np.float32)
    straightening = Straightening.of(affine, SHAPE, limit_voxels=10**6)
    straight = straightening.forth(Volume(array, affine), [-1e6])

    cosines = straight.affine[:3, :3] / np.linalg.norm(straight.affine[:3, :3], axis=0)
    np.testing.assert_allclose(cosines.T @ cosines, np.eye(3), atol=1e-12)
    expected = places_mm(straight.affine, straight.shape_zyx) @ slope
    covered = straight.array[0] > -1e4  # background, also where a pixel is partly made of it
    np.testing.assert_allclose(straight.array[0][covered], expected[covered], atol=1e-3)
    kept = covered.sum(axis=(1, 2))
    assert (kept >= (SHAPE[1] - 1) * (SHAPE[2] - 1)).all()  # of every slice all but the edge of half a pixel


@pytest.mark.parametrize(("x", "y"), SHEARS)
def test_labels_that_went_forth_come_back(x: float, y: float) -> None:
    straightening = Straightening.of(sheared(x, y), SHAPE, limit_voxels=10**6)
    labels = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)
    there = straightening.labels_forth(Labelmap(labels, straightening.sheared))
    back = straightening.back(there)
    np.testing.assert_array_equal(back.array, labels)
    np.testing.assert_array_equal(back.affine, straightening.sheared)
    assert there.volumes_ml() == pytest.approx(back.volumes_ml())


def test_the_grid_grows_by_no_more_than_the_slices_move() -> None:
    assert Straightening.of(sheared(0, 0), SHAPE, limit_voxels=10**6).rectangular_shape_zyx == SHAPE
    moved = Straightening.of(sheared(0.0, -0.53), SHAPE, limit_voxels=10**6)
    assert moved.rectangular_shape_zyx == (9, 14 + 5, 16)  # 8 * 0.53 = 4.24, up to the next whole pixel
    with pytest.raises(Refusal) as caught:
        Straightening.of(sheared(0.0, 100.0), SHAPE, limit_voxels=10_000)
    assert caught.value.reason is ReasonCode.TOO_LARGE


def test_around_the_slices_is_the_least_value_and_around_a_ct_air() -> None:
    padded = np.array([-3024.0, -1000.0, 40.0], np.float32)
    assert background_of(padded, "CT") == -1024.0
    assert background_of(padded, "MR") == -3024.0
    assert background_of(np.array([-900.0, 40.0], np.float32), "CT") == -900.0


# --- through the whole pipeline -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("model") / "b"
    return make_threshold_bundle(
        folder, thresholds=(100.5,), labels=("low",), spacing_mm=(2.0, 1.1, 0.9), modality=None
    )


@pytest.fixture(scope="module")
def segmenter(bundle: Bundle) -> Iterator[Segmenter]:
    opened = Segmenter(bundle, runtime="onnxruntime", threads=1)
    yield opened
    opened.close()


def segment(
    bundle: Bundle, segmenter: Segmenter, paths: list[Path], out: Path, reading: ReadingRules
) -> PipelineOutcome:
    job = PipelineJob((tuple(paths),), datetime(2026, 3, 4), out, reading=reading)  # noqa: DTZ001
    return run(job, segmenter, bundle.manifest, bundle.digest)


@pytest.mark.parametrize("write", [write_classic_series, write_enhanced_series])
@pytest.mark.parametrize(("x", "y"), SHEARS[:3])
@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_a_phantom_under_a_tilted_gantry_gets_its_labels_where_it_lies(
    bundle: Bundle, segmenter: Segmenter, tmp_path: Path, write, x: float, y: float, mirror: float
) -> None:
    phantom = chiral_labels(SHAPE) > 0
    affine = sheared(x, y, mirror=mirror)
    paths = write(tmp_path / "s", (phantom * 201).astype(np.int16), affine)
    outcome = segment(bundle, segmenter, paths, tmp_path / "out", RESAMPLE)

    # The threshold lies at half the contrast: what linear interpolation moves, the nearest pixel moves back.
    expected = places_of_labels(phantom.astype(np.uint8), affine)
    assert_same_places(places_in_seg(tmp_path / "out/segmentation.dcm"), expected)
    in_nifti = places_in_nifti(tmp_path / "out/labelmap.nii.gz")  # rectangular, for readers of NIfTI
    assert in_nifti[1].shape == expected[1].shape
    np.testing.assert_allclose(in_nifti[1].mean(axis=0), expected[1].mean(axis=0), atol=0.3)

    angle = np.degrees(np.arctan(np.hypot(0.9 * x, 1.1 * y) / 2.0))
    (warning,) = [each for each in outcome.summary["warnings"] if "sheared" in each]
    assert f"gantry tilt {angle:.1f} degrees" in warning
    assert warning.encode() in (tmp_path / "out/report.dcm").read_bytes()
    written = json.loads((tmp_path / "out/measurements.json").read_text())
    assert written["volumes_ml"]["low"] == pytest.approx(phantom.sum() * 0.9 * 1.1 * 2 / 1000, abs=1e-4)
    groups = dcmread(tmp_path / "out/segmentation.dcm").SharedFunctionalGroupsSequence[0]
    assert float(groups.PixelMeasuresSequence[0].SpacingBetweenSlices) == pytest.approx(2.0)


def test_a_ball_in_a_stack_that_is_sheared_both_ways_stays_a_ball(
    bundle: Bundle, segmenter: Segmenter, tmp_path: Path
) -> None:
    affine, shape = sheared(-0.3, 0.7), (11, 24, 26)
    middle = affine[:3, :3] @ [13, 11, 5] + affine[:3, 3]
    ball = np.linalg.norm(places_mm(affine, shape) - middle, axis=-1) < 8
    paths = write_classic_series(tmp_path / "s", (ball * 201).astype(np.int16), affine)
    segment(bundle, segmenter, paths, tmp_path / "out", RESAMPLE)
    found = places_in_seg(tmp_path / "out/segmentation.dcm")[1]
    assert len(found) == pytest.approx(ball.sum(), rel=0.02)
    assert np.abs(found.mean(axis=0) - places_mm(affine, shape)[ball].mean(axis=0)).max() < 0.25
    assert np.linalg.norm(found - middle, axis=1).max() < 8 + 0.71  # half the diagonal of a pixel


@pytest.mark.parametrize(("y", "reading"), [(0.53, AS_USUAL), (2.5, RESAMPLE)])
def test_what_may_not_be_set_right_is_refused(
    bundle: Bundle, segmenter: Segmenter, tmp_path: Path, y: float, reading: ReadingRules
) -> None:
    paths = write_classic_series(tmp_path / "s", (chiral_labels(SHAPE) * 201).astype(np.int16), sheared(0, y))
    with pytest.raises(Refusal) as caught:
        segment(bundle, segmenter, paths, tmp_path / "out", reading)
    assert caught.value.reason is ReasonCode.GANTRY_TILT
    assert ("gantry_tilt: resample" in caught.value.remedy) is (reading is AS_USUAL)


def test_a_tilted_stack_with_a_gap_is_still_refused(
    bundle: Bundle, segmenter: Segmenter, tmp_path: Path
) -> None:
    paths = write_classic_series(
        tmp_path / "s", (chiral_labels(SHAPE) * 201).astype(np.int16), sheared(0, 0.5)
    )
    with pytest.raises(Refusal) as caught:
        segment(bundle, segmenter, paths[:4] + paths[5:], tmp_path / "out", RESAMPLE)
    assert caught.value.reason is ReasonCode.MISSING_SLICE


def test_a_result_of_another_reading_has_other_uids(
    bundle: Bundle, segmenter: Segmenter, tmp_path: Path
) -> None:
    paths = write_classic_series(tmp_path / "s", (chiral_labels(SHAPE) * 201).astype(np.int16), sheared(0, 0))
    uids = {
        segment(bundle, segmenter, paths, tmp_path / name, reading).files[0].sop_instance_uid
        for name, reading in (("a", AS_USUAL), ("b", RESAMPLE))
    }
    assert len(uids) == 2
