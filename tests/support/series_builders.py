"""Series with something wrong in them, for the tests of the reader."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phantom import chiral_image, write_classic_series
from pydicom import Dataset, dcmread

from models.errors import Refusal
from models.volume import Affine
from service.dicom.series import GeometryPolicy, read_series

AXIAL = np.diag([1.5, 1.5, 3.0, 1.0])


def refusal(paths: list[Path], policy: GeometryPolicy | None = None) -> Refusal:
    """Why the reader refuses the files."""
    with pytest.raises(Refusal) as caught:
        read_series(paths, policy=policy)
    return caught.value


def rewrite(path: Path, change: Callable[[Dataset], Any]) -> None:
    """Change a file in place."""
    with warnings.catch_warnings():  # values that break their VR are the point
        warnings.simplefilter("ignore")
        dataset = dcmread(path)
        change(dataset)
        dataset.save_as(path)


def series(folder: Path, affine: Affine = AXIAL, **options: Any) -> list[Path]:
    return write_classic_series(folder, chiral_image(), affine, **options)


def with_change(folder: Path, which: list[int], change: Callable[[Dataset], None]) -> list[Path]:
    paths = series(folder)
    for i in which:
        rewrite(paths[i], change)
    return paths


def report(folder: Path, uid: str = "2.25.900") -> Path:
    path = write_classic_series(folder, np.zeros((1, 2, 2), np.uint8), AXIAL, SOPInstanceUID=uid)[0]

    def strip(dataset: Dataset) -> None:
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.22"
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        for keyword in ("PixelData", "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient"):
            delattr(dataset, keyword)

    rewrite(path, strip)
    return path
