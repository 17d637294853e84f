"""The DICOM files of a job's channel, out of a zip archive, a folder or a list.

An archive comes from outside and is not trusted: members are written under names of the node's own, the
bytes that come out are counted as they come, and reading stops at the limits below.
"""

from __future__ import annotations

import errno
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from models.errors import ReasonCode, Refusal

MAXIMUM_MEMBERS = 50_000
MAXIMUM_DIRECTORY_BYTES = 16 << 20
MAXIMUM_RATIO = (
    200  # bytes that come out per byte of the archive; empty slices alone exceed it, series do not
)
RATIO_COUNTS_FROM_BYTES = 64 * 1024**2
_CHUNK_BYTES = 1024**2
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # LZMA's dictionary may ask for gigabytes of memory
_END = struct.Struct("<4s4H2LH")  # end of central directory record, APPNOTE.TXT 4.3.16


def is_zip(path: Path) -> bool:
    """True for a file that begins as a zip archive with at least one member does."""
    return _begins_with(path, 0, b"PK\x03\x04") or _begins_with(path, 0, b"PK\x05\x06")


def is_dicom(path: Path) -> bool:
    """True for a file with the prefix of PS3.10 7.1."""
    return _begins_with(path, 128, b"DICM")


def _begins_with(path: Path, offset: int, expected: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(len(expected)) == expected


@contextmanager
def opened_archive(
    path: Path, name: str = "The file"
) -> Iterator[tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]]:
    """A zip archive, and the plain files in it; whatever is wrong with it while it is read is a refusal.

    Paths and names in it mean nothing, and folders are passed over. What a member holds is not looked at
    here: whatever is not DICOM is left out later, with a warning.

    Parameters
    ----------
    name : str
        How messages call it.

    Raises
    ------
    Refusal
        UNREADABLE for an archive that is damaged, cut off, encrypted, empty, in the ZIP64 format, or packed
        otherwise than by storing and deflating; TOO_LARGE for too many members.
    """
    try:
        with path.open("rb") as file:
            _check_directory(file, name)
            with zipfile.ZipFile(file) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                _check_members(members, name)
                yield archive, members
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise  # the disk's fault, not the archive's
        raise _bad(f"{name} is a damaged archive: an offset lies before its beginning.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        # NotImplementedError: an unknown method; ValueError: offsets out of the file
        raise _bad(f"{name} is a damaged archive ({type(error).__name__}).") from error


def _check_directory(file: IO[bytes], name: str) -> None:
    """Refuse a directory that is too large to be read, before :mod:`zipfile` reads it whole."""
    size_bytes = file.seek(0, os.SEEK_END)
    file.seek(-min(size_bytes, _END.size + 0xFFFF + 20), os.SEEK_END)
    tail = file.read()
    file.seek(0)
    start = tail.rfind(b"PK\x05\x06")
    if start < 0 or len(tail) - start < _END.size:
        raise _bad(f"{name} is an archive that is cut off.")
    if b"PK\x06\x07" in tail[max(0, start - 20) : start]:
        raise _bad(f"{name} is in the ZIP64 format, made for over 4 GiB or 65535 files.")
    n_members, directory_bytes = _END.unpack_from(tail, start)[4:6]
    if n_members > MAXIMUM_MEMBERS or directory_bytes > MAXIMUM_DIRECTORY_BYTES:
        raise _too_large(
            f"{name} is an archive of {n_members} files with a directory of {directory_bytes} bytes; at most "
            f"{MAXIMUM_MEMBERS} files and {MAXIMUM_DIRECTORY_BYTES} bytes are taken."
        )


def _check_members(members: list[zipfile.ZipInfo], name: str) -> None:
    if not members:
        raise _bad(f"{name} is an archive without a file in it.")
    if len(members) > MAXIMUM_MEMBERS:
        raise _too_large(
            f"{name} is an archive of {len(members)} files; at most {MAXIMUM_MEMBERS} are taken."
        )
    if any(member.flag_bits & 0x1 for member in members):
        raise _bad(f"{name} is an archive with a password.")
    if any(member.compress_type not in _METHODS for member in members):
        raise _bad(f"{name} is an archive that is packed in an unusual way.")


def extract(archive: Path, into: Path, *, limit_bytes: int) -> list[Path]:
    """Write every plain file of a zip archive into a folder, as ``000001``, ``000002``, ...

    Parameters
    ----------
    archive : Path
        The archive. Paths and names in it are not used, and links come out as the text they hold.
    into : Path
        An empty folder.
    limit_bytes : int
        How much may come out in all.

    Raises
    ------
    Refusal
        As :func:`opened_archive`, and TOO_LARGE for more bytes or a higher ratio than allowed.
    """
    written: list[Path] = []
    total_bytes, archive_bytes = 0, archive.stat().st_size
    with opened_archive(archive) as (opened, members):
        for number, member in enumerate(members, 1):
            path = into / f"{number:06d}"
            with opened.open(member) as source, path.open("xb") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    total_bytes += len(chunk)
                    if total_bytes > limit_bytes:
                        raise _too_large(f"The archive unpacks to more than {limit_bytes} bytes.")
                    if total_bytes > max(RATIO_COUNTS_FROM_BYTES, MAXIMUM_RATIO * archive_bytes):
                        raise _too_large(
                            f"The archive unpacks to more than {MAXIMUM_RATIO} times its own size."
                        )
                    target.write(chunk)
            written.append(path)
    return written


def _bad(message: str) -> Refusal:
    return Refusal(
        ReasonCode.UNREADABLE,
        message,
        remedy="Make the archive again with an ordinary zip program, and without a password.",
    )


def _too_large(message: str) -> Refusal:
    return Refusal(ReasonCode.TOO_LARGE, message, remedy="Upload one series at a time, without other files.")


def dicom_files(paths: Iterable[Path]) -> tuple[list[Path], tuple[str, ...]]:
    """The files that are DICOM, folders searched through, and a sentence about those that are not.

    Raises
    ------
    Refusal
        NOT_A_VOLUME if there is none.
    """
    files = [f for path in paths for f in ([path] if path.is_file() else _files_below(path))]
    found = [file for file in files if is_dicom(file)]
    if not found:
        raise Refusal(
            ReasonCode.NOT_A_VOLUME,
            f"There is no DICOM object among the {len(files)} file(s) given.",
            remedy="Give the images of one series.",
        )
    others = len(files) - len(found)
    return found, (f"Left out: {others} of {len(files)} files, which are not DICOM.",) if others else ()


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
