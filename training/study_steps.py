"""The steps of a study: each a command of ``segnode-train`` in a process of its own, skipped if done.

A process of its own per step gives every evaluation its own peak memory, makes a step repeatable by hand, and
loses nothing but the current step when the machine goes down. ``commands.log`` in the work folder lists what
was run.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.description import parse_description
from training.errors import TrainingDataError
from training.evaluate import Evaluation
from training.plans import read_json
from training.preprocess import TrainingCases
from training.shipping import ship_bundle
from training.study import Run, Ship, Study, best_run

CLAIM, CHOOSE = "claim", "choose"


@dataclass(frozen=True)
class StudyFolder:
    """Where everything of a study is, and what it is made from.

    Parameters
    ----------
    study : Study
    teacher : Path
        The teacher's results folder.
    data : Path
        Labelled cases, as ``segnode-train distill`` takes them.
    golden_image : Path
        A small image that may be given on; it becomes the bundles' golden case.
    work : Path
        Everything unfinished, and the trainings; a study in it is continued.
    device : str
        "auto", "cpu" or "cuda"; of the trainings.
    tell : callable
        Told each step before it starts.
    """

    study: Study
    teacher: Path
    data: Path
    golden_image: Path
    work: Path
    device: str = "auto"
    tell: Callable[[str], None] = print

    def complete(self, results: Path) -> Path:
        """Run what is left of the study, and write evaluations, logs and the report into ``results``.

        Returns
        -------
        The Markdown report.

        Raises
        ------
        TrainingDataError
            If a step fails; the message names its command.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        trained = {run.key: self.train(run) for run in self.study.runs}
        self.export("teacher", self.teacher, "nnU-Net's own training", None)
        self.evaluate("teacher", CLAIM)
        for key, start in self._starts().items():
            self.export(key, start, "an earlier student, from which the runs of this width start", None)
            self.evaluate(key, CLAIM)
        for run in self.study.runs:
            self.export(run.key, trained[run.key], self._method(run), run.recipe_path.name)
            for cases in (CHOOSE, CLAIM):
                self.evaluate(run.key, cases)
        shipped = [(ship, self.ship(ship)) for ship in self.study.description.ships]
        return self.report(results, trained, shipped)

    # The steps ---------------------------------------------------------------------------------------------

    def train(self, run: Run) -> Path:
        """Train a run, or go on with it, and return its results folder."""
        folder = self.work / "runs" / run.key
        finished = sorted(folder.glob("results/*/*/fold_0/checkpoint_final.pth"))
        if not finished:
            start = self.study.start_of(run)
            self._segnode_train(
                "distill", self.teacher, self.data, "--recipe", self._recipe_file(run), "--seed", run.seed,
                "--split", self.study.split, "--device", self.device,
                *(() if start is None else ("--start-from", start)), "-o", folder,
            )  # fmt: skip
            finished = sorted(folder.glob("results/*/*/fold_0/checkpoint_final.pth"))
        if len(finished) != 1:
            raise TrainingDataError(f"The run {run.key!r} left {len(finished)} results folders, not one.")
        return finished[0].parent.parent

    def export(self, key: str, results: Path, method: str, recipe: str | None) -> Path:
        """The float32 bundle of a results folder, without figures as yet."""
        output = self.work / "bundles" / key
        if not output.is_dir():
            teacher = () if recipe is None else ("--teacher", self.teacher, "--recipe", recipe)
            self._segnode_train(
                "export", results, "--name", self.study.description.name, "--golden-image", self.golden_image,
                "--labels-file", self.study.labels, "--training-images", self._images(), "--method", method,
                *teacher, "-o", output,
            )  # fmt: skip
        return output

    def evaluate(
        self, key: str, cases: str, *, precision: str = "float32", runtime: str = "auto"
    ) -> Evaluation:
        """Figures of a bundle on a list of cases."""
        variant = "" if (precision, runtime) == ("float32", "auto") else f"-{precision}-{runtime}"
        output = self.work / "evaluations" / f"{key}{variant}.{cases}.json"
        if not output.is_file():
            self._segnode_train(
                "evaluate", self.work / "bundles" / key, self.data, "--split", self.study.split,
                "--list", cases, "--name", key, "--precision", precision, "--runtime", runtime,
                "--labelmaps", self._labelmaps(key + variant), "-o", output,
            )  # fmt: skip
        return Evaluation.load(output)

    def ship(self, ship: Ship) -> Run:
        """Make the bundle of the best run of a width: float32, INT8 where it passes its gate, and figures."""
        runs = [run for run in self.study.runs if run.width == ship.width]
        best = best_run(runs, {run.key: self.evaluate(run.key, CHOOSE) for run in runs})
        output = self.work / "ships" / ship.name / ship.version
        if output.is_dir():
            return best
        quantized = self.work / "bundles" / f"{best.key}-int8"
        refused = self.work / "bundles" / f"{best.key}-int8.refused"
        if not quantized.is_dir() and not refused.is_file():
            said = self._segnode_train(
                "quantize", self.work / "bundles" / best.key, self.data, "--split", self.study.split,
                "--version", ship.version, "-o", quantized,
                may_fail=("QUANTIZATION_GATE", "GOLDEN_CASE_DISAGREES"),
            )  # fmt: skip
            if said is not None:
                refused.write_text(said)
                self.tell(f"INT8 does not ship: {said}")
        source = quantized if quantized.is_dir() else self.work / "bundles" / best.key
        evaluations = {
            "teacher": self.evaluate("teacher", CLAIM),
            "float32": self.evaluate(source.name, CLAIM),
        }
        if quantized.is_dir():
            evaluations["int8"] = self.evaluate(quantized.name, CLAIM, precision="int8")
            for precision in ("float32", "int8"):
                self.evaluate(quantized.name, CLAIM, precision=precision, runtime="onnxruntime")
        cases = len(json.loads(self.study.split.read_text())[CLAIM])
        ship_bundle(
            source,
            output,
            name=ship.name,
            version=ship.version,
            evaluations=evaluations,
            evaluated_on=f"the {cases} '{CLAIM}' cases of {self.study.split.name}, without mirroring",
            notes=parse_description(self.study.labels).notes,
        )
        return best

    def report(self, results: Path, trained: dict[str, Path], shipped: list[tuple[Ship, Run]]) -> Path:
        """Tables, tests, curves and pictures; what they are made from is copied beside them."""
        results.mkdir(parents=True, exist_ok=True)
        lines = [self._line("teacher", "teacher", self.teacher)]
        lines += [self._line(key, key, start) for key, start in self._starts().items()]
        for run in self.study.runs:
            baseline = self.study.baseline_of(run)
            line = self._line(run.title, run.key, trained[run.key])
            if baseline is not None and baseline is not run:
                line["baseline"] = baseline.title
            lines.append(line)
            shutil.copyfile(trained[run.key] / "fold_0" / "log.jsonl", results / f"{run.key}.log.jsonl")
        for path in sorted((self.work / "evaluations").glob("*.json")):
            shutil.copyfile(path, results / path.name)
        description = self.study.description
        ships = " ".join(
            f"{run.title} has the best mean Dice of its width on the 'choose' cases and ships as {ship.name} "
            f"{ship.version}{self._int8_sentence(run)}."
            for ship, run in shipped
        )
        images = self._images().resolve()
        content = {
            "title": f"Study: {description.name}",
            "text": f"{description.text}\n\n{ships}".strip(),
            "cases": "the 'claim' cases, which trained nothing and chose nothing",
            "teacher": "teacher",
            "images": str(images),
            "references": str(images.parent / images.name.replace("images", "labels")),
            "pictured_cases": list(description.pictured_cases),
            "runs": lines,
        }
        report = self.work / "report.yaml"
        report.write_text(yaml.safe_dump(content, sort_keys=False))
        self._segnode_train("report", report, "-o", results)
        (results / "commands.log").write_text(self._commands(), encoding="utf-8")
        return results / "report.md"

    # Their parts -------------------------------------------------------------------------------------------

    def _recipe_file(self, run: Run) -> Path:
        """The recipe as it is trained: with what the study replaces in every recipe."""
        if not self.study.description.training:
            return run.recipe_path
        content = yaml.safe_load(run.recipe_path.read_text(encoding="utf-8"))
        content["training"] = {**content.get("training", {}), **self.study.description.training}
        path = self.work / "recipes" / run.recipe_path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def _commands(self) -> str:
        """What was run, with the words of `segnode-train study --help` in place of this machine's folders."""
        text = (self.work / "commands.log").read_text(encoding="utf-8")
        for path, word in (
            (self.golden_image, "GOLDEN_IMAGE"),
            (self.work, "WORK"),
            (self.teacher, "TEACHER"),
            (self.data, "DATA"),
            (self.study.folder, "STUDIES"),
        ):
            for spelling in {str(path.resolve()), str(path)}:
                text = text.replace(f"{spelling}/", f"{word}/").replace(f"{spelling} ", f"{word} ")
        return text

    def _line(self, name: str, key: str, results: Path) -> dict[str, Any]:
        """What the report is told of a network: its name there, and where all that was measured lies."""
        return {
            "name": name,
            "results": str(results.resolve()),
            "evaluations": self._evaluations(key),
            "labelmaps": str(self._labelmaps(key).resolve()),
        }

    def _evaluations(self, key: str) -> list[str]:
        """Every evaluation of a bundle on the claim cases, plain float32 first."""
        folder = (self.work / "evaluations").resolve()
        others = {*folder.glob(f"{key}-float32-*.{CLAIM}.json"), *folder.glob(f"{key}-int8*.{CLAIM}.json")}
        return [str(folder / f"{key}.{CLAIM}.json"), *map(str, sorted(others))]

    def _int8_sentence(self, run: Run) -> str:
        refused = self.work / "bundles" / f"{run.key}-int8.refused"
        if refused.is_file():
            return f" in float32 alone, because INT8 did not pass its gate ({refused.read_text().strip()})"
        return " in float32 and INT8"

    def _starts(self) -> dict[str, Path]:
        """The students that runs start from, by their names in files and tables."""
        starts = self.study.description.starts
        return {
            f"start-{width.numerator}of{width.denominator}": self.study.folder / path
            for width, path in starts.items()
        }

    def _method(self, run: Run) -> str:
        how = f"distilled from the teacher by {run.recipe.method}, beside nnU-Net's own loss"
        if not run.recipe.distillation:
            how = "nnU-Net's loss alone, nothing distilled"
        return how if self.study.start_of(run) is None else f"{how}, going on from an earlier student"

    def _images(self) -> Path:
        """The folder of the training images. Raises TrainingDataError if there is none."""
        cases = TrainingCases.open(self.data, read_json(self.teacher / "dataset.json", "The dataset"))
        return cases.image_paths(cases.names()[0])[0].parent

    def _labelmaps(self, key: str) -> Path:
        return self.work / "labelmaps" / key

    def _segnode_train(self, *arguments: object, may_fail: tuple[str, ...] = ()) -> str | None:
        """Run a command of ``segnode-train``; what it said if it failed as it may, else None."""
        words = [str(argument) for argument in arguments]
        self.tell("segnode-train " + shlex.join(words))
        with (self.work / "commands.log").open("a", encoding="utf-8") as log:
            log.write("segnode-train " + shlex.join(words) + "\n")
        done = subprocess.run(
            [sys.executable, "-m", "training", *words], stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode == 0:
            return None
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        if may_fail and last.startswith(may_fail):
            return last
        raise TrainingDataError(
            f"A step of the study failed: {last}",
            remedy=f"Run it by hand: segnode-train {shlex.join(words)}. Then start the study again.",
        )
