"""``segnode segment``: one case from files to a file, on this machine, without a running node."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from models.errors import SegnodeError
from service.commands.console import note, progress_bar, show_table, warn
from service.commands.files import check_place
from service.commands.outputs import replace_together
from service.commands.settings import Config, cache_dir, load, models_of_node_or_cache

if TYPE_CHECKING:
    from models.bundle import Bundle
    from service.channel_rules import AlignmentRules
    from service.pipeline import PipelineOutcome
    from service.reading import ReadingRules
    from service.routes import Route

_KINDS = {".nii.gz": "labelmap", ".dcm": "segmentation"}


class GantryTilt(StrEnum):
    """The choices of ``--gantry-tilt``."""

    REFUSE = "refuse"
    RESAMPLE = "resample"


class Registration(StrEnum):
    """The choices of ``--registration``."""

    NONE = "none"
    RIGID = "rigid"


class NothingFoundError(SegnodeError):
    """Raised when a SEG was asked for, and the model found none of its labels: a SEG cannot be empty."""

    code = "NOTHING_FOUND"


def segment(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="One input per channel: a NIfTI file, a folder of DICOM files, or a .zip of one. One folder "
            "or .zip of a study, where a route of the node tells its channels apart.",
            exists=True,
            metavar="INPUT",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="out.nii.gz, or out.dcm for a DICOM-SEG (of DICOM input).",
            dir_okay=False,
        ),
    ],
    model: Annotated[str | None, typer.Option(metavar="NAME[@VERSION]", help="A model of the node.")] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="A model bundle that is not installed: a folder.", file_okay=False)
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="auto, openvino, onnxruntime or onnxruntime-cuda.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use; all unless given.")] = None,
    measurements: Annotated[
        Path | None,
        typer.Option(
            help="Write the volumes as a DICOM SR too (of DICOM input).", metavar="PATH", dir_okay=False
        ),
    ] = None,
    gantry_tilt: Annotated[
        GantryTilt, typer.Option(help="What to do with a DICOM series that was taken with a tilted gantry.")
    ] = GantryTilt.REFUSE,
    volume: Annotated[
        str | None,
        typer.Option(
            help="Which volume of a DICOM series that holds several: EchoTime:first, EchoTime~30 (nearest), "
            "DiffusionBValue=0, ...",
            metavar="RULE",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The channel that the others are brought to; the first unless given.", metavar="NAME"
        ),
    ] = None,
    registration: Annotated[
        Registration | None, typer.Option(help="Whether the other channels are registered to it first.")
    ] = None,
    config: Config = None,
) -> None:
    """Segment one case and write the labels; volumes go to standard output.

    The same steps as in the node. The files to write stay as they were until all is made, and are then
    replaced together; one that the model finds nothing for is removed. An input that cannot be segmented
    ends with exit status 3, its reason code first on standard error.
    """
    kind = _kind_of(output, inputs)
    if measurements is not None:
        _check_measurements(measurements, output, inputs)
    if (model is None) == (bundle is None):
        raise typer.BadParameter("give one of --model and --bundle", param_hint="--model")
    reading = _reading(gantry_tilt, volume)
    settings = load(config)
    opened, cache = _open(model, bundle, config)
    route = settings.route_with_channels(opened.manifest.name)

    from models.segmenter import Segmenter
    from service.pipeline import overall_fraction, run
    from service.pipeline_job import PipelineJob
    from service.profiles import Profile
    from service.records.database import utc_now

    with tempfile.TemporaryDirectory(prefix="segnode-") as scratch, progress_bar() as bar:
        task = bar.add_task("loading", total=1.0)
        segmenter = Segmenter(
            opened,
            runtime=runtime or settings.worker.runtime,
            threads=threads or settings.worker.threads,
            cache_dir=cache,
        )
        try:
            outcome = run(
                PipelineJob(
                    channels=tuple((path,) for path in inputs),
                    created_at=utc_now(),
                    output_dir=Path(scratch) / "results",
                    settings_digest=settings.results_digest,
                    profiles=(Profile(),) if kind == "segmentation" or measurements else (),
                    reading=reading,
                    told_apart_by=route,
                    alignment=_alignment(route, reference, registration),
                ),
                segmenter,
                opened.manifest,
                opened.digest,
                progress=lambda p: bar.update(task, description=p.stage, completed=overall_fraction(p)),
            )
        finally:
            segmenter.close()
        bar.update(task, description="done", completed=1.0)
        wanted = {output: kind} | ({measurements: "report"} if measurements is not None else {})
        _deliver(outcome, Path(scratch) / "results", wanted)
    _report(outcome, opened, output)


def _kind_of(output: Path, inputs: list[Path]) -> str:
    """The kind of result that belongs to the output's name."""
    kind = next((kind for suffix, kind in _KINDS.items() if output.name.lower().endswith(suffix)), None)
    if kind is None:
        raise typer.BadParameter(f"{output.name} must end in .nii.gz or .dcm", param_hint="--output")
    check_place(output, "--output")
    if kind == "segmentation" and not _are_dicom(inputs):
        raise typer.BadParameter(
            "a SEG needs the DICOM series that it belongs to; NIfTI gives out.nii.gz", param_hint="--output"
        )
    return kind


