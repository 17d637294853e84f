"""Intra-class feature variation distillation (ECCV 2020, "Intra-class Feature Variation Distillation").

Per sample and class k the centre is μ_k = mean of F_u over the voxels of the class, and each voxel's
variation is v_u = cos(F_u, μ_{y_u}); the term is mean_u (v_S − v_T)². The angles are compared, never the
features, so no projection is needed. The adversarial term of the full recipe is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.distillation.base import IGNORED, Channels, Inputs, Method, chosen_stages, labels_at


@dataclass(frozen=True)
class IfvdOptions:
    """``stages``: which encoder stages; None takes all."""

    stages: tuple[int, ...] | None = None


def variation_map(features: Tensor, labels: Tensor) -> Tensor:
    """The cosine of every voxel's features with the centre of its class.

    Parameters
    ----------
    features : (N, C, Z, Y, X) tensor
    labels : (N, Z, Y, X) tensor, int64
        Ignored voxels form a class of their own, so that every voxel has a centre.

    Returns
    -------
    (N, V) tensor
        V = Z·Y·X voxels.
    """
    flat = features.float().flatten(2)  # (N, C, V)
    classes = (labels.flatten(1) + 1).clamp(min=0)  # (N, V), IGNORED = -1 becomes 0
    n_classes = int(classes.max()) + 1
    membership = F.one_hot(classes, n_classes).to(flat.dtype)  # (N, V, K)
    sums = torch.einsum("ncv,nvk->nck", flat, membership)
    centres = sums / membership.sum(dim=1).clamp(min=1)[:, None]  # (N, C, K)
    own = torch.gather(centres, 2, classes[:, None].expand(-1, flat.shape[1], -1))  # (N, C, V)
    return F.cosine_similarity(flat, own, dim=1, eps=1e-8)


class Ifvd(Method):
    """How the voxels of one class spread around its centre."""

    def __init__(self, options: IfvdOptions, channels: Channels) -> None:
        super().__init__()
        self.stages = chosen_stages(options.stages, len(channels.teacher))

    def forward(self, inputs: Inputs) -> Tensor:
        terms = []
        for i in self.stages:
            student, teacher = inputs.student_features[i], inputs.teacher_features[i].detach()
            labels = labels_at(inputs.labels, tuple(student.shape[2:]))
            valid = labels.flatten(1) != IGNORED
            squared = (variation_map(student, labels) - variation_map(teacher, labels)).square()
            terms.append((squared * valid).sum() / valid.sum().clamp(min=1))
        return torch.stack(terms).sum()
