"""An exponential moving average of the student's weights: what is evaluated, saved and exported."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MovingAverage:
    """EMA ← d·EMA + (1 − d)·weights after every step, with d = min(decay, (1 + t)/(10 + t)).

    The warm-up keeps the random weights of the beginning out of short runs; after some thousand steps it
    makes no difference. Statistics that are no floating-point numbers are copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        current: dict[str, Tensor] = network.state_dict()
        for name, average in self.network.state_dict().items():
            if average.dtype.is_floating_point:
                average.lerp_(current[name], 1.0 - decay)
            else:
                average.copy_(current[name])
