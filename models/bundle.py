"""The model bundle: the one contract between the training wing and the service wing.

A folder of plain files, or the same folder as a .zip::

    model.json        the manifest
    student.onnx      float32 weights; further weights are optional
    golden/           one small input and the labelmap that the training framework gave for it
    card.md           the model card
    SHA256SUMS        the digest of every file above, sorted; nothing else is allowed
    SHA256SUMS.sig    optional Ed25519 signature

A :class:`Bundle` exists only for a folder that passed every check. It says nothing about the folder a
moment later: whoever runs a model takes it from the registry, whose folder only the node writes to.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from models.bundle_files import (
    CARD,
    GOLDEN,
    MANIFEST,
    SIGNATURE,
    SUMS,
    format_sums,
    list_files,
    parse_sums,
    read_file,
    sha256,
    write_atomically,
)
from models.bundle_zip import pack_zip, unpack_zip
from models.errors import BundleError
from models.graph_check import check_graph
from models.manifest import Manifest, Precision
from models.signing import verify_folder

__all__ = ["Bundle", "pack_zip", "parse_manifest", "seal", "unpack_zip"]

_REPLACE = "Get the bundle again from where it was made; do not use this copy."


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files, digests, manifest and networks were checked.

    Parameters
    ----------
    folder : Path
        Where it lies.
    manifest : Manifest
        ``model.json``, parsed.
    digest : str
        The model digest: SHA-256 of ``SHA256SUMS``, 64 hexadecimal digits.
    """

    folder: Path
    manifest: Manifest
    digest: str

    @staticmethod
    def open(folder: Path, *, trusted_keys: Sequence[Ed25519PublicKey] | None = None) -> Bundle:
        """Check a folder whole, and open it.

        Parameters
        ----------
        folder : Path
            The bundle's folder. A link to the folder as a whole is followed, a link in it is refused.
        trusted_keys : sequence of Ed25519PublicKey, optional
            Where given, one of them must have signed the bundle (an empty sequence trusts nobody); without
            it a signature is not looked at.

        Raises
        ------
        BundleError
            If a file is missing, unlisted, altered, a link or too large, the manifest is not understood,
            or a network is not one that the node runs.
        SignatureError
            If the signature is missing or not by a trusted key.
        """
        folder = Path(os.path.realpath(folder))
        on_disk = set(list_files(folder)) - {SUMS, SIGNATURE}
        sums = read_file(folder, SUMS)
        if trusted_keys is not None:
            verify_folder(folder, sums, trusted_keys)
        digests = parse_sums(sums)
        _check_same("listed in SHA256SUMS", set(digests), "in the folder", on_disk)
        manifest = parse_manifest(_read_verified(folder, MANIFEST, digests))
        _check_same("named by model.json", _named_files(manifest), "in the folder", on_disk)
        for weights in manifest.weights:
            if weights.sha256 != digests[weights.file]:
                raise BundleError(
                    f"model.json and SHA256SUMS give different digests of {weights.file!r}.", remedy=_REPLACE
                )
            check_graph(_read_verified(folder, weights.file, digests), weights.file, manifest)
        for name in sorted(on_disk - {MANIFEST} - {weights.file for weights in manifest.weights}):
            _read_verified(folder, name, digests)
        return Bundle(folder, manifest, sha256(sums))

    def weight_paths(self, precision: Precision) -> tuple[Path, ...]:
        """The ONNX files of one precision, in the order of their folds; empty where there are none."""
        return tuple(self.folder / weights.file for weights in self.manifest.weights_of(precision))

    @property
    def golden_image_paths(self) -> tuple[Path, ...]:
        """The golden case's input, one NIfTI file per channel."""
        return tuple(self.folder / GOLDEN / name for name in self.manifest.golden.images)

    @property
    def golden_labelmap_path(self) -> Path:
        """The labelmap that the training framework gave for the golden case."""
        return self.folder / GOLDEN / self.manifest.golden.labelmap


def parse_manifest(data: bytes) -> Manifest:
    """Parse ``model.json``.

    Raises
    ------
    BundleError
        One sentence that names every key that is wrong.
    """
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        )
        raise BundleError(
            f"model.json is not understood: {problems}.",
            remedy="Export the model again with a segnode of this version.",
        ) from error


def seal(folder: Path) -> Bundle:
    """Write ``SHA256SUMS`` for the files of a folder as they are now, and open it as a bundle.

    A signature of an earlier list is removed: it would no longer be true.

    Raises
    ------
    BundleError
        As :meth:`Bundle.open` does.
    """
    folder = Path(os.path.realpath(folder))
    names = set(list_files(folder)) - {SUMS, SIGNATURE}
    sums = format_sums({name: sha256(read_file(folder, name)) for name in names})
    (folder / SIGNATURE).unlink(missing_ok=True)
    write_atomically(folder / SUMS, sums)
    return Bundle.open(folder)


def _named_files(manifest: Manifest) -> set[str]:
    """Every file that a bundle with this manifest has, apart from the list of digests."""
    golden = (*manifest.golden.images, manifest.golden.labelmap)
    return {MANIFEST, CARD, *(w.file for w in manifest.weights), *(f"{GOLDEN}/{name}" for name in golden)}


def _check_same(left_what: str, left: set[str], right_what: str, right: set[str]) -> None:
    def some(names: set[str]) -> str:
        return ", ".join(map(repr, sorted(names)[:5])) + (" and more" if len(names) > 5 else "")

    if left - right:
        raise BundleError(f"Not {right_what}, but {left_what}: {some(left - right)}.", remedy=_REPLACE)
    if right - left:
        raise BundleError(f"Not {left_what}, but {right_what}: {some(right - left)}.", remedy=_REPLACE)


def _read_verified(folder: Path, name: str, digests: dict[str, str]) -> bytes:
    if name not in digests:
        raise BundleError(f"The bundle has no {name!r}.", remedy=_REPLACE)
    data = read_file(folder, name)
    if sha256(data) != digests[name]:
        raise BundleError(f"{name!r} was altered: its SHA-256 is not the one in SHA256SUMS.", remedy=_REPLACE)
    return data
