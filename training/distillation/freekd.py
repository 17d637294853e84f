"""FreeKD-style distillation (arXiv 2311.12079) in three dimensions: details, weighted by learned prompts.

A Haar transform with J levels takes each stage's features apart; H is a detail orientation of a level. T
prompts p_t, one vector over the teacher's channels each, give masks M_t = σ(Σ_c p_{t,c} H_c), and M is their
mean. The prompts are learned on the teacher first: its finest details are multiplied by M, and the prompts
are changed so that its output stays what it was while the masks stay apart from each other (by their Dice
overlap). Then they are frozen, and the student, aligned by φ, follows the masked details:
Σ_stages Σ_levels mean |M ⊙ (H_S − H_T)|.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.distillation.base import Channels, Inputs, Method, Projections, chosen_stages
from training.distillation.logits import soft_divergence
from training.wavelets import ALL_BANDS, WaveletTransform, octant

_DETAILS = tuple(band for band in ALL_BANDS if band != "LLL")


@dataclass(frozen=True)
class FreekdOptions:
    """``diversity_weight`` keeps the prompts apart while they are learned."""

    levels: int = 3
    prompts: int = 6
    prompt_iterations: int = 100
    prompt_learning_rate: float = 0.01
    diversity_weight: float = 0.1
    stages: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.levels < 1 or self.prompts < 1 or self.prompt_iterations < 1:
            raise ValueError("levels, prompts and prompt_iterations must be at least 1")


def haar_levels(shape_zyx: tuple[int, ...], levels: int) -> int:
    """Levels for which every axis still has two voxels to compare."""
    possible = 0
    size = min(shape_zyx)
    while size >= 2 and possible < levels:
        size, possible = (size + 1) // 2, possible + 1
    return possible


class Freekd(Method):
    """The teacher's details where its prompts say that they matter."""

    def __init__(self, options: FreekdOptions, channels: Channels) -> None:
        super().__init__()
        self.options = options
        self.stages = chosen_stages(options.stages, len(channels.teacher))
        self.projections = Projections(channels, self.stages)
        self.transform = WaveletTransform("haar")
        self.prompts = nn.ParameterDict(
            {str(i): torch.randn(options.prompts, channels.teacher[i]) for i in self.stages}
        ).requires_grad_(False)
        self.learned: Tensor
        self.register_buffer("learned", torch.tensor(False))

    def masks(self, stage: int, details: Tensor) -> Tensor:
        """M_t of one orientation: (N, C, Z, Y, X) to (N, T, Z, Y, X), between 0 and 1."""
        prompts: Tensor = self.prompts[str(stage)]
        return torch.sigmoid(torch.einsum("tc,nczyx->ntzyx", prompts, details))

    def forward(self, inputs: Inputs) -> Tensor:
        assert bool(self.learned), "prepare() learns the prompts before the first iteration"
        total = inputs.student_logits[0].new_zeros((), dtype=torch.float32)
        for i in self.stages:
            student = self.projections.project(i, inputs.student_features[i])
            teacher = inputs.teacher_features[i].detach().float()
            for _ in range(haar_levels(tuple(teacher.shape[2:]), self.options.levels)):
                student, teacher = self.transform(student), self.transform(teacher)
                shape = tuple(teacher.shape[2:])
                terms = []
                for band in _DETAILS:
                    s, t = student[octant(band, shape)], teacher[octant(band, shape)]
                    mask = self.masks(i, t).mean(dim=1, keepdim=True)
                    terms.append((mask * (s - t)).abs().mean())
                total = total + torch.stack(terms).mean()
                student, teacher = student[octant("LLL", shape)], teacher[octant("LLL", shape)]
        return total

    def prepare(self, teacher: Any, batches: Iterable[Tensor], activation: str) -> None:
        if bool(self.learned):
            return
        self.prompts.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.prompts.parameters(), lr=self.options.prompt_learning_rate)
        for images, _ in zip(batches, range(self.options.prompt_iterations), strict=False):
            with torch.no_grad():
                features: Sequence[Tensor] = teacher.encoder(images)
                wanted = _finest(teacher.decoder(list(features)))
            masked, overlaps = list(features), []
            for i in self.stages:
                masked[i], overlap = self._mask_details(i, features[i].float())
                overlaps.append(overlap)
            output = _finest(teacher.decoder(masked))
            valid = torch.ones_like(output[:, 0], dtype=torch.bool)
            loss = soft_divergence(output, wanted, valid, 1.0, activation)
            loss = loss + self.options.diversity_weight * torch.stack(overlaps).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self.prompts.requires_grad_(False)
        self.learned.fill_(True)

    def _mask_details(self, stage: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features with the details of the first level under the mask, and how much the masks overlap."""
        shape = tuple(features.shape[2:])
        if min(shape) < 2:
            return features, features.new_zeros(())
        coefficients = self.transform(features)
        masked, overlaps = coefficients.clone(), []
        for band in _DETAILS:
            where = octant(band, tuple(coefficients.shape[2:]))
            masks = self.masks(stage, coefficients[where])
            masked[where] = coefficients[where] * masks.mean(dim=1, keepdim=True)
            overlaps.append(mask_overlap(masks))
        return self.transform.inverse(masked, shape), torch.stack(overlaps).mean()


def _finest(output: Tensor | Sequence[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def mask_overlap(masks: Tensor) -> Tensor:
    """Mean soft Dice between different masks of (N, T, Z, Y, X): 1 if they are all the same."""
    flat = masks.flatten(2)
    t = flat.shape[1]
    if t == 1:
        return flat.new_zeros(())
    products = torch.einsum("nav,nbv->nab", flat, flat)
    squares = torch.diagonal(products, dim1=1, dim2=2)
    dice = 2 * products / (squares[:, :, None] + squares[:, None, :]).clamp(min=1e-8)
    off_diagonal = ~torch.eye(t, dtype=torch.bool, device=masks.device)
    return dice[:, off_diagonal].mean()
