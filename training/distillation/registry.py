"""The methods by name, as recipes write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from training.distillation.affinity import Affinity, AffinityOptions
from training.distillation.base import Channels, Method
from training.distillation.cwd import Cwd, CwdOptions
from training.distillation.dcd import Dcd, DcdOptions
from training.distillation.fitnets import Fitnets, FitnetsOptions
from training.distillation.freekd import Freekd, FreekdOptions
from training.distillation.ifvd import Ifvd, IfvdOptions
from training.distillation.logits import Logits, LogitsOptions
from training.distillation.reco import Reco, RecoOptions
from training.errors import RecipeError


class _Entry(NamedTuple):
    options: Any  # a frozen dataclass
    method: Any  # (options, channels) -> Method


METHODS: Mapping[str, _Entry] = {
    "logits": _Entry(LogitsOptions, Logits),
    "dcd": _Entry(DcdOptions, Dcd),
    "reco": _Entry(RecoOptions, Reco),
    "cwd": _Entry(CwdOptions, Cwd),
    "ifvd": _Entry(IfvdOptions, Ifvd),
    "fitnets": _Entry(FitnetsOptions, Fitnets),
    "freekd": _Entry(FreekdOptions, Freekd),
    "affinity": _Entry(AffinityOptions, Affinity),
}


def parse_options(name: str, values: Mapping[str, Any]) -> Any:
    """The options of a method from a recipe's mapping; lists become tuples.

    Raises
    ------
    RecipeError
        If the method, or an option of it, does not exist, or a value is not allowed.
    """
    if name not in METHODS:
        raise RecipeError(
            f"There is no distillation method {name!r}.", remedy=f"Use one of {', '.join(METHODS)}."
        )
    options = METHODS[name].options
    known = [f.name for f in fields(options)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RecipeError(
            f"Method {name!r} has no option {', '.join(map(repr, unknown))}.",
            remedy=f"Its options are {', '.join(known) or 'none at all'}.",
        )
    try:
        return options(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (ValueError, TypeError) as error:
        raise RecipeError(f"Method {name!r}: {error}.", remedy="Correct the recipe.") from error


def build_method(name: str, options: Any, channels: Channels) -> Method:
    """A fresh method for networks with the given channels."""
    method: Method = METHODS[name].method(options, channels)
    return method
