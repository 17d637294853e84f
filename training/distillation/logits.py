"""Logit distillation (arXiv 2601.09191, equations 1 to 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.distillation.base import IGNORED, Channels, Inputs, Method, labels_at


@dataclass(frozen=True)
class LogitsOptions:
    """``temperature`` softens both sides; ``scales`` counts the deep-supervision outputs, finest first.

    The paper gives neither temperature nor weight; 3 is what close public work uses.
    """

    temperature: float = 3.0
    scales: int = 1

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.scales < 1:
            raise ValueError("temperature must be positive and scales at least 1")


def soft_divergence(
    student: Tensor, teacher: Tensor, valid: Tensor, temperature: float, activation: str
) -> Tensor:
    """τ² · mean over valid voxels of Σ_c KL(teacher ‖ student), in float32.

    For a sigmoid head each channel is a Bernoulli variable of its own.

    Parameters
    ----------
    student, teacher : (N, K, Z, Y, X) tensors
        Logits.
    valid : (N, Z, Y, X) tensor, bool
        Voxels that count.
    """
    s, t = student.float() / temperature, teacher.detach().float() / temperature
    if activation == "softmax":
        log_s, log_t = F.log_softmax(s, dim=1), F.log_softmax(t, dim=1)
        divergence = (log_t.exp() * (log_t - log_s)).sum(dim=1)
    else:
        on = torch.sigmoid(t) * (F.logsigmoid(t) - F.logsigmoid(s))
        off = torch.sigmoid(-t) * (F.logsigmoid(-t) - F.logsigmoid(-s))
        divergence = (on + off).sum(dim=1)
    return temperature**2 * (divergence * valid).sum() / valid.sum().clamp(min=1)


class Logits(Method):
    """The teacher's probabilities as soft labels."""

    needs_features = False

    def __init__(self, options: LogitsOptions, channels: Channels) -> None:
        super().__init__()
        self.options = options

    def forward(self, inputs: Inputs) -> Tensor:
        pairs = list(zip(inputs.student_logits, inputs.teacher_logits, strict=True))[: self.options.scales]
        weights = [2.0**-i for i in range(len(pairs))]  # as nnU-Net weights its deep supervision
        terms = [
            soft_divergence(
                student,
                teacher,
                labels_at(inputs.labels, tuple(student.shape[2:])) != IGNORED,
                self.options.temperature,
                inputs.activation,
            )
            for student, teacher in pairs
        ]
        weighted = torch.stack([w * term for w, term in zip(weights, terms, strict=True)])
        return weighted.sum() / sum(weights)
