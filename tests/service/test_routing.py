"""Which series a route takes."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.errors import ReasonCode, Refusal
from service.routes import Condition, Route
from service.routing import (
    SeriesFacts,
    check_study_age,
    choose,
    choose_channels,
    holds,
    takes,
    wanted_keywords,
)

NOON = datetime(2026, 6, 15, 12)  # noqa: DTZ001  # times in the records are naive


def route(**changes: object) -> Route:
    return Route(**{"name": "r", "model": "m", "match": {"Modality": "MR"}, **changes})  # type: ignore[arg-type]


def series(uid: str = "1.2", *, instances: int = 10, **attributes: object) -> SeriesFacts:
    values = {k: v if isinstance(v, tuple) else (str(v),) for k, v in attributes.items()}
    return SeriesFacts(f"id-{uid}", "1", uid, instances, "MOD", "SEGNODE", {"Modality": ("MR",), **values})


@pytest.mark.parametrize(
    ("condition", "values", "expected"),
    [
        ({"equals": "T1"}, ["T1"], True),
        ({"equals": "T1"}, ["t1"], False),
        ({"equals": " T1 "}, ["T1"], True),
        ({"equals": "T1"}, [], False),
        ({"equals": 5.0}, ["5.00"], True),
        ({"equals": 5.0}, ["5.01"], False),
        ({"equals": 5.0}, ["five"], False),
        ({"equals": "ORIGINAL"}, ["DERIVED", "ORIGINAL"], True),
        ({"regex": "(?i)hippo"}, ["Ax HIPPO cor"], True),
        ({"regex": "^T1$"}, ["xT1"], False),
        ({"min": 1}, ["1"], True),
        ({"min": 1}, ["0.99"], False),
        ({"min": 1}, ["many"], False),
        ({"max": 3}, ["3"], True),
        ({"max": 3}, ["3.1"], False),
        ({"max": 3}, ["-inf"], False),
        ({"min": 1, "max": 3}, ["0", "4"], False),  # one value must satisfy all
        ({"min": 1, "max": 3}, ["0", "2"], True),
        ({"min": 1, "max": 3}, ["nan"], False),
        ({"present": True}, ["x"], True),
        ({"present": True}, [], False),
        ({"present": True}, [""], False),
        ({"present": False}, [], True),
        ({"present": False}, ["x"], False),
        ({"present": True, "equals": "x"}, ["y"], False),
    ],
)
def test_a_condition_holds_as_it_says(condition: dict, values: list[str], expected: bool) -> None:
    assert holds(Condition(**condition), values) is expected


@given(st.lists(st.text(max_size=8), max_size=4), st.floats(-5, 5))
def test_no_value_makes_a_condition_raise(values: list[str], bound: float) -> None:
    for condition in (
        Condition(min=bound),
        Condition(equals=bound),
        Condition(regex="a+"),
        Condition(equals="a"),
    ):
        assert holds(condition, values) in (True, False)


def test_every_condition_of_a_route_must_hold() -> None:
    wanting = route(
        match={
            "Modality": "MR",
            "SliceThickness": {"max": 2},
            "calling_ae_title": "MOD",
            "called_ae_title": {"regex": "^SEG"},
            "instances": {"min": 10},
        }
    )
    good = series(SliceThickness="1.5")
    assert takes(wanting, good)
    assert not takes(wanting, replace(good, calling_ae_title="OTHER"))
    assert not takes(wanting, replace(good, calling_ae_title=None))
    assert not takes(wanting, replace(good, called_ae_title="PACS"))
    assert not takes(wanting, replace(good, instances=9))
    assert not takes(wanting, series(SliceThickness="3"))
    assert not takes(wanting, series())


def test_only_the_attributes_that_are_needed_are_read() -> None:
    keywords = wanted_keywords([route(match={"Modality": "MR", "instances": 3, "EchoTime": {"max": 9}})])
    assert keywords == ("EchoTime", "Modality", "SeriesNumber", "StudyDate")


@pytest.mark.parametrize("name", ["Modallity", "PixelData", "ReferencedSeriesSequence", "modality"])
def test_a_condition_on_what_cannot_be_compared_is_a_mistake_in_the_settings(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        route(match={name: "x"})


def test_a_route_without_conditions_would_take_everything() -> None:
    with pytest.raises(ValidationError, match="at least one condition"):
        route(match={})


def test_all_matching_series_are_taken_unless_the_route_wants_one() -> None:
    several = [series("1.1"), series("1.2")]
    assert choose(route(), several) == tuple(several)
    assert choose(route(several="refuse"), several[:1]) == (several[0],)
    with pytest.raises(Refusal, match="2 series of the study match the route r") as caught:
        choose(route(several="refuse"), several)
    assert caught.value.reason is ReasonCode.AMBIGUOUS_SERIES


def test_the_best_series_has_most_instances_then_the_smallest_number_then_the_smallest_uid() -> None:
    best = route(several="best")
    small, large = series("1.1", instances=20, SeriesNumber=1), series("1.2", instances=30, SeriesNumber=9)
    assert choose(best, [small, large]) == (large,)
    earlier = series("1.3", instances=30, SeriesNumber=8)
    assert choose(best, [large, earlier]) == (earlier,)
    unnumbered = series("1.0", instances=30)
    assert choose(best, [unnumbered, large]) == (large,)
    twin = series("1.25", instances=30, SeriesNumber=9)
    assert choose(best, [twin, large]) == choose(best, [large, twin]) == (large,)


@pytest.mark.parametrize(
    ("study_date", "refused"), [("20260601", True), ("20260605", False), ("2026.06.01", True)]
)
def test_a_study_that_is_too_old_is_refused_with_figures(study_date: str, refused: bool) -> None:
    limited = route(maximum_study_age_days=10)
    if not refused:
        check_study_age(limited, series(StudyDate=study_date), now=NOON)
        return
    with pytest.raises(Refusal, match="14 days old; the route r takes studies of up to 10 days") as caught:
        check_study_age(limited, series(StudyDate=study_date), now=NOON)
    assert caught.value.reason is ReasonCode.STUDY_TOO_OLD


@pytest.mark.parametrize("attributes", [{}, {"StudyDate": "20261301"}, {"StudyDate": "yesterday"}])
def test_a_study_without_a_readable_date_is_let_through(attributes: dict[str, str]) -> None:
    check_study_age(route(maximum_study_age_days=10), series(**attributes), now=NOON)


CHANNELS = {
    "T1": {"SeriesDescription": {"regex": "T1"}, "ContrastBolusAgent": {"present": False}},
    "T1 contrast": {"SeriesDescription": {"regex": "T1"}, "ContrastBolusAgent": {"present": True}},
    "FLAIR": {"SeriesDescription": {"regex": "FLAIR"}},
}
T1 = series("1.1", SeriesDescription="Ax T1", SeriesNumber=2)
T1_CONTRAST = series("1.2", SeriesDescription="Ax T1 +C", ContrastBolusAgent="Gd", SeriesNumber=5)
FLAIR = series("1.3", SeriesDescription="FLAIR 3D", SeriesNumber=3)
T2 = series("1.4", SeriesDescription="T2", SeriesNumber=4)


class TestChannels:
    def test_every_channel_gets_its_series(self) -> None:
        found = choose_channels(route(channels=CHANNELS), [FLAIR, T1_CONTRAST, T1, T2])
        assert found == {"T1": T1, "T1 contrast": T1_CONTRAST, "FLAIR": FLAIR}
        assert list(found) == list(CHANNELS)

    def test_a_route_takes_the_series_of_its_channels_alone(self) -> None:
        of_channels = route(channels=CHANNELS)
        taken = [each for each in (T1, T1_CONTRAST, FLAIR, T2) if takes(of_channels, each)]
        assert taken == [T1, T1_CONTRAST, FLAIR]
        assert not takes(of_channels, replace(T1, attributes={**T1.attributes, "Modality": ("CT",)}))

    @pytest.mark.parametrize(
        ("there", "named", "not_named"),
        [
            ([T1, T1_CONTRAST], "the channel FLAIR;", "channels T1"),
            ([T1], "the channels T1 contrast and FLAIR;", None),
            ([], "the channels T1, T1 contrast and FLAIR;", None),
        ],
    )
    def test_a_missing_channel_is_named(self, there: list, named: str, not_named: str | None) -> None:
        with pytest.raises(Refusal) as caught:
            choose_channels(route(channels=CHANNELS), there)
        assert caught.value.reason is ReasonCode.MISSING_CHANNEL
        assert named in caught.value.message
        assert not_named is None or not_named not in caught.value.message

    def test_an_ambiguous_channel_is_named(self) -> None:
        again = replace(FLAIR, series_id="again", instances=30)
        with pytest.raises(Refusal) as caught:
            choose_channels(route(channels=CHANNELS), [T1, T1_CONTRAST, FLAIR, again])
        assert caught.value.reason is ReasonCode.AMBIGUOUS_CHANNEL
        assert "can be the channel FLAIR: 2 match FLAIR." in caught.value.message
        best = choose_channels(route(channels=CHANNELS, several="best"), [T1, T1_CONTRAST, FLAIR, again])
        assert best["FLAIR"] is again

    @pytest.mark.parametrize("several", ["all", "best", "refuse"])
    def test_one_series_is_never_two_channels(self, several: str) -> None:
        wide = {name: CHANNELS[name] for name in ("T1", "FLAIR")} | {"other": {"SeriesNumber": 3}}
        with pytest.raises(Refusal) as caught:
            choose_channels(route(channels=wide, several=several), [T1, FLAIR])
        assert caught.value.reason is ReasonCode.AMBIGUOUS_CHANNEL
        assert "the channels FLAIR and other" in caught.value.message

    def test_the_attributes_of_channels_are_read(self) -> None:
        wanted = wanted_keywords([route(channels=CHANNELS)])
        assert {"Modality", "SeriesDescription", "ContrastBolusAgent"} < set(wanted)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"channels": {"T1": {"EchoTime": 3}}}, "one channel"),
            ({"channels": {**CHANNELS, "T2": {}}}, "the channel T2 needs at least one condition"),
            ({"channels": {**CHANNELS, "T2": {"Modality": "MR"}}}, "in match and in the channel T2"),
            ({"channels": {**CHANNELS, "T2": {"PixelData": "x"}}}, "neither a DICOM keyword"),
            ({"channels": CHANNELS, "reference": "T2"}, "none of the channels"),
            ({"reference": "T1"}, "belong to a route with channels"),
            ({"registration": "rigid"}, "belong to a route with channels"),
            ({"channels": CHANNELS, "quiet_time_s": 2}, "settled_after_s"),
        ],
    )
    def test_mistakes_in_the_settings_are_named(self, changes: dict, said: str) -> None:
        with pytest.raises(ValidationError, match=said):
            route(**changes)
