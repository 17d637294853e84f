"""A student that starts from a trained one: what it takes over, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_reference import RESENC, ReferenceModel, reference_model
from torch import nn
from training_data import SPLIT, write_cases, write_results_folder

from training.distill import distill
from training.errors import RecipeError, StudentError
from training.plans import Plans
from training.preprocess import TrainingCases
from training.recipe import parse_recipe
from training.start import start_from
from training.student import build_network, scaled_plans
from training.synthesis.plans import PLANS, brain_plans, dataset_json
from training.teacher import ResultsFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

FINE = {
    "architecture": RESENC,
    "features": (4, 4, 8),
    "blocks": (1, 1, 2),
    "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    "spacing": (1.0, 1.0, 1.0),
    "n_labels": 2,
    "patch_size": (16, 16, 16),
}
COARSE = {
    **FINE,
    "features": (4, 8),
    "blocks": (1, 2),
    "strides": ((1, 1, 1), (2, 2, 2)),
    "spacing": (2.0, 2.0, 2.0),
    "patch_size": (8, 8, 8),
}


def model_of(settings: dict[str, Any], **changes: Any) -> ReferenceModel:
    return reference_model(**{**settings, **changes})


def opened(folder: Path, model: ReferenceModel) -> ResultsFolder:
    return ResultsFolder.open(write_results_folder(folder / "start", model, seed=5))


def as_if_trained(start: ResultsFolder) -> ResultsFolder:
    """Every residual block takes part: a fresh one multiplies by zero what it adds."""
    for name, tensor in start.checkpoints[0].weights.items():
        if tensor.ndim == 1 and name.endswith("weight"):
            tensor.copy_(torch.linspace(0.5, 1.5, len(tensor)))
    return start


def fresh(model: ReferenceModel) -> nn.Module:
    torch.manual_seed(1)
    return build_network(model.configuration, 1, 3, deep_supervision=True)


def images() -> Iterator[torch.Tensor]:
    torch.manual_seed(2)
    while True:
        yield torch.randn(2, 1, 16, 16, 16)


def begin(network: nn.Module, model: ReferenceModel, start: ResultsFolder) -> None:
    start_from(network, model.plans, model.dataset, "3d_fullres", start, images())


def test_the_same_network_takes_over_every_weight(tmp_path: Path) -> None:
    model = model_of(FINE)
    start = opened(tmp_path, model)
    network = fresh(model)
    begin(network, model, start)
    trained = start.network(deep_supervision=True).state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, trained[name]), name


def test_a_coarser_network_becomes_all_that_lies_below_the_finest_stage(tmp_path: Path) -> None:
    model = model_of(FINE)
    start = opened(tmp_path, model_of(COARSE))
    network: Any = fresh(model)
    begin(network, model, start)
    coarse: Any = start.network(deep_supervision=True)
    # Whatever enters the second stage, everything below answers as the coarser network would. The stage
    # above it is new.
    entering = torch.randn(1, 4, 8, 8, 8)
    below = [entering]
    for stage in network.encoder.stages[2:]:
        below.append(stage(below[-1]))
    theirs = [entering]
    for stage in coarse.encoder.stages[1:]:
        theirs.append(stage(theirs[-1]))
    for a, b in zip(below, theirs, strict=True):
        torch.testing.assert_close(a, b)
    coarsest = network.decoder.seg_layers[0](
        network.decoder.stages[0](torch.cat([network.decoder.transpconvs[0](below[-1]), below[-2]], 1))
    )
    expected = coarse.decoder.seg_layers[0](
        coarse.decoder.stages[0](torch.cat([coarse.decoder.transpconvs[0](theirs[-1]), theirs[-2]], 1))
    )
    torch.testing.assert_close(coarsest, expected)
    untouched = fresh(model).state_dict()
    assert torch.equal(
        network.state_dict()["encoder.stages.0.blocks.0.conv1.conv.weight"],
        untouched["encoder.stages.0.blocks.0.conv1.conv.weight"],
    )


@pytest.mark.parametrize("features", [(8, 8, 16), (12, 12, 24), (6, 6, 11), (4, 4, 11)])
def test_a_narrower_network_becomes_a_wider_one_that_computes_the_same(
    tmp_path: Path, features: tuple[int, ...]
) -> None:
    wide = model_of(FINE, features=features)
    start = as_if_trained(opened(tmp_path, model_of(FINE)))
    network = fresh(wide)
    begin(network, wide, start)
    narrow = start.network(deep_supervision=True).eval()
    image = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        for ours, theirs in zip(network.eval()(image), narrow(image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_copies_of_a_widened_channel_learn_different_things(tmp_path: Path) -> None:
    wide = model_of(FINE, features=tuple(2 * channels for channels in FINE["features"]))
    network: Any = fresh(wide)
    begin(network, wide, as_if_trained(opened(tmp_path, model_of(FINE))))
    network(torch.randn(2, 1, 16, 16, 16))[0].square().mean().backward()
    for convolution in (network.encoder.stages[1].blocks[0].conv2.conv, network.decoder.transpconvs[0]):
        of_outputs = convolution.weight.grad.transpose(0, int(isinstance(convolution, nn.ConvTranspose3d)))
        first, second = of_outputs[0::2], of_outputs[1::2]
        assert not torch.allclose(first, second, rtol=0.05, atol=0)


@pytest.mark.parametrize("features", [(4, 8, 16), (6, 8, 11)])
def test_a_projection_that_the_narrower_network_had_no_use_for_changes_little(
    tmp_path: Path, features: tuple[int, ...]
) -> None:
    wide = model_of(FINE, features=features)
    start = as_if_trained(opened(tmp_path, model_of(FINE)))
    network: Any = fresh(wide)
    fresh_one: Any = fresh(wide)
    begin(network, wide, start)
    narrow: Any = start.network(deep_supervision=True).eval()
    image = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        ours, of_chance, theirs = (one.eval()(image)[0] for one in (network, fresh_one, narrow))
    assert network.encoder.stages[1].blocks[0].skip[1].norm.bias.std() > 0  # of the images
    away = ((ours - theirs).square().mean() / theirs.var()).item()
    assert away < 0.05 < ((of_chance - theirs).square().mean() / theirs.var()).item()


@pytest.mark.parametrize("features", [(2, 4, 8), (4, 4, 6), (8, 8, 8)])
def test_a_network_that_is_narrower_somewhere_or_lacks_a_projection_is_refused(
    tmp_path: Path, features: tuple[int, ...]
) -> None:
    wide = model_of(FINE, features=features)
    with pytest.raises(StudentError, match=r"nor a narrower one|has no place"):
        begin(fresh(wide), wide, opened(tmp_path, model_of(FINE)))


def test_the_brain_students_plans_fit_each_other() -> None:
    """The 4 mm network is the 2 mm network without its finest stage, at the width that ships."""

    def network(which: str) -> tuple[Plans, nn.Module]:
        plans = scaled_plans(brain_plans(**PLANS[which]), Fraction(1, 4), 16)
        settings = plans["configurations"]["3d_fullres"]
        return plans, build_network(settings, 1, len(dataset_json()["labels"]), deep_supervision=True)

    coarse_plans, coarse = network("4mm")
    fine_plans, fine = network("2mm")
    start = ResultsFolder(
        folder=Path("start"),
        plans=coarse_plans,
        dataset_json=dataset_json(),
        fingerprint=None,
        configuration="3d_fullres",
        settings=coarse_plans["configurations"]["3d_fullres"],
        checkpoints=(_Weights(coarse.state_dict()),),  # type: ignore[arg-type]
    )
    start_from(fine, fine_plans, dataset_json(), "3d_fullres", start, images())
    assert torch.equal(
        fine.state_dict()["encoder.stages.4.blocks.5.conv2.conv.weight"],
        coarse.state_dict()["encoder.stages.3.blocks.5.conv2.conv.weight"],
    )


class _Weights:
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights


@pytest.mark.parametrize(
    ("settings", "changes", "why"),
    [
        (FINE, {"features": (4, 8, 16)}, "neither this one nor a narrower one nor"),
        (FINE, {"spacing": (1.0, 1.0, 2.0)}, r"trained at \[1.0, 1.0, 2.0\] mm"),
        (COARSE, {"spacing": (1.0, 1.0, 1.0)}, r"not at \[2.0, 2.0, 2.0\] mm"),
        (COARSE, {"blocks": (1, 3)}, "neither this one nor a narrower one nor"),
        (FINE, {"n_labels": 3}, "trained for other labels"),
        (FINE, {"schemes": ("NoNormalization",)}, "prepared otherwise"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, settings: dict[str, Any], changes: dict[str, Any], why: str
) -> None:
    model = model_of(FINE)
    start = opened(tmp_path, model_of(settings, **changes))
    with pytest.raises(StudentError, match=why):
        begin(fresh(model), model, start)


def test_a_run_says_what_it_started_from_and_goes_on_from_nothing_else(tmp_path: Path) -> None:
    data = write_cases(tmp_path / "Dataset001_Parity")
    model = model_of(FINE)
    untrained = write_results_folder(tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres", model)
    teacher = ResultsFolder.open(untrained)
    start = ResultsFolder.open(write_results_folder(tmp_path / "start", model, seed=5))
    cases = TrainingCases.open(data, teacher.dataset_json)
    budget = {"epochs": 1, "iterations_per_epoch": 1, "validation_iterations": 1, "threads": 1}
    still = {**budget, "learning_rate": 1e-30, "weight_decay": 0.0, "deterministic": True}
    recipe = parse_recipe({"name": "on", "student": {"width": 1}, "training": still})
    results = distill(teacher, cases, SPLIT, recipe, tmp_path / "work", start=start, device="cpu")
    told = json.loads((results / "distillation.json").read_text())
    assert told["start_digest"] == start.digest
    ended = ResultsFolder.open(results).checkpoints[0].weights
    for name, tensor in start.checkpoints[0].weights.items():
        torch.testing.assert_close(ended[name], tensor)

    (results / "fold_0" / "checkpoint_final.pth").unlink()
    with pytest.raises(RecipeError, match="begun with another recipe or start"):
        distill(teacher, cases, SPLIT, recipe, tmp_path / "work", device="cpu")
