"""From a results folder of nnU-Net to a bundle that proved itself.

Nothing is left at the output path unless every step succeeded: the ONNX networks compute what PyTorch
computes, the bundle's own checks pass, and the engine gives the golden labelmap that nnU-Net gave.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as library_version
from pathlib import Path

from pydantic import ValidationError

from models.bundle import Bundle, seal
from models.golden import check_golden_case
from models.manifest import (
    Channel,
    GoldenCase,
    Head,
    Inference,
    Manifest,
    Metrics,
    NormalizationScheme,
    Provenance,
    Weights,
)
from training.card import model_card
from training.checkpoint import file_digest
from training.description import Description, generic_description, read_description
from training.errors import ExportError
from training.evaluate import Evaluation
from training.golden_files import write_golden_case
from training.onnx_export import Agreement, compare_with_torch, export_onnx
from training.plans import intensity_of, preprocessing_of
from training.teacher import ResultsFolder
from training.training_files import choose_orientation, volume_ranges_ml

_LIBRARIES = ("torch", "nnunetv2", "dynamic_network_architectures", "onnx", "onnxscript", "numpy", "segnode")


@dataclass(frozen=True)
class ExportRequest:
    """What to export and how; see the options of ``segnode-train export``."""

    results: Path
    name: str
    output: Path
    golden_images: tuple[Path, ...]
    version: str = "0.1.0"
    labels_file: Path | None = None
    generic_codes: bool = False
    orientation: str | None = None
    training_images: Path | None = None
    training_labels: Path | None = None
    card: Path | None = None
    folds: tuple[str, ...] | None = None
    checkpoint: str = "final"
    mirroring: bool = False
    teacher: Path | None = None
    method: str = "nnU-Net training without a teacher"
    recipe: str | None = None
    metrics: Metrics | None = None


@dataclass(frozen=True)
class Exported:
    """A sealed bundle, how far each ONNX network is from PyTorch, and the golden case's Dice per label."""

    bundle: Bundle
    agreements: tuple[Agreement, ...]
    golden_dice: dict[str, float]


def export_bundle(request: ExportRequest) -> Exported:
    """Export a results folder as a bundle at ``request.output``, which must not exist.

    Raises
    ------
    ResultsFolderError, PlansError
        If the results folder is not one that can be exported.
    LabelsFileError
        If there are no codes for the labels; a template is written beside the output.
    ExportError
        If the orientation is not known, the golden case shows nothing, or the export does not agree with
        PyTorch.
    BundleError
        If the bundle does not pass its own checks.
    """
    if request.output.exists():
        raise ExportError(
            f"{request.output.name!r} exists already.", remedy="A version is never changed: give another one."
        )
    results = ResultsFolder.open(request.results, folds=request.folds, checkpoint=request.checkpoint)
    orientation = choose_orientation(
        results.plans["image_reader_writer"],
        stated=request.orientation,
        training_images=request.training_images,
    )
    description = _description(request, results)
    request.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=request.output.parent, prefix=".export-") as unfinished:
        folder = Path(unfinished) / request.output.name
        (folder / "golden").mkdir(parents=True)
        golden, patch = write_golden_case(
            results,
            request.golden_images,
            folder / "golden",
            orientation=orientation,
            mirroring=request.mirroring,
            postprocessing=description.postprocessing,
        )
        weights, agreements = [], []
        for index, one in enumerate(results.checkpoints):
            name = "student.onnx" if len(results.checkpoints) == 1 else f"student.fold_{one.fold}.onnx"
            network = results.network(index)
            export_onnx(network, results.n_channels, _patch_size(results), folder / name)
            sigmoid = bool(results.classes.regions_class_order)
            agreements.append(compare_with_torch(network, folder / name, patch, sigmoid=sigmoid))
            fold = 0 if one.fold == "all" else int(one.fold)
            weights.append(Weights(file=name, sha256=file_digest(folder / name), fold=fold))
        manifest = _manifest(request, results, description, orientation, golden, weights)
        (folder / "model.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        card = (
            request.card.read_text(encoding="utf-8")
            if request.card
            else model_card(manifest, description.notes)
        )
        (folder / "card.md").write_text(card, encoding="utf-8")
        dice = check_golden_case(seal(folder))
        shutil.move(folder, request.output)
    return Exported(Bundle.open(request.output), tuple(agreements), dice)


def _description(request: ExportRequest, results: ResultsFolder) -> Description:
    if request.generic_codes and request.labels_file is None:
        description = generic_description(results, request.name)
    else:
        template_path = request.output.parent / f"{request.name}-labels.yaml"
        description = read_description(request.labels_file, results, template_path=template_path)
    if request.training_labels is None:
        return description
    paths = sorted(p for p in request.training_labels.iterdir() if p.name.endswith((".nii", ".nii.gz")))
    ranges = volume_ranges_ml(paths, results.classes.names)
    labels = tuple(
        label if label.volume_range_ml else label.model_copy(update={"volume_range_ml": ranges[label.value]})
        for label in description.labels
    )
    return description.model_copy(update={"labels": labels})


