"""A made-up head of 24 voxels an axis with its class tables, as a folder of label maps."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

# Air, third ventricle, fluid, two kinds of tissue outside; then the left and, in the same order, the right.
NEUTRAL = [0, 14, 24, 502, 506]
LEFT = [2, 3, 4, 17]
RIGHT = [41, 42, 43, 53]
NUMBERS = NEUTRAL + LEFT + RIGHT
TISSUE = [0, 1, 1, 14, 15, 2, 3, 1, 3, 2, 3, 1, 3]


def tiny_numbers(seed: int = 0, size: int = 24) -> np.ndarray:
    """FreeSurfer's numbers (Z, Y, X) in RAS: small x is left. The halves are no mirror images."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.arange(size) - (size - 1) / 2] * 3, indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2) / (size / 2)
    numbers = np.zeros((size,) * 3, np.int64)
    numbers[radius < 0.95] = 502
    numbers[radius < 0.85] = 24
    left = x < 0
    for outer, one, other in ((0.75, 3, 42), (0.6, 2, 41)):
        numbers[radius < outer] = np.where(left, one, other)[radius < outer]
    numbers[(radius < 0.6) & (np.abs(x) < 1.5)] = 14
    for sign, one, other in ((-1, 4, 17), (1, 43, 53)):
        ventricle, hippocampus = rng.integers(-3, 3, 2)
        numbers[(np.abs(x - 4 * sign) < 1.6) & (np.abs(z - ventricle) < 2) & (np.abs(y) < 3)] = one
        numbers[(np.abs(x - 4 * sign) < 1.6) & (np.abs(z + 5) < 1.6) & (np.abs(y - hippocampus) < 2)] = other
    return numbers


def write_tiny_heads(folder: Path, names: tuple[str, ...] = ("one", "two", "three"), size: int = 24) -> Path:
    """``training_label_maps`` in LIA, as scanners' tools often store them, and ``labels_classes_priors``."""
    maps, tables = folder / "training_label_maps", folder / "labels_classes_priors"
    maps.mkdir(parents=True)
    tables.mkdir()
    to_lia = np.array([[-1.0, 0, 0, size - 1], [0, 0, 1, 0], [0, -1, 0, size - 1], [0, 0, 0, 1]])
    for seed, name in enumerate(names):
        ras = tiny_numbers(seed, size).transpose(2, 1, 0)
        lia = ras[::-1, :, ::-1].transpose(0, 2, 1)  # i = -x, j = -z, k = y
        nibabel.save(nibabel.Nifti1Image(lia.astype(np.float32), to_lia), maps / f"{name}.nii.gz")
    np.save(tables / "generation_labels.npy", np.array(NUMBERS, np.int32))
    np.save(tables / "generation_classes.npy", np.arange(len(NUMBERS)))
    np.save(tables / "generation_classes_contrast_specific.npy", np.array(TISSUE))
    means = np.zeros((2, 16))
    means[0] = np.linspace(5, 80, 16)
    means[0, [1, 2, 3]] = 40, 160, 95
    means[1] = 3.0
    np.save(tables / "prior_means_t1.npy", means)
    np.save(tables / "prior_stds_t1.npy", np.full((2, 16), [[8.0], [1.0]]))
    return folder
