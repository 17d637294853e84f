"""Do the labelled cases fit the teacher? Asked of every case before the first is preprocessed.

A label that the teacher does not know would train as background, or end a run after hours; nnU-Net verifies a
dataset when it plans, and a student's dataset is never planned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from training.errors import TrainingDataError
from training.plans import channel_names_of

_GRID_TOLERANCE_MM = 0.1
"""Of origin and voxel corners: NIfTI stores them in float32, and tools round them again."""


def check_description(folder: Path, dataset_json: dict[str, Any]) -> None:
    """Compare the dataset's own dataset.json, where there is one, with the teacher's.

    Raises
    ------
    TrainingDataError
        If labels, regions or channels differ, or the file is not JSON.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        return
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(own.get("labels"), dict) or "background" not in own["labels"]:
            return  # not nnU-Net v2's: the Decathlon's own file maps values to names and says the same
        pairs = [
            ("labels", own["labels"], dataset_json["labels"]),
            ("regions_class_order", own.get("regions_class_order"), dataset_json.get("regions_class_order")),
            ("channels", channel_names_of(own), channel_names_of(dataset_json)),
        ]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TrainingDataError(f"{path.name} of the dataset is not understood: {error}.") from error
    for what, found, expected in pairs:
        if found != expected:
            raise TrainingDataError(
                f"The {what} of the dataset differ from the teacher's: {found} against {expected}.",
                remedy="Train on the teacher's dataset, or bring labels and channels to the teacher's.",
            )


def known_values(dataset_json: dict[str, Any]) -> set[int]:
    """Every value that a reference labelmap may hold: background, labels, parts of regions, and ignore."""
    values: set[int] = {0}
    for value in dataset_json["labels"].values():
        values.update(int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))
    return values


def check_case(case: str, images: list[Path], label: Path, known: set[int]) -> None:
    """Refuse a case whose labelmap holds unknown values, or lies on another grid than its images.

    Raises
    ------
    TrainingDataError
        It names the case, the values or the grids, and what the teacher knows.
    """
    labelmap = _read(label)
    values = np.unique(sitk.GetArrayViewFromImage(labelmap))
    unknown = [float(v) for v in values if v not in known]
    if unknown:
        raise TrainingDataError(
            f"The labels of case {case!r} hold {', '.join(f'{v:g}' for v in unknown[:5])}, which the teacher "
            f"does not know (it knows {', '.join(map(str, sorted(known)))}).",
            remedy="Correct the labels, or leave the case out of the split.",
        )
    for path in images:
        image = _read(path)
        if image.GetSize() != labelmap.GetSize() or _corner_distance_mm(image, labelmap) > _GRID_TOLERANCE_MM:
            raise TrainingDataError(
                f"The labels of case {case!r} lie on another grid than {path.name}: "
                f"{labelmap.GetSize()} against {image.GetSize()} voxels, "
                f"corners up to {_corner_distance_mm(image, labelmap):.2f} mm apart.",
                remedy="Resample the labels onto the image.",
            )


def _corner_distance_mm(one: sitk.Image, other: sitk.Image) -> float:
    """The largest distance between the first voxels and between the last voxels of two images."""
    ends = (
        ([0] * one.GetDimension(), [0] * other.GetDimension()),
        ([n - 1 for n in one.GetSize()], [n - 1 for n in other.GetSize()]),
    )
    return max(
        float(
            np.linalg.norm(
                np.subtract(one.TransformIndexToPhysicalPoint(a), other.TransformIndexToPhysicalPoint(b))
            )
        )
        for a, b in ends
    )


def _read(path: Path) -> sitk.Image:
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise TrainingDataError(f"{path.name} cannot be read as an image.") from error
