"""``segnode audit``: is the audit trail whole?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.console import note, person, warn
from service.commands.keys import open_records
from service.commands.settings import Config, load

app = typer.Typer(help="Check the audit trail.", no_args_is_help=True)


@app.command()
def verify(
    head: Annotated[
        list[str] | None,
        typer.Option(help="A head that was kept elsewhere, INDEX:DIGEST; several may be given."),
    ] = None,
    head_file: Annotated[
        Path | None,
        typer.Option(help="A file of such heads, one a line.", exists=True, dir_okay=False),
    ] = None,
    config: Config = None,
) -> None:
    """Read the whole trail; tell of lines that were removed, changed, moved or cut off at the end.

    It is compared with the head that the node keeps beside its records, and with those given. Exit status 1
    if anything is wrong.
    """
    from service.audit_trail import HEAD_FILE, AuditBrokenError, Head, read_head_file
    from service.audit_trail import verify as verify_trail
    from service.records.database import utc_now
    from service.records.events import record_event

    texts = [*(head or ()), *(head_file.read_text().split() if head_file else ())]
    try:
        heads = [Head.parse(text) for text in texts]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--head") from error
    kept = read_head_file(load(config).data_dir / HEAD_FILE)
    records = open_records(config)
    with records.read() as session:
        found = verify_trail(session, [*heads, *([kept] if kept else ())])
    with records.write() as session:
        record_event(
            session,
            "audit.verified",
            actor=person(),
            at=utc_now(),
            alert=bool(found.faults),
            outcome="failure" if found.faults else "success",
            detail={"lines": found.head.chain_index, "faults": len(found.faults)},
        )
    for fault in found.faults:
        warn(fault)
    if found.faults:
        raise AuditBrokenError(
            f"The audit trail is not whole: {len(found.faults)} fault(s), {found.head.chain_index} line(s).",
            remedy="Keep the database as it is, and compare with a backup and with the heads in the log.",
        )
    note(f"All {found.head.chain_index} line(s) are as they were written.")
    typer.echo(str(found.head))


@app.command()
def head(config: Config = None) -> None:
    """Print how far the trail goes and the digest of its last line: to be kept elsewhere."""
    from service.audit_trail import read_head

    with open_records(config).read() as session:
        typer.echo(str(read_head(session)))
