"""A bundle beside an atlas: names, grids, and Dice that was worked out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from bundle_factory import make_threshold_bundle, write_nifti_ras

from models.manifest import CodedConcept, Label
from models.volume import Labelmap
from training.errors import TrainingDataError
from training.synthesis import atlas
from training.synthesis.structures import STRUCTURES

RAS_MM = np.diag([-1.0, -1.0, 1.0, 1.0])
CONCEPT = CodedConcept(value="1", meaning="x")
NAMES = {
    4: "3rd_Ventricle", 11: "4th_Ventricle", 35: "Brain_Stem", 46: "CSF", 63: "Right_vessel",
    **{20 + i: f"Left_{name}" for i, name in enumerate(atlas._OURS)},
    **{70 + i: f"Right_{name}" for i, name in enumerate(atlas._OURS)},
    100: "Right_ACgG_anterior_cingulate_gyrus", 101: "Left_ACgG_anterior_cingulate_gyrus",
}  # fmt: skip


def label(value: int, name: str) -> Label:
    return Label(value=value, name=name, category=CONCEPT, type=CONCEPT, color_rgb=(200, value, 0))


def test_the_atlas_knows_every_structure_of_the_bundle_and_nothing_else() -> None:
    assert set(atlas.structures_of(NAMES).values()) == {structure.name for structure in STRUCTURES}


def test_dice_and_volumes_are_those_of_the_overlap_in_the_patient() -> None:
    """A labelmap of 1 mm and an atlas of 2 mm that is stored mirrored and starts elsewhere."""
    ours = np.zeros((12, 10, 8), np.uint8)
    ours[4:8, 2:6, 0:4] = 7
    ours[0, 0, 0] = 8
    affine = RAS_MM.copy()
    affine[:3, 3] = (20, -5, 30)
    theirs = np.zeros((6, 5, 4), np.uint8)
    theirs[2:4, 1:4, 0:2] = 48  # the same, and a third more of it along y
    stored = theirs[:, :, ::-1]
    mirrored = np.diag([2.0, -2.0, 2.0, 1.0])
    # The centre of a voxel of 2 mm lies half a millimetre beyond the first of the two of 1 mm in it.
    first = affine @ np.array([0.5 + 2 * 3, 0.5, 0.5, 1])  # the stored first voxel is the last along x
    mirrored[:3, 3] = first[:3]
    found = atlas.agreement(
        Labelmap(ours, affine),
        (label(7, "Left hippocampus"), label(8, "Brain stem"), label(9, "Fourth ventricle")),
        Labelmap(np.ascontiguousarray(stored), mirrored),
        {48: "Left hippocampus", 35: "Brain stem"},
    )
    assert found["Left hippocampus"] == {
        "dice": pytest.approx(2 * 64 / (64 + 96), abs=1e-4), "volume_ml": 0.064, "atlas_ml": 0.096,
    }  # fmt: skip
    assert found["Brain stem"] == {"dice": 0.0, "volume_ml": 0.001, "atlas_ml": 0.0}
    assert "Fourth ventricle" not in found


def test_a_voxel_outside_of_the_atlas_is_nothing() -> None:
    small = Labelmap(np.full((2, 2, 2), 5, np.uint8), RAS_MM)
    large = Labelmap(np.zeros((4, 4, 4), np.uint8), RAS_MM)
    there = atlas.on_grid_of(small, large)
    assert int((there == 5).sum()) == 8
    assert not there[2:].any()


def test_the_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle", labels=("Brain stem", "Left hippocampus"))
    image = np.zeros((16, 16, 16), np.float32)
    image[2:8] = 200.0
    image[8:12] = 400.0
    drawn = np.where(image > 300, 48, np.where(image > 100, 35, 0)).astype(np.uint8)
    drawn[2:5] = 0
    write_nifti_ras(tmp_path / "scan.nii.gz", image, (1.0, 1.0, 1.0))
    write_nifti_ras(tmp_path / "atlas.nii.gz", drawn, (1.0, 1.0, 1.0))
    (tmp_path / "names.csv").write_text("index,name\n35,Brain_Stem\n48,Left_Hippocampus\n")
    words = ["atlas", "bundle", "atlas.nii.gz", "names.csv", "out.json", "scan.nii.gz"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    atlas.main()
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["bundle_digest"] == bundle.digest
    assert content["structures"]["Left hippocampus"]["dice"] == 1.0
    assert content["structures"]["Brain stem"]["dice"] == pytest.approx(2 * 3 / 9, abs=1e-4)
    assert content["mean_dice"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-4)


@pytest.mark.parametrize("text", ["value,name\n1,x\n", "index,name\none,x\n"])
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "names.csv").write_text(text)
    with pytest.raises(TrainingDataError, match="no table of names"):
        atlas.read_names(tmp_path / "names.csv")
