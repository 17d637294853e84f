"""``segnode models make-key``, ``sign`` and ``verify``: who answers for a bundle, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.console import note
from service.commands.settings import Config, load

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from models.bundle import Bundle

PasswordFile = Annotated[
    Path | None,
    typer.Option(help="A file whose first line encrypts the private key.", exists=True, dir_okay=False),
]


def make_key(
    private: Annotated[Path, typer.Argument(help="Where the private key goes, a new file NAME.pem.")],
    password_file: PasswordFile = None,
) -> None:
    """Make an Ed25519 key pair to sign bundles with. The public half, NAME.pub.pem, is what nodes trust."""
    from models.signing import key_id
    from models.signing import make_key as make

    public = private.with_name(f"{private.stem}.pub.pem")
    made = make(private, public, password=_password(password_file))
    note(f"Key {key_id(made)}: keep {private} secret, and give {public} to the nodes that are to trust it.")


def sign(
    bundle: Annotated[
        str, typer.Argument(help="A folder, a .zip, or NAME@VERSION of a model that ships with segnode.")
    ],
    key: Annotated[Path, typer.Option(help="The private key, PEM.", exists=True, dir_okay=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .zip to write; without it BUNDLE is signed in place."),
    ] = None,
    password_file: PasswordFile = None,
) -> None:
    """Sign a bundle: write SHA256SUMS.sig. The model digest stays what it was."""
    from models.bundle import Bundle, pack_zip
    from models.bundle_files import copy_files
    from models.signing import key_id, load_private_key
    from models.signing import sign as sign_folder

    private_key = load_private_key(key, password=_password(password_file))
    source = _find(bundle)
    if output is None and not Path(bundle).exists():
        raise typer.BadParameter("a model that ships is signed into a file of its own: name it with -o")
    with TemporaryDirectory(prefix="segnode-sign-") as scratch:
        folder = source
        if source.is_file() or output is not None:
            folder = Path(scratch) / "bundle"
            _unpack(source, folder) if source.is_file() else copy_files(source, folder)
        opened = Bundle.open(folder)  # what is not whole is not vouched for
        sign_folder(folder, private_key)
        if folder != source:
            pack_zip(opened, output or source)
    manifest = opened.manifest
    note(
        f"Signed {manifest.name} {manifest.version} with key {key_id(private_key.public_key())}. "
        f"Digest {opened.digest}."
    )


def verify(
    name: Annotated[str, typer.Argument(metavar="NAME|BUNDLE", help="A model, or a folder or .zip.")],
    version: Annotated[str | None, typer.Argument(help="The active one unless given.")] = None,
    trusted: Annotated[
        list[Path] | None,
        typer.Option("--trusted", help="A public key, or a folder of them; the node's own unless given."),
    ] = None,
    config: Config = None,
) -> None:
    """Read every byte of a bundle or of an installed version, run its golden case, and say who signed it."""
    from models.golden import check_golden_case_everywhere
    from models.signing import load_trusted_keys
    from service.node import make_data_dir, open_registry

    settings = load(config)
    keys = load_trusted_keys(trusted or settings.models.trusted_keys)
    required = settings.models.require_signature or bool(trusted)
    if version is None and _is_path(name):
        with TemporaryDirectory(prefix="segnode-verify-") as scratch:
            folder = Path(name)
            if folder.is_file():
                folder = _unpack(folder, Path(scratch) / "bundle")
            bundle = _open(folder, keys if required else None)
            check_golden_case_everywhere(bundle)
            _tell(bundle, keys)
        return
    make_data_dir(settings.data_dir)
    registry = open_registry(settings)
    version = version or registry.active(name).manifest.version
    bundle = registry.verify(name, version)
    if required:
        _open(bundle.folder, keys)
    _tell(bundle, keys)


def _tell(bundle: Bundle, keys: list[Ed25519PublicKey]) -> None:
    from models.errors import SignatureError
    from models.signing import key_id, signer_of

    try:
        signer = f"Signed by the trusted key {key_id(signer_of(bundle.folder, keys))}."
    except SignatureError as error:
        signer = error.message
    manifest = bundle.manifest
    note(
        f"{manifest.name} {manifest.version} is whole, and its golden case comes out right. "
        f"Digest {bundle.digest}. {signer}"
    )


def _is_path(text: str) -> bool:
    return "/" in text or text.endswith(".zip") or (Path(text) / "SHA256SUMS").is_file()


def _find(text: str) -> Path:
    """The folder or .zip that is meant. A name with its version is looked for among what ships."""
    from models.errors import BundleError
    from models.registry import shipped_bundles

    path = Path(text)
    if path.exists():
        return path
    name, _, version = text.partition("@")
    for folder in shipped_bundles():
        if (folder.parent.name, folder.name) == (name, version):
            return folder
    ships = ", ".join(f"{folder.parent.name}@{folder.name}" for folder in shipped_bundles())
    raise BundleError(
        f"There is no bundle {text!r}.",
        remedy=f"Give a folder, a .zip, or one that ships: {ships or 'none'}.",
    )


def _unpack(archive: Path, into: Path) -> Path:
    from models.bundle import unpack_zip
    from models.bundle_files import MAX_BUNDLE_BYTES

    return unpack_zip(archive, into, limit_bytes=MAX_BUNDLE_BYTES)


def _open(folder: Path, keys: list[Ed25519PublicKey] | None) -> Bundle:
    from models.bundle import Bundle

    return Bundle.open(folder, trusted_keys=keys)


def _password(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes().splitlines()[0]
