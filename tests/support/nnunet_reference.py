"""nnU-Net's own predictor on a small network, and the same network as our bundle: the two sides of parity.

Nothing here is imported by the product. A :class:`ReferenceModel` is a set of nnU-Net plans, networks with
random or trained weights, and what the engine needs to run them: a manifest and ONNX files.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from models.manifest import Manifest, Precision

RESENC = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


@dataclass(frozen=True)
class FolderOfWeights:
    """What the Segmenter asks of a bundle, without sealing one."""

    manifest: Manifest
    paths: tuple[Path, ...]
    int8_paths: tuple[Path, ...] = ()

    def weight_paths(self, precision: Precision) -> tuple[Path, ...]:
        return self.paths if precision is Precision.FLOAT32 else self.int8_paths


@dataclass
class ReferenceModel:
    """An nnU-Net configuration with weights for each fold."""

    plans: dict[str, Any]
    dataset: dict[str, Any]
    mirror_axes: tuple[int, ...] | None = None
    parameters: list[dict[str, torch.Tensor]] = field(default_factory=list)
    threads: int = 1

    @property
    def configuration(self) -> dict[str, Any]:
        return self.plans["configurations"]["3d_fullres"]

    def network(self, fold: int = 0) -> torch.nn.Module:
        """The network with one fold's weights, in evaluation mode, without deep supervision."""
        network = self.bare_network()
        network.load_state_dict(self.parameters[fold])
        return network.eval()

    def bare_network(self) -> torch.nn.Module:
        """The network as nnU-Net initialises it, without deep supervision."""
        plans = PlansManager(self.plans)
        network: torch.nn.Module = nnUNetTrainer.build_network_architecture(
            plans,
            plans.get_configuration("3d_fullres"),
            len(self.dataset["channel_names"]),
            plans.get_label_manager(self.dataset).num_segmentation_heads,
            False,
        )
        return network.eval()

    def randomise(self, folds: int = 1, seed: int = 0) -> ReferenceModel:
        """Random weights; norms and biases too, so that nothing is at its neutral start."""
        self.parameters = []
        for fold in range(folds):
            torch.manual_seed(seed + fold)
            network = self.bare_network()
            for name, value in network.named_parameters():
                if value.ndim == 1:
                    noise = 0.3 * torch.randn_like(value) * ("seg_layers" not in name)
                    value.data = noise if name.endswith("bias") else 1 + noise
            self.parameters.append({k: v.clone() for k, v in network.state_dict().items()})
        return self

    def predictor(self) -> nnUNetPredictor:
        """Stock nnU-Net's predictor on the CPU."""
        predictor = nnUNetPredictor(
            tile_step_size=0.5,
            use_gaussian=True,
            use_mirroring=self.mirror_axes is not None,
            perform_everything_on_device=False,
            device=torch.device("cpu"),
            allow_tqdm=False,
        )
        plans = PlansManager(self.plans)
        predictor.manual_initialization(
            self.network(),
            plans,
            plans.get_configuration("3d_fullres"),
            self.parameters,
            self.dataset,
            "nnUNetTrainer",
            self.mirror_axes,
        )
        return predictor

    def predict(
        self, array: NDArray[np.float32], spacing_zyx: Sequence[float], *, float32: bool
    ) -> NDArray[Any]:
        """Labels (Z, Y, X) by nnU-Net, stock or with its accumulators in float32."""
        torch.set_num_threads(self.threads)
        form = float32_accumulators() if float32 else contextlib.nullcontext()
        with form, contextlib.redirect_stdout(io.StringIO()):
            labels = self.predictor().predict_single_npy_array(
                array.copy(), {"spacing": [float(s) for s in spacing_zyx]}
            )
        return np.asarray(labels)

    def export(self, folder: Path, *, orientation: str = "any") -> FolderOfWeights:
        """ONNX files and the manifest."""
        paths = []
        patch = tuple(self.configuration["patch_size"])
        for fold in range(len(self.parameters)):
            path = folder / f"fold{fold}.onnx"
            export_onnx(self.network(fold), path, (1, len(self.dataset["channel_names"]), *patch))
            paths.append(path)
        return FolderOfWeights(self.manifest(orientation), tuple(paths))

    def manifest(self, orientation: str = "any") -> Manifest:
        """What model.json would say about this configuration."""
        configuration = self.configuration
        intensities = self.plans["foreground_intensity_properties_per_channel"]
        channels = []
        for i, name in self.dataset["channel_names"].items():
            span = intensities[str(i)]
            channels.append(
                {
                    "name": f"{name}{i}",
                    "normalization": configuration["normalization_schemes"][int(i)],
                    "use_mask_for_norm": configuration["use_mask_for_norm"][int(i)],
                    "intensity": {
                        key: span[key] for key in ("mean", "std", "percentile_00_5", "percentile_99_5")
                    },
                }
            )
        regions = self.dataset.get("regions_class_order")
        values = sorted(
            {v for r in self.dataset["labels"].values() for v in (r if isinstance(r, list) else [r])} - {0}
        )
        code = {"value": "49755003", "meaning": "Morphologically Abnormal Structure"}
        return Manifest.model_validate_json(
            json.dumps(
                {
                    "name": "parity",
                    "version": "1.0.0",
                    "title": "Parity",
                    "intended_use": "Tests alone",
                    "licence": "Apache-2.0",
                    "channels": channels,
                    "labels": [
                        {
                            "value": v,
                            "name": f"label {v}",
                            "category": code,
                            "type": code,
                            "color_rgb": [v % 256, 0, 0],
                        }
                        for v in values
                    ],
                    "orientation": orientation,
                    "preprocessing": {
                        "transpose_forward": self.plans["transpose_forward"],
                        "transpose_backward": self.plans["transpose_backward"],
                        "spacing_mm": configuration["spacing"],
                        "resampling_data": _orders(configuration["resampling_fn_data_kwargs"]),
                        "resampling_probabilities": _orders(
                            configuration["resampling_fn_probabilities_kwargs"]
                        ),
                    },
                    "inference": {
                        "head": "sigmoid" if regions else "softmax",
                        "patch_size": configuration["patch_size"],
                        "mirror_axes": list(self.mirror_axes or ()),
                        "regions_class_order": list(regions or ()),
                    },
                    "weights": [
                        {"file": f"fold{fold}.onnx", "sha256": "0" * 64, "fold": fold}
                        for fold in range(max(1, len(self.parameters)))
                    ],
                    "golden": {
                        "images": [f"image{i}.nii.gz" for i in range(len(channels))],
                        "labelmap": "labelmap.nii.gz",
                    },
                    "provenance": {"method": "none", "data": "random weights"},
                }
            )
        )


