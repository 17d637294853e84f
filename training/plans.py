"""nnU-Net's plans and dataset.json, read for what a bundle needs; what is not known is refused by name.

A plans file names classes and functions of nnU-Net. The engine rebuilds exactly some of them, so a name
that is not in the lists below stops here, and never turns into something similar.
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import LabelManager, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from models.manifest import IntensityProperties, NormalizationScheme, Preprocessing, Resampling
from training.errors import PlansError, ResultsFolderError

Plans = dict[str, Any]

NETWORK_CLASSES = ("PlainConvUNet", "ResidualEncoderUNet")
"""The networks that students are made of; nnU-Net's planners write no other."""

READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
"""Readers that give arrays as (Z, Y, X) with the affine of the file, whatever the file's orientation."""

REORIENTING_READERS = ("SimpleITKIOWithReorient", "NibabelIOWithReorient")
"""Of these, the readers that bring every image to RAS."""

RESAMPLING_FUNCTIONS = ("resample_data_or_seg_to_shape",)
ANISOTROPY_THRESHOLD = 3  # nnU-Net's default of separate_z_anisotropy_threshold, and the engine's only one

_PLANS_KEYS = (
    "dataset_name",
    "plans_name",
    "configurations",
    "transpose_forward",
    "transpose_backward",
    "image_reader_writer",
    "label_manager",
)
_OLD = "Plan the dataset again with a current nnU-Net v2 (2.5 or later), and train again."
_NOT_DONE = "Train with nnU-Net's default, or ask for support of this one."


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ResultsFolderError
        If the file is missing or does not hold one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultsFolderError(
            f"{path.name} is missing.",
            remedy=f"{what} belongs to every results folder of nnU-Net v2: copy the whole folder.",
        ) from error
    except (OSError, ValueError) as error:
        raise ResultsFolderError(f"{path.name} cannot be read as JSON ({type(error).__name__}).") from error
    if not isinstance(content, dict):
        raise ResultsFolderError(f"{path.name} does not hold a JSON object.")
    return content


def check_plans(plans: Plans) -> None:
    """Refuse plans that are not nnU-Net v2's, or whose reader or label manager is not known.

    Raises
    ------
    PlansError
        The message names the key or the class.
    """
    missing = [key for key in _PLANS_KEYS if key not in plans]
    if missing:
        raise PlansError(f"plans.json lacks {', '.join(missing)}: not the plans of nnU-Net v2.", remedy=_OLD)
    _check_known("image reader", plans["image_reader_writer"], READERS)
    _check_known("label manager", plans["label_manager"], ("LabelManager",))


def resolve_configuration(plans: Plans, configuration: str) -> dict[str, Any]:
    """A configuration of the plans as a dict of its own, inheritance resolved by nnU-Net.

    Raises
    ------
    PlansError
        If it is absent, inherits in a circle, or its network is none of `NETWORK_CLASSES`.
    """
    try:
        resolved: dict[str, Any] = deepcopy(
            PlansManager(plans).get_configuration(configuration).configuration
        )
        architecture = resolved["architecture"]
        network_class = str(architecture["network_class_name"])
        complete = (
            "features_per_stage" in architecture["arch_kwargs"] and "_kw_requires_import" in architecture
        )
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise PlansError(
            f"The plans give no complete configuration {configuration!r} ({error}).", remedy=_OLD
        ) from error
    if not complete:
        raise PlansError(f"The configuration {configuration!r} does not describe its network.", remedy=_OLD)
    _check_known("network", network_class.rsplit(".", 1)[-1], NETWORK_CLASSES)
    return resolved


def check_configuration(name: str, settings: dict[str, Any]) -> None:
    """Refuse a configuration that the engine cannot run: 2d, cascade, or a class that is not known.

    Parameters
    ----------
    name : str
        The configuration's name, for the message.
    settings : dict
        The configuration with its inheritance resolved.

    Raises
    ------
    PlansError
        The message names what is not known.
    """
    if len(settings.get("patch_size", ())) != 3:
        raise PlansError(
            f"The configuration {name!r} is not three-dimensional (patch {settings.get('patch_size')}).",
            remedy="Export the 3d_fullres model; 2d models are not supported.",
        )
    if settings.get("previous_stage"):
        raise PlansError(
            f"The configuration {name!r} is a cascade's second stage (after {settings['previous_stage']!r}).",
            remedy="Export the 3d_fullres model; cascades are not supported.",
        )
    _check_known("preprocessor", settings.get("preprocessor_name"), ("DefaultPreprocessor",))
    for scheme in settings["normalization_schemes"]:
        _check_known("normalization", scheme, tuple(s.value for s in NormalizationScheme))


def preprocessing_of(plans: Plans, settings: dict[str, Any]) -> Preprocessing:
    """The manifest's preprocessing of a configuration.

    Raises
    ------
    PlansError
        If the resampling is not known.
    """
    forward, backward = plans["transpose_forward"], plans["transpose_backward"]
    spacing = settings["spacing"]
    return Preprocessing(
        transpose_forward=(forward[0], forward[1], forward[2]),
        transpose_backward=(backward[0], backward[1], backward[2]),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        resampling_data=_resampling(settings, "data"),
        resampling_probabilities=_resampling(settings, "probabilities"),
    )


