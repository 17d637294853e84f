"""Derived UIDs: the same for the same result, another for any other."""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.dicom.identifiers import derived_uid, result_uid, valid_uid

RESULT: dict[str, Any] = {
    "sop_instance_uids": ["1.2.3", "1.2.4", "1.2.5"],
    "study_instance_uid": "1.2",
    "patient_id": "A",
    "issuer_of_patient_id": "",
    "weights_digest": "ab" * 32,
    "runtime": "openvino",
    "precision": "float32",
    "pipeline_version": "0.1.0",
    "settings_digest": "cd" * 32,
    "destination_profile": "",
}

INPUTS = st.dictionaries(
    st.sampled_from("abcd"),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s) | st.tuples(s)),
)


@given(st.text(), INPUTS)
def test_every_derived_uid_is_valid_and_holds_a_version_8_uuid(kind: str, inputs: dict[str, object]) -> None:
    uid = derived_uid(kind, **inputs)
    assert valid_uid(uid)
    assert uid == derived_uid(kind, **dict(reversed(inputs.items())))
    uuid = UUID(int=int(uid.removeprefix("2.25.")))
    assert (uuid.version, uuid.variant) == (8, "specified in RFC 4122")


def test_a_known_uid_never_changes() -> None:
    """Results that were sent carry these: another serialisation would file each of them a second time."""
    assert result_uid("segmentation", **RESULT) == "2.25.39810513912375414597560494387870531653"


def test_the_order_of_the_images_has_no_part_in_it() -> None:
    shuffled = list(RESULT["sop_instance_uids"])
    random.Random(1).shuffle(shuffled)
    for images in (shuffled, set(shuffled), tuple(reversed(shuffled))):
        again = result_uid("segmentation", **{**RESULT, "sop_instance_uids": images})
        assert again == result_uid("segmentation", **RESULT)


@pytest.mark.parametrize("name", RESULT)
def test_everything_else_has(name: str) -> None:
    other = RESULT[name] + (["1.2.6"] if name == "sop_instance_uids" else "x")
    assert result_uid("segmentation", **{**RESULT, name: other}) != result_uid("segmentation", **RESULT)


def test_kinds_and_arguments_are_told_apart() -> None:
    uids = [
        derived_uid("a"),
        derived_uid("b"),
        derived_uid("a", x="1"),
        derived_uid("a", y="1"),
        derived_uid("a", x=1),
        derived_uid("a", x=True),
        derived_uid("a", x=None),
        derived_uid("a", x=["1"]),
        derived_uid("a", x=["1", "2"]),
        derived_uid("a", x=["12"]),
        derived_uid("a", x='["1"]'),
        derived_uid("a", x={"1": "2"}),
        derived_uid("a", x=[["1"], "2"]),
        derived_uid("a", x=["2", "1"]),
    ]
    assert len(set(uids)) == len(uids)


@pytest.mark.parametrize("value", [1.0, b"1", object(), {1: "x"}, ["a", 0.5]])
def test_what_has_no_unambiguous_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        derived_uid("a", x=value)


@pytest.mark.parametrize(
    "text", ["1.2", "0.0", "2.25.340282366920938463463374607431768211455", "1." + "1" * 62]
)
def test_valid_uids(text: str) -> None:
    assert valid_uid(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "3.1",
        "1.",
        ".1",
        "1..2",
        "1.02",
        "1.2\n",
        "1.2/../3",
        "../etc",
        "1.2 ",
        "1.٣",
        "1." + "1" * 63,
    ],
)
def test_invalid_uids(text: str) -> None:
    assert not valid_uid(text)
