"""A study: several runs of one teacher under one budget, measured alike; the best becomes a bundle.

Described by a YAML file beside the recipes:

    name: hippocampus
    split: ../results/hippocampus-split.json
    labels: ../results/hippocampus/labels.yaml
    recipes: [hippocampus-none-1of4.yaml, hippocampus-dcd-1of4.yaml]
    seeds: [1]
    starts: {1/4: ../results/hippocampus-baseline/student}
    ships:
      - {width: 1/4, name: hippocampus, version: 0.2.0}

The recipes must agree in everything but the width and the terms, or comparing them would tell nothing.
Choices are made on the split's ``choose`` list; the figures to quote are of its ``claim`` list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from training.errors import RecipeError
from training.evaluate import Evaluation
from training.recipe import Recipe, load_recipe


def _width(value: Any) -> Fraction:
    return Fraction(str(value))


Width = Annotated[Fraction, BeforeValidator(_width)]


class Ship(BaseModel):
    """The best student of a width leaves the study as this bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    width: Width
    name: str
    version: str


class StudyDescription(BaseModel):
    """The YAML file. Paths are relative to it.

    ``starts``: for a width, the results folder of a student that every run of this width starts from.
    ``training`` replaces settings of every recipe alike.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str
    split: Path
    labels: Path
    recipes: tuple[Path, ...]
    seeds: tuple[int, ...] = (1,)
    starts: dict[Width, Path] = {}
    training: dict[str, Any] = {}
    ships: tuple[Ship, ...] = ()
    pictured_cases: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Run:
    """One training of the study: a recipe with a seed."""

    recipe: Recipe
    recipe_path: Path
    seed: int

    @property
    def key(self) -> str:
        """The run's name in files: the recipe's, with the seed."""
        return f"{self.recipe.name}-seed{self.seed}"

    @property
    def title(self) -> str:
        """The run's name in tables."""
        return f"{self.recipe.name}, seed {self.seed}"

    @property
    def width(self) -> Fraction:
        return self.recipe.student.width


@dataclass(frozen=True)
class Study:
    """A description with its recipes read."""

    description: StudyDescription
    folder: Path
    runs: tuple[Run, ...]

    @property
    def split(self) -> Path:
        return self.folder / self.description.split

    @property
    def labels(self) -> Path:
        return self.folder / self.description.labels

    def start_of(self, run: Run) -> Path | None:
        """The trained student that a run starts from; None where chance draws its weights."""
        relative = self.description.starts.get(run.width)
        return None if relative is None else self.folder / relative

    def baseline_of(self, run: Run) -> Run | None:
        """The run without distillation of the same width and seed, which a gain is measured from."""
        return next(
            (
                other
                for other in self.runs
                if not other.recipe.distillation and (other.width, other.seed) == (run.width, run.seed)
            ),
            None,
        )


def load_study(path: Path) -> Study:
    """Read a study and its recipes.

    Raises
    ------
    RecipeError
        If the file or a recipe is not understood, a recipe is named twice, the recipes differ in their
        training settings, or a bundle is to be made of a width that no run has.
    """
    try:
        description = StudyDescription.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"The study {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValidationError, ValueError, ZeroDivisionError) as error:
        raise RecipeError(f"The study {path.name} is not understood: {error}.") from error
    if not description.recipes or not description.seeds:
        raise RecipeError(f"The study {path.name} has no run.", remedy="Name recipes and seeds.")
    runs = []
    for relative in description.recipes:
        recipe_path = path.parent / relative
        recipe = load_recipe(recipe_path)
        runs += [Run(recipe, recipe_path, seed) for seed in description.seeds]
    _check(description, runs)
    return Study(description, path.parent, tuple(runs))


def _check(description: StudyDescription, runs: list[Run]) -> None:
    names = [run.key for run in runs]
    if len(set(names)) < len(names):
        raise RecipeError("Two runs of the study have the same name.", remedy="Name each recipe once.")
    first = runs[0].recipe
    for run in runs:
        if replace(run.recipe.training, seed=first.training.seed) != first.training:
            raise RecipeError(
                f"The recipes {first.name!r} and {run.recipe.name!r} differ in their training settings.",
                remedy="Give all runs of a study the same budget, optimiser and precision.",
            )
    for ship in description.ships:
        if all(run.width != ship.width for run in runs):
            raise RecipeError(f"No run of the study has the width {ship.width} of {ship.name!r}.")
    for width in description.starts:
        if all(run.width != width for run in runs):
            raise RecipeError(f"No run of the study has the width {width} that 'starts' names.")


def best_run(runs: list[Run], choose: dict[str, Evaluation]) -> Run:
    """The run to ship: of the recipe whose mean Dice over its seeds is highest, its best seed.

    Parameters
    ----------
    runs : list of Run
        Of one width.
    choose : dict
        Evaluations on the cases that choices are made on, by the runs' keys.
    """
    dice = {run.key: choose[run.key].summary("dice").mean for run in runs}

    def over_seeds(run: Run) -> float:
        same = [dice[other.key] for other in runs if other.recipe.name == run.recipe.name]
        return sum(same) / len(same)

    return max(runs, key=lambda run: (over_seeds(run), dice[run.key]))