def _manifest(
    request: ExportRequest,
    results: ResultsFolder,
    description: Description,
    orientation: str,
    golden: GoldenCase,
    weights: Sequence[Weights],
) -> Manifest:
    settings = results.settings
    schemes, masks = settings["normalization_schemes"], settings["use_mask_for_norm"]
    channels = tuple(
        Channel(
            **channel.model_dump(),
            normalization=NormalizationScheme(schemes[i]),
            use_mask_for_norm=bool(masks[i]),
            intensity=intensity_of(results.plans, i),
        )
        for i, channel in enumerate(description.channels)
    )
    classes = results.classes
    try:
        return Manifest(
            name=request.name,
            version=request.version,
            title=description.title,
            intended_use=description.intended_use,
            licence=description.licence,
            channels=channels,
            labels=description.manifest_labels(),
            orientation=orientation,
            preprocessing=preprocessing_of(results.plans, settings),
            inference=Inference(
                head=Head.SIGMOID if classes.regions_class_order else Head.SOFTMAX,
                patch_size=_patch_size(results),
                mirror_axes=results.checkpoints[0].mirror_axes if request.mirroring else (),
                regions_class_order=classes.regions_class_order,
            ),
            postprocessing=description.postprocessing,
            weights=tuple(weights),
            golden=golden,
            input_limits=description.input_limits,
            provenance=_provenance(request, results, description),
            metrics=request.metrics,
        )
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ExportError(f"The manifest would not be valid: {problems}.") from error


def metrics_of(evaluations: Mapping[str, Evaluation], evaluated_on: str) -> Metrics:
    """The manifest's figures from evaluations on the same cases: mean Dice per label.

    Parameters
    ----------
    evaluations : mapping
        By what each is of: ``teacher``, or a precision of the student such as ``float32``.
    evaluated_on : str
        What the cases are, for a person to read.

    Raises
    ------
    ExportError
        If there is none, or they are of different cases or labels.
    """
    if not evaluations:
        raise ExportError("There is no evaluation to take figures from.")
    first = next(iter(evaluations.values()))
    for name, other in evaluations.items():
        if (other.case_names, other.label_names) != (first.case_names, first.label_names):
            raise ExportError(
                f"The evaluation {name!r} is of other cases or labels than the first.",
                remedy="Evaluate every model with the same labels file on the same list of cases.",
            )
    return Metrics(
        evaluated_on=evaluated_on,
        cases=len(first.cases),
        dice={
            name: {label: round(one.summary("dice", label).mean, 4) for label in one.label_names}
            for name, one in evaluations.items()
        },
    )


def _provenance(request: ExportRequest, results: ResultsFolder, description: Description) -> Provenance:
    teacher = None if request.teacher is None else ResultsFolder.open(request.teacher)
    return Provenance(
        teacher_digest=None if teacher is None else teacher.digest,
        width=None if teacher is None else width_of(results.features, teacher.features),
        method=request.method,
        recipe=request.recipe,
        data=description.data,
        data_licence=description.data_licence,
        library_versions=_library_versions(),
        source_commit=source_commit(),
    )


def _library_versions() -> dict[str, str]:
    """Versions of the libraries that the result depends on, of those that are installed."""
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = library_version(name)
    return versions


def width_of(student: Sequence[int], teacher: Sequence[int]) -> str:
    """The student's width as a fraction, or both lists of channels where no one fraction says it."""
    widths = {Fraction(s, t) for s, t in zip(student, teacher, strict=False)}
    if len(student) == len(teacher) and len(widths) == 1:
        return str(widths.pop())
    return f"{list(student)} of {list(teacher)} channels"


def source_commit() -> str | None:
    """The commit that this code is of, with ``+changes`` where files differ; None outside of a checkout."""
    git, root = shutil.which("git"), Path(__file__).resolve().parents[1]
    if git is None or not (root / ".git").exists():
        return None

    def run(*arguments: str) -> str:
        done = subprocess.run([git, "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        commit = run("rev-parse", "HEAD")
        changed = run("status", "--porcelain", "--untracked-files=no", "--", "models", "training")
    except subprocess.CalledProcessError:
        return None
    return f"{commit}+changes" if changed else commit


def _patch_size(results: ResultsFolder) -> tuple[int, int, int]:
    z, y, x = results.settings["patch_size"]
    return int(z), int(y), int(x)
