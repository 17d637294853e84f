"""Public layouts, rebuilt in miniature, come out in nnU-Net's raw format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from training.datasets import LAYOUTS, convert, find_cases
from training.errors import TrainingDataError


def write(
    path: Path,
    array: NDArray[np.generic],
    spacing: Sequence[float] = (1, 1, 1),
    origin: Sequence[float] = (0, 0, 0),
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin([float(o) for o in origin])
    sitk.WriteImage(image, path)


def ramp(size: int = 8, step: float = 1.0) -> NDArray[np.float32]:
    """Along x, the value is the place in millimetres."""
    return np.broadcast_to(np.arange(size, dtype=np.float32) * step, (size, size, size)).copy()


def labels(*values: int, size: int = 8) -> NDArray[np.int16]:
    array = np.zeros((size, size, size), np.int16)
    for i, value in enumerate(values):
        array[i % size, i // size] = value
    return array


def read(path: Path) -> NDArray[np.generic]:
    return sitk.GetArrayFromImage(sitk.ReadImage(path))


def description(target: Path) -> dict[str, dict[str, object]]:
    content: dict[str, dict[str, object]] = json.loads((target / "dataset.json").read_text())
    return content


def test_brats(tmp_path: Path) -> None:
    folder = tmp_path / "training_data1_v2" / "BraTS-GLI-00005-100"
    for channel in ("t1n", "t1c", "t2w", "t2f"):
        write(folder / f"BraTS-GLI-00005-100-{channel}.nii.gz", ramp())
    write(folder / "BraTS-GLI-00005-100-seg.nii.gz", labels(1, 2, 3, 4))
    target = convert(LAYOUTS["BraTS2024"], tmp_path, tmp_path / "raw")
    assert target.name == "Dataset324_BraTS2024"
    assert len(list((target / "imagesTr").glob("BraTS2024_BraTS-GLI-00005-100_000[0-3].nii.gz"))) == 4
    assert description(target)["labels"]["resection cavity"] == 4
    assert description(target)["channel_names"] == {"0": "T1", "1": "T1 contrast", "2": "T2", "3": "FLAIR"}


def test_isles_brings_flair_onto_the_grid_of_dwi_through_patient_coordinates(tmp_path: Path) -> None:
    subject, session = "sub-strokecase0007", "ses-0001"
    base = tmp_path / subject / session
    write(base / "dwi" / f"{subject}_{session}_dwi.nii.gz", ramp())
    write(base / "dwi" / f"{subject}_{session}_adc.nii.gz", ramp())
    write(base / "anat" / f"{subject}_{session}_FLAIR.nii.gz", ramp(16, 0.5), (0.5, 0.5, 0.5))
    mask = tmp_path / "derivatives" / subject / session / f"{subject}_{session}_msk.nii.gz"
    write(mask, labels(1))
    target = convert(LAYOUTS["ISLES2022"], tmp_path, tmp_path / "raw")
    flair = read(target / "imagesTr" / "ISLES2022_0007_0002.nii.gz")
    np.testing.assert_allclose(flair[:7, :7, :7], ramp()[:7, :7, :7], atol=1e-4)


def test_btcv(tmp_path: Path) -> None:
    write(tmp_path / "Training" / "img" / "img0001.nii.gz", ramp())
    write(tmp_path / "Training" / "label" / "label0001.nii.gz", labels(*range(1, 14)))
    target = convert(LAYOUTS["BTCV"], tmp_path, tmp_path / "raw")
    assert description(target)["labels"]["left adrenal gland"] == 13
    assert sorted(np.unique(read(target / "labelsTr" / "BTCV_0001.nii.gz"))) == list(range(14))


def test_mindboggle_gets_consecutive_labels_over_all_cases(tmp_path: Path) -> None:
    for case, values in (("OASIS-TRT-20-1", (17, 1002)), ("NKI-RS-22-3", (17, 2035))):
        write(tmp_path / case / "t1weighted.nii.gz", ramp())
        write(tmp_path / case / "labels.DKT31.manual+aseg.nii.gz", labels(*values))
    target = convert(LAYOUTS["Mindboggle101"], tmp_path, tmp_path / "raw")
    assert description(target)["labels"] == {"background": 0, "label 17": 1, "label 1002": 2, "label 2035": 3}
    assert set(np.unique(read(target / "labelsTr" / "Mindboggle101_NKI-RS-22-3.nii.gz"))) == {0, 1, 3}


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    layout = LAYOUTS["BTCV"]
    with pytest.raises(TrainingDataError, match="no case of BTCV"):
        convert(layout, tmp_path, tmp_path / "raw")
    write(tmp_path / "a" / "label" / "label0001.nii.gz", labels(1))
    with pytest.raises(TrainingDataError, match="BTCV_0001 lacks CT"):
        convert(layout, tmp_path, tmp_path / "raw")
    write(tmp_path / "a" / "img" / "img0001.nii.gz", ramp(), origin=(5, 0, 0))
    with pytest.raises(TrainingDataError, match="does not lie on the grid"):
        convert(layout, tmp_path, tmp_path / "raw")
    write(tmp_path / "a" / "img" / "img0001.nii.gz", ramp())
    write(tmp_path / "a" / "label" / "label0001.nii.gz", labels(1, 77))
    with pytest.raises(TrainingDataError, match="without a meaning: 77"):
        convert(layout, tmp_path, tmp_path / "raw")
    write(tmp_path / "b" / "label" / "label0001.nii.gz", labels(1))
    write(tmp_path / "b" / "img" / "img0001.nii.gz", ramp())
    with pytest.raises(TrainingDataError, match="two cases BTCV_0001"):
        list(find_cases(layout, tmp_path))
