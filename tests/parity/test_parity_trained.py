"""Both gates on trained weights and real cases; the distance between the two forms is printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunet_reference import ReferenceModel
from numpy.typing import NDArray

from models.nifti import read_nifti
from models.segmenter import Segmenter
from models.volume import Volume, reorient, spacing_xyz_mm

Gate = Callable[[NDArray[Any], NDArray[Any]], float]


def whole_case(folder: Path, name: str) -> Volume:
    volume = read_nifti([folder / "images" / f"{name}.nii.gz"])
    return reorient(volume, "RAS")[0]


def two_cases_in_one(folder: Path) -> Volume:
    """Several tiles: two crops side by side, at a spacing that has to be resampled."""
    crops = [whole_case(folder, f"hippocampus_{n:03}").array[:, :30, :44, :30] for n in (3, 4)]
    both = np.concatenate([crop / crop.mean() for crop in crops], axis=2)
    return Volume(both.astype(np.float32), np.diag([-0.9, -1.1, 1.2, 1.0]))


CASES = {"hippocampus_001": False, "hippocampus_042": True, "two": False}


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, teacher: ReferenceModel, shared_data: Path
) -> tuple[ReferenceModel, Volume, NDArray[Any], NDArray[Any]]:
    """The model, mirroring or not, a volume, and what nnU-Net makes of it in float32 and as it is."""
    folder = shared_data / "hippocampus"
    volume = two_cases_in_one(folder) if request.param == "two" else whole_case(folder, request.param)
    mirror_axes = (0, 1, 2) if CASES[request.param] else None
    model = ReferenceModel(teacher.plans, teacher.dataset, mirror_axes, teacher.parameters, threads=2)
    spacing = spacing_xyz_mm(volume.affine)[::-1]
    exact, stock = (model.predict(volume.array, spacing, float32=form) for form in (True, False))
    print(f"{request.param}: (a) equals (b) in {(exact == stock).mean():.6%} of voxels")
    return model, volume, exact, stock


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_both_gates(
    case: tuple[ReferenceModel, Volume, NDArray[Any], NDArray[Any]],
    runtime: str,
    tmp_path: Path,
    gate_a: Gate,
    gate_b: Gate,
) -> None:
    model, volume, exact, stock = case
    segmenter = Segmenter(model.export(tmp_path, orientation="RAS"), runtime=runtime, threads=2)
    labels = segmenter.segment(volume).array
    segmenter.close()
    assert set(np.unique(labels)) == {0, 1, 2}
    print(f"{runtime}: (a) {gate_a(exact, labels):.6%}, (b) {gate_b(stock, labels):.6%}")
