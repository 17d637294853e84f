"""The folder of a bundle: which files it may hold, how large, and the list of their digests.

Every file is opened without following links and read once; what is parsed later is the very bytes that
were hashed. Nothing here knows what a manifest or a network is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from models.errors import BundleError

MANIFEST = "model.json"
CARD = "card.md"
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
GOLDEN = "golden"

MAX_FILES = 64
MAX_TEXT_BYTES = 1 << 20
MAX_SUMS_BYTES = 64 << 10
MAX_WEIGHTS_BYTES = 1 << 30
MAX_GOLDEN_BYTES = 64 << 20
MAX_BUNDLE_BYTES = 1900 << 20  # so that its .zip never needs the ZIP64 format

_PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_NAME = re.compile(rf"(?:{GOLDEN}/)?{_PLAIN_NAME}")
_LINE = re.compile(rf"([0-9a-f]{{64}})  ({_NAME.pattern})")


def is_file_name(name: str) -> bool:
    """True for a name that a bundle's file may have: plain, or plain inside ``golden/``."""
    return _NAME.fullmatch(name) is not None


def max_bytes(name: str) -> int:
    """The largest size that the file of this name may have."""
    if name in (MANIFEST, CARD):
        return MAX_TEXT_BYTES
    if name in (SUMS, SIGNATURE):
        return MAX_SUMS_BYTES
    return MAX_GOLDEN_BYTES if name.startswith(f"{GOLDEN}/") else MAX_WEIGHTS_BYTES


def list_files(folder: Path, *, allow_hard_links: bool = False) -> dict[str, os.stat_result]:
    """Every file of a bundle's folder by its name (``golden/x`` for those in the sub-folder), with its stat.

    A file with a second hard link can change from outside the folder. It is refused unless
    ``allow_hard_links``, which is for copying: package installers link what they install.

    Raises
    ------
    BundleError
        If there is a link, another sub-folder, a name or a size that is not allowed, anything that is not
        a plain file, or too many files.
    """
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise BundleError(
                f"The bundle {folder.name!r} is not a folder.", remedy="Give the bundle's folder."
            )
        found = _scan(folder, "", allow_hard_links)
    except OSError as error:
        raise BundleError(
            f"The bundle folder {folder.name!r} cannot be read: {error.strerror}.",
            remedy="Give a folder that exists and that the node may read.",
        ) from error
    if len(found) > MAX_FILES:
        raise BundleError(f"The bundle has {len(found)} files; at most {MAX_FILES} are allowed.")
    total_bytes = sum(info.st_size for info in found.values())
    if total_bytes > MAX_BUNDLE_BYTES:
        raise BundleError(f"The bundle has {total_bytes} bytes; at most {MAX_BUNDLE_BYTES} are allowed.")
    return found


def _scan(folder: Path, prefix: str, allow_hard_links: bool) -> dict[str, os.stat_result]:
    found: dict[str, os.stat_result] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode) and name == GOLDEN:
                found |= _scan(folder / GOLDEN, f"{GOLDEN}/", allow_hard_links)
                continue
            _check_entry(name, info, allow_hard_links)
            found[name] = info
            if len(found) > MAX_FILES:
                break  # list_files refuses it; a folder of millions is not walked first
    return found


def _check_entry(name: str, info: os.stat_result, allow_hard_links: bool) -> None:
    if stat.S_ISLNK(info.st_mode):
        raise BundleError(f"{name!r} is a symbolic link.", remedy="Put the file itself into the bundle.")
    if stat.S_ISDIR(info.st_mode):
        raise BundleError(
            f"The sub-folder {name!r} is not part of a bundle.", remedy="Only golden/ is allowed."
        )
    if not stat.S_ISREG(info.st_mode):
        raise BundleError(f"{name!r} is not a plain file.", remedy="Remove it from the bundle.")
    if info.st_nlink > 1 and not allow_hard_links:
        raise BundleError(
            f"{name!r} has {info.st_nlink} hard links, so it can change from outside the bundle.",
            remedy="Copy the bundle to a folder of its own.",
        )
    if not is_file_name(name):
        raise BundleError(
            f"{name!r} is not a file name that a bundle may have.",
            remedy="Use letters, digits, '.', '_' and '-', starting with a letter or a digit.",
        )
    if info.st_size > max_bytes(name):
        raise BundleError(f"{name!r} has {info.st_size} bytes; at most {max_bytes(name)} are allowed.")


def read_file(folder: Path, name: str, *, allow_hard_links: bool = False) -> bytes:
    """The bytes of one file of the bundle, links not followed, no more than its name allows.

    Raises
    ------
    BundleError
        If it is missing, a link, not a plain file, or too large.
    """
    try:
        # O_NONBLOCK: a pipe put in the place of a file must not hang the node.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            _check_entry(name, os.fstat(descriptor), allow_hard_links)
            data = file.read(max_bytes(name) + 1)
    except OSError as error:
        raise BundleError(
            f"{name!r} cannot be read: {error.strerror}.", remedy="Get the bundle again, whole."
        ) from error
    if len(data) > max_bytes(name):
        raise BundleError(f"{name!r} is larger than the {max_bytes(name)} bytes that are allowed.")
    return data


def copy_files(source: Path, into: Path) -> None:
    """Copy what a bundle's folder may hold into a new folder.

    Nothing is checked but names, kinds and sizes: the copy is what has to be opened and verified.

    Raises
    ------
    BundleError
        See :func:`list_files`.
    """
    names = list_files(source, allow_hard_links=True)
    (into / GOLDEN).mkdir(parents=True)
    for name in names:
        (into / name).write_bytes(read_file(source, name, allow_hard_links=True))


def empty_folder(folder: Path) -> None:
    """Remove everything that is in a folder, links themselves and not what they lead to."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def fsync_folder(folder: Path) -> None:
    """Put a folder's own entries (what is in it, by which name) on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_files(folder: Path) -> None:
    """Put every file of a bundle's folder, and its two folders, on the disk."""
    for name in list_files(folder):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    fsync_folder(folder / GOLDEN)
    fsync_folder(folder)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that, whatever dies, it holds the old bytes or the new ones. One writer at a time."""
    unfinished = path.with_name(f".{path.name}.new")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    fsync_folder(path.parent)


def sha256(data: bytes) -> str:
    """SHA-256 in 64 lower case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def format_sums(digests: Mapping[str, str]) -> bytes:
    """The bytes of ``SHA256SUMS``, sorted by name, as ``sha256sum --check`` reads them."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode("ascii")


def parse_sums(data: bytes) -> dict[str, str]:
    """Digest by file name. One list has one spelling only, so that the model digest is unique.

    Raises
    ------
    BundleError
        If a line is not understood, or the list is not what :func:`format_sums` would write.
    """
    lines = data.decode("ascii", errors="replace").split("\n")
    matches = [_LINE.fullmatch(line) for line in lines[:-1]]
    digests = {match[2]: match[1] for match in matches if match}
    if format_sums(digests) != data:
        raise BundleError(
            f"{SUMS} is not a sorted list of digests and file names.",
            remedy="Seal the bundle again, or get it again from where it was made.",
        )
    return digests
