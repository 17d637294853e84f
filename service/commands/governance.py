"""``segnode models gate``, ``shadow``, ``recall`` and ``cases``: how versions come in and out of use."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.console import note, show_table, warn
from service.commands.settings import Config, load

if TYPE_CHECKING:
    from service.node import Node
    from service.records.governance_tables import Gate, Shadow

shadow_app = typer.Typer(
    help="Run a version beside the active one; nothing of it leaves.", no_args_is_help=True
)
cases_app = typer.Typer(help="Golden cases of the site.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME")]
Version = Annotated[str, typer.Argument(metavar="VERSION")]
AcceptChangedLabels = Annotated[
    bool,
    typer.Option("--accept-changed-labels", help="Confirm that labels, channels or orientation change."),
]


def open_node_of(config: Path | None) -> Node:
    """The node that a command works on; use it as a context manager."""
    from service.node import open_node

    return open_node(load(config))


def actor() -> str:
    """Who gives a command, as the audit trail names them."""
    import getpass

    return f"command line ({getpass.getuser()})"[:128]


def gate(
    name: Name,
    version: Version,
    accept_changed_labels: AcceptChangedLabels = False,
    config: Config = None,
) -> None:
    """Put a version to the test, beside the active one; ends with status 4 if it does not pass."""
    with open_node_of(config) as node:
        done = run_gate_here(node, name, version, accept_changed_labels=accept_changed_labels)
    if done.state.value != "passed":
        raise typer.Exit(4)


def run_gate_here(node: Node, name: str, version: str, *, accept_changed_labels: bool) -> Gate:
    """Run the gate in processes of this command's own, whatever the node's workers do, and print it."""
    from service.gate_runs import GateRunner, ask_for_gate
    from service.lease import LeaseOwner
    from service.records.database import utc_now
    from service.records.gates import take_gate
    from service.records.governance_tables import Gate

    owner = str(LeaseOwner.of_this_process())
    runner = GateRunner(node.settings, node.records, node.spool, node.registry, owner=owner)
    asked = ask_for_gate(
        node.records,
        node.registry,
        name,
        version,
        accept_changed_labels=accept_changed_labels,
        actor=actor(),
        now=utc_now(),
    )
    with node.records.write() as session:
        taken = take_gate(session, asked.gate_id, owner=owner, now=utc_now())
    note(f"{name} {version} is at the gate.")
    runner.run(taken, threading.Event())
    with node.records.read() as session:
        done = session.get_one(Gate, taken.gate_id)
    for check in done.report.get("checks", ()):
        typer.echo(f"{'ok  ' if check['passed'] else 'FAIL'}  {check['name']:<10}  {check['sentence']}")
    return done


def activate_through_gate(
    node: Node, name: str, version: str, *, accept_changed_labels: bool, override_reason: str | None
) -> None:
    """Activate a version; where the gate is asked for and its last run does not let it in, run it first."""
    from service.activation import activate
    from service.errors import GateError
    from service.records.database import utc_now

    def attempt() -> None:
        activate(
            node.records,
            node.registry,
            node.settings.models,
            name,
            version,
            actor=actor(),
            now=utc_now(),
            accept_changed_labels=accept_changed_labels,
            override_reason=override_reason,
        )

    try:
        attempt()
    except GateError:
        run_gate_here(node, name, version, accept_changed_labels=accept_changed_labels)
        attempt()


@shadow_app.command(name="start")
def start_shadow(name: Name, version: Version, config: Config = None) -> None:
    """Run a version beside the active one, on the studies that are finished from now on."""
    from service.records.database import utc_now
    from service.shadow import start_shadow as start

    with open_node_of(config) as node:
        start(node.records, node.registry, name, version, actor=actor(), now=utc_now())
    note(f"{name} {version} runs beside the active version. Nothing of it leaves the node.")


@shadow_app.command(name="stop")
def stop_shadow(name: Name, config: Config = None) -> None:
    """End shadow mode; its table stays."""
    from service.records.database import utc_now
    from service.shadow import stop_shadow as stop

    with open_node_of(config) as node:
        ended = stop(node.records, name, actor=actor(), now=utc_now())
    note(f"{name} {ended.model_version} is no longer in shadow mode.")


@shadow_app.command(name="show")
def show_shadow(name: Name, config: Config = None) -> None:
    """The table of comparisons: one line for each study and label."""
    from sqlalchemy import select

    from service.errors import NotFoundError
    from service.records.governance_tables import Comparison
    from service.shadow import latest_shadow

    with open_node_of(config) as node, node.records.read() as session:
        shadow = latest_shadow(session, name)
        if shadow is None:
            raise NotFoundError(f"No version of {name!r} has been in shadow mode.")
        rows = session.scalars(
            select(Comparison)
            .where(Comparison.shadow_id == shadow.shadow_id)
            .order_by(Comparison.created_at, Comparison.comparison_id)
        ).all()
    note(_describe(shadow))
    lines: list[tuple[str, ...]] = []
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        if row.reason is not None:
            lines.append((row.job_id, "", "", "", "", seconds, f"{row.code}: {row.reason}"))
        for label, each in sorted(row.labels.items()):
            figures = [f"{each[key]:.4f}" for key in ("dice", "active_ml", "candidate_ml")]
            lines.append((row.job_id, label, *figures, seconds, ""))
    show_table(("job", "label", "Dice", "active mL", "candidate mL", "seconds", "failure"), lines)


def _describe(shadow: Shadow) -> str:
    state = "runs" if shadow.stopped_at is None else f"ran until {shadow.stopped_at:%Y-%m-%d %H:%M} UTC"
    return f"{shadow.model_name} {shadow.model_version} {state} beside the active version."


def recall(
    model: Annotated[str, typer.Argument(metavar="NAME@VERSION")],
    config: Config = None,
) -> None:
    """Withdraw a version, hold back what has not left, and list every delivery of what it has made."""
    from service.recall import recall as recall_now
    from service.records.database import utc_now

    name, at, version = model.partition("@")
    if not at:
        raise typer.BadParameter("name the version too: NAME@VERSION")
    with open_node_of(config) as node:
        found = recall_now(node.records, node.registry, name, version, actor=actor(), now=utc_now())
        active = node.registry.active_version(name)
    rows = [
        (
            each.study_instance_uid or "(upload)",
            each.job_id,
            each.destination,
            each.state.value,
            "" if each.sent_at is None else f"{each.sent_at:%Y-%m-%d %H:%M:%S}",
            each.sop_instance_uid or "",
        )
        for each in found.deliveries
    ]
    show_table(("study", "job", "destination", "state", "sent at (UTC)", "SOP Instance UID"), rows)
    note(
        f"{name} {version} is withdrawn. It has touched {found.studies} studies in {found.jobs} jobs: "
        f"{len(found.delivered)} objects have left the node, {found.held_back} were held back, "
        f"{found.jobs_taken_back} jobs were taken from their workers."
    )
    if active == version:
        warn(f"{version} is still the active version of {name}: no job starts until you activate another.")


@cases_app.command(name="list")
def list_cases(
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None, config: Config = None
) -> None:
    """The golden cases of the site."""
    from service.site_cases import list_cases as cases_of

    with open_node_of(config) as node, node.records.read() as session:
        rows = [
            (
                case.case_id,
                case.model_name,
                case.job_id,
                case.source,
                ", ".join(case.labels),
                case.approved_by,
            )
            for case in cases_of(session, model_name=name)
        ]
    show_table(("case", "model", "job", "labelmap", "labels", "approved by"), rows)


@cases_app.command(name="approve")
def approve_case(
    job: Annotated[str, typer.Argument(help="A job that has succeeded.")],
    labelmap: Annotated[
        Path | None,
        typer.Argument(help="What was approved: .nii, .nii.gz or DICOM-SEG.", exists=True, dir_okay=False),
    ] = None,
    as_produced: Annotated[
        bool, typer.Option("--as-produced", help="The node's own result is right as it is.")
    ] = False,
    config: Config = None,
) -> None:
    """Make a finished study a golden case: every new version is held against it, and it is never purged."""
    from service.records.database import utc_now
    from service.site_cases import approve_case as approve

    if (labelmap is None) != as_produced:
        raise typer.BadParameter("give either the labelmap that was approved, or --as-produced")
    with open_node_of(config) as node:
        case = approve(node.records, node.spool, node.registry, job, labelmap, actor=actor(), now=utc_now())
    typer.echo(case.case_id)


@cases_app.command(name="remove")
def remove_case(case: Annotated[str, typer.Argument()], config: Config = None) -> None:
    """Remove a golden case; its study is an ordinary one again."""
    from service.records.database import utc_now
    from service.site_cases import remove_case as remove

    with open_node_of(config) as node:
        remove(node.records, node.spool, case, actor=actor(), now=utc_now())


def register(app: typer.Typer) -> None:
    """Add these commands to ``segnode models``."""
    commands: tuple[Any, ...] = (gate, recall)
    for command in commands:
        app.command()(command)
    app.add_typer(shadow_app, name="shadow")
    app.add_typer(cases_app, name="cases")
