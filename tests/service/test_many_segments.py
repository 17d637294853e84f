"""A hundred labels make thousands of frames: each one costs little, and the last no more than the first."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from phantom import oblique_affine, phantom_manifest, write_classic_series
from pydicom import dcmread
from pydicom.sr.coding import Code

from models.volume import Labelmap
from service.dicom.proof import prove_segmentation
from service.dicom.segmentation import build_segmentation, write_segmentation
from service.dicom.series import SourceSeries, read_series

LABELS = 12
SLICES = (8, 16, 32)
# The node's own way takes 720 calls a frame, most of them to read it back for the proof; data sets that are
# made one by one take 4500, and are minutes for the 20,000 frames of a hundred labels.
MOST_CALLS_A_FRAME = 1500
UIDS: dict[str, Any] = {
    "model_digest": "ab" * 32,
    "sop_instance_uid": "2.25.7001",
    "series_instance_uid": "2.25.7002",
    "content_datetime": datetime(2026, 2, 3, tzinfo=UTC),
}

Write = Callable[[SourceSeries, Labelmap, Path], None]


def write_and_prove(source: SourceSeries, labelmap: Labelmap, path: Path) -> None:
    manifest = phantom_manifest(LABELS)
    write_segmentation(build_segmentation(source, labelmap, manifest, **UIDS), path)
    prove_segmentation(path, source, labelmap, manifest)


def write_by_plain_highdicom(source: SourceSeries, labelmap: Labelmap, path: Path) -> None:
    algorithm = highdicom.AlgorithmIdentificationSequence(
        "reference", Code("123110", "DCM", "Artificial Intelligence"), "1"
    )
    segments = [
        highdicom.seg.SegmentDescription(
            number,
            f"part {number}",
            Code("123037004", "SCT", "Anatomical Structure"),
            Code("10200004", "SCT", "Liver"),
            "AUTOMATIC",
            algorithm,
        )
        for number in range(1, LABELS + 1)
    ]
    images = [dcmread(each) for each in sorted(path.parent.glob("0*.dcm"))]
    named = ("2.25.1", 1, "2.25.2", 1, "reference", "reference", "1", "1")
    highdicom.seg.Segmentation(images, labelmap.array, "BINARY", segments, *named).save_as(path)


def calls_a_frame(folder: Path, write: Write, slices: tuple[int, ...]) -> list[float]:
    """How many more calls each further frame costs, from one number of slices to the next."""
    measured = []
    for count in (4, *slices):  # the first of all fills caches, and does not count
        random = np.random.default_rng(count)
        image = random.integers(0, 99, (count, 9, 11)).astype(np.int16)
        source = read_series(write_classic_series(folder / str(count), image, oblique_affine()))
        labels = random.integers(1, LABELS + 1, image.shape).astype(np.uint8)
        labels[:, 0, :LABELS] = np.arange(1, 12)  # every label but one on every slice
        labelmap = Labelmap(labels, source.volume.affine, source.frame_of_reference_uid)
        path = folder / str(count) / "seg.dcm"
        profile = cProfile.Profile()
        profile.runcall(write, source, labelmap, path)
        frames = int(dcmread(path, stop_before_pixels=True).NumberOfFrames)
        assert frames >= count * (LABELS - 1)
        measured.append((frames, pstats.Stats(profile).total_calls))
    steps = pairwise(measured[1:])
    return [(calls - before) / (frames - fewer) for (fewer, before), (frames, calls) in steps]


def test_each_frame_costs_little_and_the_last_no_more_than_the_first(tmp_path: Path) -> None:
    first, later = calls_a_frame(tmp_path, write_and_prove, SLICES)
    assert first < MOST_CALLS_A_FRAME
    assert later < 1.2 * first


def test_frames_that_are_made_one_by_one_would_show(tmp_path: Path) -> None:
    (each,) = calls_a_frame(tmp_path, write_by_plain_highdicom, SLICES[:2])
    assert each > MOST_CALLS_A_FRAME
