"""Bundles that were verified already, for as long as their files are seen not to have changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from models.bundle import Bundle
from models.bundle_files import list_files

_Fingerprint = tuple[tuple[str, int, int, int, int], ...]

_SETTLED_NS = 1_000_000_000


class BundleCache:
    """Opens bundles, and computes their digests again only after a file changed.

    Changed means: a name, a size, an inode number, or a time of modification or of status change that is
    another one. The last is set by the kernel at every write, rename, link and change of mode, and cannot be
    set by a program. Damage below the file system is not seen; :meth:`forget` makes the next open read all.

    Parameters
    ----------
    trusted_keys : sequence of Ed25519PublicKey, optional
        As in :meth:`Bundle.open`.
    """

    def __init__(self, trusted_keys: Sequence[Ed25519PublicKey] | None = None) -> None:
        self._trusted_keys = trusted_keys
        self._verified: dict[Path, tuple[_Fingerprint, Bundle]] = {}

    def open(self, folder: Path) -> Bundle:
        """The bundle in this folder, verified now or unchanged since.

        Raises
        ------
        BundleError
            As :meth:`Bundle.open` does.
        """
        fingerprint = _fingerprint(folder)
        remembered = self._verified.get(folder)
        if remembered is not None and remembered[0] == fingerprint:
            return remembered[1]
        bundle = Bundle.open(folder, trusted_keys=self._trusted_keys)
        # A file that changed a moment ago may change once more within the same tick of the file system's
        # clock, and then look unchanged: remember settled files only.
        if time.time_ns() - max(entry[-1] for entry in fingerprint) > _SETTLED_NS:
            self._verified[folder] = (fingerprint, bundle)
        return bundle

    def forget(self, folder: Path) -> None:
        """Read everything the next time this folder is opened."""
        self._verified.pop(folder, None)


def _fingerprint(folder: Path) -> _Fingerprint:
    return tuple(
        (name, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        for name, info in sorted(list_files(folder).items())
    )
