"""nnU-Net's own trainer at a student's plans, and the way back into stock nnU-Net."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from results_folder import PLAIN, architecture, tiny_plans, write_nifti_image, write_results

from training.errors import TrainingDataError
from training.preprocess import TrainingCases, prepare_dataset, read_split
from training.reference import make_predictor, predict_labelmap
from training.teacher import ResultsFolder
from training.train_baseline import BaselineSettings, train_baseline

# nnU-Net's plots and its search for a drawing library that nobody has
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CASES = ["a", "b", "c", "d"]
SETTINGS = BaselineSettings(
    width=Fraction(1, 2), batch_size=2, epochs=2, iterations=2, validation_iterations=1, threads=1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher, four cases and their split."""
    folder = tmp_path_factory.mktemp("baseline")
    plans = tiny_plans()
    # nnU-Net's trainer wants three stages: it gives the coarsest output no weight.
    plans["configurations"]["3d_fullres"]["architecture"] = architecture(
        PLAIN, [8, 16, 16], [[1, 1, 1], [2, 2, 2], [2, 2, 2]], [1, 1, 1], [1, 1]
    )
    write_results(folder / "teacher", plans)
    for case in CASES:
        image = nibabel.load(write_nifti_image(folder / "data" / "images" / f"{case}.nii.gz"))
        values = np.asarray(image.dataobj)
        labels = nibabel.Nifti1Image((values > 0).astype(np.uint8) + (values > 1), image.affine)
        (folder / "data" / "labels").mkdir(exist_ok=True)
        nibabel.save(labels, folder / "data" / "labels" / f"{case}.nii.gz")
    split = {"train": ["a", "b"], "choose": ["c"], "claim": ["d"]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


@pytest.fixture(scope="module")
def environment() -> Any:
    """Keep nnU-Net's settings of this module from the other tests."""
    before = dict(os.environ)
    yield
    for key in set(os.environ) - set(before):
        del os.environ[key]
    os.environ.update(before)


def train(folder: Path, work: Path) -> Path:
    return train_baseline(folder / "teacher", folder / "data", folder / "split.json", work, SETTINGS)


@pytest.fixture(scope="module")
def trained(folder: Path, environment: None) -> Path:
    """The results folder of a run that was stopped after its first epoch and gone on with."""
    stop_after_first = pytest.MonkeyPatch()
    original = nnUNetTrainer.on_epoch_end

    def on_epoch_end(self: nnUNetTrainer) -> None:
        original(self)
        raise KeyboardInterrupt

    stop_after_first.setattr(nnUNetTrainer, "on_epoch_end", on_epoch_end)
    with pytest.raises(KeyboardInterrupt):
        train(folder, folder / "work")
    stop_after_first.undo()
    return train(folder, folder / "work")


def test_a_stopped_run_goes_on_where_it_was(trained: Path) -> None:
    logs = [p.read_text() for p in sorted((trained / "fold_0").glob("training_log_*.txt"))]
    text = "\n".join(logs)
    assert text.count("Epoch 0") == 1
    assert text.count("Epoch 1") == 1
    results = ResultsFolder.open(trained)
    assert results.checkpoints[0].epoch == 2
    assert results.checkpoints[0].trainer_name == "nnUNetTrainer"
    assert results.plans["plans_name"] == "nnUNetPlansWidth1of2"
    assert "continue_training" not in results.plans
    assert results.features == [4, 8, 8]


def test_a_finished_run_is_not_trained_again(
    trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda self: pytest.fail("trained again"))
    assert train(folder, folder / "work") == trained


def test_cases_kept_for_claims_are_never_read(trained: Path, folder: Path) -> None:
    names = {p.name for p in (folder / "work" / "preprocessed").rglob("*")}
    assert {"a.pkl", "b.pkl", "c.pkl"} <= names
    assert not {name for name in names if name.startswith("d.")}


def test_stock_nnunet_predicts_with_a_student_where_segnode_cannot_be_imported(
    trained: Path, tmp_path: Path
) -> None:
    image = write_nifti_image(tmp_path / "in" / "case_0000.nii.gz")
    program = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('models', 'training', 'service'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from nnunetv2.inference.predict_from_raw_data import predict_entry_point\n"
        "predict_entry_point()\n"
    )
    (tmp_path / "predict.py").write_text(program)
    arguments = ["-i", tmp_path / "in", "-o", tmp_path / "out", "-d", "Dataset900_Balls", "-c", "3d_fullres"]
    arguments += ["-p", "nnUNetPlansWidth1of2", "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0"]
    arguments += ["--disable_tta"]
    results_root = {"nnUNet_results": str(trained.parents[1])}
    done = subprocess.run(
        [sys.executable, "predict.py", *map(str, arguments)],
        cwd=tmp_path,
        env=os.environ | results_root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    stock = np.asarray(nibabel.load(tmp_path / "out" / "case.nii.gz").dataobj).T
    ours = predict_labelmap(make_predictor(ResultsFolder.open(trained), mirroring=False), [image])
    assert (stock == ours).mean() > 0.99


# Preparing


def test_a_split_may_not_share_cases_or_name_missing_ones(folder: Path, tmp_path: Path) -> None:
    results = ResultsFolder.open(folder / "teacher")
    cases = TrainingCases.open(folder / "data", results.dataset_json)
    for split, message in (
        ({"train": ["a"], "val": ["a"]}, "at once: a"),
        ({"train": ["a"], "val": ["z"]}, "the first is 'z'"),
    ):
        with pytest.raises(TrainingDataError, match=message):
            prepare_dataset(
                cases,
                split,
                results.plans,
                results.dataset_json,
                folder / "teacher" / "dataset_fingerprint.json",
                tmp_path,
            )


def test_images_are_found_in_both_layouts(folder: Path, tmp_path: Path) -> None:
    dataset = ResultsFolder.open(folder / "teacher").dataset_json
    with pytest.raises(TrainingDataError, match="neither imagesTr"):
        TrainingCases.open(tmp_path, dataset)
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
    (tmp_path / "labelsTr" / "x.nii.gz").touch()
    cases = TrainingCases.open(tmp_path, dataset)
    assert cases.names() == ["x"]
    with pytest.raises(TrainingDataError, match=r"lacks x_0000\.nii\.gz"):
        cases.image_paths("x")
    (tmp_path / "imagesTr" / "x_0000.nii.gz").touch()
    assert cases.image_paths("x") == [tmp_path / "imagesTr" / "x_0000.nii.gz"]


def test_a_split_file_needs_its_lists(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text('{"train": ["a"]}')
    with pytest.raises(TrainingDataError, match="choose"):
        read_split(tmp_path / "split.json")


def test_the_hippocampus_split_is_disjoint_and_out_of_the_teachers_training(shared_data: Path) -> None:
    path = Path(__file__).parents[2] / "training" / "results" / "hippocampus-split.json"
    split = json.loads(path.read_text())
    fold = json.loads((shared_data / "teachers" / "hippocampus" / "splits_final.json").read_text())[0]
    assert sorted(split["train"]) == sorted(fold["train"])
    assert sorted(split["choose"] + split["claim"]) == sorted(fold["val"])
    assert not set(split["choose"]) & set(split["claim"])
    assert (len(split["choose"]), len(split["claim"])) == (21, 21)
