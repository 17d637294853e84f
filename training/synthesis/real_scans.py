"""What a brain bundle makes of real scans: volumes beside the plausible ones, symmetry, pictures.

No reference labels are needed. Nothing that is measured here was drawn from a label map.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models.bundle import Bundle
from models.manifest import Label, Laterality
from models.nifti import read_nifti
from models.segmenter import Segmenter
from models.volume import Labelmap, Removed, Volume, reorient, spacing_xyz_mm
from training.errors import TrainingDataError
from training.icbm_crop import icbm_file
from training.metrics import dice

GREY = ("cortex", "thalamus", "caudate", "putamen", "pallidum", "hippocampus", "amygdala", "accumbens")
WHITE = ("white matter", "Brain stem", "ventral diencephalon")


@dataclass(frozen=True)
class Measured:
    """One scan: the volume of each label in mL, how the two sides compare, what post-processing left out."""

    scan: str
    shape_zyx: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    seconds: float
    volumes_ml: dict[str, float]
    outside: tuple[str, ...]
    asymmetry: dict[str, float]
    islands: int = 0
    removed_ml: float = 0.0


def read_scan(path: Path) -> Volume:
    """A NIfTI file, or a folder with one DICOM series (or one multi-frame object).

    Raises
    ------
    TrainingDataError
        If there is neither.
    Refusal
        If the NIfTI file cannot be used.
    """
    if path.is_file() and path.name.endswith((".nii", ".nii.gz")):
        return read_nifti([path])
    files = sorted(str(p) for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    series = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path)) if files else ()
    try:
        image = sitk.ReadImage(list(series) if len(series) > 1 else files[0])
    except (RuntimeError, IndexError) as error:
        raise TrainingDataError(f"{path.name} holds no scan that can be read.") from error
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return Volume(sitk.GetArrayFromImage(image).astype(np.float32)[None], affine)


def measure(
    name: str, volume: Volume, labelmap: Labelmap, labels: Sequence[Label], seconds: float
) -> Measured:
    """Volumes of a labelmap, those outside of the bundle's ranges, and asymmetry.

    Asymmetry is 2 (L − R) / (L + R) of each pair, 0 for equal sides and ±2 where one is missing.
    """
    found = labelmap.volumes_ml()
    volumes = {label.name: round(found.get(label.value, 0.0), 3) for label in labels}
    outside = tuple(
        label.name
        for label in labels
        if label.volume_range_ml is not None
        and not label.volume_range_ml[0] <= volumes[label.name] <= label.volume_range_ml[1]
    )
    asymmetry = {}
    for label in labels:
        if label.laterality is Laterality.LEFT:
            left, right = volumes[label.name], volumes[label.name.replace("Left", "Right", 1)]
            both = left + right
            asymmetry[label.name.removeprefix("Left ")] = round(2 * (left - right) / both, 3) if both else 0.0
    removed = labelmap.removed or Removed(0, {}, 0.0)
    return Measured(
        scan=name,
        shape_zyx=volume.shape_zyx,
        spacing_mm=tuple(round(s, 3) for s in spacing_xyz_mm(volume.affine)),
        seconds=round(seconds, 1),
        volumes_ml=volumes,
        outside=outside,
        asymmetry=asymmetry,
        islands=removed.islands,
        removed_ml=round(sum(removed.voxels.values()) * labelmap.voxel_volume_ml, 3),
    )


def tissue_dice(
    labelmap: Labelmap, labels: Sequence[Label], tissues: Mapping[str, Volume]
) -> dict[str, float]:
    """Dice of grey and of white matter with probability maps on the same grid, where these are over one half.

    Cortex and deep nuclei count as grey; cerebral and cerebellar white matter, brain stem and ventral
    diencephalon as white.
    """
    grey, white = (tissues[k].array[0] / tissues[k].array.max() > 0.5 for k in ("grey", "white"))
    result = {}
    for name, words, reference in (
        ("grey", GREY, grey),
        ("white", WHITE, white),
    ):
        values = [label.value for label in labels if any(word in label.name for word in words)]
        mask = np.isin(labelmap.array, values)
        result[name] = round(dice(mask, reference), 4) if mask.any() or reference.any() else 0.0
    return result


def draw_overlay(volume: Volume, labelmap: Labelmap, labels: Sequence[Label], title: str, path: Path) -> Path:
    """Axial, coronal and sagittal planes through the middle of what was found, in the labels' colours."""
    image, way = reorient(volume, "RAS")
    found = way.apply(labelmap.array[None])[0]
    x_mm, y_mm, z_mm = spacing_xyz_mm(image.affine)
    middle = np.argwhere(found > 0).mean(axis=0).astype(int) if found.any() else np.array(found.shape) // 2
    colours = np.zeros((max(label.value for label in labels) + 1, 3))
    for label in labels:
        colours[label.value] = np.array(label.color_rgb) / 255
    low, high = np.percentile(image.array, [1, 99.5])
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    ratios = (y_mm / x_mm, z_mm / x_mm, z_mm / y_mm)
    for axis, (axes, ratio) in enumerate(zip(figure.subplots(1, 3), ratios, strict=True)):
        grey = np.clip((np.take(image.array[0], middle[axis], axis) - low) / max(high - low, 1e-6), 0, 1)
        plane: NDArray[np.int64] = np.take(found, middle[axis], axis).astype(np.int64)
        mixed = np.where(
            plane[..., None] > 0, 0.45 * colours[plane] + 0.55 * grey[..., None], grey[..., None]
        )
        axes.imshow(mixed, origin="lower", aspect=ratio, interpolation="nearest")
        axes.set_axis_off()
    figure.suptitle(f"{title} (left of the patient is left in the picture)", fontsize=8)
    figure.savefig(path, dpi=80)
    return path


def icbm_files() -> dict[str, Path]:
    """The ICBM152 template's T1 and tissue maps that nilearn carries. Raises TrainingDataError."""
    return {"t1": icbm_file("t1"), "grey": icbm_file("gm"), "white": icbm_file("wm")}


def main() -> None:
    """Command line: ``python -m training.synthesis.real_scans BUNDLE OUTPUT SCAN...``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path, help="folder for scans.json and the pictures")
    parser.add_argument("scans", type=Path, nargs="*", help="NIfTI files and folders of DICOM series")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    bundle = Bundle.open(arguments.bundle)
    labels = bundle.manifest.labels
    icbm = icbm_files()
    content: dict[str, object] = {"bundle_digest": bundle.digest}
    measured = []
    segmenter = Segmenter(bundle)
    try:
        for path in (icbm["t1"], *arguments.scans):
            name = "icbm152" if path == icbm["t1"] else path.name.removesuffix(".gz").removesuffix(".nii")
            volume = read_scan(path)
            started = time.perf_counter()
            labelmap = segmenter.segment(volume)
            measured.append(measure(name, volume, labelmap, labels, time.perf_counter() - started))
            draw_overlay(volume, labelmap, labels, name, arguments.output / f"{name}.png")
            if path == icbm["t1"]:
                tissues = {k: read_nifti([icbm[k]]) for k in ("grey", "white")}
                content["icbm152_tissue_dice"] = tissue_dice(labelmap, labels, tissues)
    finally:
        segmenter.close()
    content["scans"] = [asdict(one) for one in measured]
    (arguments.output / "scans.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
