"""Unique identifiers that are functions of what they name: the same result always has the same UID."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from hashlib import sha256
from uuid import UUID

_UID = re.compile(r"[0-2](?:\.(?:0|[1-9][0-9]*))+")
_LONGEST = 64


def derived_uid(kind: str, **inputs: object) -> str:
    """A UID that is a pure function of its arguments: "2.25." and a UUID as a decimal (PS3.5 annex B.2).

    The UUID holds the first 128 bits of a SHA-256 over a canonical JSON of the arguments, with the bits of
    version 8 set (RFC 9562 section 5.8). Sets are sorted, so their order has no part in the result; the
    order of sequences has.

    Parameters
    ----------
    kind : str
        What is named, such as "segmentation" or "segmentation-series".
    **inputs
        Everything that makes the result what it is.

    Raises
    ------
    TypeError
        For inputs whose serialisation would not be unambiguous, such as floats.
    """
    text = json.dumps(
        {"kind": kind, "inputs": _canonical(inputs)},
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=True,
        allow_nan=False,
    )
    digest = bytearray(sha256(text.encode("ascii")).digest()[:16])
    digest[6] = (digest[6] & 0x0F) | 0x80  # version 8
    digest[8] = (digest[8] & 0x3F) | 0x80  # variant of RFC 9562
    return f"2.25.{UUID(bytes=bytes(digest)).int}"


def result_uid(
    kind: str,
    *,
    sop_instance_uids: Sequence[str] | Set[str],
    study_instance_uid: str,
    patient_id: str,
    issuer_of_patient_id: str = "",
    weights_digest: str,
    runtime: str,
    precision: str,
    pipeline_version: str,
    settings_digest: str,
    destination_profile: str = "",
) -> str:
    """The UID of an object or series that leaves the node, from all that it depends on.

    The order of ``sop_instance_uids`` has no part in it.
    """
    return derived_uid(
        kind,
        sop_instance_uids=sorted(sop_instance_uids),
        study_instance_uid=study_instance_uid,
        patient_id=patient_id,
        issuer_of_patient_id=issuer_of_patient_id,
        weights_digest=weights_digest,
        runtime=runtime,
        precision=precision,
        pipeline_version=pipeline_version,
        settings_digest=settings_digest,
        destination_profile=destination_profile,
    )


def valid_uid(text: str) -> bool:
    """True for a UID as PS3.5 section 9.1 has it: at most 64 characters, no component with leading zeros."""
    return len(text) <= _LONGEST and _UID.fullmatch(text) is not None


def _canonical(value: object) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("the keys of a mapping must be str")
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((_canonical(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_canonical(item) for item in value]
    raise TypeError(
        "only str, int, bool, None, and sequences, sets and mappings of them can identify a result, "
        f"not {type(value).__name__}"
    )
