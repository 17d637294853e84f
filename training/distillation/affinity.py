"""Class affinity: which classes the teacher confuses with which.

With P the (K, V) class probabilities of a sample, A = P Pᵀ is a (K, K) matrix whatever the width of the
network. The term is 1 − cos(A_S, A_T), averaged over the samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.distillation.base import IGNORED, Channels, Inputs, Method


@dataclass(frozen=True)
class AffinityOptions:
    """Nothing to choose."""


def affinity(logits: Tensor, valid: Tensor, activation: str) -> Tensor:
    """A = P Pᵀ of each sample over its valid voxels: (N, K, Z, Y, X) and (N, Z, Y, X) to (N, K·K)."""
    z = logits.float().flatten(2)
    p = torch.softmax(z, dim=1) if activation == "softmax" else torch.sigmoid(z)
    p = p * valid.flatten(1)[:, None]
    return torch.einsum("nkv,nlv->nkl", p, p).flatten(1)


class Affinity(Method):
    """Agreement of the class-by-class affinity matrices."""

    needs_features = False

    def __init__(self, options: AffinityOptions, channels: Channels) -> None:
        super().__init__()

    def forward(self, inputs: Inputs) -> Tensor:
        valid = inputs.labels != IGNORED
        student = affinity(inputs.student_logits[0], valid, inputs.activation)
        teacher = affinity(inputs.teacher_logits[0].detach(), valid, inputs.activation)
        return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()
