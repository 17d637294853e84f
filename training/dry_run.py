"""Check a recipe without its data: its networks have the parameters that its paper printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from training.errors import RecipeError
from training.recipe import Published, Recipe
from training.student import (
    build_network,
    count_parameters,
    residual_encoder,
    scaled_features,
)


@dataclass(frozen=True)
class Checked:
    """Parameters of both networks, in millions with the paper's number of digits."""

    teacher_millions: str
    student_millions: str


def dry_run(recipe: Recipe) -> Checked:
    """Build a recipe's teacher and student as its paper describes them, and count.

    Raises
    ------
    RecipeError
        If the recipe names no paper, or a count is not the printed one.
    """
    published = recipe.published
    if published is None:
        raise RecipeError(
            f"Recipe {recipe.name!r} says nothing of published networks.",
            remedy="Add 'published:' to it, or run segnode-train plan on the teacher's folder.",
        )
    student = recipe.student
    planned = list(published.features)
    counted = []
    for what, features, printed in (
        ("teacher", planned, published.teacher_millions),
        (
            "student",
            scaled_features(planned, student.width, student.round_to, student.channels),
            published.student_millions,
        ),
    ):
        with torch.device("meta"):
            network = build_network(_configuration(published, features), published.inputs, published.outputs)
        digits = len(printed.partition(".")[2])
        millions = f"{count_parameters(network) / 1e6:.{digits}f}"
        if millions != printed:
            raise RecipeError(
                f"The {what} of {recipe.name!r} has {millions} M parameters, the paper prints {printed} M.",
                remedy="Correct the recipe's features, width or strides.",
            )
        counted.append(millions)
    return Checked(*counted)


def _configuration(published: Published, features: list[int]) -> dict[str, Any]:
    """nnU-Net's description of a ResidualEncoderUNet, as its planner writes it."""
    strides = [[1, 1, 1], *[[2, 2, 2]] * (len(features) - 2), published.last_stride]
    return {"architecture": residual_encoder(features, published.blocks, strides)}
