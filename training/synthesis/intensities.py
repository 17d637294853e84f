"""The mean and the spread of each label's intensity, on a scale of about 0 to 255."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.synthesis.label_maps import ClassTable
from training.synthesis.recipe import Contrast

# Tissue classes of the tables: 0 air, 1 CSF, 2 cerebral white matter, 3 grey matter, 4 and 5 cerebellar white
# and grey matter, 6 thalamus, 7 putamen, 8 pallidum, 9 ventral diencephalon, 10 lesion, 11 vessel, 12 inner
# part of the ventricles, 13 brain stem. From 14 on they lie outside of the brain and are drawn at random.
# These are the order and rough distance of the tissues on usual clinical images: choices, not measurements.
_TYPICAL: dict[str, dict[int, float]] = {
    "t2": {
        0: 6, 1: 205, 2: 80, 3: 118, 4: 84, 5: 115, 6: 100, 7: 95, 8: 72, 9: 88,
        10: 160, 11: 60, 12: 190, 13: 92,
    },
    "flair": {
        0: 6, 1: 25, 2: 100, 3: 128, 4: 102, 5: 124, 6: 120, 7: 118, 8: 102, 9: 112,
        10: 185, 11: 60, 12: 40, 13: 110,
    },
}  # fmt: skip
_TYPICAL_SD = 9.0


def draw_intensities(
    rng: np.random.Generator, table: ClassTable, contrast: Contrast
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each label, both (L,).

    ``random``: every class of the table by itself, mean 0 to 255 and deviation 0 to 30. ``t1``: from the
    table's priors by tissue, then every class moved a little. ``t2`` and ``flair``: from the usual order of
    the tissues. Left and right are always the same.
    """
    n_classes = int(table.random_class.max()) + 1
    if contrast == "random":
        means, stds = rng.uniform(0, 255, n_classes), rng.uniform(0, 30, n_classes)
        if rng.random() < 0.7:  # air is dark on most images
            air = table.random_class[table.numbers == 0]
            means[air], stds[air] = rng.uniform(0, 20), rng.uniform(0, 8)
        return means[table.random_class], stds[table.random_class]
    n_tissues = int(table.t1_means.shape[1])
    tissue_means: NDArray[np.float64]
    tissue_stds: NDArray[np.float64]
    if contrast == "t1":
        tissue_means = np.asarray(rng.normal(table.t1_means[0], table.t1_means[1]))
        tissue_stds = np.abs(np.asarray(rng.normal(table.t1_stds[0], table.t1_stds[1])))
    else:
        tissue_means, tissue_stds = rng.uniform(5, 220, n_tissues), rng.uniform(3, 30, n_tissues)
        known = list(_TYPICAL[contrast])
        tissue_means[known] = rng.normal(list(_TYPICAL[contrast].values()), _TYPICAL_SD)
        tissue_stds[known] = rng.uniform(3, 14, len(known))
    own = rng.normal(0.0, 4.0, n_classes)[table.random_class]
    # The priors' deviations hold noise and partial volume of the scans that they were measured on; a part of
    # that comes again from the acquisition, so only a share of it is drawn here.
    share = rng.uniform(0.3, 1.0)
    means = np.clip(tissue_means[table.tissue_class] + own, 0, None)
    return means, np.clip(share * tissue_stds[table.tissue_class], 0, 45)


def paint(places: Tensor, means: Tensor, stds: Tensor, generator: torch.Generator) -> Tensor:
    """An image of the shape of ``places``: each voxel drawn from its label's Gaussian, float32."""
    index = places.long()
    noise = torch.randn(places.shape, generator=generator, device=places.device)
    return means[index] + stds[index] * noise
