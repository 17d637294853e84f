"""``segnode``: the commands. Each lives in :mod:`service.commands`, and imports what it runs when it runs.

Exit status: 0 done, 1 an error, 2 not understood, 3 the input was refused (its reason code stands first on
standard error), 130 interrupted. Errors are one line, what to do about it is the next, and a traceback is
shown for our own mistakes alone.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from models.errors import Refusal, SegnodeError
from service.commands import accept, audit, backup, doctor, keys, models, node, segment, send
from service.commands.console import show_error

EXIT_ERROR, EXIT_REFUSED = 1, 3


app = typer.Typer(
    help="Segmentation node: studies in over DICOM, DICOM-SEG out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(rich_help_panel="Node")(node.serve)
app.command(rich_help_panel="Node")(node.receive)
app.command(rich_help_panel="Node")(node.api)
app.command(rich_help_panel="Node")(node.worker)
app.command(rich_help_panel="Node")(doctor.doctor)
app.command(rich_help_panel="Administration")(backup.backup)
app.command(rich_help_panel="Administration")(backup.restore)
app.command(rich_help_panel="Node")(accept.accept)
app.command(rich_help_panel="Files")(segment.segment)
app.command(rich_help_panel="Files")(send.send)
app.add_typer(models.app, name="models", rich_help_panel="Administration")
app.add_typer(keys.app, name="keys", rich_help_panel="Administration")
app.add_typer(audit.app, name="audit", rich_help_panel="Administration")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"segnode {version('segnode')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Segmentation node: studies in over DICOM, DICOM-SEG out. Not a medical device."""
    from service.logs import configure_logging

    configure_logging("ERROR")  # libraries would quote data sets on the terminal; the node's parts say more


def main() -> None:
    """Run a command, and turn what goes wrong into a line, a remedy and an exit status."""
    try:
        app(prog_name="segnode")
    except Refusal as refusal:
        show_error(refusal.reason.value, refusal.message, refusal.remedy)
        sys.exit(EXIT_REFUSED)
    except SegnodeError as error:
        show_error(error.code, error.message, error.remedy)
        sys.exit(EXIT_ERROR)
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        sys.exit(EXIT_ERROR)
    except OSError as error:
        from service.commands.files import files_error_of
        from service.logs import get_logger

        refused = files_error_of(error)
        if refused is None:
            raise
        get_logger("segnode").warning("files.refused", exc_info=error)  # the places, in a node's log alone
        show_error(refused.code, refused.message, refused.remedy)
        sys.exit(EXIT_ERROR)
    except Exception as error:
        from service.records.outage import outage_of, reason_of

        outage = outage_of(error)
        if outage is None:
            raise
        reason = reason_of(error)
        show_error(outage.code, f"{outage.message} {reason}".strip(), outage.remedy)
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
