"""Facts that only the training files know: the orientation of the images, the volumes of the labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import nibabel
import numpy as np

from models.nifti import read_labelmap
from models.volume import axis_codes, is_axis_code
from training.errors import ExportError, TrainingDataError
from training.plans import REORIENTING_READERS

ANY = "any"
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def choose_orientation(reader: str, *, stated: str | None, training_images: Path | None) -> str:
    """The axis code of the arrays that a model was trained on, or ``any``.

    A reader that reorients settles it: RAS. Otherwise a person states it, or the headers of the training
    images show it; images of several orientations mean ``any``.

    Raises
    ------
    ExportError
        If nothing says it, or what is said is not an axis code or contradicts the reader.
    TrainingDataError
        If the folder holds no NIfTI image.
    """
    if stated is not None and stated != ANY and not is_axis_code(stated):
        raise ExportError(
            f"{stated!r} is not an orientation.", remedy="Give an axis code such as RAS or LPS, or 'any'."
        )
    if reader in REORIENTING_READERS:
        if stated not in (None, "RAS"):
            raise ExportError(
                f"The plans' reader {reader} brings every image to RAS; the orientation cannot be {stated}.",
                remedy="Leave --orientation out.",
            )
        return "RAS"
    found = None if training_images is None else orientation_of(training_images)
    if stated is not None and found is not None and stated != found:
        raise ExportError(
            f"--orientation says {stated}, the training images are {found}.", remedy="Give one of the two."
        )
    orientation = stated or found
    if orientation is None:
        raise ExportError(
            f"A results folder with the reader {reader} does not say how its training images were oriented, "
            "and a model shown a mirrored patient gives wrong results without a sign.",
            remedy="Give --training-images with the folder of the training images, or --orientation.",
        )
    return orientation


def orientation_of(folder: Path) -> str:
    """The axis code that all NIfTI images of a folder share, or ``any`` where they differ.

    Raises
    ------
    TrainingDataError
        If there is no image, or one has no usable header.
    """
    paths = sorted(p for p in folder.rglob("*") if p.name.endswith((".nii", ".nii.gz")))
    if not paths:
        raise TrainingDataError(f"{folder.name!r} holds no NIfTI image.", remedy="Give the folder imagesTr.")
    codes = set()
    for path in paths:
        try:
            codes.add(axis_codes(_RAS_TO_LPS @ np.asarray(nibabel.load(path).affine)))
        except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
            raise TrainingDataError(f"The header of a training image cannot be read: {path.name}.") from error
    return codes.pop() if len(codes) == 1 else ANY


def volume_ranges_ml(
    paths: Iterable[Path], values: Iterable[int], *, percentiles: tuple[float, float] = (1.0, 99.0)
) -> dict[int, tuple[float, float]]:
    """Percentiles of each label's volume in mL over training label files, absent labels counted as none.

    Rounded outwards to 0.01 mL.

    Raises
    ------
    TrainingDataError
        If there is no file.
    """
    volumes = [read_labelmap(path).volumes_ml() for path in paths]
    if not volumes:
        raise TrainingDataError("There is no label file to take volumes from.")
    ranges = {}
    for value in values:
        low, high = np.percentile([v.get(value, 0.0) for v in volumes], percentiles)
        # Six digits first: 0.8 mL is 80.00000000000001 hundredths.
        ranges[value] = (math.floor(round(low * 100, 6)) / 100, math.ceil(round(high * 100, 6)) / 100)
    return ranges
