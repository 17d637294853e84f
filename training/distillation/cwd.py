"""Channel-wise distillation (arXiv 2011.13256).

Each channel is turned into a distribution over space, φ_c(u) = softmax_u(F_c(u)/τ), and the distributions are
compared: τ²/(N·C) Σ φ_T log(φ_T/φ_S). On logits the paper uses τ = 4 and a weight of 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from training.distillation.base import Channels, Inputs, Method, Projections, chosen_stages


@dataclass(frozen=True)
class CwdOptions:
    """``on`` says what is compared; ``stages`` counts for features only."""

    temperature: float = 4.0
    on: Literal["logits", "features"] = "logits"
    stages: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.on not in ("logits", "features"):
            raise ValueError("temperature must be positive, and on is logits or features")


def spatial_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """τ²/(N·C) Σ_{n,c} KL of the channels' distributions over space, for (N, C, Z, Y, X) tensors."""
    log_s = F.log_softmax(student.float().flatten(2) / temperature, dim=2)
    log_t = F.log_softmax(teacher.detach().float().flatten(2) / temperature, dim=2)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=2).mean()


class Cwd(Method):
    """Where each channel looks, rather than how strongly."""

    def __init__(self, options: CwdOptions, channels: Channels) -> None:
        super().__init__()
        self.options = options
        on_features = options.on == "features"
        self.stages = chosen_stages(options.stages, len(channels.teacher)) if on_features else ()
        self.projections = Projections(channels, self.stages)

    def forward(self, inputs: Inputs) -> Tensor:
        tau = self.options.temperature
        if self.options.on == "logits":
            return spatial_divergence(inputs.student_logits[0], inputs.teacher_logits[0], tau)
        terms = [
            spatial_divergence(
                self.projections.project(i, inputs.student_features[i]), inputs.teacher_features[i], tau
            )
            for i in self.stages
        ]
        return torch.stack(terms).sum()
