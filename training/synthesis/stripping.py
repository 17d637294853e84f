"""Missing parts: the skull that a tool took off, and what lay outside of the field of view."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from training.synthesis.recipe import Keep


def kept(places: Tensor, brain: Tensor, csf: Tensor, keep: Keep, margin_voxels: int = 0) -> Tensor | None:
    """(Z, Y, X) mask of what skull stripping leaves; None for the whole head.

    Parameters
    ----------
    places : (Z, Y, X) tensor of uint8
        Labels, as places in the class table.
    brain, csf : (L,) bool tensors
        Which labels are of the brain, and which are fluid around it.
    margin_voxels : int
        How far "brain with a margin" reaches beyond the brain, along each axis.
    """
    if keep == "head":
        return None
    index = places.long()
    mask = brain[index]
    if keep == "brain and CSF":
        mask = mask | csf[index]
    elif keep == "brain with a margin":
        mask = dilated(mask, margin_voxels)
    return mask


def dilated(mask: Tensor, voxels: int) -> Tensor:
    """The mask grown by a cube of ±``voxels``, one axis after the other."""
    if voxels <= 0:
        return mask
    grown = mask[None, None].to(torch.float32)
    for axis in range(3):
        size = [2 * voxels + 1 if a == axis else 1 for a in range(3)]
        grown = functional.max_pool3d(grown, size, stride=1, padding=[s // 2 for s in size])
    return grown[0, 0] > 0
