"""``segnode keys``: who may use the HTTP interface."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.console import note, person, show_table
from service.commands.settings import Config, load

if TYPE_CHECKING:
    from service.records.database import Records

app = typer.Typer(help="Make, list and revoke keys of the HTTP interface.", no_args_is_help=True)


class KeyRole(StrEnum):
    """As in the records; stated here so that the help needs no database."""

    UPLOADER = "uploader"
    OPERATOR = "operator"
    ADMIN = "admin"


def open_records(config: Path | None) -> Records:
    """The records of the node, upgraded where they are of an older release."""
    from service.node import make_data_dir
    from service.records.database import Records
    from service.records.migrate import upgrade

    settings = load(config)
    make_data_dir(settings.data_dir)
    upgrade(settings.records_url)
    return Records(settings.records_url)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who or what uses it; it stands in the audit trail.")],
    role: Annotated[
        KeyRole,
        typer.Option(
            help="uploader: own segmentations; operator: also studies, jobs, deliveries; admin: all."
        ),
    ] = KeyRole.UPLOADER,
    days: Annotated[
        int | None, typer.Option(min=1, help="Days until it expires; never unless given.")
    ] = None,
    expires: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"], help="When it expires, UTC; in the place of --days."
        ),
    ] = None,
    config: Config = None,
) -> None:
    """Make a key. Its secret is printed on standard output, once, and kept nowhere."""
    from service.keys import create_key
    from service.records.database import utc_now
    from service.records.tables import Role

    if days is not None and expires is not None:
        raise typer.BadParameter("give --days or --expires, not both")
    records, now = open_records(config), utc_now()
    ends = now + timedelta(days=days) if days is not None else expires
    with records.write() as session:
        key_id, secret = create_key(session, name, Role(role.value), ends, now=now, actor=person())
    note(f"Key {key_id} for {name} ({role.value}). Keep the secret: it is shown this once.")
    typer.echo(secret)


@app.command(name="list")
def list_all(config: Config = None) -> None:
    """Every key ever made, without its secret."""
    from service.keys import list_keys
    from service.records.database import utc_now

    records, now = open_records(config), utc_now()
    with records.read() as session:
        rows = [
            (
                key.key_id,
                key.name,
                key.role.value,
                f"{key.created_at:%Y-%m-%d %H:%M}",
                f"{key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else "never",
                "revoked"
                if key.revoked_at
                else "expired"
                if key.expires_at and key.expires_at <= now
                else "valid",
            )
            for key in list_keys(session)
        ]
    show_table(("key", "name", "role", "created (UTC)", "expires (UTC)", "state"), rows)


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="KEY")], config: Config = None) -> None:
    """End a key's life, at once."""
    from service.keys import revoke as revoke_key
    from service.records.database import utc_now

    records = open_records(config)
    with records.write() as session:
        revoke_key(session, key_id, now=utc_now(), actor=person())
    note(f"Key {key_id} is revoked.")
