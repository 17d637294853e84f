"""``segnode accept``."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from models.errors import SegnodeError
from service.commands.console import note
from service.commands.files import check_place
from service.commands.settings import Config, load

if TYPE_CHECKING:
    from service.routes import Route
    from service.settings import Settings


class NotAcceptedError(SegnodeError):
    """Raised when a check of the acceptance failed."""

    code = "NOT_ACCEPTED"


def accept(
    output: Annotated[str, typer.Option("--output", "-o", help="The PDF; - is standard output.")],
    route: Annotated[str | None, typer.Option(help="The route to try; the first unless given.")] = None,
    node: Annotated[
        str | None,
        typer.Option(metavar="AET@HOST:PORT", help="The node's DICOM port, as configured unless given."),
    ] = None,
    calling_ae_title: Annotated[
        str | None, typer.Option(help="The AE title to send from; the first peer's unless given.")
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(help="A folder with a test study; a phantom of the model unless given.", exists=True),
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEYWORD=VALUE", help="On the phantom: what the route asks for."),
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="How long each step may take.")] = 600.0,
    config: Config = None,
) -> None:
    """Try a running node at its site: echo, a study in, a proven SEG out; a PDF says how it went.

    Exit status 1 if a check failed. The report is written either way.
    """
    from importlib.metadata import version

    from service.acceptance import Trial, run_trial
    from service.acceptance_report import render_report
    from service.acceptance_study import write_phantom
    from service.archive import is_dicom
    from service.commands.send import parse_peer
    from service.node import open_node
    from service.records.database import utc_now

    if output != "-":
        if Path(output).is_dir():
            raise typer.BadParameter(f"{output} is a folder; name a PDF", param_hint="--output")
        check_place(Path(output), "--output")
    settings = load(config)
    chosen = _route(settings, route)
    listener = node or f"{settings.dicom.ae_title}@{_reachable(settings.dicom.host)}:{settings.dicom.port}"
    title = calling_ae_title or (settings.dicom.peers[0].ae_title if settings.dicom.peers else "SEGNODE-SEND")
    with open_node(settings) as opened, TemporaryDirectory(prefix="segnode-accept-") as scratch:
        bundle = (
            opened.registry.get(chosen.model, chosen.version)
            if chosen.version
            else opened.registry.active(chosen.model)
        )
        if study is None:
            paths = write_phantom(bundle, Path(scratch), _attributes(attribute or []))
        else:
            paths = sorted(path for path in study.rglob("*") if path.is_file() and is_dicom(path))
        trial = Trial(paths, parse_peer(listener), title, chosen, bundle, study is None, timeout_s)
        checks = []
        for check in run_trial(opened, trial):
            checks.append(check)
            note(f"{'passed' if check.passed else 'FAILED'}  {check.what}: {check.found}")
    manifest = bundle.manifest
    facts = [
        ("Node", f"{listener}, segnode {version('segnode')}"),
        ("Model", f"{manifest.name} {manifest.version}: {manifest.title}"),
        ("Model digest", bundle.digest),
        ("Route", f"{chosen.name} to {', '.join(chosen.destinations) or 'no destination'}"),
        (
            "Study",
            "phantom of the model's golden case" if study is None else f"{len(paths)} objects of the site",
        ),
        ("Records", settings.records_url.partition(":")[0]),
    ]
    pdf = render_report(facts, checks, at=utc_now())
    if output == "-":
        sys.stdout.buffer.write(pdf)
        sys.stdout.flush()
    else:
        Path(output).write_bytes(pdf)
    failed = [check.what for check in checks if not check.passed]
    if failed:
        raise NotAcceptedError(
            f"{len(failed)} check(s) failed: {'; '.join(failed)}.", remedy="The report says why."
        )


def _route(settings: Settings, name: str | None) -> Route:
    found = settings.route(name) if name else next(iter(settings.routes), None)
    if found is None:
        names = ", ".join(each.name for each in settings.routes) or "none"
        raise typer.BadParameter(f"no such route; configured: {names}", param_hint="--route")
    return found


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _attributes(texts: list[str]) -> dict[str, str]:
    from pydicom.datadict import tag_for_keyword

    attributes = {}
    for text in texts:
        keyword, equals, value = text.partition("=")
        if not equals or tag_for_keyword(keyword) is None:
            raise typer.BadParameter(f"{text} is not KEYWORD=VALUE of DICOM", param_hint="--set")
        attributes[keyword] = value
    return attributes
