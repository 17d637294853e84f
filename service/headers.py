"""What routing needs of a received object's header, read without trusting the object.

Nothing in a header can make reading loop or fill the memory, and no value is ever part of an error.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread, read_dataset, read_file_meta_info
from pydicom.multival import MultiValue
from pydicom.uid import DeflatedExplicitVRLittleEndian

from models.errors import ReasonCode, Refusal

_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
_INFLATE_LIMIT_BYTES = 64 * 1024**2  # a header is far smaller; a bomb is not inflated further
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_LOOKED_AT_FRAMES = 1000
_IN_GROUPS = {"EchoTime": "EffectiveEchoTime", "InversionTime": "InversionTimes"}  # PS3.3 C.8.13.5
_PREAMBLE_BYTES = 132 + 12  # preamble, prefix, and the group length element of the file meta information


def read_attributes(path: Path, keywords: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The values of some attributes of a DICOM file, as text without padding; pixels are not read.

    Parameters
    ----------
    path : Path
        A DICOM file (PS3.10).
    keywords : sequence of str
        DICOM keywords. What an enhanced object states in its functional groups (PS3.3 C.7.6.16) has every
        value that occurs among its frames; an agent or the like that is only coded (``...Sequence``) has
        the meaning of its code. Those that the file lacks have no values.

    Raises
    ------
    Refusal
        UNREADABLE, if the file cannot be parsed, or is gone.
    OSError
        If the file cannot be read now.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's warnings quote values
            header = _read_header(path, keywords)
            return {keyword: _values(header, keyword) for keyword in keywords}
    except FileNotFoundError:
        raise Refusal(
            ReasonCode.UNREADABLE,
            "A received object is no longer on the spool.",
            remedy="Send the series again, and look for who removed files from the data folder.",
        ) from None
    except OSError:
        raise  # the disk's fault, not the object's
    except Exception as error:  # noqa: BLE001  # pydicom raises nearly anything on a damaged file
        raise Refusal(
            ReasonCode.UNREADABLE,
            f"The header of a received object cannot be read ({type(error).__name__}).",
            remedy="Send the series again; if that does not help, look at the object with dcmdump.",
        ) from None


def _read_header(path: Path, keywords: Sequence[str]) -> Dataset:
    named = [*keywords, *_GROUPS, *(f"{keyword}Sequence" for keyword in keywords)]
    tags: list[Any] = [tag for keyword in named if (tag := tag_for_keyword(keyword)) is not None]
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return dcmread(path, stop_before_pixels=True, specific_tags=tags)
    start = _PREAMBLE_BYTES + meta.FileMetaInformationGroupLength
    deflated = path.read_bytes()[start:]
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(deflated, _INFLATE_LIMIT_BYTES)
    return read_dataset(
        io.BytesIO(inflated),
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, _vr, _length: tag in _PIXELS,
        specific_tags=tags,
    )


def _values(header: Dataset, keyword: str) -> tuple[str, ...]:
    if found := _texts(header, keyword):
        return found
    if coded := header.get(f"{keyword}Sequence"):
        return tuple(text for item in coded for text in _texts(item, "CodeMeaning"))
    name = _IN_GROUPS.get(keyword, keyword)
    return tuple(dict.fromkeys(text for macro in _macros(header) for text in _texts(macro, name)))


def _macros(header: Dataset) -> Iterator[Dataset]:
    """The items of every functional group, the shared ones first."""
    for groups in (header.get(name) or () for name in _GROUPS):
        for group in groups[:_LOOKED_AT_FRAMES]:
            for element in group:
                if element.VR == "SQ":
                    yield from element.value


def _texts(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    value = dataset.get(keyword)
    many = value if isinstance(value, (MultiValue, list)) else [value]
    texts = (str(one).strip(" \0") for one in many if one is not None)
    return tuple(text for text in texts if text)
