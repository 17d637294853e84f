"""What a job is given, read into one volume: NIfTI or DICOM, one or several channels."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.errors import ReasonCode, Refusal
from models.manifest import Manifest
from models.nifti import read_nifti
from models.volume import Labelmap, Volume
from service.archive import dicom_files, extract, is_dicom, is_zip
from service.dicom.identity import common_identity
from service.dicom.series import GeometryPolicy, SourceSeries, read_series
from service.limits import check_modalities
from service.reading import AS_USUAL, ReadingRules
from service.straightening import Straightening, background_of

_SAME_GRID_MM = 1e-3


@dataclass(frozen=True)
class PipelineInput:
    """The volume of all channels and, for DICOM, the series of each; the first is what a result refers to.

    ``volume`` is always rectangular, as a model wants it. Where the slices of the series are not,
    ``straightening`` leads from the one grid to the other.
    """

    volume: Volume
    sources: tuple[SourceSeries, ...] = ()
    warnings: tuple[str, ...] = ()
    straightening: Straightening | None = None

    def on_slices(self, labelmap: Labelmap) -> Labelmap:
        """The labels of the source's own planes, from those on the grid of ``volume``."""
        return labelmap if self.straightening is None else self.straightening.back(labelmap)

    def on_volume(self, labelmap: Labelmap) -> Labelmap:
        """The labels on the grid of ``volume``, from those of the source's own planes."""
        return labelmap if self.straightening is None else self.straightening.labels_forth(labelmap)


def read_input(
    channels: Sequence[Sequence[Path]],
    manifest: Manifest,
    scratch: Path,
    *,
    unpack_limit_bytes: int,
    reading: ReadingRules = AS_USUAL,
    for_objects: bool = True,
) -> PipelineInput:
    """Read every channel of a job onto one grid.

    Parameters
    ----------
    channels : sequence of sequences of Path
        The files of each channel, in the manifest's order: DICOM files, or one zip archive or folder of
        them, or one NIfTI file. What a file is is told by its contents.
    scratch : Path
        A folder for what archives hold; it is left as it was.
    unpack_limit_bytes : int
        How much an archive may unpack to.
    reading : ReadingRules
        How DICOM images are read.
    for_objects : bool
        Whether DICOM objects will be made of the result. Where not, images that name no patient or study
        are read too.

    Raises
    ------
    Refusal
        If the files are not one volume of one patient for each channel, all on one grid.
    """
    if len(channels) != len(manifest.channels):
        names = ", ".join(channel.name for channel in manifest.channels)
        raise Refusal(
            ReasonCode.MISSING_CHANNEL,
            f"{manifest.name} needs {len(manifest.channels)} channel(s) ({names}); {len(channels)} came.",
            remedy="Give one file or series for each channel, in this order.",
        )
    nifti = [len(paths) == 1 and _looks_like_nifti(paths[0]) for paths in channels]
    if all(nifti):
        return PipelineInput(read_nifti([paths[0] for paths in channels]))
    if any(nifti):
        raise Refusal(
            ReasonCode.CHANNEL_GRIDS_DIFFER,
            f"{sum(nifti)} of {len(nifti)} channels are not DICOM, and the others are.",
            remedy="Give all channels in the same format.",
        )
    policy = GeometryPolicy(
        gantry_tilt="refuse" if reading.gantry_tilt == "refuse" else "accept",
        missing_identity="refuse" if for_objects else "accept",
    )
    sources: list[SourceSeries] = []
    warnings: list[str] = []
    for number, paths in enumerate(channels):
        with _unpacked(paths, scratch / f"channel{number}", unpack_limit_bytes) as given:
            files, about_files = dicom_files(given)
            source = read_series(files, policy=policy, volume=reading.volume)
        sources.append(source)
        warnings += [*about_files, *source.warnings]
        if source.lossy:
            warnings.append("The images were compressed with loss.")
    check_modalities(manifest, [source.modality for source in sources])
    _check_same_patient_and_grid(sources)
    volume = sources[0].volume
    if len(sources) > 1:
        stacked = np.concatenate([source.volume.array for source in sources])
        volume = Volume(stacked, volume.affine, volume.frame_of_reference_uid)
    if not sources[0].tilt_degrees:
        return PipelineInput(volume, tuple(sources), tuple(warnings))
    straightening = Straightening.of(volume.affine, volume.shape_zyx, limit_voxels=policy.limit_voxels)
    around = [background_of(c, s.modality) for c, s in zip(volume.array, sources, strict=True)]
    warnings.append(_about_tilt(sources[0].tilt_degrees))
    return PipelineInput(straightening.forth(volume, around), tuple(sources), tuple(warnings), straightening)


def _about_tilt(angle_degrees: float) -> str:
    return (
        f"The stack is sheared (gantry tilt {angle_degrees:.1f} degrees): for the model every slice was "
        "moved in its plane onto a rectangular grid, by linear interpolation; the labels were brought back "
        "onto the slices as they are."
    )


def _looks_like_nifti(path: Path) -> bool:
    return path.is_file() and not is_dicom(path) and not is_zip(path)


@contextmanager
def _unpacked(paths: Sequence[Path], into: Path, limit_bytes: int) -> Iterator[Sequence[Path]]:
    """The files of a channel; those of an archive lie in ``into`` while the block runs."""
    if len(paths) != 1 or not paths[0].is_file() or not is_zip(paths[0]):
        yield paths
        return
    into.mkdir()
    yield extract(paths[0], into, limit_bytes=limit_bytes)
    shutil.rmtree(into)


def _check_same_patient_and_grid(sources: Sequence[SourceSeries]) -> None:
    """Channels must be of one patient and study, and lie voxel on voxel."""
    common_identity([source.headers[0] for source in sources])
    first = sources[0]
    for number, source in enumerate(sources[1:], 2):
        if source.volume.shape_zyx != first.volume.shape_zyx:
            sizes = (" x ".join(map(str, s.volume.shape_zyx[::-1])) for s in (source, first))
            difference = f"{next(sizes)} voxels, not {next(sizes)}"
        elif source.frame_of_reference_uid != first.frame_of_reference_uid:
            difference = "another frame of reference than the first"
        elif (apart := _furthest_apart_mm(source.volume, first.volume)) > _SAME_GRID_MM:
            difference = f"a grid that is up to {apart:.3g} mm away from the first's"
        else:
            continue
        raise Refusal(
            ReasonCode.CHANNEL_GRIDS_DIFFER,
            f"Channel {number} has {difference}.",
            remedy="Send channels that were reconstructed on one grid, or resample them to one.",
        )


def _furthest_apart_mm(one: Volume, other: Volume) -> float:
    """The largest distance in millimetres between equal voxel indices of two grids of one shape."""
    size = np.array(one.shape_zyx[::-1]) - 1
    corners = np.array([[*(size * corner), 1.0] for corner in np.ndindex(2, 2, 2)])
    return float(np.linalg.norm((corners @ (one.affine - other.affine).T)[:, :3], axis=1).max())
