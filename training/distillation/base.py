"""The interface of a distillation method, and the pieces that several methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -1
"""The value of voxels in ``labels`` that count for nothing: nnU-Net's ignore label."""


@dataclass(frozen=True)
class Inputs:
    """What student and teacher made of one batch.

    Parameters
    ----------
    student_logits, teacher_logits : tuples of (N, K, Z, Y, X) tensors
        Finest resolution first; never after a softmax.
    student_features, teacher_features : tuples of (N, C, Z, Y, X) tensors
        One per encoder stage, finest first; empty where no method asks for them.
    labels : (N, Z, Y, X) tensor, int64
        The class of each voxel, `IGNORED` where none is given. For regions: the last region, in painting
        order, that holds the voxel, plus one.
    activation : "softmax" or "sigmoid"
        How logits become probabilities.
    """

    student_logits: tuple[Tensor, ...]
    teacher_logits: tuple[Tensor, ...]
    labels: Tensor
    student_features: tuple[Tensor, ...] = ()
    teacher_features: tuple[Tensor, ...] = ()
    activation: Literal["softmax", "sigmoid"] = "softmax"


@dataclass(frozen=True)
class Channels:
    """Channels of each encoder stage, finest first."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.student) == len(self.teacher), "a student has as many stages as its teacher"


class Method(nn.Module, ABC):
    """One distillation term. Its parameters (projections) are trained with the student, never exported."""

    needs_features: ClassVar[bool] = True

    def prepare(self, teacher: Any, batches: Iterable[Tensor], activation: str) -> None:
        """Learn on the teacher alone, before the student's first iteration. Most methods have nothing to.

        Parameters
        ----------
        teacher : module
            An nnU-Net network with ``encoder`` and ``decoder``, frozen.
        batches : iterable of (N, C, Z, Y, X) tensors
            Images as the teacher sees them in training.
        activation : "softmax" or "sigmoid"
        """

    @abstractmethod
    def forward(self, inputs: Inputs) -> Tensor:
        """The term as a scalar in float32; no gradient flows to the teacher."""


def chosen_stages(stages: tuple[int, ...] | None, n_stages: int) -> tuple[int, ...]:
    """The stages that a method works on: all of them, or the given ones (0 is the finest).

    Raises
    ------
    ValueError
        If a stage does not exist or stands there twice.
    """
    if stages is None:
        return tuple(range(n_stages))
    if not stages or len(set(stages)) != len(stages) or not set(stages) <= set(range(n_stages)):
        raise ValueError(f"stages {stages} must be some of 0 to {n_stages - 1}, each once")
    return stages


class Projections(nn.ModuleDict):
    """φ: a learnable 1x1x1 convolution per stage that brings student features to the teacher's channels."""

    def __init__(self, channels: Channels, stages: tuple[int, ...], *, learnable: bool = True) -> None:
        super().__init__(
            {
                str(i): nn.Conv3d(channels.student[i], channels.teacher[i], kernel_size=1, bias=False)
                for i in stages
            }
        )
        self.requires_grad_(learnable)

    def project(self, stage: int, features: Tensor) -> Tensor:
        """(N, C_student, Z, Y, X) to (N, C_teacher, Z, Y, X), in float32."""
        projected: Tensor = self[str(stage)](features.float())
        return projected


def labels_at(labels: Tensor, shape_zyx: tuple[int, ...]) -> Tensor:
    """Labels (N, Z, Y, X) on the grid of a coarser stage, by nearest neighbour."""
    if labels.shape[1:] == torch.Size(shape_zyx):
        return labels
    # Float64 holds every label exactly; nearest copies values and averages nothing.
    coarse = F.interpolate(labels[:, None].double(), size=shape_zyx, mode="nearest-exact")
    return coarse[:, 0].long()