def reference_model(
    *,
    architecture: str = RESENC,
    features: Sequence[int] = (4, 8),
    strides: Sequence[Sequence[int]] | None = None,
    blocks: Sequence[int] | None = None,
    patch_size: Sequence[int] = (16, 16, 16),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    n_labels: int = 3,
    regions: dict[str, list[int]] | None = None,
    regions_class_order: Sequence[int] | None = None,
    schemes: Sequence[str] = ("ZScoreNormalization",),
    use_mask: bool = False,
    transpose_forward: Sequence[int] = (0, 1, 2),
    mirror_axes: tuple[int, ...] | None = None,
    force_separate_z: bool | None = None,
    folds: int = 1,
    seed: int = 0,
) -> ReferenceModel:
    """A small nnU-Net configuration with random weights; ``n_labels`` counts the foreground."""
    stages = len(features)
    strides = strides or [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)]
    blocks = list(blocks or [1] * stages)
    arguments: dict[str, Any] = {
        "n_stages": stages,
        "features_per_stage": list(features),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [list(s) for s in strides],
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    arguments["n_blocks_per_stage" if architecture == RESENC else "n_conv_per_stage"] = blocks
    labels: dict[str, Any] = {"background": 0}
    labels |= regions or {f"label{i}": i for i in range(1, n_labels + 1)}
    dataset: dict[str, Any] = {
        "channel_names": {str(i): "CT" if s.startswith("CT") else "MR" for i, s in enumerate(schemes)},
        "labels": labels,
        "file_ending": ".nii.gz",
        "numTraining": 1,
    }
    if regions_class_order is not None:
        dataset["regions_class_order"] = list(regions_class_order)
    backward = [list(transpose_forward).index(i) for i in range(3)]
    span = {"max": 400.0, "mean": 60.0, "median": 60.0, "min": -100.0}
    span |= {"percentile_00_5": -50.0, "percentile_99_5": 180.0, "std": 45.0}
    plans = {
        "dataset_name": "Dataset001_Parity",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose_forward),
        "transpose_backward": backward,
        "foreground_intensity_properties_per_channel": {str(i): span for i in range(len(schemes))},
        "original_median_spacing_after_transp": list(spacing),
        "original_median_shape_after_transp": [64, 64, 64],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": list(patch_size),
                "median_image_size_in_voxels": [64, 64, 64],
                "spacing": list(spacing),
                "normalization_schemes": list(schemes),
                "use_mask_for_norm": [use_mask] * len(schemes),
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": _arguments(False, 3, force_separate_z),
                "resampling_fn_seg_kwargs": _arguments(True, 1, force_separate_z),
                "resampling_fn_probabilities_kwargs": _arguments(False, 1, force_separate_z),
                "architecture": {
                    "network_class_name": architecture,
                    "arch_kwargs": arguments,
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
                "batch_dice": False,
            }
        },
    }
    return ReferenceModel(plans, dataset, mirror_axes).randomise(folds, seed)


def trained_model(folder: Path, *, mirror: bool = False) -> ReferenceModel:
    """A results folder of stock nnU-Net."""
    checkpoint = torch.load(
        folder / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=False
    )
    return ReferenceModel(
        json.loads((folder / "plans.json").read_text()),
        json.loads((folder / "dataset.json").read_text()),
        tuple(checkpoint["inference_allowed_mirroring_axes"]) if mirror else None,
        [checkpoint["network_weights"]],
    )


@contextlib.contextmanager
def float32_accumulators() -> Iterator[None]:
    """Form (a) of the gate: nnU-Net's sums in float32, its Gaussian as it is, rounded to float16."""
    half, gaussian = torch.half, predict_from_raw_data.compute_gaussian

    def rounded(*arguments: Any, **named: Any) -> torch.Tensor:
        return gaussian(*arguments, **{**named, "dtype": torch.float16}).float()

    torch.half = torch.float32  # the predictor names its accumulators' type in this way alone
    predict_from_raw_data.compute_gaussian = rounded
    try:
        yield
    finally:
        torch.half = half
        predict_from_raw_data.compute_gaussian = gaussian


def export_onnx(network: torch.nn.Module, path: Path, shape: Sequence[int]) -> None:
    """The network as ONNX of standard operators, with a fixed shape."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(*shape),),
            str(path),
            opset_version=18,
            dynamo=False,
            input_names=["image"],
            output_names=["logits"],
        )


def _arguments(is_seg: bool, order: int, force_separate_z: bool | None) -> dict[str, Any]:
    return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": force_separate_z}


def _orders(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: arguments[key] for key in ("order", "order_z", "force_separate_z")}
