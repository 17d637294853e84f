"""Evaluation with the engine that will serve the student, on the exported bundle.

What is measured is what a hospital will run: the bundle's own ONNX file, precision and runtime, on whole
cases, against the reference labels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.bundle import Bundle
from models.manifest import Precision
from models.nifti import read_labelmap, read_nifti, write_nifti
from models.resources import peak_resident_bytes
from models.segmenter import Segmenter
from models.volume import spacing_xyz_mm
from training.errors import TrainingDataError
from training.metrics import Agreement, Summary, compare, summarise
from training.preprocess import TrainingCases

DEFAULT_TOLERANCE_MM = 1.0


@dataclass(frozen=True)
class CaseResult:
    """One case: its agreement per label name, and how long the engine took."""

    case: str
    seconds: float
    labels: dict[str, Agreement]


@dataclass(frozen=True)
class Evaluation:
    """One bundle, in one precision on one runtime, over a list of cases.

    ``peak_memory_bytes`` is the most that the whole process held, libraries and all.
    """

    name: str
    bundle_digest: str
    precision: str
    runtime: str
    tolerance_mm: float
    peak_memory_bytes: int
    cases: tuple[CaseResult, ...]

    def values(self, metric: str, label: str | None = None) -> list[float]:
        """A metric of every case, in the order of the cases: of one label, or the mean over labels."""
        per_case = []
        for result in self.cases:
            chosen = [result.labels[label]] if label is not None else list(result.labels.values())
            per_case.append(float(np.mean([getattr(a, metric) for a in chosen])))
        return per_case

    def summary(self, metric: str, label: str | None = None) -> Summary:
        """Mean and standard error over the cases."""
        return summarise(self.values(metric, label))

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self.cases[0].labels)

    @property
    def case_names(self) -> tuple[str, ...]:
        return tuple(result.case for result in self.cases)

    @property
    def mean_seconds(self) -> float:
        """Mean time of a case in the engine, reading and writing left out."""
        return float(np.mean([result.seconds for result in self.cases]))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Evaluation:
        """Read what `save` wrote.

        Raises
        ------
        TrainingDataError
            If the file is not an evaluation.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            cases = tuple(
                CaseResult(c["case"], c["seconds"], {k: Agreement(**a) for k, a in c["labels"].items()})
                for c in content.pop("cases")
            )
            return Evaluation(**content, cases=cases)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingDataError(
                f"{path.name} is no evaluation ({error}).", remedy="Write it with segnode-train evaluate."
            ) from error


def evaluate(
    bundle: Bundle,
    cases: TrainingCases,
    names: Sequence[str],
    *,
    name: str,
    precision: Precision | None = None,
    runtime: str = "auto",
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    cache_dir: Path | None = None,
    labelmaps: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run a bundle over cases and compare with their reference labels.

    Parameters
    ----------
    bundle : Bundle
        What is evaluated.
    cases : TrainingCases
        Images and reference labels.
    names : sequence of str
        The cases, in the order in which results are listed.
    name : str
        What the evaluation is called in tables, for example "quarter, dcd".
    tolerance_mm : float
        Of the surface Dice.
    labelmaps : Path, optional
        Folder for the predicted labelmaps, ``<case>.nii.gz``; they are not kept otherwise.

    Raises
    ------
    TrainingDataError
        If there is no case, or a reference does not lie on its image's grid.
    """
    if not names:
        raise TrainingDataError("There is no case to evaluate.", remedy="Name at least one.")
    labels = {label.name: label.value for label in bundle.manifest.labels}
    segmenter = Segmenter(bundle, runtime=runtime, precision=precision, cache_dir=cache_dir)
    results = []
    try:
        for i, case in enumerate(names):
            volume = read_nifti(cases.image_paths(case))
            started = time.perf_counter()
            predicted = segmenter.segment(volume)
            seconds = time.perf_counter() - started
            if labelmaps is not None:
                labelmaps.mkdir(parents=True, exist_ok=True)
                write_nifti(predicted, labelmaps / f"{case}.nii.gz")
            reference = read_labelmap(cases.label_path(case))
            if reference.array.shape != predicted.array.shape:
                raise TrainingDataError(
                    f"The reference of {case!r} has the shape {reference.array.shape}, its image "
                    f"{predicted.array.shape}."
                )
            x, y, z = spacing_xyz_mm(volume.affine)
            agreement = {
                label: compare(predicted.array, reference.array, value, (z, y, x), tolerance_mm)
                for label, value in labels.items()
            }
            results.append(CaseResult(case, seconds, agreement))
            if progress is not None:
                progress(i + 1, len(names))
        return Evaluation(
            name=name,
            bundle_digest=bundle.digest,
            precision=str(segmenter.precision),
            runtime=segmenter.runtime_name,
            tolerance_mm=tolerance_mm,
            peak_memory_bytes=peak_resident_bytes(),
            cases=tuple(results),
        )
    finally:
        segmenter.close()