def _check_measurements(path: Path, output: Path, inputs: list[Path]) -> None:
    if not path.name.lower().endswith(".dcm"):
        raise typer.BadParameter(f"{path.name} must end in .dcm", param_hint="--measurements")
    if path.resolve() == output.resolve():
        raise typer.BadParameter(f"{path.name} is taken by --output", param_hint="--measurements")
    check_place(path, "--measurements")
    if not _are_dicom(inputs):
        raise typer.BadParameter(
            "a DICOM SR needs the DICOM series that it belongs to; the volumes of NIfTI are printed",
            param_hint="--measurements",
        )


def _reading(gantry_tilt: GantryTilt, volume: str | None) -> ReadingRules:
    from service.reading import ReadingRules, VolumeRule

    try:
        rule = VolumeRule.parse(volume) if volume is not None else None
    except ValueError as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise typer.BadParameter(first.removeprefix("Value error, "), param_hint="--volume") from error
    return ReadingRules(gantry_tilt=gantry_tilt.value, volume=rule)


def _alignment(
    route: Route | None, reference: str | None, registration: Registration | None
) -> AlignmentRules:
    """What the options say of the channels; what they leave open is as in the route, if there is one."""
    from service.channel_rules import IN_ORDER

    rules = route.alignment if route is not None else IN_ORDER
    said = {"reference": reference, "registration": registration.value if registration else None}
    return rules.model_copy(update={name: value for name, value in said.items() if value is not None})


def _are_dicom(inputs: list[Path]) -> bool:
    from service.archive import is_dicom, is_zip

    return all(path.is_dir() or is_dicom(path) or is_zip(path) for path in inputs)


def _open(model: str | None, bundle: Path | None, config: Path | None) -> tuple[Bundle, Path]:
    from models.bundle import Bundle

    if bundle is not None:
        return Bundle.open(bundle), cache_dir() / "cache"
    assert model is not None
    registry, cache = models_of_node_or_cache(config)
    name, _, version = model.partition("@")
    return (registry.get(name, version) if version else registry.active(name)), cache


def _deliver(outcome: PipelineOutcome, results: Path, wanted: dict[Path, str]) -> None:
    """Put the files that were asked for, each of its kind, in their places: all of this run, or as before."""
    made: dict[str, Path] = {file.kind: results / file.name for file in outcome.files}
    replace_together({path: made.get(kind) for path, kind in wanted.items()})
    for path, kind in wanted.items():
        if kind not in made:
            raise NothingFoundError(
                f"The model found none of its labels, and a SEG cannot be empty: there is no {path.name}.",
                remedy="Ask for a .nii.gz, which can; and look whether the input shows what the model "
                "looks for.",
            )


def _report(outcome: PipelineOutcome, bundle: Bundle, output: Path) -> None:
    volumes = outcome.summary["volumes_ml"]
    show_table(("label", "mL"), [(name, f"{value:.2f}") for name, value in volumes.items()])
    for warning in outcome.summary["warnings"]:
        warn(warning)
    manifest = bundle.manifest
    note(f"{output}: {manifest.name} {manifest.version}, {outcome.runtime} {outcome.precision}. Unverified.")
