"""The pictures of a report: bars, curves, and overlays side by side with the reference."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from models.nifti import read_labelmap, read_nifti
from training.errors import TrainingDataError
from training.evaluate import Evaluation

_DPI = 120
_MOST_UPRIGHT = 8  # labels; the names of more would run into each other


def draw_dice(evaluations: Mapping[str, Evaluation], path: Path) -> Path:
    """Mean Dice of every label and run, with standard errors."""
    labels = next(iter(evaluations.values())).label_names
    lying = len(labels) > _MOST_UPRIGHT
    if lying:
        size = (8.0, 1.5 + len(labels) * (0.14 + 0.09 * len(evaluations)))
    else:
        wide = max(7.0, 1.6 + 1.1 * len(labels) * max(1, len(evaluations) / 3))
        size = (wide, 3.6 + 0.25 * len(evaluations) / 2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(evaluations)
    lowest, highest = 1.0, 0.0
    for i, (name, evaluation) in enumerate(evaluations.items()):
        summaries = [evaluation.summary("dice", label) for label in labels]
        positions = np.arange(len(labels)) + (i - (len(evaluations) - 1) / 2) * width
        means, errors = [s.mean for s in summaries], [s.standard_error for s in summaries]
        if lying:
            axes.barh(positions, means, width, xerr=errors, capsize=1, label=name)
        else:
            axes.bar(positions, means, width, yerr=errors, capsize=3, label=name)
        lowest, highest = min(lowest, *means), max(highest, *means)
    # The axis does not start at 0: differences are small.
    limits = (max(0.0, lowest - 0.05), min(1.0, highest + 0.05))
    if lying:
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)  # the first label on top
        axes.set(xlim=limits, xlabel="Dice")
    else:
        axes.set_xticks(range(len(labels)), labels)
        axes.set(ylim=limits, ylabel="Dice")
    figure.legend(fontsize="small", ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=_DPI)
    return path


def draw_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Segmentation loss and validation Dice over the epochs of every run."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    loss, dice = figure.subplots(1, 2)
    for name, log in logs.items():
        epochs = [entry["epoch"] for entry in log]
        loss.plot(epochs, [entry["losses"]["segmentation"] for entry in log], label=name)
        dice.plot(epochs, [entry["mean_dice"] for entry in log], label=name)
    for axes, title in ((loss, "segmentation loss, training"), (dice, "mean Dice of patches, validation")):
        axes.set_xlabel("epoch")
        axes.set_title(title, fontsize="medium")
    figure.legend(*dice.get_legend_handles_labels(), fontsize="small", ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=_DPI)
    return path


def draw_overlays(
    case: str, images: Path, references: Path, labelmaps: Mapping[str, Path], path: Path
) -> Path:
    """One axial plane of a case, through the most labelled voxels: image, reference, and each run.

    Raises
    ------
    TrainingDataError
        If the case's image is not there.
    """
    candidates = [images / f"{case}_0000.nii.gz", images / f"{case}.nii.gz"]
    image_path = next((p for p in candidates if p.is_file()), None)
    if image_path is None:
        raise TrainingDataError(f"There is no image of {case!r} to draw.")
    image = read_nifti([image_path]).array[0]
    reference = read_labelmap(references / f"{case}.nii.gz").array
    plane = int((reference > 0).sum(axis=(1, 2)).argmax())
    panels = {"image": None, "reference": reference} | {
        name: read_labelmap(folder / f"{case}.nii.gz").array for name, folder in labelmaps.items()
    }
    figure = Figure(figsize=(2.4 * len(panels), 3.0), layout="constrained")
    colours = mpl.colormaps["tab10"]
    for axes, (name, labels) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
        axes.imshow(image[plane], cmap="gray", origin="lower")
        if labels is not None:
            for value in np.unique(reference[reference > 0]):
                mask = labels[plane] == value
                if mask.any():
                    axes.contour(mask, levels=[0.5], colors=[colours(int(value) % 10)], linewidths=1.2)
        axes.set_title(textwrap.fill(name, 20), fontsize="small")
        axes.set_axis_off()
    figure.savefig(path, dpi=_DPI)
    return path
