"""One report of several runs: tables of what was measured, curves of how it came about, pictures.

A report is described by a YAML file beside its inputs:

    title: Hippocampus students
    cases: 21 cases of fold 0 that were used for nothing else
    baseline: none 1/4        # of every run that names none of its own
    teacher: teacher
    runs:
      - name: teacher
        evaluations: [teacher.json]
      - name: none 1/4
        results: runs/none/nnUNetTrainer__nnUNetPlansWidth1of4__3d_fullres
        evaluations: [none.json, none-int8.json]
        labelmaps: labelmaps/none

Every figure comes from a file that is named there; nothing is typed in by hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, StrictUndefined, select_autoescape
from pydantic import BaseModel, ConfigDict, ValidationError

from training.errors import RecipeError, TrainingDataError
from training.evaluate import Evaluation
from training.metrics import PairedTest, paired_test
from training.report_pictures import draw_curves, draw_dice, draw_overlays
from training.run_log import read_log
from training.student import build_network, count_gflops, count_parameters
from training.teacher import ResultsFolder

_MOST_COLUMNS = 8  # labels side by side; more become lines of a table of their own
_METRICS = ("dice", "nsd", "hd95_mm")


class RunDescription(BaseModel):
    """One line of the tables."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    evaluations: tuple[Path, ...]
    results: Path | None = None
    labelmaps: Path | None = None
    baseline: str | None = None
    note: str = ""


class ReportDescription(BaseModel):
    """The YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    cases: str
    runs: tuple[RunDescription, ...]
    baseline: str | None = None
    teacher: str | None = None
    images: Path | None = None
    references: Path | None = None
    pictured_cases: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Run:
    """A described run with its inputs read."""

    description: RunDescription
    evaluations: tuple[Evaluation, ...]
    log: tuple[dict[str, Any], ...]
    method: str
    width: str
    parameters: int | None
    gflops: float | None

    @property
    def name(self) -> str:
        return self.description.name

    @property
    def main(self) -> Evaluation:
        """The evaluation that the tables of accuracy use: the first one."""
        return self.evaluations[0]


def write_report(description_path: Path, output: Path) -> tuple[Path, Path]:
    """Write ``report.md``, ``report.html`` and their pictures into a folder.

    Returns
    -------
    The paths of the two.

    Raises
    ------
    RecipeError
        If the description is not understood, or two runs have one name.
    TrainingDataError
        If an input is missing, or the evaluations are not of the same cases.
    """
    description = _read_description(description_path)
    base = description_path.parent
    names = [run.name for run in description.runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"Two runs of the report are called {', '.join(twice)}.", remedy="Name them apart.")
    runs = [_read_run(run, base) for run in description.runs]
    _check_same_cases(runs)
    output.mkdir(parents=True, exist_ok=True)
    pictures = [draw_dice({run.name: run.main for run in runs}, output / "dice.png")]
    if any(run.log for run in runs):
        pictures.append(draw_curves({r.name: r.log for r in runs if r.log}, output / "curves.png"))
    if description.images is not None and description.references is not None:
        labelmaps = {
            r.name: base / r.description.labelmaps for r in runs if r.description.labelmaps is not None
        }
        pictures += [
            draw_overlays(
                case,
                base / description.images,
                base / description.references,
                labelmaps,
                output / f"{case}.png",
            )
            for case in description.pictured_cases
        ]
    context = {
        "description": description,
        "runs": runs,
        "labels": runs[0].main.label_names,
        "tests": _tests(runs, description.baseline),
        "baselines": {run.name: run.description.baseline or description.baseline for run in runs},
        "retention": _retention(runs, description.teacher),
        "pictures": [path.name for path in pictures],
        "metrics": _METRICS,
        "most_columns": _MOST_COLUMNS,
    }
    written = []
    for name in ("report.md", "report.html"):
        path = output / name
        path.write_text(_render(f"{name}.jinja", context), encoding="utf-8")
        written.append(path)
    return written[0], written[1]


def _read_description(path: Path) -> ReportDescription:
    try:
        return ReportDescription.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"The description {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise RecipeError(f"The description {path.name} is not understood: {error}.") from error


def _read_run(description: RunDescription, base: Path) -> Run:
    if not description.evaluations:
        raise TrainingDataError(f"Run {description.name!r} names no evaluation.")
    evaluations = tuple(Evaluation.load(base / path) for path in description.evaluations)
    if description.results is None:
        return Run(description, evaluations, (), "", "", None, None)
    folder = base / description.results
    results = ResultsFolder.open(folder)
    told: dict[str, Any] = {}
    if (folder / "distillation.json").is_file():
        told = json.loads((folder / "distillation.json").read_text())
    with torch.device("meta"):
        network = build_network(results.settings, results.n_channels, results.classes.n_outputs)
    z, y, x = results.settings["patch_size"]
    return Run(
        description,
        evaluations,
        tuple(read_log(folder / "fold_0" / "log.jsonl")),
        str(told.get("method", "nnU-Net's own training")),
        str(told.get("width", "1")),
        count_parameters(network),
        count_gflops(network, results.n_channels, (z, y, x)),
    )


def _check_same_cases(runs: list[Run]) -> None:
    expected = runs[0].main.case_names if runs else ()
    for run in runs:
        for evaluation in run.evaluations:
            if evaluation.case_names != expected:
                raise TrainingDataError(
                    f"{run.name!r} was evaluated on other cases than {runs[0].name!r}.",
                    remedy="Evaluate every run on the same list, in the same order.",
                )


def _tests(runs: list[Run], baseline: str | None) -> dict[str, PairedTest]:
    """Each run's mean Dice per case against its own baseline's, or else the report's, by name.

    Raises
    ------
    RecipeError
        If a baseline is no run of the report.
    """
    by_name = {run.name: run for run in runs}
    tests = {}
    for run in runs:
        name = run.description.baseline or baseline
        if name is None or name == run.name:
            continue
        if name not in by_name:
            raise RecipeError(f"The baseline {name!r} of {run.name!r} is no run of the report.")
        tests[run.name] = paired_test(run.main.values("dice"), by_name[name].main.values("dice"))
    return tests


def _retention(runs: list[Run], teacher: str | None) -> dict[str, float]:
    """Each run's mean Dice over the teacher's."""
    reference = next((run.main for run in runs if run.name == teacher), None)
    if reference is None:
        return {}
    return {run.name: run.main.summary("dice").mean / reference.summary("dice").mean for run in runs}


def _render(template: str, context: dict[str, Any]) -> str:
    environment = Environment(
        autoescape=select_autoescape(("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = resources.files("training").joinpath("templates", template).read_text(encoding="utf-8")
    escaped = environment.overlay(autoescape=template.endswith(".html.jinja"))
    return escaped.from_string(source).render(context)
