"""Every real series through ``segnode segment``: the right labels, or the reason why there are none.

The model is a threshold, so what is expected is known for every voxel: from the NIfTI truth where there is
one, read by nibabel alone, and else from the series as the reader's own tests have it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from bundle_factory import expected_labels, make_threshold_bundle
from real_series import (
    CASES,
    NIFTI,
    REFUSED,
    VOLUMES,
    Case,
    Why,
    files,
    from_nifti,
    labels_in,
    names,
    thresholds_of,
    truth_of,
)
from typer.testing import CliRunner

from models.errors import ReasonCode, Refusal
from models.volume import Affine, Labelmap, Volume, axis_codes, reorient, spacing_xyz_mm
from service import cli


def assert_labels(found: Labelmap, image: Volume, thresholds: tuple[float, float]) -> None:
    """The labels are those of the image, voxel for voxel, at the same places within 0.01 mm."""
    expected, _ = reorient(image, axis_codes(found.affine))
    np.testing.assert_array_equal(found.array, expected_labels(expected.array, thresholds))
    assert len(np.unique(found.array)) == 3
    np.testing.assert_allclose(found.affine, expected.affine, atol=0.01)


Segment = Callable[..., Path | Refusal]


@pytest.fixture
def segment(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Segment:
    """Run the command with a model on the grid of an image; the file that it wrote, or why it wrote none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("SEGNODE_WORKER__RUNTIME", "onnxruntime")
    monkeypatch.delenv("SEGNODE_CONFIG", raising=False)

    def run(
        source: Path,
        image: Volume | None,
        *options: str,
        out: str = "out.nii.gz",
        thresholds: tuple[float, float] | None = None,
    ) -> Path | Refusal:
        model: dict[str, Any] = {}
        if image is not None:
            model["spacing_mm"] = spacing_xyz_mm(image.affine)[::-1]
            model["thresholds"] = thresholds or thresholds_of(image.array)
            model["patch_size"] = tuple(min(128, n) for n in image.shape_zyx)
        bundle = make_threshold_bundle(tmp_path / f"bundle{len(list(tmp_path.iterdir()))}", **model)
        arguments = ["segment", source, "--bundle", bundle.folder, "--threads", 1, "-o", tmp_path / out]
        result = CliRunner().invoke(cli.app, [*map(str, arguments), *options])
        if isinstance(result.exception, Refusal):
            return result.exception
        assert result.exit_code == 0, result.output
        return tmp_path / out

    return run


def assert_refused(answer: Path | Refusal, why: Why) -> None:
    assert isinstance(answer, Refusal), answer
    assert answer.reason is why[0]
    assert why[1] in answer.message
    assert answer.remedy


@pytest.mark.parametrize("case", VOLUMES, ids=names(VOLUMES))
def test_the_command_finds_the_labels_of_the_truth(shared_data: Path, segment: Segment, case: Case) -> None:
    files(shared_data / case.name)
    image = truth_of(shared_data, case)
    found = segment(shared_data / case.name, image)
    assert isinstance(found, Path), found
    assert_labels(labels_in(found), image, thresholds_of(image.array))
    if case.no_object is not None:
        assert_refused(segment(shared_data / case.name, image, out="out.dcm"), case.no_object)


@pytest.mark.parametrize("case", REFUSED, ids=names(REFUSED))
def test_the_command_says_why_there_is_no_volume(shared_data: Path, segment: Segment, case: Case) -> None:
    files(shared_data / case.name)
    assert case.refused is not None
    assert_refused(segment(shared_data / case.name, None), case.refused)


TILTED = [case for case in CASES if case.resampled is not None]


@pytest.mark.parametrize("case", TILTED, ids=names(TILTED))
def test_the_command_sets_a_tilted_gantry_right(shared_data: Path, segment: Segment, case: Case) -> None:
    files(shared_data / case.name)
    if isinstance(case.resampled, tuple) and isinstance(case.resampled[0], ReasonCode):
        assert_refused(segment(shared_data / case.name, None, "--gantry-tilt", "resample"), case.resampled)
        return
    sheared = truth_of(shared_data, case)
    upright = Volume(sheared.array, _without_shear(sheared.affine))
    tissue_and_bone = (-300.5, 300.5)  # Hounsfield units that noise does not reach
    path = segment(shared_data / case.name, upright, "--gantry-tilt", "resample", thresholds=tissue_and_bone)
    assert isinstance(path, Path), path
    found = labels_in(path)
    assert found.array.shape == case.resampled
    cosines = found.affine[:3, :3] / np.linalg.norm(found.affine[:3, :3], axis=0)
    np.testing.assert_allclose(cosines.T @ cosines, np.eye(3), atol=1e-6)
    _assert_same_anatomy(found, expected_labels(sheared.array, tissue_and_bone), sheared.affine)


def _without_shear(affine: Affine) -> Affine:
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    normal /= np.linalg.norm(normal)
    upright = affine.copy()
    upright[:3, 2] = (normal @ affine[:3, 2]) * normal
    return upright


def _assert_same_anatomy(found: Labelmap, own: np.ndarray, affine: Affine) -> None:
    """Slice by slice, every label has its size and its middle, in millimetres, where the slices have it."""
    to_index = np.linalg.inv(found.affine)
    for z in range(len(own)):
        there = int(np.rint(to_index @ affine @ [0, 0, z, 1])[2])
        for value in (1, 2):
            here_yx, there_yx = np.argwhere(own[z] == value), np.argwhere(found.array[there] == value)
            assert len(there_yx) == pytest.approx(len(here_yx), rel=0.05, abs=3)
            if len(here_yx) < 100:
                continue
            here_mm = affine @ [*here_yx.mean(axis=0)[::-1], z, 1]
            there_mm = found.affine @ [*there_yx.mean(axis=0)[::-1], there, 1]
            assert np.abs(here_mm - there_mm)[:3].max() < 0.5


@pytest.mark.parametrize("name", NIFTI)
def test_the_command_keeps_a_nifti_file_on_its_grid(shared_data: Path, segment: Segment, name: str) -> None:
    if not (shared_data / name).exists():
        pytest.skip(f"no {name} among the test data")
    image = from_nifti(shared_data / name)
    found = segment(shared_data / name, image)
    assert isinstance(found, Path), found
    stored = nibabel.load(found)
    np.testing.assert_allclose(stored.affine, nibabel.load(shared_data / name).affine, atol=1e-3)
    assert_labels(labels_in(found), image, thresholds_of(image.array))
