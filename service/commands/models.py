"""``segnode models``: the models of a node."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from models.errors import SegnodeError
from service.commands import governance, signing
from service.commands.console import note, show_error, show_table
from service.commands.governance import AcceptChangedLabels, activate_through_gate, actor, open_node_of
from service.commands.settings import Config, load

if TYPE_CHECKING:
    from models.registry import Registry

app = typer.Typer(help="Install, check, activate and withdraw models.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME")]
Version = Annotated[str, typer.Argument(metavar="VERSION")]


def _registry(config: Path | None) -> Registry:
    from service.node import make_data_dir, open_registry

    settings = load(config)
    make_data_dir(settings.data_dir)
    return open_registry(settings)


@app.command(name="list")
def list_models(config: Config = None) -> None:
    """Every installed version: what is active, what is withdrawn, and its digest.

    Exit status 1 if one is not what was installed; the others are listed all the same.
    """
    registry = _registry(config)
    rows = []
    damaged: list[SegnodeError] = []
    for name in registry.names():
        for version in registry.versions(name):
            state = "withdrawn" if registry.is_withdrawn(name, version) else ""
            active = "active" if registry.active_version(name) == version else ""
            try:
                bundle = registry.get(name, version)
                digest, title = bundle.digest, bundle.manifest.title
            except SegnodeError as error:
                damaged.append(error)
                state, digest, title = f"{state} damaged".strip(), "-", "-"
            rows.append((name, version, " ".join(filter(None, (active, state))), digest, title))
    show_table(("model", "version", "state", "digest", "title"), rows)
    if not rows:
        note(
            "No model is installed: segnode serve installs those that ship, segnode models add installs one."
        )
    for wrong in damaged:
        show_error(wrong.code, wrong.message, wrong.remedy)
    if damaged:
        raise typer.Exit(1)


@app.command()
def add(
    bundle: Annotated[Path, typer.Argument(help="A model bundle: a folder or a .zip.", exists=True)],
    activate: Annotated[
        bool, typer.Option("--activate", help="Activate it as well, through the gate.")
    ] = False,
    accept_changed_labels: AcceptChangedLabels = False,
    config: Config = None,
) -> None:
    """Check a bundle whole, its golden case too, and install it."""
    from service.records.database import utc_now
    from service.records.events import record_event

    with open_node_of(config) as node:
        installed = node.registry.add(bundle)
        added = installed.manifest
        subject = f"{added.name}@{added.version}"
        with node.records.write() as session:
            detail = {"digest": installed.digest}
            record_event(session, "model.added", actor=actor(), at=utc_now(), subject=subject, detail=detail)
        note(f"Installed {added.name} {added.version}.")
        if activate:
            activate_through_gate(
                node,
                added.name,
                added.version,
                accept_changed_labels=accept_changed_labels,
                override_reason=None,
            )
            note(f"{added.name} {added.version} is active: new jobs run on it.")


app.command(name="make-key")(signing.make_key)
app.command()(signing.sign)
app.command()(signing.verify)


@app.command()
def activate(
    name: Name,
    version: Version,
    accept_changed_labels: AcceptChangedLabels = False,
    override_gate: Annotated[
        str | None,
        typer.Option(metavar="REASON", help="Activate it without a passed gate; the audit trail says why."),
    ] = None,
    config: Config = None,
) -> None:
    """Let new jobs run on a version that passes the gate. Jobs under way end on the one they began with."""
    with open_node_of(config) as node:
        activate_through_gate(
            node,
            name,
            version,
            accept_changed_labels=accept_changed_labels,
            override_reason=override_gate,
        )
    note(f"{name} {version} is active: new jobs run on it.")


@app.command()
def rollback(name: Name, config: Config = None) -> None:
    """Go back to the version that was active before."""
    from service.activation import roll_back
    from service.records.database import utc_now

    with open_node_of(config) as node:
        bundle = roll_back(node.records, node.registry, name, actor=actor(), now=utc_now())
    note(f"{name} {bundle.manifest.version} is active again.")


@app.command()
def withdraw(name: Name, version: Version, config: Config = None) -> None:
    """Take a version out of use for good; its files stay, so that past results can be explained."""
    from service.records.database import utc_now
    from service.records.events import record_event

    with open_node_of(config) as node:
        node.registry.withdraw(name, version)
        with node.records.write() as session:
            alert = node.registry.active_version(name) == version
            subject = f"{name}@{version}"
            record_event(
                session, "model.withdrawn", actor=actor(), at=utc_now(), subject=subject, alert=alert
            )
    note(f"{name} {version} is withdrawn: it starts no job any more.")


governance.register(app)
