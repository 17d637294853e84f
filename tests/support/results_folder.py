"""Tiny nnU-Net results folders with random weights, whole or broken in one place, for the training tests."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from training.student import build_network

PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESENC = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
PATCH = [16, 16, 16]


def architecture(
    network_class: str,
    features: list[int],
    strides: list[list[int]],
    blocks: list[int],
    decoder_convs: list[int],
) -> dict[str, Any]:
    """The ``architecture`` of a configuration, as nnU-Net 2.5 and later writes it."""
    stages = len(features)
    blocks_key = "n_conv_per_stage" if network_class == PLAIN else "n_blocks_per_stage"
    return {
        "network_class_name": network_class,
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": features,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": strides,
            blocks_key: blocks,
            "n_conv_per_stage_decoder": decoder_convs,
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


def tiny_plans(n_channels: int = 1) -> dict[str, Any]:
    """Plans of a two-stage PlainConvUNet of 8 and 16 channels with a patch of 16³ at 1 mm."""
    kwargs = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    fullres = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": PATCH,
        "median_image_size_in_voxels": [20.0, 20.0, 20.0],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * n_channels,
        "use_mask_for_norm": [False] * n_channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": kwargs,
        "resampling_fn_seg_kwargs": kwargs | {"is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": kwargs | {"order": 1},
        "architecture": architecture(PLAIN, [8, 16], [[1, 1, 1], [2, 2, 2]], [1, 1], [1]),
        "batch_dice": False,
    }
    intensity = {
        "max": 9.0,
        "mean": 2.0,
        "median": 2.0,
        "min": 0.0,
        "percentile_00_5": 0.5,
        "percentile_99_5": 8.0,
        "std": 1.5,
    }
    return {
        "dataset_name": "Dataset900_Balls",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": copy.deepcopy(fullres)},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): dict(intensity) for c in range(n_channels)},
    }


def tiny_dataset(n_channels: int = 1, *, regions: bool = False) -> dict[str, Any]:
    """A dataset.json with two labels, or two nested regions."""
    dataset: dict[str, Any] = {
        "channel_names": {str(c): f"channel{c}" for c in range(n_channels)},
        "labels": {"background": 0, "core": 1, "shell": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    if regions:
        dataset["labels"] = {"background": 0, "whole": [1, 2], "core": [2]}
        dataset["regions_class_order"] = [1, 2]
    return dataset


def tiny_checkpoint(plans: dict[str, Any], dataset: dict[str, Any], *, seed: int = 0) -> dict[str, Any]:
    """What nnU-Net's trainer saves, numpy's numbers in its log included."""
    settings = plans["configurations"]["3d_fullres"]
    torch.manual_seed(seed)
    n_outputs = len(dataset["labels"]) - has_regions(dataset)
    network = build_network(settings, len(dataset["channel_names"]), n_outputs)
    for name, value in network.named_parameters():
        if "seg_layers" in name:  # spread the random outputs, so that every label occurs
            torch.nn.init.normal_(value, std=2.0)
    return {
        "network_weights": network.state_dict(),
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float32(0.5)], "train_losses": [np.float64(0.1)]},
        "_best_ema": np.float32(0.5),
        "current_epoch": 3,
        "init_args": {
            "plans": plans,
            "configuration": "3d_fullres",
            "fold": 0,
            "dataset_json": dataset,
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


def has_regions(dataset: dict[str, Any]) -> bool:
    """Whether a dataset.json speaks of regions."""
    return "regions_class_order" in dataset


def write_results(
    folder: Path,
    plans: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    *,
    folds: tuple[str, ...] = ("0",),
    checkpoint: dict[str, Any] | None = None,
    name: str = "final",
) -> Path:
    """Write a results folder; every part may be given, also one that does not fit the others."""
    plans = tiny_plans() if plans is None else plans
    dataset = tiny_dataset() if dataset is None else dataset
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    (folder / "dataset_fingerprint.json").write_text(json.dumps({"spacings": [[1, 1, 1]]}))
    for seed, fold in enumerate(folds):
        content = checkpoint if checkpoint is not None else tiny_checkpoint(plans, dataset, seed=seed)
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(content, folder / f"fold_{fold}" / f"checkpoint_{name}.pth")
    return folder


def write_nifti_image(path: Path, *, axes: str = "RAS", shape: tuple[int, int, int] = (22, 20, 18)) -> Path:
    """A smooth random image with the given voxel axes (x, y, z), 1 mm, float32."""
    rng = np.random.default_rng(7)
    coarse = rng.normal(size=(4, 4, 4))
    index = np.ix_(*(np.linspace(0, 3, n).astype(int) for n in shape))
    array = (coarse[index] + 0.2 * rng.normal(size=shape)).astype(np.float32)
    image = nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 1.0, 1.0]))
    target = nibabel.orientations.axcodes2ornt(axes)
    change = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), target)
    image = image.as_reoriented(change)
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path
