"""The bundle that ships: a measured bundle under its final name and version, with its figures in it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from models.bundle import Bundle, seal
from models.golden import check_golden_case
from training.card import model_card
from training.errors import ExportError
from training.evaluate import Evaluation
from training.export import metrics_of


def ship_bundle(
    source: Path,
    output: Path,
    *,
    version: str,
    evaluations: Mapping[str, Evaluation],
    evaluated_on: str,
    name: str | None = None,
    notes: str = "",
) -> Bundle:
    """A copy of a bundle with figures in its manifest and card, sealed, its golden case proven again.

    Parameters
    ----------
    source : Path
        The bundle that was measured.
    output : Path
        Folder of the new one; it appears only when all is done.
    version : str
        Its semantic version.
    evaluations : mapping
        By what each is of: ``teacher``, or a precision of the bundle such as ``float32``. Those of a
        precision must be of the very bundle.
    evaluated_on : str
        What the cases are, for a person to read.
    name : str, optional
        By default the bundle keeps its own.
    notes : str
        Markdown for the end of the card.

    Raises
    ------
    ExportError
        If the output exists, or an evaluation is of another bundle or of other cases than the rest.
    GoldenCaseError
        If the golden case disagrees in any precision.
    """
    if output.exists():
        raise ExportError(
            f"{output.name!r} exists already.", remedy="A version is never changed: give another one."
        )
    bundle = Bundle.open(source)
    precisions = {weights.precision for weights in bundle.manifest.weights}
    for key, evaluation in evaluations.items():
        known = (
            key in precisions and evaluation.precision == key and evaluation.bundle_digest == bundle.digest
        )
        if key != "teacher" and not known:
            raise ExportError(
                f"The evaluation {key!r} is of {evaluation.name!r} in {evaluation.precision} with the digest "
                f"{evaluation.bundle_digest[:12]}…, not of the bundle {bundle.digest[:12]}… in {key}.",
                remedy="Evaluate the bundle that ships, in each of its precisions.",
            )
    manifest = bundle.manifest.changed(
        name=name or bundle.manifest.name,
        version=version,
        metrics=metrics_of(evaluations, evaluated_on),
    )
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished)
    (unfinished / "model.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (unfinished / "card.md").write_text(model_card(manifest, notes), encoding="utf-8")
    sealed = seal(unfinished)
    for weights in sealed.manifest.weights:
        check_golden_case(sealed, precision=weights.precision)
    unfinished.rename(output)
    return Bundle.open(output)
