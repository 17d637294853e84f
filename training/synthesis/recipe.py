"""How widely synthetic samples vary: the part of a recipe under ``data: synthesis``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Contrast = Literal["random", "t1", "t2", "flair"]
Keep = Literal["head", "brain and CSF", "brain with a margin", "brain"]

CONTRASTS: tuple[Contrast, ...] = ("t1", "random", "t2", "flair")
KEEPS: tuple[Keep, ...] = ("head", "brain and CSF", "brain with a margin", "brain")


@dataclass(frozen=True)
class SynthesisRecipe:
    """How widely samples vary. Probabilities are of one sample; lengths are in mm, whatever the grid.

    ``contrasts``: shares of T1-like, random, T2-like and FLAIR-like images. ``keeps``: shares of whole heads,
    brain with CSF, brain with a margin, brain alone. ``near_mm`` and ``far_mm``: how far the patch's middle
    lies from the brain's, at most and along each axis; far for ``far_probability`` of the samples, since a
    sliding window shows the network such places too. ``cut_probability``: the field of view ends inside of
    the patch.
    """

    contrasts: tuple[float, ...] = (0.5, 0.3, 0.1, 0.1)
    keeps: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)
    flip_probability: float = 0.5
    rotation_degrees: float = 18.0
    scaling: float = 0.15
    shearing: float = 0.012
    knot_mm: float = 24.0
    displacement_sd_mm: float = 3.5
    near_mm: float = 12.0
    far_mm: float = 48.0
    far_probability: float = 0.4
    cut_probability: float = 0.15
    bias_knot_mm: float = 70.0
    bias_log_sd: float = 0.3
    thick_probability: float = 0.4
    thickest_mm: float = 7.0
    noise_sd: float = 12.0
    log_gamma_sd: float = 0.25

    def __post_init__(self) -> None:
        for name, wanted in (("contrasts", len(CONTRASTS)), ("keeps", len(KEEPS))):
            shares = getattr(self, name)
            if len(shares) != wanted or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
                raise ValueError(f"{name} must be {wanted} shares that sum to 1")
        for name in ("knot_mm", "bias_knot_mm", "thickest_mm"):
            if getattr(self, name) <= 2:
                raise ValueError(f"{name} must be over 2 mm")
