"""Small encodings that every derived object needs."""

from __future__ import annotations

from collections.abc import Iterable

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.coding import Code
from pydicom.valuerep import format_number_as_ds

LONGEST_TEXT = 64  # characters of a LO (PS3.5 table 6.2-1)


def decimal_strings(values: Iterable[float]) -> list[str]:
    """Numbers as decimal strings of at most 16 characters, with all the digits that fit (PS3.5 6.2)."""
    texts = []
    for value in values:
        text = repr(float(value) + 0.0)  # no negative zero
        texts.append(text if len(text) <= 16 else str(format_number_as_ds(float(value))))
    return texts


def code_sequence(code: Code) -> DicomSequence:
    """A code sequence with one item (PS3.3 table 8.8-1)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = code.value, code.scheme_designator
    item.CodeMeaning = code.meaning
    return DicomSequence([item])
