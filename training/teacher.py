"""A results folder of nnU-Net v2: the teacher that comes in, and the student that goes out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from training.checkpoint import Checkpoint, load_checkpoint
from training.errors import ResultsFolderError
from training.plans import (
    Classes,
    Plans,
    check_configuration,
    check_plans,
    classes_of,
    n_channels_of,
    read_json,
    resolve_configuration,
)
from training.student import build_network
from training.trainers import check_builds_planned_network

CHECKPOINTS = ("final", "best", "latest")

# What of a configuration changes the network or its input. The rest (batch size, names) may differ between
# plans.json and the plans in a checkpoint.
_COMPARED = ("architecture", "patch_size", "spacing", "normalization_schemes", "use_mask_for_norm")


@dataclass(frozen=True, eq=False)
class ResultsFolder:
    """``<trainer>__<plans>__<configuration>``: plans.json, dataset.json and one checkpoint per fold.

    Everything was checked when an instance exists: the files agree with each other, every class that the
    plans name is known, and the weights fit the network.

    Parameters
    ----------
    folder : Path
        Where it lies.
    plans, dataset_json : dict
        The two files.
    fingerprint : Path or None
        dataset_fingerprint.json, where it is there.
    configuration : str
        The configuration that was trained, for example ``3d_fullres``.
    settings : dict
        That configuration, with its inheritance resolved.
    checkpoints : tuple of Checkpoint
        One per fold that was opened, in their order.
    """

    folder: Path
    plans: Plans
    dataset_json: dict[str, Any]
    fingerprint: Path | None
    configuration: str
    settings: dict[str, Any]
    checkpoints: tuple[Checkpoint, ...]

    @staticmethod
    def open(folder: Path, *, folds: Sequence[str] | None = None, checkpoint: str = "final") -> ResultsFolder:
        """Read and check a results folder.

        Parameters
        ----------
        folds : sequence of str or None
            Folds to open, "0" to "4" or "all"; None opens every numbered fold that has the checkpoint, or
            ``fold_all`` where there is no other.
        checkpoint : str
            "final", "best" or "latest".

        Raises
        ------
        ResultsFolderError
            If a file is missing, damaged, or does not agree with the others.
        PlansError
            If the plans are not those of nnU-Net v2, or name what is not known.
        """
        if not folder.is_dir():
            raise ResultsFolderError(
                f"{folder.name!r} is not a folder.", remedy="Give a results folder of nnU-Net."
            )
        if not (folder / "plans.json").exists() and any(folder.rglob("plans.pkl")):
            raise ResultsFolderError(
                "The folder holds plans.pkl: a model of nnU-Net v1.",
                remedy="Train again with nnU-Net v2; models of v1 cannot be converted.",
            )
        plans = read_json(folder / "plans.json", "The plans")
        dataset_json = read_json(folder / "dataset.json", "The dataset's description")
        check_plans(plans)
        classes_of(dataset_json)
        names = folds if folds is not None else _available_folds(folder, checkpoint)
        checkpoints = tuple(
            load_checkpoint(folder / f"fold_{f}" / f"checkpoint_{checkpoint}.pth", f) for f in names
        )
        if not checkpoints:
            raise ResultsFolderError("No fold was asked for.", remedy="Give at least one fold.")
        configurations = {c.configuration for c in checkpoints}
        if len(configurations) != 1:
            raise ResultsFolderError(f"The folds trained different configurations: {sorted(configurations)}.")
        configuration = configurations.pop()
        settings = resolve_configuration(plans, configuration)
        check_configuration(configuration, settings)
        fingerprint = folder / "dataset_fingerprint.json"
        opened = ResultsFolder(
            folder=folder,
            plans=plans,
            dataset_json=dataset_json,
            fingerprint=fingerprint if fingerprint.is_file() else None,
            configuration=configuration,
            settings=settings,
            checkpoints=checkpoints,
        )
        for one in checkpoints:
            opened._check_agrees(one)
        for name in sorted({c.trainer_name for c in checkpoints}):
            check_builds_planned_network(name)
        for index in range(len(checkpoints)):
            opened.network(index)
        return opened

    @staticmethod
    def planned(folder: Path, configuration: str = "3d_fullres") -> ResultsFolder:
        """Plans, dataset.json and fingerprint alone: a network to train that has no weights yet.

        Raises
        ------
        ResultsFolderError
            If a file is missing or damaged.
        PlansError
            If the plans are not those of nnU-Net v2, or name what is not known.
        """
        plans = read_json(folder / "plans.json", "The plans")
        dataset_json = read_json(folder / "dataset.json", "The dataset's description")
        check_plans(plans)
        classes_of(dataset_json)
        settings = resolve_configuration(plans, configuration)
        check_configuration(configuration, settings)
        fingerprint = folder / "dataset_fingerprint.json"
        return ResultsFolder(
            folder=folder,
            plans=plans,
            dataset_json=dataset_json,
            fingerprint=fingerprint if fingerprint.is_file() else None,
            configuration=configuration,
            settings=settings,
            checkpoints=(),
        )

    @cached_property
    def classes(self) -> Classes:
        """What the outputs mean."""
        return classes_of(self.dataset_json)

    @cached_property
    def n_channels(self) -> int:
        """Number of input channels."""
        return n_channels_of(self.plans, self.configuration, self.dataset_json)

    @property
    def features(self) -> list[int]:
        """Channels of each encoder stage."""
        return [int(f) for f in self.settings["architecture"]["arch_kwargs"]["features_per_stage"]]

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, over plans.json, dataset.json and the checkpoints, by name and content."""
        total = hashlib.sha256()
        for name in ("plans.json", "dataset.json"):
            total.update(
                f"{hashlib.sha256((self.folder / name).read_bytes()).hexdigest()}  {name}\n".encode()
            )
        for one in self.checkpoints:
            total.update(f"{one.digest}  fold_{one.fold}/{one.path.name}\n".encode())
        return total.hexdigest()

    def network(self, index: int = 0, *, deep_supervision: bool = False) -> nn.Module:
        """The network of one checkpoint with its weights, in evaluation mode.

        It takes (N, n_channels, Z, Y, X) float32 and gives logits (N, n_outputs, Z, Y, X); with
        ``deep_supervision`` a list of them, the finest first.

        Raises
        ------
        ResultsFolderError
            If the weights are not those of the network that the plans describe.
        """
        one = self.checkpoints[index]
        network = build_network(
            self.settings, self.n_channels, self.classes.n_outputs, deep_supervision=deep_supervision
        )
        expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in one.weights.items()}
        if expected != found:
            raise ResultsFolderError(
                f"The weights of fold {one.fold} do not fit the plans: {_difference(expected, found)}.",
                remedy="Take plans.json, dataset.json and the checkpoints from one and the same folder.",
            )
        network.load_state_dict(dict(one.weights))
        return network.eval()

    def _check_agrees(self, one: Checkpoint) -> None:
        """Compare plans.json and dataset.json with what the checkpoint was trained with."""
        trained = one.init_args
        remedy = "Take plans.json, dataset.json and the checkpoints from one and the same folder."
        dataset = trained.get("dataset_json") or {}
        for key in ("labels", "regions_class_order", "channel_names"):
            if dataset and _plain(dataset.get(key)) != _plain(self.dataset_json.get(key)):
                raise ResultsFolderError(
                    f"dataset.json and the checkpoint of fold {one.fold} differ in {key}.", remedy=remedy
                )
        plans = trained.get("plans")
        if not isinstance(plans, dict):
            return
        theirs = resolve_configuration(plans, one.configuration)
        for key in _COMPARED:
            if _plain(theirs.get(key)) != _plain(self.settings.get(key)):
                raise ResultsFolderError(
                    f"plans.json and the checkpoint of fold {one.fold} differ in {key}.", remedy=remedy
                )
        for key in ("transpose_forward", "transpose_backward"):
            if _plain(plans.get(key)) != _plain(self.plans[key]):
                raise ResultsFolderError(
                    f"plans.json and the checkpoint of fold {one.fold} differ in {key}.", remedy=remedy
                )


def _available_folds(folder: Path, checkpoint: str) -> list[str]:
    if checkpoint not in CHECKPOINTS:
        raise ResultsFolderError(
            f"There is no checkpoint {checkpoint!r}; {', '.join(CHECKPOINTS)} are known."
        )
    found = sorted(
        p.parent.name.removeprefix("fold_") for p in folder.glob(f"fold_*/checkpoint_{checkpoint}.pth")
    )
    numbered = [f for f in found if f != "all"]
    if found:
        return numbered or found
    raise ResultsFolderError(
        f"No fold has a checkpoint_{checkpoint}.pth.",
        remedy="Give the folder that holds plans.json and the fold folders, of a training that has finished.",
    )


def _difference(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    """The first difference between two sets of tensors, in words."""
    for name in expected:
        if name not in found:
            return f"{name} is missing"
        if found[name] != expected[name]:
            return f"{name} is {found[name]}, where the plans say {expected[name]}"
    return f"{next(name for name in found if name not in expected)} has no place in the network"


def _plain(value: Any) -> Any:
    """Tuples as lists, at any depth: JSON knows no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
