"""The bundle that ships carries the figures of the bundle that was measured, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bundle_factory import make_threshold_bundle
from typer.testing import CliRunner

from models.bundle import Bundle
from models.errors import GoldenCaseError
from training.cli import build_app
from training.errors import ExportError
from training.evaluate import CaseResult, Evaluation
from training.metrics import Agreement
from training.shipping import ship_bundle


def evaluation(bundle: Bundle, dice: float, precision: str = "float32") -> Evaluation:
    agreement = Agreement(dice=dice, nsd=1.0, hd95_mm=0.0, reference_ml=1.0, predicted_ml=1.0)
    case = CaseResult("a", 0.0, {label.name: agreement for label in bundle.manifest.labels})
    return Evaluation("any", bundle.digest, precision, "openvino", 1.0, 0, (case,))


def test_figures_name_and_version_are_in_manifest_and_card(tmp_path: Path) -> None:
    bundle = make_threshold_bundle(tmp_path / "measured", int8=True)
    files = []
    for precision, dice in (("float32", 0.8123), ("int8", 0.8119)):
        path = tmp_path / f"{precision}.json"
        evaluation(bundle, dice, precision).save(path)
        files += ["--figures", f"{precision}={path}"]
    output = tmp_path / "shipped" / "2.0.0"
    output.parent.mkdir()
    words = ["ship", str(bundle.folder), "--version", "2.0.0", "--name", "given-out", *files]
    done = CliRunner().invoke(build_app(), [*words, "--evaluated-on", "a case", "-o", str(output)])
    assert done.exit_code == 0, done.output
    shipped = Bundle.open(output)
    assert (shipped.manifest.name, shipped.manifest.version) == ("given-out", "2.0.0")
    assert shipped.manifest.metrics is not None
    assert shipped.manifest.metrics.dice["int8"]["low"] == 0.8119
    card = (output / "card.md").read_text()
    assert "0.8123" in card
    assert "a case" in card
    assert [w.sha256 for w in shipped.manifest.weights] == [w.sha256 for w in bundle.manifest.weights]
    again = CliRunner().invoke(build_app(), [*words, "--evaluated-on", "a case", "-o", str(output)])
    assert isinstance(again.exception, ExportError)
    assert "exists already" in again.exception.message


@pytest.mark.parametrize("change", [{"bundle_digest": "0" * 64}, {"precision": "int8"}])
def test_figures_of_another_bundle_or_precision_are_refused(tmp_path: Path, change: dict[str, str]) -> None:
    bundle = make_threshold_bundle(tmp_path / "measured")
    other = replace(evaluation(bundle, 0.9), **change)
    with pytest.raises(ExportError, match="not of the bundle"):
        ship_bundle(
            bundle.folder,
            tmp_path / "out",
            version="2.0.0",
            evaluations={"float32": other},
            evaluated_on="a case",
        )
    assert not (tmp_path / "out").exists()


def test_a_bundle_whose_golden_case_disagrees_does_not_ship(tmp_path: Path) -> None:
    bundle = make_threshold_bundle(tmp_path / "measured", golden="wrong")
    with pytest.raises(GoldenCaseError):
        ship_bundle(
            bundle.folder,
            tmp_path / "out",
            version="2.0.0",
            evaluations={"float32": evaluation(bundle, 0.9)},
            evaluated_on="a case",
        )
    assert not (tmp_path / "out").exists()


def test_figures_without_a_file_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    bundle = make_threshold_bundle(tmp_path / "measured")
    words = ["ship", str(bundle.folder), "--version", "2.0.0", "--figures", "float32", "--evaluated-on", "x"]
    done = CliRunner().invoke(build_app(), [*words, "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "float32=FILE" in done.output
