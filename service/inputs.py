"""What a job is given, read into one volume: NIfTI or DICOM, one or several channels."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.errors import ReasonCode, Refusal
from models.manifest import Manifest
from models.nifti import read_nifti
from models.volume import Labelmap, Volume
from service.alignment import AlignedChannel, align, alignment_warnings
from service.archive import dicom_files, extract, is_dicom, is_zip
from service.channel_rules import AlignmentRules
from service.dicom.series import GeometryPolicy, SourceSeries, read_series
from service.guard import guard_modalities
from service.pipeline_job import PipelineJob
from service.straightening import Straightening, background_of
from service.study_channels import channels_of_study


@dataclass(frozen=True)
class PipelineInput:
    """The volume of all channels and, for DICOM, the series of each; the first is what a result refers to.

    Where there are several channels, ``channels`` tells what became of each, in the model's order.
    ``volume`` is always rectangular, as a model wants it. Where the slices of the series are not,
    ``straightening`` leads from the one grid to the other.
    """

    volume: Volume
    sources: tuple[SourceSeries, ...] = ()
    warnings: tuple[str, ...] = ()
    straightening: Straightening | None = None
    channels: tuple[AlignedChannel, ...] = ()

    def on_slices(self, labelmap: Labelmap) -> Labelmap:
        """The labels of the source's own planes, from those on the grid of ``volume``."""
        return labelmap if self.straightening is None else self.straightening.back(labelmap)

    def on_volume(self, labelmap: Labelmap) -> Labelmap:
        """The labels on the grid of ``volume``, from those of the source's own planes."""
        return labelmap if self.straightening is None else self.straightening.labels_forth(labelmap)


def read_input(job: PipelineJob, manifest: Manifest, scratch: Path) -> PipelineInput:
    """Read every channel of a job onto one grid.

    What a file is is told by its contents. Where no DICOM object will be made of the result, images that name
    no patient or study are read too.

    Parameters
    ----------
    scratch : Path
        A folder for what archives hold; it is left as it was.

    Raises
    ------
    Refusal
        If the files are not one volume of one patient for each channel, or cannot be brought onto one grid.
    """
    channels: Sequence[Sequence[Path]] = job.channels
    channel_names: Sequence[str] = job.channel_names
    limit_bytes = job.unpack_limit_bytes
    with ExitStack() as stack:
        if job.told_apart_by is not None and len(channels) == 1 < len(manifest.channels):
            files = stack.enter_context(_unpacked(channels[0], scratch / "study", limit_bytes))
            channels, channel_names = channels_of_study(files, job.told_apart_by)
        if channel_names:
            channels = _in_the_models_order(channels, channel_names, manifest)
        _check_number(channels, manifest)
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
            gantry_tilt="refuse" if job.reading.gantry_tilt == "refuse" else "accept",
            missing_identity="refuse" if job.profiles else "accept",
        )
        sources: list[SourceSeries] = []
        warnings: list[str] = []
        for number, (channel, paths) in enumerate(zip(manifest.channels, channels, strict=True)):
            with _unpacked(paths, scratch / f"channel{number}", limit_bytes) as given:
                files, about_files = dicom_files(given)
                rule = job.alignment.volumes.get(channel.name, job.reading.volume)
                source = read_series(files, policy=policy, volume=rule)
            sources.append(source)
            warnings += [*about_files, *source.warnings]
            if source.lossy:
                warnings.append("The images were compressed with loss.")
    warnings += guard_modalities(manifest, [source.modality for source in sources], job.guard)
    reference = _reference(job.alignment, manifest)
    volume = sources[reference].volume
    aligned: tuple[AlignedChannel, ...] = ()
    if len(sources) > 1:
        wanted = [channel.name for channel in manifest.channels]
        volume, aligned = align(sources, wanted, reference, job.alignment)
        warnings += alignment_warnings(aligned)
    first = sources[reference]
    ordered = (first, *(source for source in sources if source is not first))
    if not first.tilt_degrees:
        return PipelineInput(volume, ordered, tuple(warnings), channels=aligned)
    straightening = Straightening.of(volume.affine, volume.shape_zyx, limit_voxels=policy.limit_voxels)
    around = [background_of(c, s.modality) for c, s in zip(volume.array, sources, strict=True)]
    warnings.append(_about_tilt(first.tilt_degrees))
    return PipelineInput(
        straightening.forth(volume, around), ordered, tuple(warnings), straightening, aligned
    )


def _check_number(channels: Sequence[Sequence[Path]], manifest: Manifest) -> None:
    if len(channels) != len(manifest.channels):
        names = ", ".join(channel.name for channel in manifest.channels)
        raise Refusal(
            ReasonCode.MISSING_CHANNEL,
            f"{manifest.name} needs {len(manifest.channels)} channel(s) ({names}); {len(channels)} came.",
            remedy="Give one file or series for each channel, in this order.",
        )


def _in_the_models_order(
    channels: Sequence[Sequence[Path]], names: Sequence[str], manifest: Manifest
) -> list[Sequence[Path]]:
    """The files of every channel of the model, told by name. Raises Refusal (MISSING_CHANNEL)."""
    wanted = [channel.name for channel in manifest.channels]
    given = dict(zip(names, channels, strict=True))
    if sorted(given) != sorted(wanted):
        raise Refusal(
            ReasonCode.MISSING_CHANNEL,
            f"The route names the channels {', '.join(names)}; {manifest.name} {manifest.version} has "
            f"{', '.join(wanted)}.",
            remedy="Name the route's channels as the model's card does.",
        )
    return [given[name] for name in wanted]


def _reference(alignment: AlignmentRules, manifest: Manifest) -> int:
    """Which channel of the model the others are brought to. Raises Refusal (MISSING_CHANNEL)."""
    if alignment.reference is None:
        return 0
    names = [channel.name for channel in manifest.channels]
    if alignment.reference not in names:
        raise Refusal(
            ReasonCode.MISSING_CHANNEL,
            f"The reference {alignment.reference} is no channel of {manifest.name}, which has "
            f"{', '.join(names)}.",
            remedy="Name one of the model's channels as the reference.",
        )
    return names.index(alignment.reference)


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
