"""A .zip of a DICOM series, as people and PACS export it, unpacked without trusting a word of it.

The archive is judged by its directory before a byte is unpacked. Names in it serve to tell a viewer's
leaflet from a slice, and for nothing else: files get the node's own names.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from models.errors import ReasonCode, Refusal
from service.spool import Spool

MAX_ENTRIES = 20_000
_MAX_DIRECTORY_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_END = struct.Struct("<4s4H2LH")  # end of central directory record, APPNOTE.TXT 4.3.16
_REMEDY = "Send a plain .zip of the DICOM files of one series."

# What exports carry beside the images. Everything else in the archive must be DICOM: a damaged slice that
# was left out in silence would be a wrong result.
_LEAFLET_SUFFIXES = frozenset(
    ".bat .bmp .css .csv .db .dll .exe .gif .htm .html .inf .ini .jpeg .jpg .js .json .log .md .pdf .png .rtf"
    " .sh .txt .xml .xsl .yaml .yml".split()
)
_LEAFLET_NAMES = frozenset({"dicomdir", "lockfile", "readme", "license", "version"})


def unpack_dicom(
    archive_path: Path, name: str, *, prefix: str, spool: Spool, limit_bytes: int
) -> list[Path]:
    """Unpack the DICOM files of an archive beside it, as ``<prefix>-<number>.dcm``.

    Parameters
    ----------
    name : str
        What to call the archive in messages.
    limit_bytes : int
        Largest sum of unpacked bytes.

    Raises
    ------
    Refusal
        UNREADABLE for an archive that is damaged, encrypted or holds other things than DICOM; TOO_LARGE.
    StorageFullError
        If it does not fit on the disk unpacked.
    """
    try:
        with archive_path.open("rb") as file:
            _check_directory_size(file, name)
            with zipfile.ZipFile(file) as archive:
                entries = _checked_entries(archive, name, limit_bytes)
                spool.check_space(sum(entry.file_size for entry in entries))
                return _unpack(archive, entries, archive_path.parent, name, prefix)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error) as error:
        raise _unreadable(f"{name} is a damaged .zip archive ({type(error).__name__}).") from error


def _check_directory_size(file: IO[bytes], name: str) -> None:
    """Refuse a directory that is too large to be read, before :mod:`zipfile` reads it whole."""
    size_bytes = file.seek(0, os.SEEK_END)
    file.seek(-min(size_bytes, _END.size + 0xFFFF + 20), os.SEEK_END)
    tail = file.read()
    file.seek(0)
    start = tail.rfind(b"PK\x05\x06")
    if start < 0 or len(tail) - start < _END.size:
        raise _unreadable(f"{name} is a .zip archive that is cut off.")
    if b"PK\x06\x07" in tail[max(0, start - 20) : start]:
        raise _unreadable(f"{name} is in the ZIP64 format, for archives of over 4 GiB or 65535 files.")
    n_entries, directory_bytes = _END.unpack_from(tail, start)[4:6]
    if n_entries > MAX_ENTRIES or directory_bytes > _MAX_DIRECTORY_BYTES:
        raise Refusal(
            ReasonCode.TOO_LARGE,
            f"{name} has {n_entries} entries; at most {MAX_ENTRIES} are accepted.",
            remedy=_REMEDY,
        )


def _checked_entries(archive: zipfile.ZipFile, name: str, limit_bytes: int) -> list[zipfile.ZipInfo]:
    entries = [info for info in archive.infolist() if not info.is_dir() and not _is_leaflet(info.filename)]
    if not entries:
        raise _unreadable(f"{name} holds no DICOM file.")
    if any(entry.flag_bits & 0x1 for entry in entries):
        raise _unreadable(f"{name} is encrypted.")
    methods = {entry.compress_type for entry in entries} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
    if methods:  # LZMA's dictionary may ask for gigabytes of memory
        raise _unreadable(f"{name} is compressed by method {min(methods)}, not by deflate.")
    size_bytes = sum(entry.file_size for entry in entries)
    if size_bytes > limit_bytes:
        raise Refusal(
            ReasonCode.TOO_LARGE,
            f"{name} unpacks to {size_bytes} bytes; at most {limit_bytes} are accepted.",
            remedy="Send one series alone, or have the node's limit raised.",
        )
    return entries


def _is_leaflet(filename: str) -> bool:
    path = PurePosixPath(filename.replace("\\", "/"))
    return (
        path.name.startswith(".")
        or "__MACOSX" in path.parts
        or path.suffix.lower() in _LEAFLET_SUFFIXES
        or path.name.lower() in _LEAFLET_NAMES
    )


def _unpack(
    archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], into: Path, name: str, prefix: str
) -> list[Path]:
    unpacked = []
    for number, entry in enumerate(entries):
        target_path = into / f"{prefix}-{number:05d}.dcm"
        with archive.open(entry) as source, target_path.open("xb") as target:
            start = source.read(132)
            if start[128:] != b"DICM":
                raise _unreadable(f"Entry {number + 1} of {len(entries)} in {name.lower()} is not a DICOM file.")
            target.write(start)
            # zipfile reads no more than the declared size, and checks the CRC-32 at its end
            while chunk := source.read(_CHUNK_BYTES):
                target.write(chunk)
        unpacked.append(target_path)
    return unpacked


def _unreadable(message: str) -> Refusal:
    return Refusal(ReasonCode.UNREADABLE, message, remedy=_REMEDY)
