"""The golden case of a bundle: a small image, and what nnU-Net's own predictor makes of it."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Image
from numpy.typing import NDArray

from models.manifest import GoldenCase, Postprocessing
from models.nifti import read_nifti, write_nifti
from models.volume import Affine, Labelmap, axis_codes, reorient
from training.errors import ExportError
from training.reference import make_predictor, postprocess, predict_labelmap, preprocess
from training.teacher import ResultsFolder

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_golden_case(
    results: ResultsFolder,
    images: Sequence[Path],
    folder: Path,
    *,
    orientation: str,
    mirroring: bool,
    postprocessing: Postprocessing | None = None,
) -> tuple[GoldenCase, NDArray[np.float32]]:
    """Write ``image_0000.nii.gz``, ... and ``labelmap.nii.gz`` into a folder.

    The image is brought to the model's orientation first (by flips and transposes alone), because nnU-Net's
    readers take an array as it lies in the file.

    Parameters
    ----------
    images : sequence of Path
        NIfTI files, one per channel, on one grid.
    orientation : str
        The model's axis code, or ``any`` for the image as it is.
    postprocessing : Postprocessing, optional
        What the bundle asks for; nnU-Net's own function does it here.

    Returns
    -------
    GoldenCase, (C, Z, Y, X) array
        The files' names, and the middle patch of the preprocessed image as the network sees it.

    Raises
    ------
    ExportError
        If there is not one image per channel, or the model finds nothing in it.
    Refusal
        If an image cannot be read.
    """
    if len(images) != results.n_channels:
        raise ExportError(
            f"The golden case needs one image for each of {results.n_channels} channels, not {len(images)}.",
            remedy="Give --golden-image once per channel, in order: a small image that may be given on.",
        )
    volume = read_nifti(images)
    if orientation != "any":
        volume, _ = reorient(volume, orientation)
    names = [f"image_{channel:04d}.nii.gz" for channel in range(results.n_channels)]
    for name, channel in zip(names, volume.array, strict=True):
        write_image(channel, volume.affine, folder / name)
    paths = [folder / name for name in names]
    predictor = make_predictor(results, mirroring=mirroring)
    labels = predict_labelmap(predictor, paths)
    if labels.shape != volume.shape_zyx:
        raise ExportError(f"nnU-Net gave labels of {labels.shape} for an image of {volume.shape_zyx}.")
    if not labels.any():
        raise ExportError(
            "The model finds no label in the golden image, which would prove nothing.",
            remedy="Give an image that shows what the model segments.",
        )
    if postprocessing is not None:
        labels = postprocess(labels, postprocessing)
    write_nifti(Labelmap(labels, volume.affine), folder / "labelmap.nii.gz")
    assert orientation in ("any", axis_codes(volume.affine))
    patch_size: tuple[int, int, int] = tuple(results.settings["patch_size"])
    patch = middle_patch(preprocess(predictor, paths), patch_size)
    return GoldenCase(images=tuple(names), labelmap="labelmap.nii.gz"), patch


def write_image(array: NDArray[np.float32], affine: Affine, path: Path) -> None:
    """Write one channel (Z, Y, X) as .nii.gz; the same content always gives the same bytes.

    Whole numbers that fit are stored as int16, anything else as float32.
    """
    whole = bool(np.all(array == np.round(array)) and np.abs(array).max(initial=0) <= np.iinfo(np.int16).max)
    image = Nifti1Image(array.T.astype(np.int16 if whole else np.float32), _LPS_TO_RAS @ affine)
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def middle_patch(array: NDArray[np.float32], size: tuple[int, int, int]) -> NDArray[np.float32]:
    """The middle (C, *size) of an array (C, Z, Y, X), filled up with zeros where that is smaller."""
    short = [(0, 0), *((0, max(0, s - n)) for s, n in zip(size, array.shape[1:], strict=True))]
    padded = np.pad(array, short)
    starts = [(n - s) // 2 for s, n in zip(size, padded.shape[1:], strict=True)]
    return padded[(slice(None), *(slice(a, a + s) for a, s in zip(starts, size, strict=True)))]
