"""A crop of the ICBM152 template as a small test image that may be given on.

The ICBM 2009a nonlinear symmetric template (Fonov et al. 2009) comes with nilearn's wheel: 1 mm, skull
removed, RAS. Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological
Institute, McGill University; it may be used, copied, changed and distributed for any purpose and without
fee, provided that this notice appears in all copies, and comes without any warranty.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from models.nifti import read_nifti
from models.volume import Volume
from training.errors import TrainingDataError
from training.golden_files import write_image

LEFT_HIPPOCAMPUS_RAS_MM = (-27.0, -22.0, -14.0)
HIPPOCAMPUS_SIZE_XYZ = (36, 50, 36)


def icbm_file(content: Literal["t1", "gm", "wm"]) -> Path:
    """The template's T1, or its map of grey or white matter. Raises TrainingDataError without nilearn."""
    found = find_spec("nilearn")
    if found is None or found.origin is None:
        raise TrainingDataError("nilearn is not installed.", remedy="Install segnode[demo].")
    name = f"mni_icbm152_{content}_tal_nlin_sym_09a_converted.nii.gz"
    return Path(found.origin).parent / "datasets" / "data" / name


def icbm_crop(
    centre_ras_mm: tuple[float, float, float] = LEFT_HIPPOCAMPUS_RAS_MM,
    size_xyz: tuple[int, int, int] = HIPPOCAMPUS_SIZE_XYZ,
) -> Volume:
    """A box of the template's T1 around a place in MNI space, (1, Z, Y, X) at 1 mm.

    Raises
    ------
    TrainingDataError
        If nilearn is not installed, or the box reaches over the template's border.
    """
    whole = read_nifti([icbm_file("t1")])
    centre_lps = np.array([-centre_ras_mm[0], -centre_ras_mm[1], centre_ras_mm[2], 1.0])
    middle = np.round(np.linalg.solve(whole.affine, centre_lps))[:3].astype(int)
    first = middle - np.array(size_xyz) // 2
    last = first + np.array(size_xyz)
    if first.min() < 0 or np.any(last > np.array(whole.shape_zyx[::-1])):
        raise TrainingDataError(
            f"A box of {size_xyz} around {centre_ras_mm} reaches over the template's border."
        )
    (x0, y0, z0), (x1, y1, z1) = first, last
    affine = whole.affine.copy()
    affine[:3, 3] += whole.affine[:3, :3] @ first
    return Volume(np.ascontiguousarray(whole.array[:, z0:z1, y0:y1, x0:x1]), affine)


def main() -> None:
    """Command line: ``python -m training.icbm_crop OUT.nii.gz``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args().output
    crop = icbm_crop()
    write_image(crop.array[0], crop.affine, output)


if __name__ == "__main__":
    main()
