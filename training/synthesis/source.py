"""Synthetic batches in place of nnU-Net's loaders; everything else of the toolbox stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from training.dice_ce import DiceCrossEntropy
from training.errors import TrainingDataError
from training.plans import Plans
from training.preprocess import Split
from training.synthesis.generator import Generator
from training.synthesis.label_maps import LabelMapFolder
from training.synthesis.recipe import SynthesisRecipe
from training.synthesis.structures import STRUCTURES
from training.toolbox import Toolbox

_TRAINING, _VALIDATION = 0, 1


class SyntheticToolbox(Toolbox):
    """The toolbox of a student that learns from images drawn from label maps.

    A batch is a function of seed, rank and its number alone, so a run that is resumed sees the batches that
    the uninterrupted run would have seen.

    Parameters
    ----------
    maps : LabelMapFolder
        Where the label maps are.
    split : dict
        Maps to train on and to validate with.
    seed, rank : int
        Of the run, and of this process in it.
    balance : float
        Of the cross-entropy; see `training.dice_ce`.

    Raises
    ------
    TrainingDataError
        If a map is missing, or the plans and dataset.json are not made for these structures.
    """

    def __init__(
        self,
        plans: Plans,
        dataset_json: dict[str, Any],
        configuration: str,
        device: torch.device,
        *,
        maps: LabelMapFolder,
        split: Split,
        synthesis: SynthesisRecipe,
        seed: int,
        rank: int = 0,
        validation_iterations: int = 1,
        balance: float = 0.0,
    ) -> None:
        super().__init__(plans, dataset_json, configuration, device)
        if self.label_names != tuple(s.name for s in STRUCTURES):
            raise TrainingDataError(
                "dataset.json does not hold the structures that the label maps are merged to.",
                remedy="Write it with python -m training.synthesis.plans.",
            )
        missing = sorted({*split["train"], *split["val"]} - set(maps.names()))
        if missing or set(split["train"]) & set(split["val"]):
            raise TrainingDataError(
                f"The split names label maps that are missing ({missing[:3]}), or one of them twice.",
                remedy="Give the folder of the label maps that the split was made for.",
            )
        spacing = self._trainer.configuration_manager.spacing
        if max(spacing) - min(spacing) > 1e-6:
            raise TrainingDataError(f"Synthesis needs one spacing for all axes, not {spacing} mm.")
        self._maps, self._split, self._synthesis = maps, split, synthesis
        self._balance = balance
        self._seed, self._rank, self._validation_iterations = seed, rank, validation_iterations

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """None: a mirrored head has its left labels on the right."""
        return ()

    def loss(self) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
        """nnU-Net's loss under deep supervision, by the faster of two ways to compute it."""
        built: Any = super().loss()
        built.loss = DiceCrossEntropy(self._balance)
        wrapped: Callable[[list[Tensor], list[Tensor]], Tensor] = built
        return wrapped

    def loaders(self, iterations_done: int = 0) -> tuple[Iterator[dict[str, Any]], Iterator[dict[str, Any]]]:
        """Training batches from number ``iterations_done`` on, and the validation's, the same every epoch."""
        train = self._batches(self._generator("train"), _TRAINING, iterations_done, None)
        validation = self._batches(self._generator("val"), _VALIDATION, 0, self._validation_iterations)
        return train, validation

    def _generator(self, part: str) -> Generator:
        settings = self._trainer.configuration_manager
        z, y, x = settings.patch_size
        return Generator(
            self._maps.read_all(self._split[part]),
            self._maps.table,
            self._synthesis,
            shape=(int(z), int(y), int(x)),
            spacing_mm=float(settings.spacing[0]),
            device=self.device,
        )

    def _batches(
        self, generator: Generator, part: int, first: int, repeat_after: int | None
    ) -> Iterator[dict[str, Any]]:
        number = first
        scales = self._trainer._get_deep_supervision_scales() or [[1.0, 1.0, 1.0]]
        while True:
            wanted = number if repeat_after is None else number % repeat_after
            size = int(self._trainer.batch_size)
            samples = [generator.sample(self._seed, part, self._rank, wanted, i) for i in range(size)]
            images = torch.stack([s.image for s in samples])[:, None]
            labels = torch.stack([s.labels for s in samples])[:, None]
            yield {"data": images, "target": [thinned(labels, scale) for scale in scales]}
            number += 1


def thinned(labels: Tensor, scale: list[float]) -> Tensor:
    """Targets of a deep-supervision output: (N, 1, Z, Y, X) at the nearest voxels, as nnU-Net takes them."""
    if all(s == 1 for s in scale):
        return labels
    size = [round(n * s) for n, s in zip(labels.shape[2:], scale, strict=True)]
    nearest = torch.nn.functional.interpolate(labels.float(), size=size, mode="nearest-exact")
    return nearest.to(labels.dtype)
