"""A tiny segmentation task and a tiny nnU-Net teacher for it, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import torch
from nnunet_reference import ReferenceModel

from training.preprocess import Split
from training.run_state import nnunet_checkpoint

N_CASES = 6
SPLIT: Split = {
    "train": [f"case_{i:03d}" for i in range(4)],
    "val": [f"case_{i:03d}" for i in range(4, N_CASES)],
}


def write_cases(folder: Path, *, size: int = 24, n_labels: int = 2, seed: int = 0) -> Path:
    """Noisy balls, one per label, brighter with the label: imagesTr and labelsTr."""
    rng = np.random.default_rng(seed)
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
    for case in range(N_CASES):
        labels = np.zeros((size, size, size), np.uint8)
        for value in range(1, n_labels + 1):
            centre = rng.uniform(6, size - 6, 3)[:, None, None, None]
            labels[((grid - centre) ** 2).sum(0) < rng.uniform(3, 5) ** 2] = value
        image = (100 * labels + rng.normal(0, 20, labels.shape)).astype(np.float32)
        for array, where in (
            (image, f"imagesTr/case_{case:03d}_0000"),
            (labels, f"labelsTr/case_{case:03d}"),
        ):
            nifti = nibabel.Nifti1Image(array, np.eye(4))
            nifti.set_qform(np.eye(4), code=1)
            nibabel.save(nifti, folder / f"{where}.nii.gz")
    return folder


def write_results_folder(folder: Path, model: ReferenceModel, *, seed: int = 0) -> Path:
    """A results folder as nnU-Net leaves it, one fold per set of weights, deep-supervision heads and all."""
    from training.student import build_network

    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(model.plans))
    (folder / "dataset.json").write_text(json.dumps(model.dataset))
    (folder / "dataset_fingerprint.json").write_text(json.dumps({"spacings": [], "shapes_after_crop": []}))
    n_outputs = len(model.dataset.get("regions_class_order", model.dataset["labels"]))
    for fold in range(len(model.parameters)):
        torch.manual_seed(seed + fold)
        network = build_network(
            model.configuration, len(model.dataset["channel_names"]), n_outputs, deep_supervision=True
        )
        init_args = {
            "plans": model.plans,
            "configuration": "3d_fullres",
            "fold": fold,
            "dataset_json": model.dataset,
        }
        (folder / f"fold_{fold}").mkdir()
        torch.save(
            nnunet_checkpoint(network, init_args, (0, 1, 2), 1),
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return folder
