"""Students: the teacher's network with fewer channels, described by a stock nnU-Net v2 plans file.

Everything but ``features_per_stage`` stays the teacher's (topology, spacing, patch, preprocessing), so the
preprocessed data are shared, and a trained student loads in stock nnU-Net.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from fractions import Fraction
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from training.errors import StudentError
from training.plans import Plans, resolve_configuration


def scaled_features(
    features: list[int],
    width: Fraction,
    round_to: int | None = None,
    channels: Sequence[int] | None = None,
) -> list[int]:
    """Channels of each stage: round(width * f), then up to a multiple of ``round_to`` where that is given.

    Halves go to the even neighbour, as Python rounds. A stage never gets wider than the teacher's. Where
    ``channels`` are given they are taken as they are.

    Raises
    ------
    StudentError
        If the width is not in (0, 1], a stage would be left without a channel, or the channels given do not
        fit the stages.
    """
    if channels is not None:
        return _given_features(features, channels)
    if not 0 < width <= 1:
        raise StudentError(
            f"A student's width must be over 0 and at most 1, not {width}.", remedy="Give 1/2, 1/4 or 1/8."
        )
    if round_to is not None and round_to < 1:
        raise StudentError(f"Channels cannot be rounded up to a multiple of {round_to}.")
    scaled = [round(width * f) for f in features]
    if min(scaled) < 1:
        raise StudentError(
            f"Width {width} leaves a stage of {min(features)} channels with none.",
            remedy=f"Give a width of at least 1/{min(features)}.",
        )
    if round_to is not None:
        scaled = [min(f, -(-s // round_to) * round_to) for s, f in zip(scaled, features, strict=True)]
    return scaled


def _given_features(features: list[int], channels: Sequence[int]) -> list[int]:
    if len(channels) != len(features):
        raise StudentError(
            f"{len(channels)} numbers of channels are given, and the network has {len(features)} stages."
        )
    for ours, theirs in zip(channels, features, strict=True):
        if not 0 < ours <= theirs:
            raise StudentError(f"A stage of {theirs} channels cannot have {ours} in the student.")
    return list(channels)


def student_plans_name(
    teacher_name: str, width: Fraction, round_to: int | None = None, channels: Sequence[int] | None = None
) -> str:
    """The plans name of a student, for example ``nnUNetPlansWidth1of4`` or ``nnUNetPlansWidth1of4By16``."""
    if channels is not None:
        return f"{teacher_name}Channels{'x'.join(map(str, channels))}"
    rounding = "" if round_to is None else f"By{round_to}"
    return f"{teacher_name}Width{width.numerator}of{width.denominator}{rounding}"


def scaled_plans(
    plans: Plans,
    width: Fraction,
    round_to: int | None = None,
    *,
    channels: Sequence[int] | None = None,
    plans_name: str | None = None,
    batch_size: int | None = None,
    configuration: str = "3d_fullres",
) -> Plans:
    """Stock nnU-Net v2 plans of a student; the given plans are not changed.

    Only ``configuration`` is kept, with what it inherits written out: the others would still describe the
    teacher. Its ``data_identifier`` stays, so the teacher's preprocessed data are used as they are.

    Parameters
    ----------
    plans : dict
        The teacher's plans.
    width : Fraction
        Factor on every entry of ``features_per_stage``.
    round_to : int or None
        Round the channels up to a multiple of this, for example 8 or 16.
    channels : sequence of int or None
        Channels of each stage, the finest first, which then stand for width and rounding.
    plans_name : str or None
        Name of the new plans; None takes `student_plans_name`.
    batch_size : int or None
        Batch size of training; None keeps the teacher's.

    Raises
    ------
    PlansError
        If the plans have no such configuration, or a network that is not known.
    StudentError
        If the width leaves no channel, the channels do not fit, or the batch size is not positive.
    """
    resolved = resolve_configuration(plans, configuration)
    for key in ("inherits_from", "next_stage", "previous_stage"):
        resolved.pop(key, None)
    kwargs = resolved["architecture"]["arch_kwargs"]
    features = list(kwargs["features_per_stage"])
    kwargs["features_per_stage"] = scaled_features(features, width, round_to, channels)
    if batch_size is not None:
        if batch_size < 1:
            raise StudentError(f"The batch size must be positive, not {batch_size}.")
        resolved["batch_size"] = batch_size
    student = deepcopy({key: value for key, value in plans.items() if key != "configurations"})
    student["plans_name"] = plans_name or student_plans_name(plans["plans_name"], width, round_to, channels)
    if "__" in student["plans_name"]:
        raise StudentError(
            f"{student['plans_name']!r} cannot name plans: nnU-Net splits folder names at two underscores."
        )
    student["configurations"] = {configuration: resolved}
    return student


def residual_encoder(
    features: Sequence[int], blocks: Sequence[int], strides: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The ``architecture`` of nnU-Net's plans for a ResidualEncoderUNet, as its planner writes it.

    Parameters
    ----------
    features, blocks, strides : sequences
        Channels, residual blocks and stride (Z, Y, X) of each stage, the finest first.
    """
    stages = len(features)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [list(stride) for stride in strides],
            "n_blocks_per_stage": list(blocks),
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def build_network(
    configuration: ConfigurationManager | dict[str, Any],
    n_inputs: int,
    n_outputs: int,
    *,
    deep_supervision: bool = False,
) -> nn.Module:
    """The network of a configuration, made by nnU-Net's own function, with freshly drawn weights.

    It takes (N, n_inputs, Z, Y, X) float32 and gives logits (N, n_outputs, Z, Y, X), or a list of them from
    the finest to the coarsest with ``deep_supervision``. The coarser heads exist, and hold weights, in
    either case.
    """
    settings = configuration if isinstance(configuration, dict) else configuration.configuration
    architecture = settings["architecture"]
    network: nn.Module = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        n_inputs,
        n_outputs,
        allow_init=True,
        deep_supervision=deep_supervision,
    )
    return network


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values, deep supervision heads included, each shared tensor counted once."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def count_gflops(network: nn.Module, n_inputs: int, patch_size: tuple[int, int, int]) -> float:
    """Cost of one patch in GFLOPs: two operations for each multiply-add of a convolution.

    Transposed convolutions, norms and activations are not counted, which is how the figures of
    arXiv:2601.09191 come about. Nothing is computed: shapes alone run through the network.
    """
    total = 0

    def count(module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv3d)
        per_output = module.in_channels // module.groups * math.prod(module.kernel_size)
        total += 2 * per_output * output.numel()

    shapes = deepcopy(network).to("meta")
    for module in shapes.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(count)
    with torch.no_grad():
        shapes(torch.empty(1, n_inputs, *patch_size, device="meta"))
    return total / 1e9
