"""The golden image of the brain bundle: the ICBM152 template in voxels of 2 mm, the network's own.

Its notice is in ``training.icbm_crop``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models.nifti import read_nifti
from models.volume import Volume, reorient
from training.golden_files import write_image
from training.synthesis.consistency import reacquired
from training.synthesis.real_scans import icbm_files

VOXEL_MM = 2.0


def small_brain() -> Volume:
    """ICBM152's T1, RAS, whole numbers. Raises TrainingDataError if nilearn is not installed."""
    volume, _ = reorient(read_nifti([icbm_files()["t1"]]), "RAS")
    for axis in range(3):
        volume = reacquired(volume, axis, VOXEL_MM)
    return Volume(volume.array.round(), volume.affine)


def main() -> None:
    """Command line: ``python -m training.synthesis.golden OUT.nii.gz``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args().output
    volume = small_brain()
    write_image(volume.array[0], volume.affine, output)


if __name__ == "__main__":
    main()
