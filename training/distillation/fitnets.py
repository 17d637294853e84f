"""FitNets (arXiv 1412.6550) at every encoder stage: mean ‖F_T − φ(F_S)‖²."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.distillation.base import Channels, Inputs, Method, Projections, chosen_stages


@dataclass(frozen=True)
class FitnetsOptions:
    """``stages``: which encoder stages; None takes all."""

    stages: tuple[int, ...] | None = None


class Fitnets(Method):
    """The teacher's features as targets, voxel for voxel."""

    def __init__(self, options: FitnetsOptions, channels: Channels) -> None:
        super().__init__()
        self.stages = chosen_stages(options.stages, len(channels.teacher))
        self.projections = Projections(channels, self.stages)

    def forward(self, inputs: Inputs) -> Tensor:
        terms = [
            F.mse_loss(
                self.projections.project(i, inputs.student_features[i]),
                inputs.teacher_features[i].detach().float(),
            )
            for i in self.stages
        ]
        return torch.stack(terms).sum()
