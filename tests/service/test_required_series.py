"""A study is complete early when the series that a route names are there, and not by less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError
from small_node import SmallNode, image_array, make_node
from sqlalchemy import select

from service.completeness import Completeness
from service.records.database import utc_now
from service.records.tables import Event, Job, SeriesState
from service.records.tables import Series as SeriesRow
from service.required_series import are_present
from service.routing import SeriesFacts
from service.settings import Route

T1, FLAIR = {"SeriesDescription": {"regex": "T1"}}, {"SeriesDescription": "FLAIR"}
ROUTE = {
    "name": "mr",
    "model": "threshold",
    "match": {"Modality": "MR"},
    "quiet_time_s": 600.0,
    "settled_after_s": 10.0,
    "complete_when": [{**T1, "instances": {"min": 8}}, FLAIR],
}


def route(**changes: object) -> Route:
    return Route.model_validate({**ROUTE, **changes})


def facts(description: str, instances: int = 8) -> SeriesFacts:
    attributes = {"SeriesDescription": (description,)}
    return SeriesFacts(description, "2.25.1", description, instances, attributes=attributes)


@pytest.mark.parametrize(
    ("required", "found", "present"),
    [
        ([T1, FLAIR], ["T1", "FLAIR"], True),
        ([T1, FLAIR], ["FLAIR", "T2", "T1 post"], True),
        ([T1, FLAIR], ["T1"], False),
        ([T1, FLAIR], [], False),
        # One series never stands for two, in whichever order it is asked for.
        ([T1, {"SeriesDescription": "T1 post"}], ["T1 post"], False),
        ([T1, {"SeriesDescription": "T1 post"}], ["T1 post", "T1"], True),
        ([{"SeriesDescription": "T1 post"}, T1], ["T1 post", "T1"], True),
        ([T1, T1, FLAIR], ["T1 a", "FLAIR"], False),
        ([T1, T1, T1], ["T1 a", "T1 b", "T1 c"], True),
    ],
)
def test_every_required_series_is_another_one(required: list, found: list[str], present: bool) -> None:
    conditions = route(complete_when=required).complete_when
    assert are_present(conditions, [facts(each) for each in found]) is present


def test_a_hopeless_search_ends_at_once() -> None:
    required = route(complete_when=[T1] * 39 + [FLAIR]).complete_when
    assert not are_present(required, [facts(f"T1 {i}") for i in range(60)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"complete_when": [{}]}, "at least one condition"),
        ({"complete_when": [{"Colour": "red"}]}, "Colour is neither a DICOM keyword"),
        ({"settled_after_s": 601.0}, "cannot be longer than quiet_time_s"),
    ],
)
def test_what_cannot_be_required_is_an_error_of_the_configuration(changes: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        route(**changes)


Receive = Callable[..., None]


class Study:
    """A study that arrives at a node, series by series; ``sweep`` looks at it some seconds later."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.node: SmallNode = make_node(folder / "node", routes=[{**ROUTE, **changes}])
        self.folder = folder
        self.completeness = Completeness(self.node.settings, self.node.records, self.node.spool)

    def receive(self, description: str, *, ago_s: float = 0, slices: int = 8, uid: str = "") -> None:
        uid = uid or f"2.25.{sum(map(ord, description))}"
        folder = self.folder / f"{uid}-{slices}"
        array = image_array((slices, 12, 14))
        self.node.receive_phantom(
            folder, array, series_instance_uid=uid, SeriesDescription=description, ago_s=ago_s
        )

    def sweep(self, after_s: float = 11) -> int:
        return self.completeness.sweep(utc_now() + timedelta(seconds=after_s))

    def states(self) -> list[SeriesState]:
        with self.node.records.read() as session:
            return list(session.scalars(select(SeriesRow.state).order_by(SeriesRow.first_instance_at)))


@pytest.fixture
def new_study(tmp_path: Path) -> Iterator[Callable[..., Study]]:
    made: list[Study] = []

    def new(**changes: object) -> Study:
        made.append(Study(tmp_path, **changes))
        return made[-1]

    yield new
    for each in made:
        each.node.records.close()


def test_the_set_completes_a_study_long_before_it_is_quiet(new_study: Callable[..., Study]) -> None:
    study = new_study()
    study.receive("T1 mprage")
    assert study.sweep() == 0
    study.receive("FLAIR")
    assert study.sweep(9) == 0  # still settling
    assert study.sweep() == 2
    assert study.states() == [SeriesState.COMPLETE] * 2
    assert study.sweep(700) == 0


def test_a_series_of_the_set_that_is_still_arriving_keeps_the_study_open(
    new_study: Callable[..., Study],
) -> None:
    study = new_study()
    study.receive("T1", slices=5, ago_s=60)  # quiet, and too few
    study.receive("FLAIR", ago_s=60)
    assert study.sweep(0) == 0
    study.receive("T1")  # the other three slices, just now
    assert study.sweep(9) == 0
    assert study.sweep() == 2
    jobs = study.node.jobs()
    with study.node.records.read() as session:
        assert [len(session.get_one(Job, job.job_id).inputs) for job in jobs] == [8, 8]


def test_without_the_set_quiet_time_completes_as_ever(new_study: Callable[..., Study]) -> None:
    study = new_study()
    study.receive("T1")
    assert study.sweep(599) == 0
    assert study.sweep(601) == 1


def test_a_series_beside_the_set_is_taken_when_it_has_settled(new_study: Callable[..., Study]) -> None:
    study = new_study()
    study.receive("T1", ago_s=60)
    study.receive("FLAIR", ago_s=60)
    study.receive("T2")
    assert study.sweep(0) == 2
    assert study.sweep(9) == 0
    assert study.sweep() == 1


def test_the_best_of_a_study_is_none_that_still_arrives(new_study: Callable[..., Study]) -> None:
    study = new_study(several="best")
    study.receive("T1", ago_s=60)
    study.receive("FLAIR", ago_s=60)
    study.receive("T2", slices=12)
    assert study.sweep(0) == 1
    (job,) = study.node.jobs()
    with study.node.records.read() as session:
        assert len(session.get_one(Job, job.job_id).inputs) == 8
    assert study.sweep() == 1  # the better one, now that it is there
    assert study.node.jobs()[1].supersedes_job_id == job.job_id


def test_a_late_slice_after_the_set_makes_a_job_that_supersedes(new_study: Callable[..., Study]) -> None:
    study = new_study()
    study.receive("T1", ago_s=60)
    study.receive("FLAIR", ago_s=60)
    assert study.sweep(0) == 2
    study.receive("T1", slices=9)
    assert study.sweep() == 1
    old = {job.job_id for job in study.node.jobs()[:2]}
    assert study.node.jobs()[2].supersedes_job_id in old


@pytest.mark.parametrize("rules", [{"gantry_tilt": "resample"}, {"guard": {"border": "refuse"}}])
def test_a_second_route_that_reads_in_another_way_is_told_that_it_does_not(
    tmp_path: Path, rules: dict[str, object]
) -> None:
    plain = {"name": "a", "model": "threshold", "match": {"Modality": "MR"}, "quiet_time_s": 10.0}
    other = {**plain, "name": "b", **rules}
    node = make_node(tmp_path / "node", routes=[plain, plain | {"name": "c"}, other])
    completeness = Completeness(node.settings, node.records, node.spool)
    node.receive_phantom(tmp_path / "s")
    assert completeness.sweep(utc_now()) == 1
    with node.records.read() as session:
        (told,) = session.scalars(select(Event).where(Event.kind == "route.reading_ignored"))
        assert told.alert
        assert told.detail == {"route": "b", "used": "a"}
    node.records.close()
