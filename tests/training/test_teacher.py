"""Results folders: whole ones open, broken ones are refused with a reason."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from results_folder import tiny_checkpoint, tiny_dataset, tiny_plans, write_results

from training.errors import PlansError, ResultsFolderError
from training.plans import preprocessing_of
from training.teacher import ResultsFolder
from training.trainers import check_builds_planned_network


def test_a_whole_folder_opens(tmp_path: Path) -> None:
    results = ResultsFolder.open(write_results(tmp_path / "r"))
    assert results.configuration == "3d_fullres"
    assert results.features == [8, 16]
    assert results.n_channels == 1
    assert results.classes.names == {1: "core", 2: "shell"}
    assert results.classes.regions_class_order == ()
    assert results.classes.n_outputs == 3
    checkpoint = results.checkpoints[0]
    assert (checkpoint.fold, checkpoint.mirror_axes, checkpoint.epoch) == ("0", (0, 1, 2), 3)
    assert not checkpoint.plain  # numpy's numbers had to be let in
    network = results.network()
    assert not network.training
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


def test_deep_supervision_gives_the_finest_logits_first(tmp_path: Path) -> None:
    results = ResultsFolder.open(write_results(tmp_path / "r"))
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        outputs = results.network(deep_supervision=True)(x)
        assert torch.equal(outputs[0], results.network()(x))


def test_regions_keep_their_order(tmp_path: Path) -> None:
    dataset = tiny_dataset(regions=True)
    results = ResultsFolder.open(write_results(tmp_path / "r", dataset=dataset))
    assert results.classes.names == {1: "whole", 2: "core"}
    assert results.classes.regions_class_order == (1, 2)
    assert results.classes.n_outputs == 2


def test_folds_are_found_and_chosen(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "r", folds=("0", "3", "all"))
    assert [c.fold for c in ResultsFolder.open(folder).checkpoints] == ["0", "3"]
    assert [c.fold for c in ResultsFolder.open(folder, folds=("all",)).checkpoints] == ["all"]
    with pytest.raises(ResultsFolderError, match=r"fold_1/checkpoint_final\.pth is missing"):
        ResultsFolder.open(folder, folds=("1",))


def test_fold_all_alone_is_taken(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "r", folds=("all",))
    assert [c.fold for c in ResultsFolder.open(folder).checkpoints] == ["all"]


def test_another_checkpoint_can_be_chosen(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "r", name="best")
    assert ResultsFolder.open(folder, checkpoint="best").checkpoints[0].path.name == "checkpoint_best.pth"
    with pytest.raises(ResultsFolderError, match=r"No fold has a checkpoint_final\.pth"):
        ResultsFolder.open(folder)


def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tiny_plans(), tiny_dataset())
    weights = checkpoint["network_weights"]
    checkpoint["network_weights"] = {f"module._orig_mod.{name}": value for name, value in weights.items()}
    loaded = ResultsFolder.open(write_results(tmp_path / "r", checkpoint=checkpoint)).network().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_the_digest_changes_with_every_file(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "r")
    first = ResultsFolder.open(folder).digest
    assert first == ResultsFolder.open(folder).digest
    (folder / "dataset.json").write_text(json.dumps(tiny_dataset(), indent=2))
    second = ResultsFolder.open(folder).digest
    other = tiny_checkpoint(tiny_plans(), tiny_dataset(), seed=9)
    torch.save(other, folder / "fold_0" / "checkpoint_final.pth")
    assert len({first, second, ResultsFolder.open(folder).digest}) == 3


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_a_missing_or_broken_json_is_named(tmp_path: Path, name: str) -> None:
    folder = write_results(tmp_path / "r")
    for content in ("{", "[]"):
        (folder / name).write_text(content)
        with pytest.raises(ResultsFolderError, match=name):
            ResultsFolder.open(folder)
    (folder / name).unlink()
    with pytest.raises(ResultsFolderError, match=f"{name} is missing"):
        ResultsFolder.open(folder)


def test_nnunet_v1_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "plans.pkl").write_bytes(pickle.dumps({"num_stages": 1}))
    with pytest.raises(ResultsFolderError, match="nnU-Net v1"):
        ResultsFolder.open(tmp_path)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ResultsFolderError, match="is not a folder"):
        ResultsFolder.open(tmp_path / "nowhere")


@pytest.mark.parametrize("key", ["plans_name", "transpose_forward", "label_manager", "image_reader_writer"])
def test_plans_without_a_key_are_refused_by_its_name(tmp_path: Path, key: str) -> None:
    plans = tiny_plans()
    checkpoint = tiny_checkpoint(plans, tiny_dataset())
    broken = {name: value for name, value in plans.items() if name != key}
    with pytest.raises(PlansError, match=f"lacks {key}"):
        ResultsFolder.open(write_results(tmp_path / "r", plans=broken, checkpoint=checkpoint))


def set_in_configuration(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: p.update(label_manager="MyLabelManager"), "label manager 'MyLabelManager'"),
        (lambda p: p.update(image_reader_writer="Tiff3DIO"), "image reader 'Tiff3DIO'"),
        (set_in_configuration("preprocessor_name", "MyPreprocessor"), "preprocessor 'MyPreprocessor'"),
        (set_in_configuration("normalization_schemes", ["MyNorm"]), "normalization 'MyNorm'"),
        (set_in_configuration("patch_size", [16, 16]), "not three-dimensional"),
        (set_in_configuration("previous_stage", "3d_lowres"), "cascade"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    plans = tiny_plans()
    checkpoint = tiny_checkpoint(plans, tiny_dataset())
    changed = copy.deepcopy(plans)
    change(changed)
    checkpoint["init_args"]["plans"] = changed
    with pytest.raises(PlansError, match=named):
        ResultsFolder.open(write_results(tmp_path / "r", plans=changed, checkpoint=checkpoint))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("resampling_fn_data", "resample_torch_fornnunet", "'resample_torch_fornnunet'"),
        ("resampling_fn_probabilities", "no_resampling_hack", "'no_resampling_hack'"),
        ("resampling_fn_data_kwargs", {"is_seg": True}, "is_seg"),
        ("resampling_fn_data_kwargs", {"separate_z_anisotropy_threshold": 2}, "anisotropy_threshold of 2"),
        ("resampling_fn_data_kwargs", {"mode": "edge"}, "mode"),
        ("resampling_fn_data_kwargs", {"order": 5}, "order over 3"),
    ],
)
def test_unknown_resampling_is_refused_by_name(key: str, value: Any, named: str) -> None:
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"][key] = value
    with pytest.raises(PlansError, match=named):
        preprocessing_of(plans, plans["configurations"]["3d_fullres"])


def test_resampling_arguments_that_plans_leave_out_are_nnunets_defaults() -> None:
    plans = tiny_plans()
    settings = plans["configurations"]["3d_fullres"]
    settings["resampling_fn_data_kwargs"] = {}
    resampling = preprocessing_of(plans, settings).resampling_data
    assert (resampling.order, resampling.order_z, resampling.force_separate_z) == (3, 0, False)


def test_transposes_and_spacing_reach_the_manifest() -> None:
    plans = tiny_plans()
    plans |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    plans["configurations"]["3d_fullres"]["spacing"] = [3.0, 1.0, 0.5]
    found = preprocessing_of(plans, plans["configurations"]["3d_fullres"])
    assert found.transpose_forward == (2, 0, 1)
    assert found.transpose_backward == (1, 2, 0)
    assert found.spacing_mm == (3.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"0": "background", "1": "core"}, "no labels with a 'background'"),
        ({"background": 0, "core": 1, "shell": 3}, "not 1, 2, 3"),
        ({"background": 0, "whole": [1, 2], "core": [2]}, "does not accept the labels"),  # no class order
    ],
)
def test_labels_of_another_kind_are_refused(tmp_path: Path, labels: dict[str, Any], message: str) -> None:
    dataset = tiny_dataset() | {"labels": labels}
    checkpoint = tiny_checkpoint(tiny_plans(), tiny_dataset())
    with pytest.raises(ResultsFolderError, match=message):
        ResultsFolder.open(write_results(tmp_path / "r", dataset=dataset, checkpoint=checkpoint))


def test_labels_that_differ_from_the_checkpoints_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tiny_plans(), tiny_dataset())
    swapped = tiny_dataset() | {"labels": {"background": 0, "shell": 1, "core": 2}}
    folder = write_results(tmp_path / "r", dataset=swapped, checkpoint=checkpoint)
    with pytest.raises(ResultsFolderError, match=r"fold 0 differ in labels"):
        ResultsFolder.open(folder)


@pytest.mark.parametrize(("key", "value"), [("spacing", [2.0, 1.0, 1.0]), ("patch_size", [32, 16, 16])])
def test_plans_that_differ_from_the_checkpoints_are_refused(
    tmp_path: Path, key: str, value: list[float]
) -> None:
    plans = tiny_plans()
    checkpoint = tiny_checkpoint(plans, tiny_dataset())
    other = copy.deepcopy(plans)
    other["configurations"]["3d_fullres"][key] = value
    with pytest.raises(ResultsFolderError, match=f"fold 0 differ in {key}"):
        ResultsFolder.open(write_results(tmp_path / "r", plans=other, checkpoint=checkpoint))


def test_another_batch_size_is_no_difference(tmp_path: Path) -> None:
    plans = tiny_plans()
    checkpoint = tiny_checkpoint(copy.deepcopy(plans), tiny_dataset())
    plans["configurations"]["3d_fullres"]["batch_size"] = 7
    folder = write_results(tmp_path / "r", plans=plans, checkpoint=checkpoint)
    assert ResultsFolder.open(folder).features == [8, 16]


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tiny_plans(), tiny_dataset())
    name = "encoder.stages.0.0.convs.0.conv.weight"
    checkpoint["network_weights"][name] = torch.zeros(9, 1, 3, 3, 3)
    with pytest.raises(ResultsFolderError, match=r"conv\.weight is \(9, 1, 3, 3, 3\)"):
        ResultsFolder.open(write_results(tmp_path / "r", checkpoint=checkpoint))
    del checkpoint["network_weights"][name]
    with pytest.raises(ResultsFolderError, match=r"conv\.weight is missing"):
        ResultsFolder.open(write_results(tmp_path / "s", checkpoint=checkpoint))


@pytest.mark.parametrize("key", ["network_weights", "init_args", "trainer_name"])
def test_a_checkpoint_without_a_key_is_refused(tmp_path: Path, key: str) -> None:
    checkpoint = tiny_checkpoint(tiny_plans(), tiny_dataset())
    del checkpoint[key]
    with pytest.raises(ResultsFolderError, match=f"lacks {key}"):
        ResultsFolder.open(write_results(tmp_path / "r", checkpoint=checkpoint))


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, kept: float) -> None:
    folder = write_results(tmp_path / "r")
    path = folder / "fold_0" / "checkpoint_final.pth"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    with pytest.raises(ResultsFolderError, match="is damaged"):
        ResultsFolder.open(folder)


class Trap:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_named_and_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    checkpoint = tiny_checkpoint(tiny_plans(), tiny_dataset()) | {"extra": Trap(trap)}
    folder = write_results(tmp_path / "r", checkpoint=checkpoint)
    with pytest.raises(ResultsFolderError, match=r"could run code: .*Path"):
        ResultsFolder.open(folder)
    assert not trap.exists()


def test_a_checkpoint_of_tensors_alone_is_known_as_such(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tiny_plans(), tiny_dataset())
    del checkpoint["logging"], checkpoint["_best_ema"]
    assert ResultsFolder.open(write_results(tmp_path / "r", checkpoint=checkpoint)).checkpoints[0].plain


def test_arrays_of_numpy_are_let_in(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tiny_plans(), tiny_dataset()) | {"curve": np.arange(3.0)}
    assert not ResultsFolder.open(write_results(tmp_path / "r", checkpoint=checkpoint)).checkpoints[0].plain


def test_a_trainer_that_keeps_the_planned_network_is_accepted(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tiny_plans(), tiny_dataset()) | {"trainer_name": "nnUNetTrainer_5epochs"}
    assert ResultsFolder.open(write_results(tmp_path / "r", checkpoint=checkpoint)).features == [8, 16]


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("nnUNetTrainerBN", "builds a network of its own"),
        ("nnUNetTrainerOfNobody", "is not found"),
    ],
)
def test_a_trainer_with_another_network_is_refused(tmp_path: Path, trainer: str, message: str) -> None:
    checkpoint = tiny_checkpoint(tiny_plans(), tiny_dataset()) | {"trainer_name": trainer}
    with pytest.raises(ResultsFolderError, match=message):
        ResultsFolder.open(write_results(tmp_path / "r", checkpoint=checkpoint))


def test_trainers_of_ones_own_are_looked_up_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "raise SystemExit('this file was run')\n"
        "class Longer(nnUNetTrainer):\n    num_epochs = 2000\n"
        "class Wider(Longer):\n    def build_network_architecture(*args): pass\n"
        "class WiderStill(Wider):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "own"))
    check_builds_planned_network("Longer")
    for name in ("Wider", "WiderStill"):
        with pytest.raises(ResultsFolderError, match=f"'{name}' builds a network of its own"):
            check_builds_planned_network(name)


def test_the_hippocampus_teacher_opens(shared_data: Path) -> None:
    results = ResultsFolder.open(shared_data / "teachers" / "hippocampus")
    assert results.features == [32, 64, 128, 256]
    assert results.classes.names == {1: "Anterior", 2: "Posterior"}
    assert results.settings["patch_size"] == [40, 56, 40]
