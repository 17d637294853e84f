"""Ed25519 signatures of bundles.

``SHA256SUMS.sig`` is the 64 bytes of an Ed25519 signature (RFC 8032) of the file ``SHA256SUMS``, nothing
around them. It can be made and checked without segnode::

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem
    openssl pkeyutl -sign   -rawin -inkey private.pem -in SHA256SUMS -out SHA256SUMS.sig
    openssl pkeyutl -verify -rawin -pubin -inkey public.pem -in SHA256SUMS -sigfile SHA256SUMS.sig

``segnode models make-key`` and ``segnode models sign`` do the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from models.bundle_files import SIGNATURE, SUMS, read_file, write_atomically
from models.errors import SignatureError

_REMEDY = (
    "Get the bundle from its maker again, or have whoever runs this node sign it or trust its maker's key."
)


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read an Ed25519 public key (PEM, SubjectPublicKeyInfo).

    Raises
    ------
    SignatureError
        If the file cannot be read or holds no such key.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise _not_a_key(path, "public") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _not_a_key(path, "public")
    return key


def load_trusted_keys(paths: Sequence[Path]) -> list[Ed25519PublicKey]:
    """Read every key that a node trusts.

    Parameters
    ----------
    paths : sequence of Path
        Files with one public key each, and folders: of a folder every file ``*.pem``, by name.

    Raises
    ------
    SignatureError
        If a file cannot be read or holds no such key, or a folder is not there.
    """
    files: list[Path] = []
    for path in paths:
        files.extend(sorted(path.glob("*.pem")) if path.is_dir() else [path])
    return [load_public_key(file) for file in files]


def make_key(private_path: Path, public_path: Path, *, password: bytes | None = None) -> Ed25519PublicKey:
    """Make a key pair and write both halves as PEM; nothing that is there is overwritten.

    The private half can be read by its owner alone, and is encrypted where a password is given.

    Raises
    ------
    SignatureError
        If one of the files is there already or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    encryption: KeySerializationEncryption = (
        BestAvailableEncryption(password) if password is not None else NoEncryption()
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for path, content, mode in ((private_path, private, 0o600), (public_path, public, 0o644)):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise SignatureError(
                f"The key {path.name!r} cannot be written: {error.strerror}.",
                remedy="Name a file that is not there yet, in a folder that you may write to.",
            ) from error
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    return key.public_key()


def load_private_key(path: Path, *, password: bytes | None = None) -> Ed25519PrivateKey:
    """Read an Ed25519 private key (PEM, PKCS 8), encrypted or not.

    Raises
    ------
    SignatureError
        If the file cannot be read, holds no such key, or the password does not fit.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _not_a_key(path, "private") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _not_a_key(path, "private")
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """A short name of a key for people: the first 16 hexadecimal digits of the SHA-256 of its 32 bytes."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def sign(folder: Path, private_key: Ed25519PrivateKey) -> None:
    """Sign a sealed folder: write ``SHA256SUMS.sig`` beside its ``SHA256SUMS``. The digest stays.

    Raises
    ------
    BundleError
        If the folder was not sealed.
    """
    folder = Path(os.path.realpath(folder))
    write_atomically(folder / SIGNATURE, private_key.sign(read_file(folder, SUMS)))


def verify(sums: bytes, signature: bytes, trusted_keys: Iterable[Ed25519PublicKey]) -> Ed25519PublicKey:
    """Check the signature of the bytes of ``SHA256SUMS``; returns the trusted key that made it.

    Raises
    ------
    SignatureError
        If none of the keys made it.
    """
    keys = list(trusted_keys)
    for key in keys:
        try:
            key.verify(signature, sums)
        except InvalidSignature:
            continue
        return key
    trusted = ", ".join(map(key_id, keys)) or "none"
    raise SignatureError(f"No trusted key made the bundle's signature (trusted: {trusted}).", remedy=_REMEDY)


def verify_folder(folder: Path, sums: bytes, trusted_keys: Iterable[Ed25519PublicKey]) -> Ed25519PublicKey:
    """Check the signature that lies in a bundle's folder against list bytes that were already read.

    Raises
    ------
    SignatureError
        If the folder has no signature, or none of the keys made it.
    """
    if not (folder / SIGNATURE).exists():
        raise SignatureError("The bundle is not signed, and this node asks for a signature.", remedy=_REMEDY)
    return verify(sums, read_file(folder, SIGNATURE), trusted_keys)


def signer_of(folder: Path, trusted_keys: Iterable[Ed25519PublicKey]) -> Ed25519PublicKey:
    """The trusted key that signed the folder of an opened bundle. Raises SignatureError."""
    sums = read_file(folder, SUMS)
    if not (folder / SIGNATURE).exists():
        raise SignatureError("The bundle is not signed.", remedy=_REMEDY)
    return verify(sums, read_file(folder, SIGNATURE), trusted_keys)


def _not_a_key(path: Path, kind: str) -> SignatureError:
    return SignatureError(
        f"{path.name!r} is not a readable Ed25519 {kind} key in PEM form.",
        remedy="Make one with `openssl genpkey -algorithm ed25519`, and check the path and the password.",
    )
