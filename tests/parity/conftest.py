"""The two gates of parity with nnU-Net's predictor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunet_reference import ReferenceModel, trained_model
from numpy.typing import NDArray
from scipy import ndimage


def one_sided_voxels(reference: NDArray[Any], labels: NDArray[Any]) -> dict[int, int]:
    """Voxels of each label that one side has and the other has none of."""
    found: dict[int, int] = {}
    for some, other in ((reference, labels), (labels, reference)):
        values, counts = np.unique(some, return_counts=True)
        found |= {int(v): int(n) for v, n in zip(values, counts, strict=True) if not (other == v).any()}
    return found


@pytest.fixture(scope="session")
def gate_a() -> Callable[[NDArray[Any], NDArray[Any]], float]:
    """Float32 accumulators: 99.99% of voxels equal, no label of over 10 voxels on one side only."""

    def check(reference: NDArray[Any], labels: NDArray[Any]) -> float:
        assert labels.shape == reference.shape
        equal = float((reference == labels).mean())
        assert equal >= 0.9999, f"{equal:.6%} of voxels equal"
        assert max(one_sided_voxels(reference, labels).values(), default=0) <= 10
        return equal

    return check


@pytest.fixture(scope="session")
def gate_b() -> Callable[[NDArray[Any], NDArray[Any]], float]:
    """Stock predictor: 99.9% of voxels equal, Dice at least 0.999 for each label."""

    def check(reference: NDArray[Any], labels: NDArray[Any]) -> float:
        equal = float((reference == labels).mean())
        assert equal >= 0.999, f"{equal:.6%} of voxels equal"
        for value in np.union1d(np.unique(reference), np.unique(labels)):
            a, b = reference == value, labels == value
            dice = 2 * (a & b).sum() / (a.sum() + b.sum())
            assert dice >= 0.999, f"label {value}: Dice {dice:.5f}"
        return equal

    return check


@pytest.fixture(scope="session")
def make_image() -> Callable[..., NDArray[np.float32]]:
    """A smooth random image, (C, Z, Y, X), with a border of zeros where asked for."""

    def make(
        shape: tuple[int, ...], *, channels: int = 1, border: int = 0, seed: int = 0
    ) -> NDArray[np.float32]:
        noise = np.random.default_rng(seed).normal(size=(channels, *shape))
        image = 300 * ndimage.gaussian_filter(noise, (0, 1, 1, 1)) + 40
        if border:
            inside = np.zeros(shape, bool)
            inside[border:-border, border + 1 : -border - 2, border:] = True
            inside[shape[0] // 2, shape[1] // 2, -3:] = False
            image *= inside
            image[:, shape[0] // 2, shape[1] // 2, shape[2] // 2] = 0  # a hole
        return image.astype(np.float32)

    return make


@pytest.fixture(scope="session")
def teacher(shared_data: Path) -> ReferenceModel:
    """A teacher with trained weights, as stock nnU-Net left it."""
    folder = shared_data / "teachers" / "hippocampus"
    if not folder.is_dir():
        pytest.skip("no trained teacher in the test data")
    return trained_model(folder)
