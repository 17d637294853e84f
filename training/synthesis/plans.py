"""Plans, dataset.json and fingerprint for the brain networks, at any spacing.

nnU-Net plans a network from the data that it finds. Synthetic data are what this file says they are, so the
plans are written down.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from training.plans import Plans
from training.preprocess import write_json
from training.student import residual_encoder
from training.synthesis.structures import STRUCTURES

DATASET = "Dataset700_BrainStructures"


def dataset_json() -> dict[str, Any]:
    """One channel, MR of any contrast, and the labels of `STRUCTURES`."""
    return {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0} | {s.name: s.value for s in STRUCTURES},
        "numTraining": 20,
        "file_ending": ".nii.gz",
    }


def brain_plans(
    *,
    spacing_mm: float,
    patch_size: tuple[int, int, int],
    features: tuple[int, ...],
    blocks: tuple[int, ...],
    batch_size: int,
) -> Plans:
    """Plans of a ResidualEncoderUNet, every stage but the first halving all axes.

    Images are brought to RAS by the reader, normalised as a whole, and resampled with cubic splines along all
    axes: thick slices are interpolated too, not repeated.

    Parameters
    ----------
    spacing_mm : float
        Of the grid, on all axes.
    patch_size : tuple
        Voxels (Z, Y, X); whole-brain context matters, so that it should hold about 160 x 192 x 160 mm.
    features, blocks : tuple
        Channels and residual blocks of each stage of the teacher.
    """
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": False}
    architecture = residual_encoder(features, blocks, [[1, 1, 1], *[[2, 2, 2]] * (len(features) - 1)])
    # The intensities of synthetic images say nothing of real ones; z-scores need none.
    unused = {"mean": 0.0, "std": 1.0, "min": 0.0, "max": 1.0, "median": 0.0}
    return {
        "dataset_name": DATASET,
        "plans_name": f"BrainPlans{spacing_mm:g}mm".replace(".", "p"),
        "original_median_spacing_after_transp": [spacing_mm] * 3,
        "original_median_shape_after_transp": [round(256 / spacing_mm)] * 3,
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "3d_fullres": {
                "data_identifier": f"BrainPlans{spacing_mm:g}mm_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": batch_size,
                "patch_size": list(patch_size),
                "median_image_size_in_voxels": [float(round(256 / spacing_mm))] * 3,
                "spacing": [spacing_mm] * 3,
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resampling,
                "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
                "architecture": architecture,
                "batch_dice": False,
            }
        },
        "experiment_planner_used": "training.synthesis.plans",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {**unused, "percentile_00_5": 0.0, "percentile_99_5": 1.0}
        },
    }


CPU_2MM: dict[str, Any] = {
    "spacing_mm": 2.0,
    "patch_size": (80, 96, 80),
    "features": (32, 64, 128, 256, 320),
    "blocks": (1, 3, 4, 6, 6),
    "batch_size": 1,
}
# The 2 mm network without its finest stage, on a grid twice as coarse: an eighth of the work an iteration.
CPU_4MM: dict[str, Any] = {
    "spacing_mm": 4.0,
    "patch_size": (40, 48, 40),
    "features": (64, 128, 256, 320),
    "blocks": (3, 4, 6, 6),
    "batch_size": 2,
}
GPU_1MM: dict[str, Any] = {
    "spacing_mm": 1.0,
    "patch_size": (160, 192, 160),
    "features": (32, 64, 128, 256, 320, 320),
    "blocks": (1, 3, 4, 6, 6, 6),
    "batch_size": 2,
}
PLANS = {"4mm": CPU_4MM, "2mm": CPU_2MM, "1mm": GPU_1MM}


def write_plans(folder: Path, which: str) -> Path:
    """Write the files that a run starts from: plans.json, dataset.json, dataset_fingerprint.json."""
    folder.mkdir(parents=True, exist_ok=True)
    plans = brain_plans(**PLANS[which])
    write_json(folder / "plans.json", plans)
    write_json(folder / "dataset.json", dataset_json())
    write_json(
        folder / "dataset_fingerprint.json",
        {
            "foreground_intensity_properties_per_channel": plans[
                "foreground_intensity_properties_per_channel"
            ],
            "median_relative_size_after_cropping": 1.0,
            "shapes_after_crop": [plans["original_median_shape_after_transp"]],
            "spacings": [plans["original_median_spacing_after_transp"]],
        },
    )
    return folder


def main() -> None:
    """Command line: ``python -m training.synthesis.plans 4mm|2mm|1mm FOLDER``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=sorted(PLANS))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_plans(arguments.folder, arguments.which)


if __name__ == "__main__":
    main()
