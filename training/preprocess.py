"""Bring a folder of training cases into nnU-Net's layout and preprocess it with the teacher's plans.

nnU-Net plans and preprocesses a dataset in one go and under its own folder names. A student must have
exactly the teacher's preprocessing, so only the second half is run here, in this process, case by case.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from models.manifest import Manifest
from training.case_checks import check_case, check_description, known_values
from training.errors import TrainingDataError

Split = dict[str, list[str]]
"""``{"train": [case, ...], "val": [case, ...]}``: one entry of nnU-Net's splits_final.json."""


@dataclass(frozen=True)
class TrainingCases:
    """Training cases on disk: ``images/<case>[_0000].nii.gz`` and ``labels/<case>.nii.gz``.

    Both nnU-Net's own layout (``imagesTr``, ``labelsTr``, a channel number in each image's name) and the
    plain one of the Medical Segmentation Decathlon are understood.
    """

    images: Path
    labels: Path
    file_ending: str
    n_channels: int

    @staticmethod
    def open(folder: Path, dataset_json: dict[str, Any]) -> TrainingCases:
        """Find the image and label folders.

        Raises
        ------
        TrainingDataError
            If either is missing, or the folder's own dataset.json differs from the teacher's in its labels.
        """
        check_description(folder, dataset_json)
        return TrainingCases._find(folder, dataset_json["file_ending"], len(dataset_json["channel_names"]))

    @staticmethod
    def of_bundle(folder: Path, manifest: Manifest) -> TrainingCases:
        """NIfTI cases with the channels of a bundle. Raises TrainingDataError."""
        return TrainingCases._find(folder, ".nii.gz", len(manifest.channels))

    @staticmethod
    def _find(folder: Path, file_ending: str, n_channels: int) -> TrainingCases:
        for images, labels in (("imagesTr", "labelsTr"), ("images", "labels")):
            if (folder / images).is_dir() and (folder / labels).is_dir():
                return TrainingCases(folder / images, folder / labels, file_ending, n_channels)
        raise TrainingDataError(
            f"{folder.name!r} holds neither imagesTr and labelsTr nor images and labels.",
            remedy="Give the dataset's folder in nnUNet_raw.",
        )

    def names(self) -> list[str]:
        """The cases that have a label file, sorted."""
        return sorted(p.name.removesuffix(self.file_ending) for p in self.labels.glob(f"*{self.file_ending}"))

    def image_paths(self, case: str) -> list[Path]:
        """The case's image files, one per channel.

        Raises
        ------
        TrainingDataError
            If one is missing.
        """
        numbered = [self.images / f"{case}_{c:04d}{self.file_ending}" for c in range(self.n_channels)]
        plain = self.images / f"{case}{self.file_ending}"
        paths = [plain] if self.n_channels == 1 and plain.is_file() else numbered
        missing = [p.name for p in paths if not p.is_file()]
        if missing:
            raise TrainingDataError(f"Training case {case!r} lacks {', '.join(missing)}.")
        return paths

    def label_path(self, case: str) -> Path:
        """The case's label file."""
        return self.labels / f"{case}{self.file_ending}"


def prepare_dataset(
    cases: TrainingCases,
    split: Split,
    plans: dict[str, Any],
    dataset_json: dict[str, Any],
    fingerprint: Path,
    preprocessed_folder: Path,
    *,
    configuration: str = "3d_fullres",
) -> Path:
    """Preprocess the cases of a split as ``plans`` say; what is already there is kept.

    Writes ``<preprocessed_folder>/<dataset name>/`` with the plans, dataset.json, the fingerprint, a
    splits_final.json whose only fold is ``split``, the reference labels, and one blosc2 file a case.

    Parameters
    ----------
    cases : TrainingCases
        Where the images and labels are.
    split : dict
        The cases to train on and to validate with. Cases outside of both are never read.
    plans, dataset_json : dict
        The student's plans and the teacher's dataset.json.
    fingerprint : Path
        The teacher's dataset_fingerprint.json.
    preprocessed_folder : Path
        nnU-Net's ``nnUNet_preprocessed``.

    Returns
    -------
    Path
        The dataset's folder.

    Raises
    ------
    TrainingDataError
        If a case of the split is missing or stands on both sides of it, its labels hold a value that the
        teacher does not know, or its image and labels lie on different grids.
    """
    both = sorted(set(split["train"]) & set(split["val"]))
    if both:
        raise TrainingDataError(f"Cases to train on and to validate with at once: {', '.join(both[:5])}.")
    wanted = sorted({*split["train"], *split["val"]})
    missing = sorted(set(wanted) - set(cases.names()))
    if missing:
        raise TrainingDataError(
            f"{len(missing)} cases of the split have no labels, the first is {missing[0]!r}."
        )

    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    dataset = preprocessed_folder / str(manager.dataset_name)
    arrays = dataset / settings.data_identifier
    references = dataset / "gt_segmentations"
    for folder in (arrays, references):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(dataset / f"{manager.plans_name}.json", plans)
    write_json(dataset / "dataset.json", dataset_json)
    write_json(dataset / "splits_final.json", [split])
    shutil.copyfile(fingerprint, dataset / "dataset_fingerprint.json")

    known = known_values(dataset_json)
    new = {case for case in wanted if not (arrays / f"{case}.pkl").is_file()}  # nnU-Net writes it last
    for case in sorted(new):
        check_case(case, cases.image_paths(case), cases.label_path(case), known)
    preprocessor = settings.preprocessor_class(verbose=False)
    for case in wanted:
        shutil.copyfile(cases.label_path(case), references / f"{case}{cases.file_ending}")
        if case not in new:
            continue
        images = [str(p) for p in cases.image_paths(case)]
        preprocessor.run_case_save(
            str(arrays / case), images, str(cases.label_path(case)), manager, settings, dataset_json
        )
    return dataset


def read_split(path: Path, train: str = "train", val: str = "choose") -> Split:
    """A split file's cases to train on and to make choices with.

    Raises
    ------
    TrainingDataError
        If the file cannot be read or lacks either list.
    """
    try:
        content = json.loads(path.read_text())
        return {"train": list(content[train]), "val": list(content[val])}
    except (OSError, ValueError, KeyError) as error:
        raise TrainingDataError(
            f"{path.name} is not a split file with {train!r} and {val!r}: {error}."
        ) from error


def write_json(path: Path, content: dict[str, Any] | Sequence[Any]) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n")
