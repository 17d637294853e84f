"""Samples are functions of their key, and the loop trains on them and goes on where it was stopped."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from tiny_head import tiny_numbers, write_tiny_heads

from training.commands import distill as command
from training.dice_ce import DiceCrossEntropy
from training.distill import Progress, distill
from training.environment import configure_nnunet
from training.errors import RecipeError, ResultsFolderError, TrainingDataError
from training.preprocess import TrainingCases, write_json
from training.recipe import Recipe, load_recipe, parse_recipe
from training.run_log import read_log
from training.run_state import STATE_FILE
from training.student import build_network, count_parameters, scaled_plans
from training.synthesis.generator import Generator, Sample
from training.synthesis.label_maps import LabelMapFolder
from training.synthesis.plans import PLANS, brain_plans, dataset_json, write_plans
from training.synthesis.recipe import SynthesisRecipe
from training.synthesis.source import SyntheticToolbox, thinned
from training.synthesis.structures import STRUCTURES, merged
from training.teacher import ResultsFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CPU = torch.device("cpu")
SPLIT = {"train": ["one", "two"], "val": ["three"]}
RECIPES = Path(__file__).parents[2] / "training" / "recipes"
BEFORE = "1ccf55bf4f9ae222461a1eaecf840113da43901318708ee5033ea11db616e1bc"
NEAR = {"near_mm": 2.0, "far_mm": 6.0}


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> LabelMapFolder:
    return LabelMapFolder(write_tiny_heads(tmp_path_factory.mktemp("heads") / "maps"))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> ResultsFolder:
    """Plans of a network small enough for a test, in the layout of the real ones."""
    folder = write_plans(tmp_path_factory.mktemp("plans"), "2mm")
    plans = brain_plans(
        spacing_mm=1.0, patch_size=(16, 16, 16), features=(8, 8, 16), blocks=(1, 1, 1), batch_size=2
    )
    write_json(folder / "plans.json", plans)
    return ResultsFolder.planned(folder)


def generator(maps: LabelMapFolder, **changes: object) -> Generator:
    recipe = SynthesisRecipe(**{**NEAR, **changes})  # type: ignore[arg-type]
    heads = maps.read_all(["one", "two"])
    return Generator(heads, maps.table, recipe, shape=(20, 22, 18), spacing_mm=1.0, device=CPU)


def same(one: Sample, other: Sample) -> bool:
    return torch.equal(one.image, other.image) and torch.equal(one.labels, other.labels)


def tiny_recipe(*terms: dict[str, object], width: object = 1, **training: object) -> Recipe:
    budget = {"iterations_per_epoch": 3, "validation_iterations": 1, "threads": 1, "ema_decay": 0.5}
    optimiser = {"optimizer": "adamw", "learning_rate": 0.003, "deterministic": True, "batch_size": 2}
    return parse_recipe(
        {
            "name": "tiny",
            "student": {"width": width},
            "training": {"epochs": 3, **budget, **optimiser, **training},
            "data": {"synthesis": NEAR},
            "distillation": list(terms),
        }
    )


class TestSamples:
    def test_a_key_gives_its_sample_in_any_order_and_from_a_new_generator(self, maps: LabelMapFolder) -> None:
        first = generator(maps)
        forward = [first.sample(5, i) for i in range(4)]
        second = generator(maps)
        backward = [second.sample(5, i) for i in reversed(range(4))][::-1]
        assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
        assert not any(same(forward[0], other) for other in forward[1:])
        assert not same(forward[0], first.sample(6, 0))

    def test_drawing_leaves_the_global_generators_alone(self, maps: LabelMapFolder) -> None:
        drawing = generator(maps)
        np.random.seed(1)
        torch.manual_seed(1)
        wanted = np.random.rand(), torch.rand(1)
        np.random.seed(1)
        torch.manual_seed(1)
        drawing.sample(0, 0)
        assert (np.random.rand(), torch.rand(1)) == wanted

    def test_images_are_z_scores_and_labels_are_structures(self, maps: LabelMapFolder) -> None:
        drawing = generator(maps, cut_probability=0.0)
        for i in range(12):
            sample = drawing.sample(0, i)
            assert sample.image.shape == sample.labels.shape == (20, 22, 18)
            assert sample.image.dtype == torch.float32
            assert float(sample.image.mean()) == pytest.approx(0, abs=1e-4)
            assert float(sample.image.std(correction=0)) == pytest.approx(1, abs=1e-4)
            assert set(sample.labels.unique().tolist()) <= {0, *(s.value for s in STRUCTURES)}
            assert sample.labels.any()

    def test_outside_of_the_field_of_view_there_is_nothing(self, maps: LabelMapFolder) -> None:
        drawing = generator(maps, cut_probability=1.0)
        for i in range(12):
            sample = drawing.sample(0, i)
            flat = [
                (sample.image.index_select(axis, torch.tensor([edge])) == 0).all()
                and not sample.labels.index_select(axis, torch.tensor([edge])).any()
                for axis in range(3)
                for edge in (0, sample.image.shape[axis] - 1)
            ]
            assert sum(map(bool, flat)) >= 1
            inside = sample.image[sample.image != 0]
            assert float(inside.std(correction=0)) == pytest.approx(1, abs=0.02)

    def test_the_shares_of_the_recipe_are_kept(self, maps: LabelMapFolder) -> None:
        drawing = generator(maps, contrasts=[0.0, 0.0, 1.0, 0.0], keeps=[0.0, 0.0, 0.0, 1.0])
        samples = [drawing.sample(0, i) for i in range(6)]
        assert {(s.contrast, s.keep) for s in samples} == {("t2", "brain")}
        assert {s.map_name for s in samples} == {"one", "two"}

    def test_without_any_variation_the_labels_are_the_maps(self, maps: LabelMapFolder) -> None:
        still = {
            "flip_probability": 0.0,
            "rotation_degrees": 0.0,
            "scaling": 0.0,
            "shearing": 0.0,
            "displacement_sd_mm": 0.0,
            "near_mm": 0.0,
            "far_probability": 0.0,
            "cut_probability": 0.0,
        }
        head = maps.read("three")
        centred = type(head)(head.name, head.places, 1.0, np.full(3, 11.5))
        recipe = SynthesisRecipe(**still)
        drawing = Generator([centred], maps.table, recipe, shape=(24,) * 3, spacing_mm=1.0, device=CPU)
        np.testing.assert_array_equal(drawing.sample(0, 0).labels, merged(tiny_numbers(2)))


class TestToolbox:
    def toolbox(self, maps: LabelMapFolder, planned: ResultsFolder, work: Path, **changes: object):
        configure_nnunet(work)
        plans = scaled_plans(planned.plans, Fraction(1))
        values = {"maps": maps, "split": SPLIT, "synthesis": SynthesisRecipe(**NEAR), "seed": 3}
        return SyntheticToolbox(
            plans,
            planned.dataset_json,
            "3d_fullres",
            CPU,
            **{**values, "validation_iterations": 2, **changes},
        )

    def test_batches_have_nnunets_shapes_and_targets(
        self, maps: LabelMapFolder, planned: ResultsFolder, tmp_path: Path
    ) -> None:
        toolbox = self.toolbox(maps, planned, tmp_path)
        batch = toolbox.to_device(next(toolbox.loaders()[0]))
        assert batch.images.shape == (2, 1, 16, 16, 16)
        assert [t.shape[2] for t in batch.targets] == [16, 8]
        assert toolbox.mirror_axes == ()
        assert toolbox.label_names == tuple(s.name for s in STRUCTURES)

    def test_thinned_targets_are_nnunets(self) -> None:
        labels = torch.randint(0, 30, (2, 1, 12, 8, 20), dtype=torch.int16)
        scales = [[1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.25, 0.5, 0.25]]
        for i, one in enumerate(labels):
            reference = DownsampleSegForDSTransform(scales)(segmentation=one)["segmentation"]
            for scale, wanted in zip(scales, reference, strict=True):
                assert torch.equal(thinned(labels, scale)[i], wanted)

    def test_a_resumed_loader_goes_on_and_validation_repeats(
        self, maps: LabelMapFolder, planned: ResultsFolder, tmp_path: Path
    ) -> None:
        toolbox = self.toolbox(maps, planned, tmp_path)
        train, validation = toolbox.loaders()
        images = [next(train)["data"] for _ in range(4)]
        assert torch.equal(next(toolbox.loaders(3)[0])["data"], images[3])
        seen = [next(validation)["data"] for _ in range(4)]
        assert torch.equal(seen[0], seen[2])
        assert torch.equal(seen[1], seen[3])
        assert not torch.equal(seen[0], seen[1])
        other_rank = self.toolbox(maps, planned, tmp_path, rank=1)
        assert not torch.equal(next(other_rank.loaders()[0])["data"], images[0])

    def test_a_split_that_does_not_fit_is_refused(
        self, maps: LabelMapFolder, planned: ResultsFolder, tmp_path: Path
    ) -> None:
        for split in ({"train": ["one"], "val": ["four"]}, {"train": ["one"], "val": ["one"]}):
            with pytest.raises(TrainingDataError, match="split"):
                self.toolbox(maps, planned, tmp_path, split=split)


class TestLoss:
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
    @pytest.mark.parametrize("scale", [1.0, 30.0])
    def test_value_and_gradient_are_nnunets(self, layout: torch.memory_format, scale: float) -> None:
        gen = torch.Generator().manual_seed(0)
        logits = (scale * torch.randn(2, 7, 5, 6, 4, generator=gen)).to(memory_format=layout)
        target = torch.randint(0, 6, (2, 1, 5, 6, 4), generator=gen)  # the last class is absent
        reference = DC_and_CE_loss(
            {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False},
            {},
            weight_ce=1,
            weight_dice=1,
            dice_class=MemoryEfficientSoftDiceLoss,
        )
        results = []
        for loss in (reference, DiceCrossEntropy()):
            leaf = logits.clone().requires_grad_()
            value = 1.7 * loss(leaf, target)
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(results[1][0], results[0][0])
        torch.testing.assert_close(results[1][1], results[0][1], atol=1e-7, rtol=1e-4)

    @pytest.mark.parametrize("balance", [0.5, 1.0])
    def test_a_balanced_cross_entropy_weighs_each_voxel_by_its_class(self, balance: float) -> None:
        gen = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 4, 5, 6, 4, generator=gen)
        target = torch.randint(0, 4, (2, 1, 5, 6, 4), generator=gen) // 2 * 2  # only 0 and 2 occur
        target[0, 0, 0, 0, :3] = 1
        gradients = []
        for by_hand in (True, False):
            leaf = logits.clone().requires_grad_()
            if by_hand:
                each = torch.nn.functional.cross_entropy(leaf, target[:, 0], reduction="none")
                counts = torch.stack([torch.bincount(t.flatten(), minlength=4) for t in target])
                weights = (120 / (4 * counts.clamp(min=1))) ** balance
                voxels = torch.stack([w[t[0]] for w, t in zip(weights, target, strict=True)])
                plain = torch.nn.functional.cross_entropy(leaf, target[:, 0])
                value = DiceCrossEntropy()(leaf, target) - plain + (each * voxels).mean()
            else:
                value = DiceCrossEntropy(balance)(leaf, target)
            gradients.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(gradients[1][0], gradients[0][0])
        torch.testing.assert_close(gradients[1][1], gradients[0][1], atol=1e-8, rtol=1e-4)


class StopHereError(Exception):
    """Stands for a kill."""


class TestRuns:
    def test_a_stopped_run_resumes_bit_for_bit_and_its_best_can_be_used_before_it_ends(
        self, maps: LabelMapFolder, planned: ResultsFolder, tmp_path: Path
    ) -> None:
        recipe = tiny_recipe()
        whole = distill(planned, maps, SPLIT, recipe, tmp_path / "whole", device="cpu")

        def stop(progress: Progress) -> None:
            if (progress.epoch, progress.iteration) == (2, 1):
                raise StopHereError

        with pytest.raises(StopHereError):
            distill(planned, maps, SPLIT, recipe, tmp_path / "cut", device="cpu", progress=stop)
        (state,) = (tmp_path / "cut").rglob(STATE_FILE)
        unfinished = ResultsFolder.open(state.parents[1], checkpoint="best")
        assert unfinished.checkpoints[0].mirror_axes == ()
        resumed = distill(planned, maps, SPLIT, recipe, tmp_path / "cut", device="cpu")
        logs = [[e["losses"] for e in read_log(f / "fold_0" / "log.jsonl")] for f in (whole, resumed)]
        assert logs[0] == logs[1]
        one, other = (
            torch.load(f / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
            for f in (whole, resumed)
        )
        assert all(torch.equal(one[k], other[k]) for k in one)

    def test_a_teacher_from_plans_teaches_a_student_by_both_methods(
        self, maps: LabelMapFolder, planned: ResultsFolder, tmp_path: Path
    ) -> None:
        recipe = tiny_recipe(epochs=1)
        teacher = ResultsFolder.open(distill(planned, maps, SPLIT, recipe, tmp_path / "t", device="cpu"))
        terms = ({"method": "dcd", "weight": 0.05}, {"method": "logits", "weight": 1.0})
        taught = tiny_recipe(*terms, width="1/2", epochs=1)
        student = ResultsFolder.open(distill(teacher, maps, SPLIT, taught, tmp_path / "s", device="cpu"))
        assert student.features == [4, 4, 8]
        (entry,) = read_log(student.folder / "fold_0" / "log.jsonl")
        assert {"segmentation", "0:dcd", "1:logits"} == set(entry["losses"])
        said = json.loads((student.folder / "distillation.json").read_text())
        assert (said["method"], said["teacher_digest"]) == ("dcd + logits", teacher.digest)

    def test_the_command_trains_from_plans_and_label_maps(
        self, maps: LabelMapFolder, planned: ResultsFolder, tmp_path: Path
    ) -> None:
        budget = {"epochs": 1, "iterations_per_epoch": 1, "validation_iterations": 1, "batch_size": 2}
        recipe = {"name": "x", "student": {"width": 1}, "training": budget, "data": {"synthesis": NEAR}}
        write_json(tmp_path / "recipe.yaml", recipe)  # JSON is YAML
        write_json(tmp_path / "split.json", {"train": ["one"], "choose": ["two"]})
        command.distill(
            planned.folder,
            maps.folder,
            recipe=tmp_path / "recipe.yaml",
            split=tmp_path / "split.json",
            output=tmp_path / "run",
            train_list="train",
            validation_list="choose",
            fold=None,
            checkpoint="final",
            device="cpu",
            seed=None,
        )
        (folder,) = (tmp_path / "run" / "results").glob("*/*__3d_fullres")
        assert ResultsFolder.open(folder).classes.n_outputs == 30

    def test_it_learns_the_made_up_heads(
        self, maps: LabelMapFolder, planned: ResultsFolder, tmp_path: Path
    ) -> None:
        recipe = tiny_recipe(epochs=5, iterations_per_epoch=8, learning_rate=0.01)
        log = read_log(distill(planned, maps, SPLIT, recipe, tmp_path, device="cpu") / "fold_0" / "log.jsonl")
        assert log[-1]["losses"]["segmentation"] < log[0]["losses"]["segmentation"] - 0.3

    def test_the_wrong_kind_of_data_or_a_missing_teacher_is_said(
        self, maps: LabelMapFolder, planned: ResultsFolder, tmp_path: Path
    ) -> None:
        plain = parse_recipe({"name": "plain"})
        with pytest.raises(TrainingDataError, match="Label maps"):
            distill(planned, maps, SPLIT, plain, tmp_path, device="cpu")
        cases = TrainingCases(tmp_path, tmp_path, ".nii.gz", 1)
        with pytest.raises(TrainingDataError, match="Label maps"):
            distill(planned, cases, SPLIT, tiny_recipe(), tmp_path, device="cpu")
        with pytest.raises(RecipeError, match="without weights"):
            distill(
                planned, maps, SPLIT, tiny_recipe({"method": "logits", "weight": 1}), tmp_path, device="cpu"
            )
        with pytest.raises(ResultsFolderError):
            ResultsFolder.planned(tmp_path)


class TestRecipes:
    @pytest.mark.parametrize("spacing", ["1mm", "2mm"])
    def test_every_brain_recipe_parses_and_shares_data_seed_and_budget(self, spacing: str) -> None:
        recipes = [load_recipe(p) for p in sorted(RECIPES.glob(f"brain-*-{spacing}.yaml"))]
        assert {"none", "logits", "dcd", "dcd + logits"} <= {r.method for r in recipes}
        assert len({(r.data, r.training) for r in recipes}) == 1
        assert all(r.data.synthesis is not None for r in recipes)

    def test_the_parts_of_the_short_training_differ_in_their_budget_alone(self) -> None:
        parts = ("4mm", "2mm-short", "2mm-last")
        recipes = [load_recipe(RECIPES / f"brain-none-1of4by16-{part}.yaml") for part in parts]
        assert len({(r.data, r.student, r.method) for r in recipes}) == 1
        assert len({r.training.seed for r in recipes}) == len(parts)  # none sees the images of another

    def test_recipes_from_before_keep_their_digest(self) -> None:
        # As it was computed when neither ``data`` nor ``optimizer`` existed; a run in progress depends on it.
        assert parse_recipe({"name": "x"}).digest == BEFORE
        assert parse_recipe({"name": "x", "training": {"optimizer": "adamw"}}).digest != BEFORE
        assert parse_recipe({"name": "x", "data": {"synthesis": {}}}).digest != BEFORE

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            ({"synthesis": {"nose": 1}}, "nose"),
            ({"synthetic": {}}, "synthetic"),
            ({"synthesis": {"contrasts": [1.0, 1.0, 0.0, 0.0]}}, "sum to 1"),
            ({"synthesis": {"knot_mm": 0}}, "knot_mm"),
        ],
    )
    def test_a_mistake_is_named(self, data: dict[str, object], said: str) -> None:
        with pytest.raises(RecipeError, match=said):
            parse_recipe({"name": "x", "data": data})


class TestPlans:
    @pytest.mark.parametrize("which", sorted(PLANS))
    def test_the_plans_are_understood_and_deep_enough(self, which: str, tmp_path: Path) -> None:
        opened = ResultsFolder.planned(write_plans(tmp_path, which))
        assert opened.fingerprint is not None
        assert opened.classes.n_outputs == 30
        extent_mm = np.array(opened.settings["patch_size"]) * opened.settings["spacing"]
        assert extent_mm.tolist() == [160, 192, 160]
        halved = np.array(opened.settings["patch_size"]) / 2 ** (len(opened.features) - 1)
        assert halved.tolist() == [5, 6, 5]

    def test_a_quarter_of_the_teacher_is_about_a_sixteenth(self) -> None:
        plans = brain_plans(**PLANS["2mm"])
        sizes = []
        for width in ("1", "1/4"):
            settings = scaled_plans(plans, Fraction(width))["configurations"]
            with torch.device("meta"):
                sizes.append(count_parameters(build_network(settings["3d_fullres"], 1, 30)))
        assert 15 < sizes[0] / sizes[1] < 16.2

    def test_dataset_json_has_the_structures(self) -> None:
        labels = dataset_json()["labels"]
        assert labels["background"] == 0
        assert labels["Left cerebral white matter"] == 1
        assert len(labels) == 30
