"""A bundle as one .zip: written the same way each time, read without trusting a word of it.

An archive is judged by its directory before a byte is unpacked, and by its bytes while they are: no name
that is not a bundle's own, no link, no second entry of a name, no more bytes than were declared and
allowed. One folder around everything is accepted, because that is what people's tools make.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

from models.bundle_files import GOLDEN, MAX_FILES, is_file_name, list_files, max_bytes, read_file
from models.errors import BundleError

if TYPE_CHECKING:
    from models.bundle import Bundle

MAX_RATIO = 200
"""Largest factor by which an entry may grow. Deflate reaches 1032; weights 1.1, and text 20."""

_RATIO_FREE_BYTES = 1 << 20  # small files may be as repetitive as they like
_CHUNK_BYTES = 1 << 20
_MAX_DIRECTORY_BYTES = 64 << 10
_END = struct.Struct("<4s4H2LH")  # end of central directory record, APPNOTE.TXT 4.3.16
_REMEDY = "Make the archive again from the sealed bundle's folder."


def pack_zip(bundle: Bundle, zip_path: Path) -> None:
    """Write a bundle as a .zip, atomically. The same bundle gives the same bytes."""
    unfinished = zip_path.with_name(f".{zip_path.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(list_files(bundle.folder)):
                entry = zipfile.ZipInfo(name)  # dated 1980-01-01
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                archive.writestr(entry, read_file(bundle.folder, name))
        os.replace(unfinished, zip_path)
    finally:
        unfinished.unlink(missing_ok=True)


def unpack_zip(zip_path: Path, into: Path, *, limit_bytes: int) -> Path:
    """Unpack an uploaded .zip; the caller then opens the folder as a bundle.

    Parameters
    ----------
    zip_path : Path
        The archive.
    into : Path
        Folder to create for the bundle's files; must not exist. It is removed again on any error.
    limit_bytes : int
        Largest sum of unpacked bytes.

    Returns
    -------
    Path
        ``into``, with ``model.json`` directly in it.

    Raises
    ------
    BundleError
        If the archive is damaged, or holds anything that a bundle may not.
    """
    into.mkdir(parents=True)
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, into)
        with open(zip_path, "rb") as file:
            _unpack(file, into, limit_bytes)
        undo.pop_all()
    return into


def _unpack(file: IO[bytes], into: Path, limit_bytes: int) -> None:
    try:
        _check_directory_size(file)
        with zipfile.ZipFile(file) as archive:
            entries = _checked_entries(archive, limit_bytes)
            (into / GOLDEN).mkdir()
            for name, entry in entries.items():
                with archive.open(entry) as source, open(into / name, "xb") as target:
                    # zipfile gives no more bytes than were declared, and checks their CRC-32 at the end.
                    shutil.copyfileobj(source, target, _CHUNK_BYTES)
                    if target.tell() != entry.file_size:
                        raise BundleError(f"{name!r} in the archive is shorter than it says.", remedy=_REMEDY)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, struct.error) as error:
        raise BundleError(f"The archive is damaged: {error}.", remedy=_REMEDY) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a full disk is no fault of the archive; a seek to nowhere is
            raise
        raise BundleError("The archive is damaged: an offset is wrong.", remedy=_REMEDY) from error


def _check_directory_size(file: IO[bytes]) -> None:
    """Refuse a directory that is too large to be read, before :mod:`zipfile` reads it whole.

    The record is looked for as zipfile does: at the very end, else (with a comment) in the last 64 KiB.
    """
    size_bytes = file.seek(0, os.SEEK_END)
    file.seek(-min(size_bytes, _END.size + 0xFFFF + 20), os.SEEK_END)
    tail = file.read()
    file.seek(0)
    start = tail.rfind(b"PK\x05\x06")
    if start < 0 or len(tail) - start < _END.size:
        raise BundleError("The file is not a .zip archive.", remedy=_REMEDY)
    if b"PK\x06\x07" in tail[max(0, start - 20) : start]:
        raise BundleError("The archive is in the ZIP64 format, which no bundle needs.", remedy=_REMEDY)
    record = _END.unpack_from(tail, start)
    n_entries, directory_bytes, comment_bytes = record[4], record[5], record[7]
    if start + _END.size + comment_bytes != len(tail):
        raise BundleError("The archive is damaged: something follows its end.", remedy=_REMEDY)
    if n_entries > MAX_FILES + 2 or directory_bytes > _MAX_DIRECTORY_BYTES:
        raise BundleError(
            f"The archive has {n_entries} entries ({directory_bytes} bytes of directory);"
            f" a bundle has at most {MAX_FILES} files.",
            remedy=_REMEDY,
        )


def _checked_entries(archive: zipfile.ZipFile, limit_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The files to unpack by their name in the bundle, all of them allowed, or an error."""
    infos = archive.infolist()
    top = _common_top_folder([info.orig_filename for info in infos])
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.orig_filename.removeprefix(top)
        if info.orig_filename.endswith("/") and name in ("", f"{GOLDEN}/"):
            continue
        _check_entry(info, name)
        if name.lower() in (other.lower() for other in entries):
            raise BundleError(f"The archive holds {name!r} more than once.", remedy=_REMEDY)
        entries[name] = info
    declared_bytes = sum(info.file_size for info in entries.values())
    if declared_bytes > limit_bytes:
        raise BundleError(
            f"The archive unpacks to {declared_bytes} bytes; at most {limit_bytes} are allowed.",
            remedy="Leave out what is not needed, or raise the limit for uploads.",
        )
    return entries


def _common_top_folder(names: list[str]) -> str:
    """``"folder/"`` when everything lies in one folder that is not ``golden/`` itself, else ``""``."""
    tops = {name.partition("/")[0] for name in names}
    if len(tops) != 1 or not all("/" in name for name in names):
        return ""
    top = tops.pop()
    return f"{top}/" if is_file_name(top) and top != GOLDEN else ""


def _check_entry(info: zipfile.ZipInfo, name: str) -> None:
    if not is_file_name(name) or info.filename != info.orig_filename:
        raise BundleError(f"The archive holds {info.orig_filename!r}, which no bundle has.", remedy=_REMEDY)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise BundleError(f"{name!r} in the archive is a link or not a plain file.", remedy=_REMEDY)
    if info.flag_bits & 0x1:
        raise BundleError(f"{name!r} in the archive is encrypted.", remedy=_REMEDY)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BundleError(
            f"{name!r} in the archive is compressed by method {info.compress_type}, not by deflate.",
            remedy=_REMEDY,
        )
    if info.file_size > max_bytes(name):
        raise BundleError(
            f"{name!r} in the archive has {info.file_size} bytes; at most {max_bytes(name)} are allowed.",
            remedy=_REMEDY,
        )
    if info.file_size > max(_RATIO_FREE_BYTES, MAX_RATIO * info.compress_size):
        raise BundleError(
            f"{name!r} in the archive grows from {info.compress_size} to {info.file_size} bytes,"
            f" more than {MAX_RATIO} times.",
            remedy=_REMEDY,
        )
