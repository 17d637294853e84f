"""From a public dataset as it is published to nnU-Net's raw format, for those who hold the data.

Each dataset is described by where its files lie in its published layout. Channels that lie on another grid
than the first (FLAIR of ISLES 2022) are resampled onto it through patient coordinates; labels never are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from training.errors import TrainingDataError


@dataclass(frozen=True)
class Layout:
    """Where a dataset's files are, and what they mean.

    ``label_file`` is a regular expression over the path from the dataset's root, with forward slashes; its
    group ``case`` names the case. ``channels`` map a channel's name to the path of its file, in which
    ``{name}`` stands for the same-named group of ``label_file``. ``labels`` map a name to the value in the
    published file; nnU-Net's values are 1, 2, 3, ... in this order. An empty mapping means: all values that
    occur, in ascending order.
    """

    name: str
    dataset_id: int
    source: str
    label_file: str
    channels: Mapping[str, str]
    labels: Mapping[str, int]


_BTCV_ORGANS = (
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
)  # fmt: skip

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="BraTS2024",
            dataset_id=324,
            source="BraTS 2024, adult glioma after treatment: BraTS-GLI-*/BraTS-GLI-*-seg.nii.gz",
            label_file=r"(?P<folder>.*?/?)(?P<case>BraTS-GLI-[0-9]+-[0-9]+)-seg\.nii\.gz",
            channels={
                "T1": "{folder}{case}-t1n.nii.gz",
                "T1 contrast": "{folder}{case}-t1c.nii.gz",
                "T2": "{folder}{case}-t2w.nii.gz",
                "FLAIR": "{folder}{case}-t2f.nii.gz",
            },
            labels={
                "non-enhancing tumor core": 1,
                "surrounding FLAIR hyperintensity": 2,
                "enhancing tissue": 3,
                "resection cavity": 4,
            },
        ),
        Layout(
            name="ISLES2022",
            dataset_id=322,
            source="ISLES 2022 in BIDS: derivatives/sub-*/ses-*/sub-*_ses-*_msk.nii.gz",
            label_file=r"derivatives/(?P<subject>sub-strokecase(?P<case>[0-9]+))/(?P<session>ses-[0-9]+)/"
            r"(?P=subject)_(?P=session)_msk\.nii\.gz",
            channels={
                "DWI": "{subject}/{session}/dwi/{subject}_{session}_dwi.nii.gz",
                "ADC": "{subject}/{session}/dwi/{subject}_{session}_adc.nii.gz",
                "FLAIR": "{subject}/{session}/anat/{subject}_{session}_FLAIR.nii.gz",
            },
            labels={"lesion": 1},
        ),
        Layout(
            name="BTCV",
            dataset_id=313,
            source="BTCV abdomen: Training/img/img*.nii.gz and Training/label/label*.nii.gz",
            label_file=r"(?P<folder>.*?/?)label/label(?P<case>[0-9]+)\.nii\.gz",
            channels={"CT": "{folder}img/img{case}.nii.gz"},
            labels={organ: value for value, organ in enumerate(_BTCV_ORGANS, start=1)},
        ),
        Layout(
            name="Mindboggle101",
            dataset_id=301,
            source="Mindboggle-101 volumes: */labels.DKT31.manual+aseg.nii.gz beside t1weighted.nii.gz",
            label_file=r"(?P<folder>(?:.*/)?(?P<case>[^/]+)/)labels\.DKT31\.manual\+aseg\.nii\.gz",
            channels={"T1": "{folder}t1weighted.nii.gz"},
            labels={},
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """One case of a dataset: its files in the published layout."""

    name: str
    images: tuple[Path, ...]
    label: Path


def convert(
    layout: Layout, source: Path, raw_folder: Path, *, progress: Callable[[int, int], None] = lambda *_: None
) -> Path:
    """Write a dataset in nnU-Net's raw format; cases that are there already are kept.

    Parameters
    ----------
    layout : Layout
        One of `LAYOUTS`.
    source : Path
        The dataset as it was unpacked.
    raw_folder : Path
        nnU-Net's ``nnUNet_raw``.

    Returns
    -------
    Path
        ``Dataset<id>_<name>`` with imagesTr, labelsTr and dataset.json.

    Raises
    ------
    TrainingDataError
        If nothing of the layout is found, a channel is missing, an image and its label lie on different
        grids, or a label file holds a value that the layout does not know.
    """
    cases = list(find_cases(layout, source))
    if not cases:
        raise TrainingDataError(
            f"{source.name!r} holds no case of {layout.name}.", remedy=f"Expected: {layout.source}."
        )
    target = raw_folder / f"Dataset{layout.dataset_id:03d}_{layout.name}"
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    values = dict(layout.labels) or _occurring_values(cases)
    for i, case in enumerate(cases):
        _write_case(case, target, values)
        progress(i + 1, len(cases))
    description = {
        "channel_names": {str(i): name for i, name in enumerate(layout.channels)},
        "labels": {"background": 0} | {name: i for i, name in enumerate(values, start=1)},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (target / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
    return target


def find_cases(layout: Layout, source: Path) -> Iterator[Case]:
    """The cases of a dataset, sorted by name.

    Raises
    ------
    TrainingDataError
        If a case lacks a channel, or two cases have one name.
    """
    found: dict[str, Case] = {}
    for path in sorted(source.rglob("*.nii.gz")):
        matched = re.fullmatch(layout.label_file, path.relative_to(source).as_posix())
        if matched is None:
            continue
        groups = matched.groupdict()
        images = tuple(source / pattern.format(**groups) for pattern in layout.channels.values())
        missing = [name for name, image in zip(layout.channels, images, strict=True) if not image.is_file()]
        name = f"{layout.name}_{groups['case']}"
        if missing:
            raise TrainingDataError(
                f"Case {name} lacks {', '.join(missing)}.",
                remedy="Unpack the dataset whole, or remove the case.",
            )
        if name in found:
            raise TrainingDataError(f"There are two cases {name}.", remedy="Give one dataset's folder alone.")
        found[name] = Case(name, images, path)
    yield from (found[name] for name in sorted(found))


def _occurring_values(cases: list[Case]) -> dict[str, int]:
    values: set[int] = set()
    for case in cases:
        values |= set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(case.label))).astype(int).tolist())
    return {f"label {value}": value for value in sorted(values - {0})}


def _write_case(case: Case, target: Path, values: Mapping[str, int]) -> None:
    label_path = target / "labelsTr" / f"{case.name}.nii.gz"
    if label_path.is_file():  # written last
        return
    label = sitk.ReadImage(case.label)
    reference = sitk.ReadImage(case.images[0])
    if not _same_grid(reference, label):
        raise TrainingDataError(
            f"The label of {case.name} does not lie on the grid of its first channel.",
            remedy="Check the case's headers; labels are never resampled here.",
        )
    for i, path in enumerate(case.images):
        image = reference if i == 0 else sitk.ReadImage(path)
        if not _same_grid(reference, image):
            image = sitk.Resample(image, reference, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)
        sitk.WriteImage(image, target / "imagesTr" / f"{case.name}_{i:04d}.nii.gz")
    sitk.WriteImage(_renumbered(label, values, case.name), label_path)


def _same_grid(one: sitk.Image, other: sitk.Image) -> bool:
    """Same size, and corners within a hundredth of a millimetre."""
    if one.GetSize() != other.GetSize():
        return False
    corners = [(0, 0, 0), tuple(n - 1 for n in one.GetSize())]
    distances = [
        np.abs(
            np.subtract(one.TransformIndexToPhysicalPoint(c), other.TransformIndexToPhysicalPoint(c))
        ).max()
        for c in corners
    ]
    return bool(max(distances) < 0.01 and np.allclose(one.GetDirection(), other.GetDirection(), atol=1e-4))


def _renumbered(label: sitk.Image, values: Mapping[str, int], name: str) -> sitk.Image:
    """The label with nnU-Net's consecutive values."""
    array = np.rint(sitk.GetArrayFromImage(label)).astype(np.int64)
    unknown = sorted(set(np.unique(array).tolist()) - {0, *values.values()})
    if unknown:
        raise TrainingDataError(
            f"The label of {name} holds values without a meaning: {', '.join(map(str, unknown[:5]))}.",
            remedy="Check that this is the published dataset.",
        )
    table = np.zeros(int(max([*values.values(), array.max(), 0])) + 1, np.uint16)
    for i, value in enumerate(values.values(), start=1):
        table[value] = i
    renumbered = sitk.GetImageFromArray(table[array])
    renumbered.CopyInformation(label)
    return renumbered
