"""Label maps of whole heads with their class tables: what images are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.funcs import as_closest_canonical
from numpy.typing import NDArray

from training.errors import TrainingDataError
from training.synthesis.structures import LEFT_TO_RIGHT, is_brain, merged


@dataclass(frozen=True, eq=False)
class ClassTable:
    """What is known of each label of the maps; all arrays have one entry a label, in one order.

    Parameters
    ----------
    numbers : (L,) array
        FreeSurfer's numbers, 0 (air) among them.
    random_class : (L,) array
        Labels of one class share their intensities where those are drawn at random; left and right do.
    tissue_class : (L,) array
        Coarser classes, those that the priors of a contrast are given for.
    t1_means, t1_stds : (2, T) arrays
        Of each tissue class: mean and standard deviation of the mean intensity, and of its deviation.
    """

    numbers: NDArray[np.int64]
    random_class: NDArray[np.int64]
    tissue_class: NDArray[np.int64]
    t1_means: NDArray[np.float64]
    t1_stds: NDArray[np.float64]

    @staticmethod
    def read(folder: Path) -> ClassTable:
        """Read ``generation_labels.npy`` and the tables beside it.

        Raises
        ------
        TrainingDataError
            If one is missing, or they do not fit each other.
        """
        names = (
            "generation_labels",
            "generation_classes",
            "generation_classes_contrast_specific",
            "prior_means_t1",
            "prior_stds_t1",
        )
        try:
            numbers, random, tissue, means, stds = (
                np.load(folder / f"{name}.npy", allow_pickle=False) for name in names
            )
        except (OSError, ValueError) as error:
            raise TrainingDataError(
                f"The class tables of the label maps cannot be read: {error}.",
                remedy="Give the folder that holds training_label_maps and labels_classes_priors.",
            ) from error
        wanted = (2, int(tissue.max(initial=0)) + 1)
        if not (numbers.shape == random.shape == tissue.shape and means.shape == stds.shape == wanted):
            raise TrainingDataError("The class tables of the label maps do not fit each other.")
        table = ClassTable(numbers.astype(np.int64), random.astype(np.int64), tissue, means, stds)
        shared = table.random_class.copy()
        shared[table.swapped[table.is_right]] = shared[table.is_right]
        return ClassTable(table.numbers, shared, table.tissue_class.astype(np.int64), means, stds)

    @cached_property
    def swapped(self) -> NDArray[np.int64]:
        """(L,) the place of each label's partner on the other side; its own where it has none."""
        place = {int(n): i for i, n in enumerate(self.numbers)}
        partner = LEFT_TO_RIGHT | {right: left for left, right in LEFT_TO_RIGHT.items()}
        return np.array([place.get(partner.get(int(n), int(n)), i) for i, n in enumerate(self.numbers)])

    @cached_property
    def is_right(self) -> NDArray[np.bool_]:
        return np.isin(self.numbers, list(LEFT_TO_RIGHT.values()))

    @cached_property
    def brain(self) -> NDArray[np.bool_]:
        """(L,) whether skull stripping keeps the label."""
        return np.array([is_brain(int(n)) for n in self.numbers])

    @cached_property
    def structure(self) -> NDArray[np.uint8]:
        """(L,) the output value of each label."""
        return merged(self.numbers)


@dataclass(frozen=True, eq=False)
class LabelMap:
    """One head.

    Parameters
    ----------
    name : str
        The file's, without its ending.
    places : (Z, Y, X) array of uint8
        For each voxel the place of its label in the class table. RAS: x to the right, y to the front, z up.
    spacing_mm : float
        Of all three axes.
    middle : (3,) array
        Centroid of the brain in voxels (z, y, x).
    """

    name: str
    places: NDArray[np.uint8]
    spacing_mm: float
    middle: NDArray[np.float64]


@dataclass(frozen=True)
class LabelMapFolder:
    """A folder with ``training_label_maps/*.nii.gz`` and ``labels_classes_priors/*.npy``."""

    folder: Path

    @cached_property
    def table(self) -> ClassTable:
        return ClassTable.read(self.folder / "labels_classes_priors")

    def names(self) -> list[str]:
        """The maps, sorted."""
        maps = self.folder / "training_label_maps"
        return sorted(p.name.removesuffix(".nii.gz") for p in maps.glob("*.nii.gz"))

    def read(self, name: str) -> LabelMap:
        """Read one map and bring it to RAS by flips and transposes alone.

        Raises
        ------
        TrainingDataError
            If it is not there, is not isotropic, or holds a label that the class table does not know.
        """
        path = self.folder / "training_label_maps" / f"{name}.nii.gz"
        try:
            image = as_closest_canonical(nibabel.load(path))
            numbers = np.asarray(image.dataobj).astype(np.int64).transpose(2, 1, 0)
        except (OSError, EOFError, ImageFileError) as error:
            raise TrainingDataError(f"The label map {path.name} cannot be read.") from error
        spacing = np.array(image.header.get_zooms()[:3], dtype=float)
        if np.ptp(spacing) > 1e-3:
            raise TrainingDataError(f"The label map {path.name} is not isotropic: {spacing} mm.")
        unknown = np.setdiff1d(numbers, self.table.numbers)
        if unknown.size:
            raise TrainingDataError(f"The label map {path.name} holds labels without a class: {unknown[:5]}.")
        place_of = np.zeros(int(self.table.numbers.max()) + 1, np.uint8)
        place_of[self.table.numbers] = np.arange(len(self.table.numbers))
        places = np.ascontiguousarray(place_of[numbers])
        middle = np.argwhere(self.table.brain[places]).mean(axis=0)
        return LabelMap(name, places, float(spacing[0]), middle)

    def read_all(self, names: Sequence[str]) -> list[LabelMap]:
        return [self.read(name) for name in names]
