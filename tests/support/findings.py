"""A result of the phantom, ready to be rendered for destinations."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from phantom import chiral_image, chiral_labels, oblique_affine, phantom_manifest, write_classic_series
from programs import program

from models.manifest import Manifest
from models.volume import Labelmap
from service.dicom.predecessors import Predecessor
from service.dicom.series import SourceSeries, read_series
from service.overlay import draw_overlay
from service.profiles import Profile
from service.rendering import Finding, OutputFile, render

DIGEST = "0123456789abcdef" * 4
CREATED_AT = datetime(2026, 3, 4, 5, 6, 7)  # noqa: DTZ001  # times in the records are naive


def phantom_source(folder: Path, **options: Any) -> SourceSeries:
    return read_series(write_classic_series(folder, chiral_image(), oblique_affine(), **options))


def labelmap_of(source: SourceSeries, array: np.ndarray | None = None) -> Labelmap:
    array = chiral_labels() if array is None else array
    return Labelmap(array, source.volume.affine, source.frame_of_reference_uid)


def make_finding(
    source: SourceSeries,
    *,
    array: np.ndarray | None = None,
    manifest: Manifest | None = None,
    comments: Sequence[str] = ("3 of 3 structures were found.",),
    predecessors: Sequence[Predecessor] = (),
) -> Finding:
    manifest = manifest or phantom_manifest()
    labelmap = labelmap_of(source, array)
    return Finding(
        sources=(source,),
        labelmap=labelmap,
        manifest=manifest,
        digest=DIGEST,
        runtime="onnxruntime",
        precision="float32",
        created_at=CREATED_AT,
        settings_digest="s",
        comments=tuple(comments),
        picture=np.asarray(draw_overlay(source.volume, labelmap, manifest.labels)),
        predecessors=tuple(predecessors),
    )


def rendered(finding: Finding, folder: Path, ordinal: int = 1, **profile: Any) -> list[OutputFile]:
    """The objects of one profile, written into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return render(finding, Profile(**profile), folder, ordinal, lambda: None)


def dciodvfy_errors(path: Path, iod: str) -> list[str]:
    """What dciodvfy finds wrong, once it has recognised the IOD."""
    dciodvfy = program("dciodvfy", "dicom3tools")
    said = subprocess.run([dciodvfy, path], capture_output=True, text=True, check=False).stderr
    assert iod in said.splitlines(), said
    return [line for line in said.splitlines() if line.startswith("Error")]
