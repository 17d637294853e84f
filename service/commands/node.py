"""``segnode serve``, and its three parts one by one: ``receive``, ``api``, ``worker``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.console import note, warn
from service.commands.settings import Config, load

if TYPE_CHECKING:
    from models.registry import Registry
    from service.settings import Settings

Check = Annotated[
    bool,
    typer.Option("--check", help="Say whether the one that runs on this host works: exit status 0 or 1."),
]
Supervised = Annotated[bool, typer.Option("--supervised", hidden=True)]


def serve(config: Config = None) -> None:
    """Run a whole node: DICOM, HTTP and a worker, on SQLite, with nothing else to install.

    Makes the data folder, the database and the models that ship if they are not there yet. Ends on SIGTERM
    or Ctrl-C, after what is under way.
    """
    from service.diagnosis import Health
    from service.doctor import check_configuration
    from service.lifetime import stop_on_signals
    from service.logs import configure_logging
    from service.node import make_data_dir, open_node, seed_models
    from service.records.outage import wait_for_records
    from service.serve import Supervisor, node_programs, only_one, write_ports

    settings = load(config)
    configure_logging(settings.log_level, component="serve")
    stop = stop_on_signals()
    make_data_dir(settings.data_dir)  # before whatever else would make it, open to everybody
    if not wait_for_records(settings.records_url, stop):
        return
    with open_node(settings) as node, only_one(settings.data_dir):
        for bundle in seed_models(node.registry):
            note(f"Installed {bundle.manifest.name} {bundle.manifest.version}, which ships with segnode.")
        ports_path = settings.data_dir / "ports.json"
        ports_path.unlink(missing_ok=True)

        def ready(ports: Mapping[str, int | None]) -> None:
            write_ports(ports_path, ports)
            for line in describe(settings, node.registry, ports):
                typer.echo(line)
            for finding in check_configuration(settings, node.registry):
                if finding.health is not Health.OK:
                    warn(f"{finding.what}: {finding.message} {finding.remedy}")
            sys.stdout.flush()

        programs = node_programs(config, {"receive": settings.dicom.port, "api": settings.http.port})
        try:
            Supervisor(programs, on_ready=ready).run(stop)
        finally:
            ports_path.unlink(missing_ok=True)
    note("Stopped.")


def receive(config: Config = None, supervised: Supervised = False, check: Check = False) -> None:
    """Run the DICOM receiver alone."""
    _check("receive", config) if check else _run("receive", config, supervised)


def api(config: Config = None, supervised: Supervised = False, check: Check = False) -> None:
    """Run the HTTP interface alone."""
    _check("api", config) if check else _run("api", config, supervised)


def worker(config: Config = None, supervised: Supervised = False, check: Check = False) -> None:
    """Run a worker alone: jobs and deliveries."""
    _check("worker", config) if check else _run("worker", config, supervised)


def _check(name: str, config: Path | None) -> None:
    from service.liveness import LIVENESS

    health = LIVENESS[name](load(config))
    typer.echo(health.message)
    if not health.is_healthy:
        raise typer.Exit(1)


def _run(name: str, config: Path | None, supervised: bool) -> None:
    from service.components import COMPONENTS
    from service.lifetime import announce, standard_input, stop_on_end_of, stop_on_signals
    from service.logs import configure_logging, get_logger
    from service.node import make_data_dir, open_node
    from service.records.outage import wait_for_records

    settings = load(config)
    configure_logging(settings.log_level, component=name)
    stop = stop_on_signals(supervised=supervised)
    if supervised:
        stop_on_end_of(standard_input(), stop)

    def listening(port: int | None) -> None:
        get_logger(__name__).info("node.ready", port=port)
        if supervised:
            announce(name, port)

    make_data_dir(settings.data_dir)
    if not wait_for_records(settings.records_url, stop):
        return
    with open_node(settings) as node:
        COMPONENTS[name](node, stop, listening)


def describe(settings: Settings, registry: Registry, ports: Mapping[str, int | None]) -> list[str]:
    """What a node does, in lines for whoever started it."""
    dicom, http = settings.dicom, settings.http
    scheme = "https" if http.tls_certificate else "http"
    lines = [
        f"DICOM  {dicom.ae_title}@{dicom.host}:{ports['receive']}",
        f"HTTP   {scheme}://{http.host}:{ports['api']}/api/v1",
        f"Data   {settings.data_dir.resolve()}",
    ]
    lines += [
        f"Model  {name} {registry.active_version(name) or '(none active)'}" for name in registry.names()
    ]
    for route in settings.routes:
        wanted = ", ".join(f"{k} {c.model_dump(exclude_none=True)}" for k, c in route.match.items())
        to = ", ".join(route.destinations) or "nowhere: results stay in the node"
        lines.append(f"Route  {route.name}: {wanted or 'every series'} -> {route.model} -> {to}")
    return lines
