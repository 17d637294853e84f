"""nnU-Net's trainer, used as a box of parts: its split, loaders, augmentation, loss and label handling.

The loop is our own (``training.distill``); everything that makes nnU-Net what it is stays nnU-Net's.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from training.plans import Plans


@dataclass(frozen=True)
class Batch:
    """One batch on the training device.

    Parameters
    ----------
    images : (N, C, Z, Y, X) tensor
    targets : list of (N, 1 or R, Z, Y, X) tensors
        Finest first, one per deep-supervision output.
    """

    images: Tensor
    targets: list[Tensor]


class Toolbox:
    """The parts of nnU-Net's trainer for one student, one split and one device.

    Parameters
    ----------
    plans, dataset_json : dict
        The student's plans and the dataset's description; nnU-Net's folders must be configured and the data
        preprocessed (``training.preprocess.prepare_dataset``).
    device : torch.device
        Where batches go.
    """

    def __init__(
        self, plans: Plans, dataset_json: dict[str, Any], configuration: str, device: torch.device
    ) -> None:
        handed_over = copy.deepcopy(plans)
        handed_over["continue_training"] = False  # nnU-Net's command adds this key, its trainer takes it out
        with redirect_stdout(io.StringIO()):  # nnU-Net prints; its own log file keeps what it says
            self._trainer = nnUNetTrainer(handed_over, configuration, 0, dataset_json, torch.device("cpu"))
            self._trainer.device = device
            self._trainer._set_batch_size_and_oversample()
            # Also sets the mirroring axes that prediction may use.
            self._trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.device = device

    @property
    def output_folder(self) -> Path:
        """``<results>/<dataset>/nnUNetTrainer__<plans>__<configuration>/fold_0``."""
        return Path(self._trainer.output_folder)

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        return tuple(self._trainer.inference_allowed_mirroring_axes or ())

    @property
    def init_args(self) -> dict[str, Any]:
        """What a checkpoint names as the trainer's arguments."""
        return {k: v for k, v in self._trainer.my_init_kwargs.items() if k != "device"}

    @property
    def has_regions(self) -> bool:
        return bool(self._trainer.label_manager.has_regions)

    @property
    def ignore_label(self) -> int | None:
        label: int | None = self._trainer.label_manager.ignore_label
        return label

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the foreground labels or regions, in the order of the network's outputs."""
        manager, labels = self._trainer.label_manager, self._trainer.dataset_json["labels"]
        by_value = {_hashable(value): name for name, value in labels.items()}
        wanted = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        return tuple(by_value[_hashable(value)] for value in wanted)

    def loss(self) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
        """Dice plus cross-entropy under deep supervision, as nnU-Net weights it."""
        built: Callable[[list[Tensor], list[Tensor]], Tensor] = self._trainer._build_loss()
        return built

    def loaders(self, iterations_done: int = 0) -> tuple[Iterator[dict[str, Any]], Iterator[dict[str, Any]]]:
        """nnU-Net's training and validation loaders, with its augmentation.

        They draw at random, so that ``iterations_done`` of a resumed run makes no difference to them.
        """
        with redirect_stdout(io.StringIO()):
            train, validation = self._trainer.get_dataloaders()
        return train, validation

    def to_device(self, batch: dict[str, Any]) -> Batch:
        target = batch["target"]
        targets = target if isinstance(target, list) else [target]
        return Batch(
            batch["data"].to(self.device, non_blocking=True),
            [t.to(self.device, non_blocking=True) for t in targets],
        )

    def count_hits(self, logits: Tensor, target: Tensor) -> Tensor:
        """True positives, false positives and false negatives of each foreground label or region.

        Parameters
        ----------
        logits : (N, K, Z, Y, X) tensor
        target : (N, 1 or R, Z, Y, X) tensor
            The finest target.

        Returns
        -------
        (labels, 3) tensor, float64
        """
        spatial = (0, 2, 3, 4)
        if self.has_regions:
            predicted = logits > 0  # sigmoid(z) > 0.5
            valid = (
                ~target[:, -1:].bool() if self.ignore_label is not None else torch.ones_like(predicted[:, :1])
            )
            true = (target[:, :-1] if self.ignore_label is not None else target).bool()
        else:
            values = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, 1, 1, 1)
            predicted = logits.argmax(dim=1, keepdim=True) == values
            valid = target != -1 if self.ignore_label is None else target != self.ignore_label
            true = target == values
        hits = [
            (predicted & true & valid).sum(spatial),
            (predicted & ~true & valid).sum(spatial),
            (~predicted & true & valid).sum(spatial),
        ]
        return torch.stack(hits, dim=1).double().cpu()


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def dice_of(hits: Tensor) -> list[float]:
    """Dice per label of summed counts (labels, 3): 2 TP / (2 TP + FP + FN); NaN where nothing was there."""
    tp, fp, fn = hits.unbind(dim=1)
    total = 2 * tp + fp + fn
    return torch.where(total > 0, 2 * tp / total.clamp(min=1), torch.nan).tolist()


def seed_iteration(seed: int, *key: int) -> None:
    """Seed every generator that nnU-Net's loader, its augmentation and torch draw from, for one iteration."""
    state = np.random.SeedSequence([seed, *key]).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))