def intensity_of(plans: Plans, channel: int) -> IntensityProperties | None:
    """The fingerprint's foreground intensities of a channel; None where the plans have no finite ones."""
    everything = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    found = everything.get(str(channel))
    keys = ("mean", "std", "percentile_00_5", "percentile_99_5")
    if not found or not all(math.isfinite(found.get(key, math.nan)) for key in keys):
        return None
    return IntensityProperties(**{key: float(found[key]) for key in keys})


@dataclass(frozen=True)
class Classes:
    """What the network's outputs mean.

    ``names`` maps a value of the labelmap to its name in dataset.json, background left out.
    ``regions_class_order`` is empty for a softmax head; for a sigmoid head entry i is the value that output
    i paints, and its name is that of region i.
    """

    names: dict[int, str]
    regions_class_order: tuple[int, ...]
    n_outputs: int


def classes_of(dataset_json: dict[str, Any]) -> Classes:
    """The classes of a dataset.json, as nnU-Net's LabelManager reads it.

    Raises
    ------
    ResultsFolderError
        If the labels are not those of nnU-Net v2, or have gaps.
    """
    labels = dataset_json.get("labels")
    if not isinstance(labels, dict) or "background" not in labels:
        raise ResultsFolderError(
            "dataset.json has no labels with a 'background': not a dataset.json of nnU-Net v2.",
            remedy="Convert the dataset with nnUNetv2_convert_old_nnUNet_dataset.",
        )
    try:
        manager = LabelManager(labels, dataset_json.get("regions_class_order"))
        n_outputs = int(manager.num_segmentation_heads)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ResultsFolderError(f"nnU-Net does not accept the labels of dataset.json: {error}.") from error
    foreground = {name: value for name, value in labels.items() if name not in ("background", "ignore")}
    if manager.has_regions:
        order = tuple(int(v) for v in dataset_json["regions_class_order"])
        return Classes(dict(zip(order, foreground, strict=True)), order, n_outputs)
    values = {int(v[0] if isinstance(v, list) else v): name for name, v in foreground.items()}
    if sorted(values) != list(range(1, len(foreground) + 1)):
        raise ResultsFolderError(f"The label values {sorted(values)} of dataset.json are not 1, 2, 3, ...")
    return Classes(dict(sorted(values.items())), (), n_outputs)


def n_channels_of(plans: Plans, configuration: str, dataset_json: dict[str, Any]) -> int:
    """Number of input channels, as nnU-Net counts them.

    Raises
    ------
    ResultsFolderError
        If dataset.json names no channels.
    """
    if not (dataset_json.get("channel_names") or dataset_json.get("modality")):
        raise ResultsFolderError("dataset.json names no channels (channel_names).")
    manager = PlansManager(plans)
    return int(determine_num_input_channels(manager, manager.get_configuration(configuration), dataset_json))


def channel_names_of(dataset_json: dict[str, Any]) -> list[str]:
    """The channels' names in the order of their numbers."""
    names = dataset_json.get("channel_names") or dataset_json["modality"]
    return [str(names[key]) for key in sorted(names, key=int)]


def _resampling(settings: dict[str, Any], what: str) -> Resampling:
    function = settings.get(f"resampling_fn_{what}")
    _check_known(f"resampling of {what}", function, RESAMPLING_FUNCTIONS)
    kwargs = dict(settings.get(f"resampling_fn_{what}_kwargs") or {})
    if kwargs.pop("is_seg", False):
        raise PlansError(f"The resampling of {what} treats it as a segmentation (is_seg).", remedy=_NOT_DONE)
    threshold = kwargs.pop("separate_z_anisotropy_threshold", ANISOTROPY_THRESHOLD)
    if threshold != ANISOTROPY_THRESHOLD:
        raise PlansError(
            f"The resampling of {what} has a separate_z_anisotropy_threshold of {threshold}; "
            f"only {ANISOTROPY_THRESHOLD} is known.",
            remedy=_NOT_DONE,
        )
    # nnU-Net's own defaults of the function, where the plans are silent.
    known: dict[str, Any] = {"order": 3, "order_z": 0, "force_separate_z": False}
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise PlansError(
            f"The resampling of {what} has arguments that are not known: {', '.join(unknown)}.",
            remedy=_NOT_DONE,
        )
    arguments = known | kwargs
    if not all(isinstance(arguments[k], int) and 0 <= arguments[k] <= 3 for k in ("order", "order_z")):
        raise PlansError(f"The resampling of {what} has an order over 3.", remedy=_NOT_DONE)
    return Resampling(**arguments)


def _check_known(what: str, name: object, known: tuple[str, ...]) -> None:
    if name not in known:
        raise PlansError(
            f"The {what} {name!r} is not known here; known: {', '.join(known)}.",
            remedy=_NOT_DONE,
        )
