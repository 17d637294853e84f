"""Recipes: a distillation run as a YAML file, parsed once into frozen dataclasses.

A key that does not exist is an error that names it; so is a value of the wrong kind.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from training.distillation.registry import parse_options
from training.errors import RecipeError
from training.synthesis.recipe import SynthesisRecipe


@dataclass(frozen=True)
class StudentRecipe:
    """The student: the teacher's plans with scaled channels.

    ``channels``, the finest stage's first, are taken as they are written, instead of a ``width``.
    """

    width: Fraction = Fraction(1, 4)
    round_to: int | None = None
    channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise ValueError("width must be over 0 and at most 1")
        if self.channels is not None and (self.width, self.round_to) != (StudentRecipe.width, None):
            raise ValueError("a student has a width or channels, not both")

    def __str__(self) -> str:
        return str(self.width) if self.channels is None else ", ".join(map(str, self.channels))


@dataclass(frozen=True)
class TrainingRecipe:
    """Budget and optimiser; the defaults are nnU-Net's, and the DCD paper's EMA.

    ``optimizer`` "sgd" has Nesterov's momentum; "adamw" takes no ``momentum`` and suits a short budget.
    ``balance``, from 0 to 1, gives small classes a greater share of the cross-entropy (``training.dice_ce``).
    ``precision`` "auto" is float16 with loss scaling on CUDA and float32 on a CPU. ``early_stop_epochs``: the
    run ends when the validation Dice has not improved for so many epochs; None never stops early.
    ``deterministic``: one loader, a seed for every iteration, deterministic kernels; a run that is resumed
    gives the uninterrupted run bit for bit. Otherwise ``loader_processes`` augment in parallel, and two runs
    with the same seed differ by the order in which their batches arrive.
    """

    epochs: int = 1000
    iterations_per_epoch: int = 250
    validation_iterations: int = 50
    batch_size: int | None = None
    learning_rate: float = 0.01
    momentum: float = 0.99
    optimizer: Literal["sgd", "adamw"] = "sgd"
    balance: float = 0.0
    weight_decay: float = 3e-5
    gradient_clip: float = 12.0
    ema_decay: float = 0.999
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    compile: bool = False
    seed: int = 0
    deterministic: bool = False
    loader_processes: int = 0
    threads: int | None = None
    early_stop_epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "iterations_per_epoch", "validation_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError("ema_decay must be from 0 to under 1")
        if not 0 <= self.balance <= 1:
            raise ValueError("balance must be from 0 to 1")
        if self.learning_rate <= 0 or self.gradient_clip <= 0:
            raise ValueError("learning_rate and gradient_clip must be positive")
        if self.deterministic and self.loader_processes:
            raise ValueError("deterministic runs have one loader: set loader_processes to 0")


@dataclass(frozen=True)
class Term:
    """One distillation term and its weight over time."""

    method: str
    weight: float
    start_epoch: int = 0
    ramp_epochs: int = 0
    options: Any = None  # the method's frozen options

    def weight_at(self, epoch: int) -> float:
        """λ(e): 0 before the start, then λ_max · ½(1 − cos(π · min((e − start)/ramp, 1))).

        Source: arXiv 2605.26382, equation 8. Without a ramp it is λ_max from the start on.
        """
        if epoch < self.start_epoch:
            return 0.0
        if self.ramp_epochs <= 0:
            return self.weight
        done = min((epoch - self.start_epoch) / self.ramp_epochs, 1.0)
        return self.weight * 0.5 * (1.0 - math.cos(math.pi * done))


@dataclass(frozen=True)
class Published:
    """What a paper says of the networks that a recipe is about, so that they can be checked without data.

    A ResidualEncoderUNet; every stage but the first halves all axes, unless ``last_stride`` says otherwise
    for the last. ``teacher_millions`` and ``student_millions`` are parameters as printed, deep-supervision
    heads counted.
    """

    source: str
    inputs: int
    outputs: int
    teacher_millions: str
    student_millions: str
    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    blocks: tuple[int, ...] = (1, 3, 4, 6, 6, 6)
    last_stride: tuple[int, ...] = (2, 2, 2)


@dataclass(frozen=True)
class DataRecipe:
    """Where batches come from: nnU-Net's loaders over preprocessed cases, or images drawn from label maps."""

    synthesis: SynthesisRecipe | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run. Without terms it is the baseline "none" that every gain is measured from."""

    name: str
    student: StudentRecipe = StudentRecipe()
    training: TrainingRecipe = TrainingRecipe()
    distillation: tuple[Term, ...] = ()
    published: Published | None = None
    data: DataRecipe = DataRecipe()
    note: str = ""

    @property
    def method(self) -> str:
        """The methods in one word, for tables and model cards: "none", "dcd", "dcd + logits"."""
        return " + ".join(term.method for term in self.distillation) or "none"

    @property
    def digest(self) -> str:
        """SHA-256 of everything that defines the run; a checkpoint of another recipe is not resumed."""
        content = asdict(self)
        # Later settings count only where they are used: runs begun before them can still be resumed.
        if self.data == DataRecipe():
            del content["data"]
        if self.student.channels is None:
            del content["student"]["channels"]
        for key in ("optimizer", "balance"):
            if getattr(self.training, key) == getattr(TrainingRecipe, key):
                del content["training"][key]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises
    ------
    RecipeError
        If the file is not there or not YAML, or anything in it is not understood.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {path} is not YAML: {error}.") from error
    return parse_recipe(content)


def parse_recipe(content: Any) -> Recipe:
    """A recipe from the mapping that its YAML holds. Raises RecipeError."""
    values = _mapping(content, "the recipe")
    terms = values.get("distillation") or []
    if not isinstance(terms, list):
        raise RecipeError("distillation must be a list of terms.", remedy="Write each as '- method: …'.")
    published = values.get("published")
    parsed: dict[str, Any] = {
        "data": _data(values.get("data")),
        "published": None if published is None else _build(Published, published, "published"),
        "student": _build(StudentRecipe, values.get("student"), "student"),
        "training": _build(TrainingRecipe, values.get("training"), "training"),
        "distillation": tuple(_term(term, f"distillation[{i}]") for i, term in enumerate(terms)),
    }
    return cast(Recipe, _build(Recipe, {**values, **parsed}, "the recipe"))


def _data(content: Any) -> DataRecipe:
    values = _mapping(content, "data")
    if "synthesis" not in values:
        return cast(DataRecipe, _build(DataRecipe, values, "data"))
    synthesis = _build(SynthesisRecipe, values["synthesis"], "data.synthesis")
    return cast(DataRecipe, _build(DataRecipe, {**values, "synthesis": synthesis}, "data"))


def _term(content: Any, where: str) -> Term:
    values = _mapping(content, where)
    if "method" not in values:
        raise RecipeError(f"{where} names no method.", remedy="Write '- method: dcd', for example.")
    options = parse_options(str(values["method"]), _mapping(values.get("options"), f"{where}.options"))
    return cast(Term, _build(Term, {**values, "options": options}, where))


def _mapping(content: Any, where: str) -> Mapping[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where} must be a mapping.", remedy="Write it as 'key: value' lines.")
    return content


def _build(kind: type, content: Any, where: str) -> Any:
    """An instance of a frozen dataclass from a mapping, every key and value checked."""
    values = _mapping(content, where)
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise RecipeError(
            f"{where} has no key {', '.join(map(repr, unknown))}.", remedy=f"Its keys are {', '.join(known)}."
        )
    try:
        return kind(**{key: _convert(value, hints[key]) for key, value in values.items()})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}.", remedy="Correct the recipe.") from error


def _convert(value: Any, hint: Any) -> Any:
    """A YAML value as what the dataclass wants. Raises ValueError."""
    if hint is Fraction:
        return Fraction(str(value))
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{value!r} is none of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_convert(item, typing.get_args(hint)[0]) for item in value)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = next(a for a in typing.get_args(hint) if a is not type(None))
        return None if value is None else _convert(value, inner)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is not hint:
        raise ValueError(f"{value!r} is not of type {hint.__name__}")
    if hint is float:
        raise ValueError(f"{value!r} is not a number")
    return value
