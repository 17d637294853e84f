"""What a student starts from, where that is not chance: the weights of another student.

Three kinds of start are known. The same network goes on with another recipe: a budget that was spent without
distillation is not spent again for every method. A network that lacks the finest stage, trained on a grid
as much coarser, becomes everything below the finest stage: what lies where is learnt at an eighth of the cost
of an iteration. Or a narrower network becomes a wider one that computes the same (Net2WiderNet: Chen,
Goodfellow and Shlens 2016, arXiv 1511.05641): a teacher begins where a student has got to.

One part of a wider network cannot compute the same: where two stages had as many channels and now have not,
a residual block gets a projection with an instance norm that it did not have. The norm is given the scale
and the mean that the block saw there on training images, so that it does on an average image what the block
did on each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import StudentError
from training.plans import Plans, resolve_configuration
from training.teacher import ResultsFolder

_STAGE = re.compile(r"^((?:decoder\.)?encoder\.stages\.)(\d+)\.")
_PER_STAGE = ("features_per_stage", "kernel_sizes", "strides", "n_blocks_per_stage", "n_conv_per_stage")
_PREPROCESSING = ("normalization_schemes", "use_mask_for_norm")
_PROJECTION = re.compile(r"\.skip\.\d+\.")
_IMAGES_FOR_NORMS = 4


def start_from(
    student: nn.Module,
    plans: Plans,
    dataset_json: Mapping[str, Any],
    configuration: str,
    start: ResultsFolder,
    images: Iterable[Tensor],
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
    images : iterable of (N, C, Z, Y, X) tensors
        As the student is trained on, on its device. Only read where a wider network needs projections that
        the narrower one had no use for.

    Raises
    ------
    StudentError
        If its network is neither the student's, nor the student's without the finest stage, nor the student's
        with fewer channels, or it saw other images or labels.
    """
    settings = resolve_configuration(plans, configuration)
    for key in ("labels", "channel_names"):
        if start.dataset_json.get(key) != dataset_json.get(key):
            raise _refused(start, f"it was trained for other {key.replace('_', ' ')}")
    for key in _PREPROCESSING:
        if settings[key] != start.settings[key]:
            raise _refused(start, f"its images were prepared otherwise ({key})")
    if _same_but_for_channels(settings, start.settings):
        if settings["spacing"] != start.settings["spacing"]:
            raise _refused(start, f"it was trained at {start.settings['spacing']} mm")
        weights = start.checkpoints[0].weights
        new = _load(student, _widened(student, weights), start)
        others = [name for name in new if not _PROJECTION.search(name)]
        if others:
            raise _refused(start, f"it lacks {others[0]}")
        _fill_projections(student, new, weights, images)
    elif _without_finest(settings) == _architecture(start.settings):
        strides = settings["architecture"]["arch_kwargs"]["strides"][1]
        coarse = [mm * stride for mm, stride in zip(settings["spacing"], strides, strict=True)]
        if coarse != list(start.settings["spacing"]):
            raise _refused(start, f"it was trained at {start.settings['spacing']} mm, not at {coarse} mm")
        _load(student, _one_stage_deeper(start.checkpoints[0].weights), start)
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


def _same_but_for_channels(settings: Mapping[str, Any], start: Mapping[str, Any]) -> bool:
    """Whether each stage has as many channels as the start's, or more, and all else is equal."""
    wide, narrow = _architecture(settings), _architecture(start)
    pairs = list(zip(wide.pop("features_per_stage"), narrow.pop("features_per_stage"), strict=False))
    return wide == narrow and all(more >= fewer for more, fewer in pairs)


def _widened(student: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the wide network that give the narrow one's output; channel i of n copies i·m // n of m.

    What reads a channel reads its copies with random shares that sum to one, or the copies would have equal
    gradients and stay copies for ever. Copies lie side by side, so that they keep their place where a decoder
    joins two groups of as many channels.
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
            if channels <= tensor.shape[axis]:
                continue
            copied = _copied(channels, tensor.shape[axis])
            widened = widened.index_select(axis, copied)
            if inputs.get(name) == axis:
                shares = torch.rand_like(widened) + 0.5
                sums = torch.zeros_like(shares).index_add(axis, copied, shares).index_select(axis, copied)
                widened = widened * shares / sums
        wide[name] = widened
    return wide


def _copied(wide: int, narrow: int) -> Tensor:
    """Which of the narrow network's channels each of the wide one's is a copy of."""
    return torch.arange(wide) * narrow // wide


@torch.no_grad()
def _fill_projections(
    student: nn.Module, new: list[str], weights: Mapping[str, Tensor], images: Iterable[Tensor]
) -> None:
    """Make the projections among the ``new`` weights do what passing a block's input on did."""
    fresh = {
        name: module
        for name, module in student.named_modules()
        if any(key.startswith(f"{name}.") for key in new) and hasattr(module, "norm")
    }
    if not fresh:
        return
    norms = []
    for name, module in fresh.items():
        weight = module.conv.weight
        outputs, inputs = weight.shape[:2]
        narrow = weights[f"{_PROJECTION.split(f'{name}.')[0]}.conv1.conv.weight"].shape[1]
        # Both sides copy the same channels: each output is the mean of the inputs that copy its own.
        same = _copied(outputs, narrow)[:, None] == _copied(inputs, narrow)[None]
        weight.copy_((same / same.sum(1, keepdim=True)).reshape(weight.shape))
        norms.append(module.norm)
    with _measured(norms) as moments:
        for image in islice(images, _IMAGES_FOR_NORMS):
            student(image)
    for norm, seen in zip(norms, moments, strict=True):
        mean, square = torch.stack([torch.stack(pair) for pair in seen]).mean(0)
        norm.bias.copy_(mean)
        norm.weight.copy_((square - mean**2).clamp_min(norm.eps).sqrt())


@contextmanager
def _measured(norms: list[nn.Module]) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """Let the norms pass on what they are given, and note its mean and mean square by channel."""
    moments: list[list[tuple[Tensor, Tensor]]] = [[] for _ in norms]
    hooks = []
    for norm, seen in zip(norms, moments, strict=True):

        def passed_on(_: nn.Module, given: tuple[Tensor], __: Tensor, seen: Any = seen) -> Tensor:
            values = given[0].transpose(0, 1).flatten(1)
            seen.append((values.mean(1), values.square().mean(1)))
            return given[0]

        hooks.append(norm.register_forward_hook(passed_on))
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


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


def _load(student: nn.Module, weights: Mapping[str, Tensor], start: ResultsFolder) -> list[str]:
    """Give the student the weights; the names of its own that are not among them."""
    own = student.state_dict()
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            raise _refused(start, f"{name} of shape {tuple(tensor.shape)} has no place in this network")
    missing, _ = student.load_state_dict(dict(weights), strict=False)
    return list(missing)
