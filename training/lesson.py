"""What one iteration computes: student and teacher on one batch, the segmentation loss, the extra terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from training.distillation.base import IGNORED, Channels, Inputs, Method
from training.distillation.registry import build_method
from training.recipe import Term


class Teacher:
    """One or several frozen folds. Logits are averaged over the folds; features are the first fold's.

    Features of different folds live in different spaces, and their mean would mean nothing.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        assert networks, "a teacher has at least one fold"
        self.networks = [network.eval().requires_grad_(False) for network in networks]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits (finest first) and encoder features (finest first) of (N, C, Z, Y, X) images."""
        features, logits = encode_decode(self.networks[0], images)
        for network in self.networks[1:]:
            _, more = encode_decode(network, images)
            logits = tuple(a + b for a, b in zip(logits, more, strict=True))
        return tuple(x / len(self.networks) for x in logits), features


def encode_decode(network: Any, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Encoder features and logits, both finest first, of one of nnU-Net's U-Nets.

    The two halves are called one after the other, so no hook is needed that could leak or be forgotten.
    """
    features = network.encoder(images)
    logits = network.decoder(features)
    return tuple(features), tuple(logits) if isinstance(logits, (list, tuple)) else (logits,)


class Lesson(nn.Module):
    """The student with all that is trained beside it: one module, so that DDP sees every parameter.

    Parameters
    ----------
    student : nn.Module
        An nnU-Net network with deep supervision on.
    terms : sequence of Term
        The recipe's distillation terms.
    channels : Channels
        Features of each encoder stage of student and teacher.
    segmentation_loss : callable
        nnU-Net's loss over the list of outputs and the list of targets.
    """

    def __init__(
        self,
        student: nn.Module,
        terms: Sequence[Term],
        channels: Channels,
        segmentation_loss: Callable[[list[Tensor], list[Tensor]], Tensor],
        activation: Literal["softmax", "sigmoid"],
    ) -> None:
        super().__init__()
        self.student = student
        self.methods = nn.ModuleList(build_method(t.method, t.options, channels) for t in terms)
        self.segmentation_loss = segmentation_loss
        self.activation = activation

    def method_list(self) -> list[Method]:
        return [method for method in self.methods if isinstance(method, Method)]

    def forward(
        self,
        images: Tensor,
        targets: list[Tensor],
        labels: Tensor,
        teacher: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None,
        weights: Sequence[float],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and each term by itself (unweighted, detached).

        A term whose weight is zero at present is not computed, so a schedule that starts late costs nothing
        before its start.
        """
        features, logits = encode_decode(self.student, images)
        # Autocast is for the networks' convolutions alone. On a CPU it would also run the softmax, the sums
        # of the Dice and the wavelets in bfloat16, whose eight bits of precision are not enough for a sum.
        with torch.autocast(images.device.type, enabled=False):
            return self._losses(_in_float32(features), _in_float32(logits), targets, labels, teacher, weights)

    def _losses(
        self,
        features: tuple[Tensor, ...],
        logits: tuple[Tensor, ...],
        targets: list[Tensor],
        labels: Tensor,
        teacher: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None,
        weights: Sequence[float],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = self.segmentation_loss(list(logits), targets)
        parts = {"segmentation": total.detach()}
        if teacher is None:
            return total, parts
        inputs = Inputs(
            student_logits=logits,
            teacher_logits=_in_float32(teacher[0]),
            labels=labels,
            student_features=features,
            teacher_features=_in_float32(teacher[1]),
            activation=self.activation,
        )
        for i, (method, weight) in enumerate(zip(self.method_list(), weights, strict=True)):
            if weight == 0.0:
                continue
            term = method(inputs)
            total = total + weight * term
            parts[f"{i}:{type(method).__name__.lower()}"] = term.detach()
        return total, parts


def _in_float32(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in maps)


def labels_of(target: Tensor, *, regions: bool, ignore_label: int | None) -> Tensor:
    """The (N, Z, Y, X) classes of nnU-Net's finest target.

    Parameters
    ----------
    target : (N, 1, Z, Y, X) tensor of labels, or (N, R[+1], Z, Y, X) of regions
        With an ignore label, region targets have one channel more, which marks what is ignored.
    """
    if not regions:
        labels = target[:, 0].long()
        if ignore_label is not None:
            labels = torch.where(labels == ignore_label, IGNORED, labels)
        return labels
    ignored = None
    if ignore_label is not None:
        ignored, target = target[:, -1].bool(), target[:, :-1]
    order = torch.arange(1, target.shape[1] + 1, device=target.device).view(1, -1, 1, 1, 1)
    labels = (target.bool() * order).amax(dim=1)  # the last region, in painting order, wins
    return labels if ignored is None else torch.where(ignored, IGNORED, labels)
