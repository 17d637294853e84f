"""One head in many acquisitions: how far the volumes agree when slices get thick, in each direction."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from models.bundle import Bundle
from models.segmenter import Segmenter
from models.volume import Volume, reorient, spacing_xyz_mm
from training.synthesis.fields import along_axes, slice_matrix
from training.synthesis.real_scans import icbm_files, read_scan

PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}
"""Which axis of an RAS array (z, y, x) the slices of a plane are stacked along."""

THICKNESSES_MM = (1.0, 3.0, 6.0)
REFERENCE = "1x1x1"


def tolerance(volume_ml: float) -> float:
    """By how much the volume of a structure may differ between acquisitions, as a share of it.

    A tenth from 10 mL on, a fifth from 1 mL on, and 0.35 below: in slices of 6 mm a structure of 1 mL, about
    10 mm across, has two slices, and half of a slice more or less is a quarter of it.
    """
    return 0.10 if volume_ml >= 10 else 0.20 if volume_ml >= 1 else 0.35


def reacquired(volume: Volume, axis: int, thickness_mm: float) -> Volume:
    """The volume in contiguous slices of a Gaussian profile of the stated width at half maximum.

    Parameters
    ----------
    volume : Volume
        RAS, finer than ``thickness_mm`` along the axis.
    axis : int
        Of (z, y, x), along which the slices are stacked.
    """
    voxel_mm = spacing_xyz_mm(volume.affine)[2 - axis]
    step = thickness_mm / voxel_mm
    if step <= 1.0:
        return volume
    shift = (step - 1.0) / 2.0  # the first slice covers the first voxels
    matrix = slice_matrix(volume.array.shape[1 + axis], step, step, shift)
    matrices: list[torch.Tensor | None] = [None, None, None]
    matrices[axis] = torch.as_tensor(matrix, dtype=torch.float32)
    array = along_axes(torch.as_tensor(np.ascontiguousarray(volume.array)), matrices).numpy()
    affine = volume.affine.copy()
    column = 2 - axis
    affine[:3, 3] += affine[:3, column] * shift
    affine[:3, column] *= step
    return Volume(np.ascontiguousarray(array), affine)


def deviations(volumes_ml: Mapping[str, Mapping[str, float]], reference: str) -> dict[str, float]:
    """For each label the largest relative difference of any acquisition's volume from the reference's."""
    return {
        label: round(
            max(abs(volumes[label] - wanted) / wanted for volumes in volumes_ml.values()) if wanted else 1.0,
            4,
        )
        for label, wanted in volumes_ml[reference].items()
    }


def main() -> None:
    """Command line: ``python -m training.synthesis.consistency BUNDLE OUTPUT.json [SCAN]``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("scan", type=Path, nargs="?", help="1 mm isotropic; ICBM152 if left out")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    volume, _ = reorient(read_scan(arguments.scan or icbm_files()["t1"]), "RAS")
    found: dict[str, dict[str, float]] = {}
    segmenter = Segmenter(bundle)
    try:
        for thickness in THICKNESSES_MM:
            for plane, axis in PLANES.items():
                if thickness == THICKNESSES_MM[0] and found:
                    continue  # without thick slices the three planes are one
                name = REFERENCE if thickness == THICKNESSES_MM[0] else f"1x1x{thickness:g} {plane}"
                volumes = segmenter.segment(reacquired(volume, axis, thickness)).volumes_ml()
                found[name] = {
                    label.name: round(volumes.get(label.value, 0.0), 3) for label in bundle.manifest.labels
                }
    finally:
        segmenter.close()
    largest = deviations(found, REFERENCE)
    allowed = {label: tolerance(volume) for label, volume in found[REFERENCE].items()}
    content = {
        "bundle_digest": bundle.digest,
        "reference": REFERENCE,
        "volumes_ml": found,
        "largest_relative_deviation": largest,
        "tolerance": allowed,
        "beyond_tolerance": [label for label, deviation in largest.items() if deviation > allowed[label]],
    }
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
