"""A report of models with many labels: a line for each label, and a picture that is not too wide."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from training.evaluate import CaseResult, Evaluation
from training.metrics import Agreement
from training.report import write_report


def write_evaluations(folder: Path, n_labels: int) -> Path:
    runs = []
    for name, dice in (("none", 0.5), ("logits", 0.25)):
        cases = tuple(
            CaseResult(
                f"case {c}",
                1.0,
                {
                    f"label {i}": Agreement(dice + 0.01 * i + 0.1 * c, 0.5, 1.0, 1.0, 1.0)
                    for i in range(n_labels)
                },
            )
            for c in range(2)
        )
        Evaluation(name, "", "float32", "openvino", 1.0, 0, cases).save(folder / f"{name}.json")
        runs.append({"name": name, "evaluations": [f"{name}.json"]})
    path = folder / "report.yaml"
    path.write_text(yaml.safe_dump({"title": "Many", "cases": "two", "baseline": "none", "runs": runs}))
    return path


@pytest.mark.parametrize("n_labels", [3, 29])
def test_every_label_of_every_run_is_in_the_report(tmp_path: Path, n_labels: int) -> None:
    markdown, page = write_report(write_evaluations(tmp_path, n_labels), tmp_path / "report")
    lines = markdown.read_text().splitlines()
    if n_labels == 3:
        assert lines[lines.index("|---|---|---|---|---|---|---|") - 1].startswith(
            "| run | Dice label 0 | Dice label 1"
        )
        assert any(line.startswith("| none | 0.5500 ± 0.0500 | 0.5600 ± 0.0500 |") for line in lines)
    else:
        assert "| label 28 | 0.8300 ± 0.0500 | 0.5800 ± 0.0500 |" in lines
        assert any(line.startswith("| none | 0.6900 ± 0.0500 | 0.5000 ± 0.0000 |") for line in lines)
        assert max(len(line) for line in lines) < 200
    assert all(f"label {i}" in page.read_text() for i in range(n_labels))
    with Image.open(tmp_path / "report" / "dice.png") as picture:
        assert picture.width < 1600
