"""What a model was not made for, and what it should not have found: warned of or refused, by route."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from bundle_factory import make_threshold_bundle
from pydantic import ValidationError
from pydicom import dcmread
from small_node import AFFINE, image_array, make_node
from sqlalchemy import select
from structlog.testing import capture_logs

from models.errors import ReasonCode, Refusal
from models.manifest import Manifest, Postprocessing
from models.volume import Labelmap, Removed, Volume
from service.completeness import Completeness
from service.guard import guard_grid, guard_modalities, guard_removed, guard_result
from service.guard_rules import GuardRules
from service.records.database import utc_now
from service.records.tables import Event, JobState, Result, ResultKind
from service.settings import Route

KINDS = tuple(GuardRules.model_fields)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    limits = {
        "modalities": ["CT"],
        "spacing_mm": [0.5, 1.9],
        "field_of_view_mm": [30, 400],
        "minimum_slices": 20,
    }
    bundle = make_threshold_bundle(tmp_path_factory.mktemp("guard") / "b", input_limits=limits)
    low, high = bundle.manifest.labels
    return bundle.manifest.model_copy(
        update={"labels": (low.model_copy(update={"volume_range_ml": (1.0, 2.0)}), high)}
    )


def labelmap(**boxes: tuple[slice, slice, slice]) -> Labelmap:
    array = np.zeros((8, 12, 14), np.uint8)
    for name, box in boxes.items():
        array[box] = {"low": 1, "high": 2}[name]
    return Labelmap(array, AFFINE)


INSIDE = (slice(2, 4), slice(3, 6), slice(3, 7))
VOLUME = Volume(np.zeros((1, 8, 12, 14), np.float32), AFFINE)


def judged(kind: str, manifest: Manifest, rules: GuardRules) -> tuple[str, ...]:
    """What the guard says of a case that is doubtful in this way alone."""
    plausible = (slice(1, 7), slice(1, 10), slice(1, 7))
    if kind == "modality":
        return guard_modalities(manifest, ["MR"], rules)
    if kind in ("spacing", "field_of_view", "slices"):
        fine = manifest.input_limits.model_copy(
            update={"spacing_mm": None, "field_of_view_mm": None, "minimum_slices": 1}
        )
        one = {"spacing": "spacing_mm", "field_of_view": "field_of_view_mm", "slices": "minimum_slices"}[kind]
        limits = fine.model_copy(update={one: getattr(manifest.input_limits, one)})
        return guard_grid(manifest.model_copy(update={"input_limits": limits}), VOLUME, rules)
    if kind == "removed":
        asked = Postprocessing(largest_component_of_foreground=True, maximum_removed_share=0.1)
        found = Labelmap(labelmap(low=INSIDE).array, AFFINE, removed=Removed(2, {1: 40, 2: 360}, 0.25))
        return guard_removed(manifest.model_copy(update={"postprocessing": asked}), found, rules)
    found = {
        "volume_range": labelmap(low=INSIDE),
        "nothing_found": labelmap(),
        "border": labelmap(low=plausible, high=(slice(2, 4), slice(10, 12), slice(8, 9))),
    }[kind]
    return guard_result(manifest, found, rules)


SAID = {
    "modality": (ReasonCode.WRONG_MODALITY, "is MR; threshold takes CT."),
    "spacing": (ReasonCode.OUT_OF_LIMITS, "1.5 x 1.25 x 2 mm (x, y, z); the model takes 0.5 to 1.9 mm."),
    "field_of_view": (ReasonCode.OUT_OF_LIMITS, "21 x 15 x 16 mm (x, y, z); the model takes 30 to 400 mm."),
    "slices": (ReasonCode.OUT_OF_LIMITS, "8 slices; the model takes 20 or more."),
    "volume_range": (
        ReasonCode.IMPLAUSIBLE_RESULT,
        "low has 0.09 mL; the training cases had 1 to 2 mL.",
    ),
    "nothing_found": (ReasonCode.IMPLAUSIBLE_RESULT, "the model found nothing in this series."),
    "border": (ReasonCode.IMPLAUSIBLE_RESULT, "high reaches the edge of the field of view"),
    "removed": (
        ReasonCode.IMPLAUSIBLE_RESULT,
        "2, together 1.5 mL, 25.00% of what was found (high 1.35 mL, low 0.15 mL); "
        "the model's card allows 10.00%.",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_doubt_is_a_warning_or_a_refusal_as_the_route_says(kind: str, manifest: Manifest) -> None:
    reason, sentence = SAID[kind]
    others = {name: "refuse" for name in KINDS if name != kind}
    (warning,) = judged(kind, manifest, GuardRules(**others, **{kind: "warn"}))
    assert sentence in warning
    with pytest.raises(Refusal) as caught:
        judged(kind, manifest, GuardRules(**dict.fromkeys(KINDS, "warn") | {kind: "refuse"}))
    assert caught.value.reason is reason
    assert caught.value.message == warning
    assert caught.value.remedy


def test_limits_are_refused_and_doubtful_results_are_warned_of_unless_the_route_says_otherwise() -> None:
    route = Route(name="r", model="m", match={"Modality": "MR"})
    limits = ("modality", "spacing", "field_of_view", "slices")
    assert {kind: getattr(route.guard, kind) for kind in KINDS} == {
        kind: "refuse" if kind in limits else "warn" for kind in KINDS
    }
    with pytest.raises(ValidationError):
        Route(name="r", model="m", match={"Modality": "MR"}, guard={"border": "ignore"})


@pytest.mark.parametrize(
    "box",
    [
        (slice(0, 2), slice(3, 6), slice(3, 7)),
        (slice(6, 8), slice(3, 6), slice(3, 7)),
        (slice(2, 4), slice(0, 6), slice(3, 7)),
        (slice(2, 4), slice(9, 12), slice(3, 7)),
        (slice(2, 4), slice(3, 6), slice(0, 1)),
        (slice(2, 4), slice(3, 6), slice(13, 14)),
    ],
)
def test_every_edge_of_the_field_of_view_is_looked_at(box: tuple, manifest: Manifest) -> None:
    assert "high reaches the edge" in guard_result(manifest, labelmap(high=box))[-1]
    assert guard_result(manifest, labelmap(high=(slice(1, 7), slice(1, 11), slice(1, 13)))) == ()


def test_what_was_taken_away_is_told_even_where_it_is_little(manifest: Manifest) -> None:
    asked = Postprocessing(largest_component_of_labels=(2,), maximum_removed_share=0.1)
    asking = manifest.model_copy(update={"postprocessing": asked})
    inside = labelmap(high=INSIDE).array
    one, none = Removed(1, {2: 4}, 0.1), Removed(0, {}, 0.0)
    refusing = GuardRules(removed="refuse")
    assert guard_removed(asking, Labelmap(inside, AFFINE, removed=one), refusing) == (
        "Islands left out, as they lie apart from the largest part: 1, together 0.015 mL, 10.00% of what was "
        "found (high 0.015 mL).",
    )
    assert guard_removed(asking, Labelmap(inside, AFFINE, removed=none), refusing) == ()
    assert guard_removed(manifest, Labelmap(inside, AFFINE), refusing) == ()


def test_what_was_not_found_has_no_doubtful_volume(manifest: Manifest) -> None:
    assert guard_result(manifest, labelmap(high=INSIDE)) == ()


def test_a_warning_reaches_the_records_the_report_the_audit_trail_and_the_log(tmp_path: Path) -> None:
    route = {
        "name": "mr",
        "model": "threshold",
        "match": {"Modality": "MR"},
        "quiet_time_s": 1.0,
        "guard": {"slices": "warn"},
    }
    strict = route | {"name": "strict", "match": {"Modality": "MR", "StationName": "STRICT"}}
    routes = [
        route | {"match": {"Modality": "MR", "StationName": "MILD"}},
        strict | {"guard": {"border": "refuse"}},
    ]
    node = make_node(tmp_path / "node", routes=routes)
    node.add_model(tmp_path / "model", input_limits={"minimum_slices": 8})
    array = image_array()
    array[0, 2:5, 2:5] = 400  # at the edge
    for number, station in enumerate(("MILD", "STRICT")):
        uid = f"2.25.{number + 500}"
        node.receive_phantom(
            tmp_path / station, array[: 7 + number], series_instance_uid=uid, StationName=station
        )
    worker = node.worker()
    with capture_logs() as logs:
        assert Completeness(node.settings, node.records, node.spool).sweep(utc_now()) == 2
        assert worker.run_one(threading.Event())
        assert worker.run_one(threading.Event())
    worker.runner.close()
    mild, refused = sorted(node.jobs(), key=lambda job: job.route_name)
    slices, border = mild.summary["warnings"]
    assert "7 slices; the model takes 8 or more" in slices
    assert "high reaches the edge of the field of view" in border
    assert (refused.state, refused.reason_code) == (JobState.REFUSED, "IMPLAUSIBLE_RESULT")
    assert refused.reason == border
    with node.records.read() as session:
        (event,) = session.scalars(select(Event).where(Event.kind == "job.warned"))
        report = session.scalar(select(Result).where(Result.kind == ResultKind.REPORT))
    assert (event.subject, event.detail["warnings"]) == (mild.job_id, [slices, border])
    (line,) = [each for each in logs if each["event"] == "job.warned"]
    assert (line["log_level"], line["warnings"]) == ("warning", [slices, border])
    said = [
        str(each.get("TextValue", "")) for each in dcmread(node.spool.absolute(report.path)).ContentSequence
    ]
    assert {slices, border} <= set(said)
    node.records.close()
