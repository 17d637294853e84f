"""Whole heads drawn from label maps as NIfTI cases for `segnode-train evaluate`, and a picture of samples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from models.nifti import write_nifti
from models.volume import Labelmap
from training.golden_files import write_image
from training.preprocess import read_split
from training.synthesis.generator import Generator, Sample
from training.synthesis.label_maps import LabelMapFolder
from training.synthesis.recipe import SynthesisRecipe
from training.synthesis.structures import STRUCTURES

WHOLE_HEAD = (208, 224, 192)
"""Voxels (Z, Y, X) of 1 mm: room for a head whose brain lies in the middle."""


def draw(
    maps: LabelMapFolder, name: str, count: int, *, seed: int, shape: tuple[int, int, int], spacing_mm: float
) -> list[Sample]:
    """Samples of one map; the same arguments always give the same ones on a CPU."""
    recipe = SynthesisRecipe(near_mm=0.0, far_probability=0.0, cut_probability=0.0)
    generator = Generator(
        [maps.read(name)],
        maps.table,
        recipe,
        shape=shape,
        spacing_mm=spacing_mm,
        device=torch.device("cpu"),
    )
    # The key holds the map's name, so that a map gives the same heads in whatever list it stands.
    return [generator.sample(seed, *name.encode(), i) for i in range(count)]


def write_cases(
    maps: LabelMapFolder,
    names: Sequence[str],
    folder: Path,
    *,
    count: int,
    seed: int,
    shape: tuple[int, int, int],
    spacing_mm: float = 1.0,
) -> list[str]:
    """Write ``images/<case>.nii.gz`` and ``labels/<case>.nii.gz``, RAS, and return the cases' names."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])  # RAS voxels in LPS millimetres
    cases = []
    for name in names:
        for i, sample in enumerate(draw(maps, name, count, seed=seed, shape=shape, spacing_mm=spacing_mm)):
            case = f"{name}_{i}_{sample.contrast}_{sample.keep.replace(' ', '-')}"
            image = np.round((sample.image - sample.image.min()).numpy() * 200).astype(np.float32)
            write_image(image, affine, folder / "images" / f"{case}.nii.gz")
            labels = sample.labels.numpy().astype(np.uint8)
            write_nifti(Labelmap(labels, affine), folder / "labels" / f"{case}.nii.gz")
            cases.append(case)
    return cases


def draw_samples(samples: Sequence[Sample], path: Path) -> Path:
    """One plane of each sample, image over labels: axial, coronal and sagittal in turn."""
    figure = Figure(figsize=(1.5 * len(samples), 3.4), layout="constrained")
    grid = np.atleast_2d(figure.subplots(2, len(samples)))
    colours = mpl.colormaps["nipy_spectral"]
    for i, sample in enumerate(samples):
        axis = i % 3
        plane = sample.image.shape[axis] // 2
        grid[0, i].imshow(sample.image.select(axis, plane).numpy(), cmap="gray", origin="lower")
        grid[1, i].imshow(
            sample.labels.select(axis, plane).numpy(),
            cmap=colours,
            origin="lower",
            vmin=0,
            vmax=len(STRUCTURES),
            interpolation="nearest",
        )
        grid[0, i].set_title(f"{sample.contrast}, {sample.keep}", fontsize=6)
        for axes in grid[:, i]:
            axes.set_axis_off()
    figure.savefig(path, dpi=90)
    return path


def main() -> None:
    """Command line: ``python -m training.synthesis.cases MAPS SPLIT LIST FOLDER``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("maps", type=Path, help="folder of the label maps")
    parser.add_argument("split", type=Path, help="JSON with lists of maps")
    parser.add_argument("list", help="name of the list, for example claim")
    parser.add_argument("folder", type=Path, help="where images and labels go")
    parser.add_argument("--count", type=int, default=3, help="samples of each map")
    parser.add_argument("--seed", type=int, default=20250101)
    parser.add_argument(
        "--picture", type=Path, help="draw samples of the training's kind to this PNG instead"
    )
    arguments = parser.parse_args()
    maps = LabelMapFolder(arguments.maps)
    names = read_split(arguments.split, arguments.list, arguments.list)["train"]
    if arguments.picture is None:
        write_cases(
            maps, names, arguments.folder, count=arguments.count, seed=arguments.seed, shape=WHOLE_HEAD
        )
        return
    generator = Generator(
        maps.read_all(names),
        maps.table,
        SynthesisRecipe(),
        shape=(80, 96, 80),
        spacing_mm=2.0,
        device=torch.device("cpu"),
    )
    draw_samples([generator.sample(arguments.seed, i) for i in range(10)], arguments.picture)


if __name__ == "__main__":
    main()
