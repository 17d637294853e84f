"""Detail Consistent Distillation (arXiv 2605.26382, equations 2 to 8).

At every encoder stage the student's features, brought to the teacher's channels by φ, must agree with the
teacher's in the detail bands of a wavelet transform; what is in LLL (meaning) and HHH (noise) is left free:

    ℓ_i = (1/J) Σ_j mean ‖P_j(φ_i(F_i^S)) − P_j(F_i^T)‖²,    L = Σ_i ℓ_i.

The exact variant uses an orthonormal transform. The ``released`` variant reproduces what the published code
does where it differs from the paper: a correlation in place of the convolution of the synthesis (so that
analysis and synthesis are no longer adjoint), a φ that is never trained, zero padding at the border, and a
fixed number of levels, each inverted by itself to the size of its own input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pywt
import torch
from torch import Tensor
from torch.nn import functional as F

from training.distillation.base import Channels, Inputs, Method, Projections, chosen_stages
from training.wavelets import ALL_BANDS, DETAIL_BANDS, detail_coefficients, detail_parts, exact_levels


@dataclass(frozen=True)
class DcdOptions:
    """Every choice of the method; the defaults are the paper's.

    ``idwt`` compares in space as the formula says; without it the coefficients are compared, which by
    Parseval is the same up to rounding for even sizes. ``small_maps`` says what happens at stages that are
    too small for one level of the wavelet: Haar in its place, or nothing.
    """

    wavelet: str = "db4"
    levels: int = 3
    bands: tuple[str, ...] = DETAIL_BANDS
    idwt: bool = True
    stages: tuple[int, ...] | None = None
    learnable_projection: bool = True
    small_maps: Literal["haar", "skip"] = "haar"
    variant: Literal["exact", "released"] = "exact"

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError("levels must be at least 1")
        if not self.bands or not set(self.bands) <= set(ALL_BANDS):
            raise ValueError(f"bands must be some of {', '.join(ALL_BANDS)}")
        if self.small_maps not in ("haar", "skip") or self.variant not in ("exact", "released"):
            raise ValueError("small_maps is haar or skip, and variant is exact or released")
        if self.wavelet not in pywt.wavelist(kind="discrete") or not pywt.Wavelet(self.wavelet).orthogonal:
            raise ValueError(f"wavelet {self.wavelet!r} is not an orthogonal wavelet")


class Dcd(Method):
    """Agreement of student and teacher in the detail bands of every stage."""

    def __init__(self, options: DcdOptions, channels: Channels) -> None:
        super().__init__()
        self.options = options
        self.stages = chosen_stages(options.stages, len(channels.teacher))
        learnable = options.learnable_projection and options.variant == "exact"
        self.projections = Projections(channels, self.stages, learnable=learnable)

    def forward(self, inputs: Inputs) -> Tensor:
        total = inputs.student_logits[0].new_zeros((), dtype=torch.float32)
        for i in self.stages:
            student, teacher = inputs.student_features[i].float(), inputs.teacher_features[i].detach().float()
            if self.options.variant == "released":
                difference = self.projections.project(i, student) - teacher
                total = total + released_detail_loss(difference, self.options)
            else:
                project = partial(self.projections.project, i)
                total = total + exact_detail_loss(student, teacher, project, self.options)
        return total


def exact_detail_loss(
    student: Tensor, teacher: Tensor, project: Callable[[Tensor], Tensor], options: DcdOptions
) -> Tensor:
    """(1/J) Σ_j mean ‖P_j(φ(student)) − P_j(teacher)‖², orthonormal; zero where a map has no level.

    φ mixes channels and P_j mixes voxels, so they commute: φ(P_j(student)) is computed, which transforms and
    differentiates the student's few channels where P_j(φ(student)) would those of the teacher.

    Parameters
    ----------
    student : (N, C_student, Z, Y, X) tensor
    teacher : (N, C_teacher, Z, Y, X) tensor
    project : callable
        φ, linear and without a bias: (N, C_student, ...) to (N, C_teacher, ...).
    """
    shape = tuple(teacher.shape[2:])
    wavelet = options.wavelet
    levels = exact_levels(shape, options.levels, pywt.Wavelet(wavelet).dec_len)
    if levels == 0:
        if options.small_maps == "skip" or min(shape) < 2:
            return student.sum() * 0.0
        wavelet, levels = "haar", 1
    part = partial(detail_parts if options.idwt else detail_coefficients, levels=levels, bands=options.bands)
    student_parts = part(student.contiguous(), wavelet=wavelet)
    with torch.no_grad():
        teacher_parts = part(teacher.contiguous(), wavelet=wavelet)
    energies = [
        F.mse_loss(project(s), t, reduction="sum") for s, t in zip(student_parts, teacher_parts, strict=True)
    ]
    return torch.stack(energies).mean() / teacher.numel()


def _released_filters(wavelet: str, band: str, kind: Literal["dec", "rec"], like: Tensor) -> Tensor:
    """The separable 3D filter of a band as a (1, 1, k, k, k) kernel, taps in PyWavelets' own order."""
    w = pywt.Wavelet(wavelet)
    taps = {"L": getattr(w, f"{kind}_lo"), "H": getattr(w, f"{kind}_hi")}
    z, y, x = (like.new_tensor(taps[letter]) for letter in band)
    return torch.einsum("z,y,x->zyx", z, y, x)[None, None]


def released_detail_loss(difference: Tensor, options: DcdOptions) -> Tensor:
    """The published code's variant: see the module's text. Kept for comparison only."""
    n, c = difference.shape[:2]
    current = difference.reshape(n * c, 1, *difference.shape[2:])
    padding = pywt.Wavelet(options.wavelet).dec_len // 2 - 1
    losses = []
    for _ in range(options.levels):
        shape = tuple(current.shape[2:])
        if min(shape) < 2:
            break
        rebuilt = torch.zeros_like(current)
        for band in options.bands:
            analysed = F.conv3d(
                current, _released_filters(options.wavelet, band, "dec", current), stride=2, padding=padding
            )
            synthesis = _released_filters(options.wavelet, band, "rec", current)
            back = F.conv_transpose3d(analysed, synthesis, stride=2, padding=padding)
            missing = [
                p
                for have, want in zip(reversed(back.shape[2:]), reversed(shape), strict=True)
                for p in (0, want - have)
            ]
            rebuilt = rebuilt + F.pad(back, missing)  # negative padding crops
        losses.append(rebuilt.square().mean())
        low = _released_filters(options.wavelet, "LLL", "dec", current)
        current = F.conv3d(current, low, stride=2, padding=padding)
    return torch.stack(losses).mean() if losses else difference.sum() * 0.0
