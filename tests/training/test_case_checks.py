"""Cases that do not fit their teacher are refused by name, before anything is preprocessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from training.case_checks import check_case, check_description, known_values
from training.errors import TrainingDataError
from training.preprocess import TrainingCases

TEACHER: dict[str, Any] = {
    "labels": {"background": 0, "head": 1, "body": 2},
    "channel_names": {"0": "MR"},
    "file_ending": ".nii.gz",
}


def write(path: Path, array: np.ndarray[Any, Any], shift_mm: float = 0.0) -> Path:
    affine = np.eye(4)
    affine[0, 3] = shift_mm
    image = nibabel.Nifti1Image(array, affine)
    image.set_qform(affine, code=1)
    nibabel.save(image, path)
    return path


def labelmap(*values: int) -> np.ndarray[Any, Any]:
    array = np.zeros((6, 7, 8), np.uint8)
    for i, value in enumerate(values):
        array[i] = value
    return array


def test_a_label_that_the_teacher_does_not_know_is_named(tmp_path: Path) -> None:
    image = write(tmp_path / "image.nii.gz", np.zeros((6, 7, 8), np.float32))
    check_case("a", [image], write(tmp_path / "good.nii.gz", labelmap(1, 2)), known_values(TEACHER))
    with pytest.raises(TrainingDataError, match=r"case 'a' hold 3, 7, which the teacher .* knows 0, 1, 2"):
        check_case("a", [image], write(tmp_path / "bad.nii.gz", labelmap(1, 3, 7)), known_values(TEACHER))


@pytest.mark.parametrize(
    ("shape", "shift_mm", "message"),
    [((6, 7, 9), 0.0, r"\(6, 7, 9\) voxels"), ((6, 7, 8), 0.5, r"up to 0\.50 mm apart")],
)
def test_labels_on_another_grid_are_refused(
    tmp_path: Path, shape: tuple[int, ...], shift_mm: float, message: str
) -> None:
    label = write(tmp_path / "label.nii.gz", labelmap(1))
    image = write(tmp_path / "image.nii.gz", np.zeros(shape, np.float32), shift_mm)
    with pytest.raises(TrainingDataError, match="another grid") as refused:
        check_case("a", [image], label, {0, 1})
    refused.match(message)


def test_a_rounded_origin_is_the_same_grid(tmp_path: Path) -> None:
    label = write(tmp_path / "label.nii.gz", labelmap(1))
    check_case("a", [write(tmp_path / "i.nii.gz", np.zeros((6, 7, 8), np.float32), 0.01)], label, {0, 1})


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "label.nii.gz").write_text("no image")
    with pytest.raises(TrainingDataError, match=r"label\.nii\.gz cannot be read"):
        check_case("a", [], tmp_path / "label.nii.gz", {0})


def test_regions_and_ignored_voxels_are_known() -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2, 3], "ignore": 4}
    assert known_values({"labels": labels}) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"labels": {"background": 0, "head": 2, "body": 1}}, "labels"),
        ({"channel_names": {"0": "CT"}}, "channels"),
        ({"regions_class_order": [1, 2]}, "regions_class_order"),
    ],
)
def test_a_dataset_of_other_labels_than_the_teachers_is_refused(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps(TEACHER))
    TrainingCases.open(tmp_path, TEACHER)
    (tmp_path / "dataset.json").write_text(json.dumps({**TEACHER, **changes}))
    with pytest.raises(TrainingDataError, match=f"The {what} of the dataset differ from the teacher's"):
        TrainingCases.open(tmp_path, TEACHER)


def test_a_decathlon_description_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "Anterior"}}))
    check_description(tmp_path, TEACHER)
