"""ReCo-style distillation: a reconstruction after the ideas of ReCo-KD (arXiv 2601.08301).

The paper's formulas are not reproduced here word for word, hence the name. Two terms:

* region: at each stage, squared differences of features, weighted so that every class of a sample counts
  as much whatever its size, and by the teacher's spatial and channel attention; plus the L1 distance of the
  attention maps themselves;
* context: the affinity of at most 8³ pooled tokens, G = X Xᵀ of L2-normalised tokens, compared by its mean
  squared error; no projection is needed for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.distillation.base import (
    IGNORED,
    Channels,
    Inputs,
    Method,
    Projections,
    chosen_stages,
    labels_at,
)

_TEMPERATURE = 0.5
_TOKENS = 8  # per axis


@dataclass(frozen=True)
class RecoOptions:
    """Weights of the three parts, and the stages (None takes all)."""

    region_weight: float = 1.0
    attention_weight: float = 1.0
    context_weight: float = 1.0
    stages: tuple[int, ...] | None = None


def spatial_attention(features: Tensor) -> Tensor:
    """A_sp = V · softmax over voxels of (mean over channels of |F|) / 0.5: (N, C, Z, Y, X) to (N, V)."""
    strength = features.abs().mean(dim=1).flatten(1)
    return strength.shape[1] * torch.softmax(strength / _TEMPERATURE, dim=1)


def channel_attention(features: Tensor) -> Tensor:
    """A_ch = C · softmax over channels of (mean over voxels of |F|) / 0.5: (N, C, Z, Y, X) to (N, C)."""
    strength = features.abs().flatten(2).mean(dim=2)
    return strength.shape[1] * torch.softmax(strength / _TEMPERATURE, dim=1)


def class_balance(labels: Tensor) -> Tensor:
    """1/n_y for a voxel of a class with n_y voxels in its sample, 0 if ignored: (N, Z, Y, X) to (N, V)."""
    classes = labels.flatten(1) + 1
    counts = F.one_hot(classes, int(classes.max()) + 1).sum(dim=1)  # (N, K + 1)
    weights = 1.0 / torch.gather(counts, 1, classes)
    return weights * (labels.flatten(1) != IGNORED)


def token_affinity(features: Tensor) -> Tensor:
    """G = X Xᵀ of at most 8³ pooled, L2-normalised tokens: (N, C, Z, Y, X) to (N, T, T)."""
    z, y, x = (min(_TOKENS, n) for n in features.shape[2:])
    tokens = F.adaptive_avg_pool3d(features, (z, y, x)).flatten(2).transpose(1, 2)  # (N, T, C)
    tokens = F.normalize(tokens, dim=2, eps=1e-8)
    return tokens @ tokens.transpose(1, 2)


class Reco(Method):
    """Region-balanced, attention-weighted features and pooled context."""

    def __init__(self, options: RecoOptions, channels: Channels) -> None:
        super().__init__()
        self.options = options
        self.stages = chosen_stages(options.stages, len(channels.teacher))
        self.projections = Projections(channels, self.stages)

    def forward(self, inputs: Inputs) -> Tensor:
        total = inputs.student_logits[0].new_zeros((), dtype=torch.float32)
        for i in self.stages:
            teacher = inputs.teacher_features[i].detach().float()
            student = inputs.student_features[i].float()
            projected = self.projections.project(i, student)
            labels = labels_at(inputs.labels, tuple(teacher.shape[2:]))
            total = total + self._region(projected, teacher, labels)
            total = total + self.options.context_weight * F.mse_loss(
                token_affinity(student), token_affinity(teacher)
            )
        return total

    def _region(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        n, c = teacher.shape[:2]
        spatial, channel = spatial_attention(teacher), channel_attention(teacher)
        squared = (teacher - student).square().flatten(2)  # (N, C, V)
        weights = class_balance(labels)[:, None] * spatial[:, None] * channel[:, :, None]
        # Σ of the formula over voxels and channels, divided by N and, so that wide stages do not drown
        # the others, by C.
        region = (weights * squared).sum() / (n * c)
        attention = F.l1_loss(spatial_attention(student), spatial) + F.l1_loss(
            channel_attention(student), channel
        )
        return self.options.region_weight * region + self.options.attention_weight * attention
