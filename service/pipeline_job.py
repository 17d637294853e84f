"""What the pipeline is asked for: the files, the rules that they are read by, and where the results go.

Light to import: the worker gives it to its inference process, which alone loads the pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from service.channel_rules import IN_ORDER, AlignmentRules
from service.dicom.predecessors import Predecessor
from service.guard_rules import USUAL_GUARD, GuardRules
from service.profiles import Profile
from service.reading import AS_USUAL, ReadingRules
from service.routes import Route

LABELMAP, MEASUREMENTS, PREVIEW = "labelmap.nii.gz", "measurements.json", "preview.png"
"""What it always writes, into the folder of the results."""


@dataclass(frozen=True)
class PipelineJob:
    """What is to be segmented, and where the results go.

    Parameters
    ----------
    channels : tuple of tuples of Path
        The files of each channel, in the manifest's order: DICOM files, or one zip archive or folder of
        them, or one NIfTI file.
    created_at : datetime
        When the job came into being, UTC and naive: the date in everything that is written.
    output_dir : Path
        The folder that will hold the results. It must not exist; it appears at once, complete.
    settings_digest : str
        SHA-256 of the settings that can change a result; part of every derived UID.
    supersedes : tuple of str
        SOP Instance UIDs of the objects that this result replaces.
    predecessors : tuple of Predecessor
        The same with all that a reference to them takes, where that is known.
    profiles : tuple of Profile
        The objects that destinations want: each profile is rendered once. Without any, no DICOM object is
        made, and none of what only such an object needs is asked of the images.
    reading : ReadingRules
        How DICOM images are read.
    channel_names : tuple of str
        Which channel of the model each of ``channels`` is; the manifest's order unless given.
    told_apart_by : Route, optional
        Where one input holds a whole study for a model of several channels: the route whose rules tell its
        series apart.
    alignment : AlignmentRules
        How several DICOM channels are brought together.
    guard : GuardRules
        What is only warned of, and what is refused.
    unpack_limit_bytes : int
        How much an archive may unpack to.
    """

    channels: tuple[tuple[Path, ...], ...]
    created_at: datetime
    output_dir: Path
    settings_digest: str = ""
    supersedes: tuple[str, ...] = ()
    predecessors: tuple[Predecessor, ...] = ()
    profiles: tuple[Profile, ...] = (Profile(),)
    reading: ReadingRules = AS_USUAL
    channel_names: tuple[str, ...] = ()
    told_apart_by: Route | None = None
    alignment: AlignmentRules = IN_ORDER
    guard: GuardRules = USUAL_GUARD
    unpack_limit_bytes: int = 16 * 1024**3
