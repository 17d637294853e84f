"""nnU-Net's Dice plus cross-entropy, with its gradient written out.

With thirty classes at the resolution of a whole head, automatic differentiation through the softmax, the sums
and the logarithm costs more time on a CPU than a small network itself. This computes the same numbers in a
third of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SMOOTH = 1e-5


class DiceCrossEntropy(nn.Module):
    """−(mean soft Dice of the foreground classes of each sample) + mean cross-entropy.

    The same as nnU-Net's ``DC_and_CE_loss`` without an ignore label, background left out of the Dice, and
    one Dice a sample (``batch_dice`` false); see nnunetv2.training.loss.

    Parameters
    ----------
    balance : float
        From 0 (every voxel counts the same, as in nnU-Net) to 1 (every class of a sample does). The
        cross-entropy of a voxel whose class has n of the M voxels is weighted by (M / (C n))^balance.
        A softmax over thirty classes that has not found a small one yet hardly moves towards it otherwise.
    """

    def __init__(self, balance: float = 0.0) -> None:
        super().__init__()
        self.balance = balance

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C, Z, Y, X), float32, for labels (N, 1, Z, Y, X)."""
        n, classes = logits.shape[:2]
        voxels_last = logits.movedim(1, -1).reshape(n, -1, classes)  # no copy where channels lie last
        labels = target.reshape(n, -1, 1).long()
        loss: Tensor = _DiceCrossEntropy.apply(voxels_last, labels, self.balance)  # type: ignore[no-untyped-call]
        return loss


class _DiceCrossEntropy(torch.autograd.Function):
    """On logits z (N, M, C) and labels y (N, M, 1).

    With p = softmax(z), n_k = Σ_u [y = k], I_k = Σ_u p_k [y = k], D_k = Σ_u p_k + n_k + ε and K = C − 1
    foreground classes, the Dice term is −1/(N K) Σ (2 I_k + ε) / D_k. By p_k(u) it changes with
    b_k + a_k [y = k], where a_k = −2 / (N K D_k) and b_k = (2 I_k + ε) / (N K D_k²); through the softmax that
    becomes p_k (b_k − s) + [y = k] a_y p_y with s = Σ_k b_k p_k + a_y p_y. Cross-entropy with the weight
    w_y = (M / (C n_y))^balance adds w_y (p_k − [y = k]) / (N M).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, balance: float) -> Tensor:
        n, voxels, classes = logits.shape
        total = logits.logsumexp(dim=-1, keepdim=True)
        entropy = (total - logits.gather(-1, labels))[..., 0]
        probabilities = (logits - total).exp_()
        of_truth = probabilities.gather(-1, labels)
        flat = labels[..., 0]
        zeros = logits.new_zeros(n, classes)
        shared = zeros.scatter_add(1, flat, of_truth[..., 0])
        present = zeros.scatter_add(1, flat, torch.ones_like(entropy))
        weights = (voxels / (classes * present.clamp(min=1))).pow(balance).gather(1, flat)
        both = probabilities.sum(dim=1) + present + SMOOTH
        dice = (2 * shared + SMOOTH) / both
        ctx.save_for_backward(probabilities, of_truth, labels, weights, both, dice)
        return (weights * entropy).mean() - dice[:, 1:].mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        probabilities, of_truth, labels, weights, both, dice = ctx.saved_tensors
        n, voxels, classes = probabilities.shape
        share = 1.0 / (n * (classes - 1))
        a = -2 * share / both
        b = share * dice / both
        a[:, 0] = b[:, 0] = 0  # the background has no Dice term
        a_of_truth = a.gather(1, labels[..., 0])[..., None] * of_truth
        s = probabilities @ b[..., None] + a_of_truth
        weight = weights[..., None] / (n * voxels)
        result = torch.sub(b[:, None, :], s - weight).mul_(probabilities)
        result.scatter_add_(-1, labels, a_of_truth - weight)
        return result.mul_(gradient), None, None
