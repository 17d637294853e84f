"""What a student starts from, where that is not chance: the weights of another student.

Three kinds of start are known. The same network goes on with another recipe: a budget that was spent without
distillation is not spent again for every method. A network that lacks the finest stage, trained on a grid
as much coarser, becomes everything below the finest stage: what lies where is learnt at an eighth of the cost
of an iteration. Or a narrower network becomes a wider one that computes the same (Net2WiderNet: Chen,
Goodfellow and Shlens 2016, arXiv 1511.05641): a teacher begins where a student has got to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import StudentError
from training.plans import Plans, resolve_configuration
from training.teacher import ResultsFolder

_STAGE = re.compile(r"^((?:decoder\.)?encoder\.stages\.)(\d+)\.")
_PER_STAGE = ("features_per_stage", "kernel_sizes", "strides", "n_blocks_per_stage", "n_conv_per_stage")
_PREPROCESSING = ("normalization_schemes", "use_mask_for_norm")


def start_from(
    student: nn.Module,
    plans: Plans,
    dataset_json: Mapping[str, Any],
    configuration: str,
    start: ResultsFolder,
) -> None:
    """Give a freshly drawn student the weights of a trained one.

    Parameters
    ----------
    student : nn.Module
        One of nnU-Net's U-Nets with deep supervision; changed in place.
    plans, dataset_json : dict
        The student's.
    configuration : str
        Of the plans.
    start : ResultsFolder
        The first of its checkpoints is taken.

    Raises
    ------
    StudentError
        If its network is neither the student's, nor the student's without the finest stage, nor the student's
        with all channels divided by one whole number, or it saw other images or labels.
    """
    settings = resolve_configuration(plans, configuration)
    for key in ("labels", "channel_names"):
        if start.dataset_json.get(key) != dataset_json.get(key):
            raise _refused(start, f"it was trained for other {key.replace('_', ' ')}")
    for key in _PREPROCESSING:
        if settings[key] != start.settings[key]:
            raise _refused(start, f"its images were prepared otherwise ({key})")
    times = _times_wider(settings, start.settings)
    if times is not None:
        if settings["spacing"] != start.settings["spacing"]:
            raise _refused(start, f"it was trained at {start.settings['spacing']} mm")
        weights = start.checkpoints[0].weights
        _load(student, weights if times == 1 else _widened(student, weights, times), start, complete=True)
    elif _without_finest(settings) == _architecture(start.settings):
        strides = settings["architecture"]["arch_kwargs"]["strides"][1]
        coarse = [mm * stride for mm, stride in zip(settings["spacing"], strides, strict=True)]
        if coarse != list(start.settings["spacing"]):
            raise _refused(start, f"it was trained at {start.settings['spacing']} mm, not at {coarse} mm")
        _load(student, _one_stage_deeper(start.checkpoints[0].weights), start, complete=False)
    else:
        raise _refused(
            start,
            "its network is neither this one nor a narrower one nor this one without the finest stage",
        )


def _refused(start: ResultsFolder, why: str) -> StudentError:
    return StudentError(
        f"The student cannot start from {start.folder.name!r}: {why}.",
        remedy="Give the results folder of a student of the same plans and width, or of a whole part of it.",
    )


def _architecture(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes the weights. The first stage's stride does not: nothing comes before it to be scaled."""
    architecture = settings["architecture"]
    kwargs = {key: value for key, value in architecture["arch_kwargs"].items() if key != "n_stages"}
    kwargs["strides"] = [list(stride) for stride in kwargs["strides"]][1:]
    kwargs["kernel_sizes"] = [list(size) for size in kwargs["kernel_sizes"]]
    return {"class": architecture["network_class_name"], **kwargs}


def _times_wider(settings: Mapping[str, Any], start: Mapping[str, Any]) -> int | None:
    """How many channels of this network there are for each of the start's; None if they differ otherwise."""
    wide, narrow = _architecture(settings), _architecture(start)
    pairs = list(zip(wide.pop("features_per_stage"), narrow.pop("features_per_stage"), strict=False))
    times = pairs[0][0] // pairs[0][1]
    same = wide == narrow and all(channels == times * fewer for channels, fewer in pairs)
    return times if same and times > 0 else None


def _widened(student: nn.Module, weights: Mapping[str, Tensor], times: int) -> dict[str, Tensor]:
    """Weights of the wide network that give the narrow one's output; channel i copies its ``i // times``.

    What reads a channel reads its copies with random shares that sum to one, or the copies would have equal
    gradients and stay copies for ever. Copies that lie side by side keep their place where a decoder joins
    two groups of channels.
    """
    inputs = {}  # which axis of a weight counts the input channels, by all names that a module is saved by
    for name, module in student.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            inputs[f"{name}.weight"] = 1
        elif isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
            inputs[f"{name}.weight"] = 0
    wide = {}
    own = student.state_dict()
    for name, tensor in weights.items():
        widened = tensor
        for axis, channels in enumerate(own[name].shape if name in own else ()):
            if channels == tensor.shape[axis]:
                continue
            widened = widened.repeat_interleave(times, axis)
            if inputs.get(name) == axis:
                shares = torch.rand_like(widened) + 0.5
                sums = shares.unfold(axis, times, times).sum(-1).repeat_interleave(times, axis)
                widened = widened * shares / sums
        wide[name] = widened
    return wide


def _without_finest(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The architecture of the network that lacks the finest stage; None if there is no such network."""
    kwargs = settings["architecture"]["arch_kwargs"]
    if kwargs["n_stages"] < 3 or kwargs["features_per_stage"][0] != kwargs["features_per_stage"][1]:
        return None  # the coarser network's stem would have other channels
    shorter = {key: value[1:] if key in _PER_STAGE else value for key, value in kwargs.items()}
    shorter["n_conv_per_stage_decoder"] = kwargs["n_conv_per_stage_decoder"][:-1]
    return _architecture(
        {"architecture": {**settings["architecture"], "arch_kwargs": shorter}},
    )


def _one_stage_deeper(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that they have in the deeper network; its decoder counts from below."""
    return {
        _STAGE.sub(lambda match: f"{match[1]}{int(match[2]) + 1}.", name): tensor
        for name, tensor in weights.items()
    }


def _load(student: nn.Module, weights: Mapping[str, Tensor], start: ResultsFolder, *, complete: bool) -> None:
    own = student.state_dict()
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            raise _refused(start, f"{name} of shape {tuple(tensor.shape)} has no place in this network")
    missing, _ = student.load_state_dict(dict(weights), strict=False)
    if complete and missing:
        raise _refused(start, f"it lacks {missing[0]}")
