"""The DICOM files of a job's channel, out of a zip archive, a folder or a list.

An archive comes from outside and is not trusted: members are written under names of the node's own, the
bytes that come out are counted as they come, and reading stops at the limits below.
"""

from __future__ import annotations

import errno
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from models.errors import ReasonCode, Refusal

MAXIMUM_MEMBERS = 50_000
MAXIMUM_RATIO = (
    200  # bytes that come out per byte of the archive; empty slices alone exceed it, series do not
)
RATIO_COUNTS_FROM_BYTES = 64 * 1024**2
_CHUNK_BYTES = 1024**2


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
        UNREADABLE for a damaged or encrypted archive; TOO_LARGE for more members, more bytes or a higher
        ratio than allowed.
    """
    written: list[Path] = []
    total_bytes, archive_bytes = 0, archive.stat().st_size
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            if len(members) > MAXIMUM_MEMBERS:
                raise _too_large(f"holds {len(members)} files, more than {MAXIMUM_MEMBERS}")
            for number, member in enumerate(members, 1):
                path = into / f"{number:06d}"
                with opened.open(member) as source, path.open("xb") as target:
                    while chunk := source.read(_CHUNK_BYTES):
                        total_bytes += len(chunk)
                        if total_bytes > limit_bytes:
                            raise _too_large(f"unpacks to more than {limit_bytes} bytes")
                        if total_bytes > max(RATIO_COUNTS_FROM_BYTES, MAXIMUM_RATIO * archive_bytes):
                            raise _too_large(f"unpacks to more than {MAXIMUM_RATIO} times its own size")
                        target.write(chunk)
                written.append(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise  # the disk's fault, not the archive's
        raise _damaged(error) from error  # an offset before the archive's beginning
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        # RuntimeError: encrypted; NotImplementedError: an unknown method; ValueError: offsets out of the file
        raise _damaged(error) from error
    return written


def _damaged(error: Exception) -> Refusal:
    return Refusal(
        ReasonCode.UNREADABLE,
        f"The archive is damaged, encrypted or of an unknown kind ({type(error).__name__}).",
        remedy="Make the archive again with an ordinary zip program and without a password.",
    )


def _too_large(how: str) -> Refusal:
    return Refusal(
        ReasonCode.TOO_LARGE,
        f"The archive {how}.",
        remedy="Upload one series at a time, without other files.",
    )


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
