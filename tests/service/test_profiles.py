"""Every destination gets the objects of its profile, each rendered once and proven; nothing gets lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from findings import make_finding, phantom_source, rendered
from phantom import chiral_labels, phantom_manifest
from pydantic import ValidationError
from pydicom import dcmread
from small_node import SmallNode, image_array, make_node
from sqlalchemy import select
from storage_scp import StorageScp, StoredObject
from waiting import wait_until

from service.completeness import Completeness
from service.dicom.series import SourceSeries
from service.profiles import Profile
from service.records.database import Records, utc_now
from service.records.deliveries import retry_delivery
from service.records.jobs import claim_job, enqueue, succeed_job
from service.records.supersession import add_destinations
from service.records.tables import (
    Delivery,
    DeliveryState,
    Event,
    Instance,
    InstanceKind,
    Job,
    JobOrigin,
    JobState,
    Result,
    ResultKind,
)
from service.records.work import NewInput, NewJob, NewResult, Outcome
from service.settings import Settings

SEG, LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"
REPORT, CAPTURE = "1.2.840.10008.5.1.4.1.1.88.22", "1.2.840.10008.5.1.4.1.1.7"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceSeries:
    return phantom_source(tmp_path_factory.mktemp("source"))


# --- settings -----------------------------------------------------------------------------------------


def test_the_default_is_a_binary_segmentation_and_a_report() -> None:
    profile = Profile()
    assert (profile.segmentation, profile.measurements, profile.secondary_capture) == ("binary", True, False)
    assert (profile.maximum_frames, profile.empty_frames, profile.one_per_label) == (None, "omit", False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"segmentation": "none", "measurements": False},
        {"segmentation": "surface"},
        {"maximum_frames": 0},
        {"empty_frames": "some"},
        {"unknown": True},
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    destination = {"name": "a", "ae_title": "A", "host": "h", "port": 104, "profile": wrong}
    with pytest.raises(ValidationError):
        Settings(destinations=[destination])


def test_equal_profiles_have_one_key_and_other_profiles_another() -> None:
    assert Profile().key == Profile(segmentation="binary", measurements=True).key
    keys = {
        Profile(**changes).key
        for changes in (
            {},
            {"segmentation": "labelmap"},
            {"measurements": False},
            {"secondary_capture": True},
            {"maximum_frames": 400},
            {"empty_frames": "keep"},
            {"one_per_label": True},
        )
    }
    assert len(keys) == 7


def settings_with(**profiles: dict[str, Any]) -> Settings:
    return Settings(
        destinations=[
            {"name": name, "ae_title": name.upper(), "host": "127.0.0.1", "port": 104, "profile": profile}
            for name, profile in profiles.items()
        ],
        routes=[
            {"name": "r", "model": "m", "match": {"Modality": "MR"}, "destinations": ["a"]},
            {"name": "s", "model": "m", "match": {"Modality": "MR"}, "destinations": ["b", "c"]},
        ],
    )


def test_a_job_is_rendered_for_every_destination_that_its_model_may_go_to() -> None:
    settings = settings_with(a={}, b={"segmentation": "labelmap"}, c={}, d={"secondary_capture": True})
    assert settings.profiles_for("m", ["a"]) == (Profile(), Profile(segmentation="labelmap"))
    assert settings.profiles_for("m", ["b"]) == (Profile(segmentation="labelmap"), Profile())
    assert settings.profiles_for("other", ["d"]) == (Profile(secondary_capture=True),)
    assert settings.profiles_for("other", []) == (Profile(),)
    assert settings.profiles_for("other", ["gone"]) == (Profile(),)


# --- rendering ----------------------------------------------------------------------------------------


def test_uids_depend_on_the_profile_and_names_do_not_collide(tmp_path: Path, source: SourceSeries) -> None:
    finding = make_finding(source)
    one = rendered(finding, tmp_path, 1)
    two = rendered(finding, tmp_path, 2, empty_frames="keep")
    assert not {f.sop_instance_uid for f in one} & {f.sop_instance_uid for f in two}
    assert not {f.name for f in one} & {f.name for f in two}
    assert [f.profile for f in one] == [Profile().key] * 2
    assert [f.profile for f in two] == [Profile(empty_frames="keep").key] * 2


def test_one_object_for_each_label(tmp_path: Path, source: SourceSeries) -> None:
    files = rendered(make_finding(source), tmp_path, one_per_label=True, measurements=False)
    datasets = [dcmread(tmp_path / file.name) for file in files]
    assert [[s.SegmentLabel for s in d.SegmentSequence] for d in datasets] == [
        ["part 1"],
        ["part 2"],
        ["part 3"],
    ]
    assert len({d.SOPInstanceUID for d in datasets}) == 3
    assert len({d.SeriesInstanceUID for d in datasets}) == 1
    assert [d.InstanceNumber for d in datasets] == [1, 2, 3]
    painted = sum(int(d.pixel_array.sum()) for d in datasets)
    assert painted == np.count_nonzero(chiral_labels())


@pytest.mark.parametrize("form", ["binary", "labelmap"])
def test_too_many_frames_are_split_and_what_is_still_too_many_is_withheld(
    tmp_path: Path, source: SourceSeries, form: str
) -> None:
    finding = make_finding(source)
    whole = rendered(finding, tmp_path / "whole", segmentation=form)
    frames = dcmread(tmp_path / "whole" / whole[0].name).NumberOfFrames
    as_it_is = rendered(finding, tmp_path / "fits", segmentation=form, maximum_frames=frames)
    assert [f.kind for f in as_it_is] == ["segmentation", "report"]
    limit = 3
    split = rendered(finding, tmp_path / "split", segmentation=form, maximum_frames=limit)
    segmentations = [f for f in split if f.kind == "segmentation"]
    assert len(segmentations) == 3
    for file in split:
        frames = dcmread(tmp_path / "split" / file.name).get("NumberOfFrames", 0)
        assert (file.withheld is not None) is (frames > limit)
    (withheld,) = [f.withheld for f in split if f.withheld]
    assert withheld.startswith("The segmentation of part 1 alone has 4 frames; the destination takes 3.")


def test_two_renderings_are_byte_identical(tmp_path: Path, source: SourceSeries) -> None:
    finding = make_finding(source, manifest=phantom_manifest(3, laterality=["left"]))
    contents = []
    for name in "ab":
        files = rendered(finding, tmp_path / name, secondary_capture=True, one_per_label=True)
        contents.append([(tmp_path / name / file.name).read_bytes() for file in files])
    assert contents[0] == contents[1]
    other = replace(finding, settings_digest="other")
    assert not {f.sop_instance_uid for f in rendered(other, tmp_path / "c", secondary_capture=True)} & {
        f.sop_instance_uid for f in rendered(finding, tmp_path / "d", secondary_capture=True)
    }


# --- a node -------------------------------------------------------------------------------------------


@pytest.fixture
def pacs() -> Iterator[list[StorageScp]]:
    """Three archives."""
    with StorageScp() as one, StorageScp() as two, StorageScp() as three:
        yield [one, two, three]


def node_with(
    folder: Path, pacs: list[StorageScp], profiles: list[dict[str, Any]], **route: Any
) -> SmallNode:
    destinations = [
        {"name": f"D{i}", "ae_title": "PACS", "host": "127.0.0.1", "port": scp.port, "profile": profile}
        for i, (scp, profile) in enumerate(zip(pacs, profiles, strict=False))
    ]
    routes = [
        {
            "name": "mr",
            "model": "threshold",
            "match": {"Modality": "MR"},
            "quiet_time_s": 1.0,
            "destinations": [d["name"] for d in destinations],
            **route,
        }
    ]
    node = make_node(folder / "node", destinations=destinations, routes=routes)
    node.add_model(folder / "bundle")
    return node


def deliveries(node: SmallNode) -> list[Delivery]:
    with node.records.read() as session:
        return list(session.scalars(select(Delivery)))


def run_until_sent(node: SmallNode, count: int) -> None:
    with node.working():
        node.wait_for_jobs(JobState.SUCCEEDED)
        wait_until(
            lambda: [d.state for d in deliveries(node)] == [DeliveryState.SENT] * count,
            60,
            lambda: str([(d.destination, d.state, d.last_error) for d in deliveries(node)]),
        )


def classes(objects: list[StoredObject]) -> list[str]:
    return sorted(each.sop_class_uid for each in objects)


def test_every_destination_gets_what_its_profile_says(tmp_path: Path, pacs: list[StorageScp]) -> None:
    node = node_with(
        tmp_path,
        pacs,
        [{}, {"segmentation": "labelmap", "secondary_capture": True}, {"segmentation": "none"}],
    )
    node.receive_phantom(tmp_path / "s")
    run_until_sent(node, 6)
    assert classes(pacs[0].objects) == sorted([SEG, REPORT])
    assert classes(pacs[1].objects) == sorted([LABEL_MAP, REPORT, CAPTURE])
    assert classes(pacs[2].objects) == [REPORT]
    sent = [each.sop_instance_uid for scp in pacs for each in scp.objects]
    assert len(set(sent)) == len(sent)
    with node.records.read() as session:
        stored = {r.sop_instance_uid: node.spool.absolute(r.path) for r in session.scalars(select(Result))}
    for scp in pacs:
        for each in scp.objects:
            assert each.data_set in stored[each.sop_instance_uid].read_bytes()
    node.records.close()


def test_equal_profiles_share_one_rendering(tmp_path: Path, pacs: list[StorageScp]) -> None:
    node = node_with(tmp_path, pacs, [{}, {"measurements": True}])
    node.receive_phantom(tmp_path / "s")
    run_until_sent(node, 4)
    assert {o.sop_instance_uid for o in pacs[0].objects} == {o.sop_instance_uid for o in pacs[1].objects}
    node.records.close()


def test_nothing_found_sends_the_report_alone(tmp_path: Path, pacs: list[StorageScp]) -> None:
    node = node_with(tmp_path, pacs, [{}, {"measurements": False}])
    node.receive_phantom(tmp_path / "s", np.minimum(image_array(), 90))
    run_until_sent(node, 2)
    assert classes(pacs[0].objects) == classes(pacs[1].objects) == [REPORT]
    node.records.close()


def test_the_nodes_own_objects_that_come_back_trigger_nothing(tmp_path: Path, pacs: list[StorageScp]) -> None:
    everything = {"match": {"instances": {"min": 1}}}
    node = node_with(tmp_path, pacs, [{"secondary_capture": True}], **everything)
    node.receive_phantom(tmp_path / "s")
    run_until_sent(node, 3)
    with node.records.read() as session:
        own = [node.spool.absolute(r.path) for r in session.scalars(select(Result)) if r.sop_instance_uid]
    recorded = node.receive(own, ago_s=60)
    with node.records.read() as session:
        kinds = [session.get_one(Instance, each.instance_id).kind for each in recorded]
    assert kinds == [InstanceKind.OWN] * 3
    assert Completeness(node.settings, node.records, node.spool).sweep(utc_now()) == 0
    assert len(node.jobs()) == 1
    node.records.close()


def test_an_object_with_too_many_frames_is_parked_until_a_person_lets_it_go(
    tmp_path: Path, pacs: list[StorageScp]
) -> None:
    node = node_with(tmp_path, pacs, [{"maximum_frames": 1}])
    node.receive_phantom(tmp_path / "s")
    with node.working():
        node.wait_for_jobs(JobState.SUCCEEDED)
        wait_until(lambda: len(pacs[0].objects) == 1, 60)
        parked = [d for d in deliveries(node) if d.state is DeliveryState.PARKED]
        assert len(parked) == 2  # one for each label
        assert all("alone has 2 frames; the destination takes 1." in (d.last_error or "") for d in parked)
        with node.records.read() as session:
            alerts = session.scalars(select(Event).where(Event.kind == "delivery_parked")).all()
            assert sorted(e.subject for e in alerts) == sorted(d.delivery_id for d in parked)
            assert all(e.alert for e in alerts)
        with node.records.write() as session:
            for delivery in parked:
                retry_delivery(session, delivery.delivery_id, now=utc_now())
        wait_until(lambda: len(pacs[0].objects) == 3, 60)
    assert classes(pacs[0].objects) == sorted([SEG, SEG, REPORT])
    node.records.close()


# --- the records --------------------------------------------------------------------------------------


def succeeded_job(records: Records, profiles: list[str | None], **destinations: str) -> str:
    """A job with one object for each profile, queued for destinations with these profiles."""
    now = utc_now()
    with records.write() as session:
        new = NewJob(JobOrigin.DICOM, "m", "key", [NewInput("uploads/x")], destinations=tuple(destinations))
        enqueue(session, new, at=now)
        job = claim_job(session, owner="w", lease_s=60, now=now)
        assert job is not None
        results = [
            NewResult(ResultKind.REPORT, f"r/{i}", 1, "0" * 64, REPORT, f"2.25.{i + 1}", profile=profile)
            for i, profile in enumerate(profiles)
        ]
        outcome = Outcome(results, "r", "float32")
        succeed_job(session, job.job_id, job.attempt, outcome, now=now, profile_keys=destinations)
        return job.job_id


def queued(records: Records) -> set[tuple[str, str | None, DeliveryState]]:
    with records.read() as session:
        return {(d.destination, d.result.profile, d.state) for d in session.scalars(select(Delivery))}


PENDING, PARKED = DeliveryState.PENDING, DeliveryState.PARKED


def test_a_destination_whose_profile_was_not_made_gets_another_parked(records: Records) -> None:
    succeeded_job(records, ["p", "q"], a="p", b="q", c="new")
    assert queued(records) == {("a", "p", PENDING), ("b", "q", PENDING), ("c", "p", PARKED)}
    with records.read() as session:
        (parked,) = session.scalars(select(Delivery).where(Delivery.state == PARKED))
        assert "profile was changed" in (parked.last_error or "")


def test_a_destination_that_is_added_later_gets_its_profile(records: Records) -> None:
    job_id = succeeded_job(records, ["p", "q"], a="p")
    with records.write() as session:
        job = session.get_one(Job, job_id)
        add_destinations(session, job, ["a", "b"], {"a": "p", "b": "q"}, at=utc_now())
    assert queued(records) == {("a", "p", PENDING), ("b", "q", PENDING)}


def test_objects_of_no_profile_go_everywhere(records: Records) -> None:
    succeeded_job(records, [None], a="p", b="q")
    assert queued(records) == {("a", None, PENDING), ("b", None, PENDING)}
