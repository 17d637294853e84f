"""``segnode send``: a folder of DICOM files to a storage SCP."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from models.errors import SegnodeError
from service.commands.console import note, progress_bar, warn

if TYPE_CHECKING:
    from service.settings import Destination

_PEER = re.compile(r"(?P<ae_title>[^@]{1,16})@(?P<host>[^@]+):(?P<port>\d{1,5})")


class NotSentError(SegnodeError):
    """Raised when a peer did not take all of the files."""

    code = "NOT_SENT"


def send(
    folder: Annotated[
        Path, typer.Argument(help="A folder of DICOM files, or one file.", exists=True, metavar="FOLDER")
    ],
    peer: Annotated[str, typer.Argument(help="Where to: SEGNODE@127.0.0.1:11112.", metavar="AET@HOST:PORT")],
    calling_ae_title: Annotated[str, typer.Option(help="The AE title to call from.")] = "SEGNODE-SEND",
    tls_trusted: Annotated[
        Path | None,
        typer.Option(help="Send over TLS; a PEM file of the authorities of the peer's certificate."),
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="The certificate to show the peer, in PEM; with --tls-key.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, in PEM.")] = None,
) -> None:
    """Send DICOM files with C-STORE, as they lie on the disk. Exit status 1 unless every one was taken."""
    destination = parse_peer(peer)
    if tls_trusted is not None:
        from service.security_rules import ClientTls

        if (tls_certificate is None) != (tls_key is None):
            raise typer.BadParameter("--tls-certificate and --tls-key belong together")
        tls = ClientTls(trusted=tls_trusted, certificate=tls_certificate, key=tls_key)
        destination = destination.model_copy(update={"tls": tls})
    elif tls_certificate is not None or tls_key is not None:
        raise typer.BadParameter("TLS takes --tls-trusted: whose certificates the peer may show")
    paths = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]

    from service.archive import is_dicom
    from service.dicom.send import OutcomeKind, send_files

    files = [path for path in paths if is_dicom(path)]
    if len(files) < len(paths):
        note(f"{len(paths) - len(files)} file(s) that are not DICOM are left out.")
    if not files:
        raise typer.BadParameter(f"there is no DICOM file in {folder}", param_hint="FOLDER")
    taken, errors = 0, dict[str, int]()
    with progress_bar() as bar:
        task = bar.add_task("sending", total=len(files))
        for _, outcome in send_files(files, destination, calling_ae_title=calling_ae_title):
            bar.advance(task)
            if outcome.kind in (OutcomeKind.DELIVERED, OutcomeKind.WARNING):
                taken += 1
            if outcome.error is not None:
                errors[outcome.error] = errors.get(outcome.error, 0) + 1
    for error, count in errors.items():
        warn(f"{count} file(s): {error}")
    if taken < len(files):
        raise NotSentError(
            f"{peer} took {taken} of {len(files)} files.",
            remedy="Check host, port and AE titles, and that the peer knows the calling AE title.",
        )
    note(f"{peer} took all of {len(files)} files.")


def parse_peer(peer: str) -> Destination:
    """A peer from AET@HOST:PORT. Raises typer.BadParameter."""
    from pydantic import ValidationError

    from service.settings import Destination

    match = _PEER.fullmatch(peer)
    if match is not None:
        with suppress(ValidationError):
            return Destination.model_validate({"name": "peer", **match.groupdict()})
    raise typer.BadParameter(
        f"{peer} is not AET@HOST:PORT, such as SEGNODE@127.0.0.1:11112", param_hint="AET@HOST:PORT"
    )
