"""The gate: a version that is not whole, means something else or does worse is turned away, and told why."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from api_harness import ApiHarness, assert_problem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from governed_node import finish_job
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select
from trial_stand_in import MIB, TrialStandIn

from models.registry import Registry
from models.signing import key_id, sign
from service import gate as gate_module
from service.gate import GateReport, run_gate
from service.gate_checks import (
    CaseFigures,
    VersionFigures,
    judge_count,
    judge_dice,
    judge_golden,
    judge_memory,
    judge_time,
)
from service.gate_runs import GateRunner
from service.governance_rules import GateRules
from service.records.database import utc_now
from service.records.gates import claim_gate, latest_gate, request_gate
from service.records.governance_tables import Activation, GateState
from service.records.tables import Event
from service.site_cases import approve_case, list_cases

NEVER = threading.Event()
TRUSTED = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
URL = "/api/v1/models"


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> type[TrialStandIn]:
    stand_in = TrialStandIn.fresh()
    monkeypatch.setattr(gate_module, "Trial", stand_in)
    return stand_in


@pytest.fixture
def case(api: ApiHarness) -> str:
    """An active version, and a golden case of the site that it has made."""
    api.install()
    job_id = finish_job(api)
    approved = approve_case(api.records, api.spool, api.registry, job_id, None, actor="operator", now=api.now)
    return approved.case_id


def put_to_the_test(api: ApiHarness, version: str, *, accept: bool = False) -> GateReport:
    return run_gate(
        api.settings,
        api.records,
        api.spool,
        api.registry,
        "threshold",
        version,
        accept_changed_labels=accept,
        stop=NEVER,
    )


def failed(report: GateReport) -> dict[str, str]:
    assert report.passed is not bool(report.failed_sentences)
    return {c["name"]: c["sentence"] for c in report.content["checks"] if not c["passed"]}


# --- With the site's cases


def test_an_equal_version_passes_and_the_report_has_every_figure(
    api: ApiHarness, case: str, trial: type[TrialStandIn]
) -> None:
    version = api.install(version="1.1.0", title="Another title", activate=False)
    report = put_to_the_test(api, version)
    assert failed(report) == {}
    names = [check["name"] for check in report.content["checks"]]
    assert names == [
        "digests",
        "signature",
        "graph",
        "labels",
        "golden",
        "site_cases",
        "dice",
        "time",
        "memory",
    ]
    assert report.content["against"]["version"] == "1.0.0"
    for who, which in (("candidate", "1.1.0"), ("active", "1.0.0")):
        figures = report.content[who]
        assert figures["version"] == which
        assert [each["case"] for each in figures["cases"]] == ["golden", case]
        assert figures["cases"][1]["dice"] == {"low": 1.0, "high": 1.0}
    assert [name for name, _ in trial.runs] == ["1.1.0", "1.1.0", "1.0.0", "1.0.0"]


def test_a_worse_dice_is_turned_away(api: ApiHarness, case: str, trial: type[TrialStandIn]) -> None:
    version = api.install(version="1.1.0", thresholds=(150.5, 300.5), activate=False)
    trial.thresholds[version] = (150.5, 300.5)  # what has 120 is lost
    report = put_to_the_test(api, version)
    assert set(failed(report)) == {"dice"}
    assert f"low has Dice 0.0000 in {case}, 1.0000 before" in failed(report)["dice"]
    assert "high" not in failed(report)["dice"]


def test_a_refused_case_is_turned_away(api: ApiHarness, case: str, trial: type[TrialStandIn]) -> None:
    version = api.install(version="1.1.0", thresholds=(50.5, 300.5), activate=False)
    trial.thresholds[version] = (50.5, 300.5)
    trial.refuses.add(version)
    assert failed(put_to_the_test(api, version))["dice"].count("It takes other images.") == 1


def test_changed_labels_are_turned_away_until_someone_confirms(
    api: ApiHarness, case: str, trial: type[TrialStandIn]
) -> None:
    version = api.install(version="2.0.0", labels=("low", "higher"), activate=False)
    report = put_to_the_test(api, version)
    assert set(failed(report)) == {"labels"}
    assert "label 2 is 'higher'" in failed(report)["labels"]
    confirmed = put_to_the_test(api, version, accept=True)
    assert failed(confirmed) == {}
    assert set(confirmed.content["candidate"]["cases"][1]["dice"]) == {"low"}  # what both have


def test_a_golden_case_that_disagrees_is_turned_away(
    api: ApiHarness, case: str, trial: type[TrialStandIn]
) -> None:
    version = api.install(version="1.1.0", golden="wrong", activate=False)
    assert set(failed(put_to_the_test(api, version))) == {"golden"}


def test_an_altered_version_is_turned_away_before_it_is_run(
    api: ApiHarness, case: str, trial: type[TrialStandIn]
) -> None:
    version = api.install(version="1.1.0", thresholds=(50.5, 300.5), activate=False)
    (api.registry.root / "threshold" / version / "card.md").write_text("changed")
    report = put_to_the_test(api, version)
    assert set(failed(report)) == {"digests"}
    assert "'card.md' was altered" in failed(report)["digests"]
    assert trial.runs == []


@pytest.mark.parametrize("signer", [TRUSTED, STRANGER, None])
def test_a_version_that_nobody_trusted_has_signed_is_turned_away_before_it_is_run(
    api: ApiHarness, case: str, trial: type[TrialStandIn], signer: Ed25519PrivateKey | None
) -> None:
    version = api.install(version="1.1.0", title="Another title", activate=False)
    installed = api.registry.root / "threshold"
    sign(installed / "1.0.0", TRUSTED)
    if signer is not None:
        sign(installed / version, signer)
    api.registry = Registry(api.registry.root, trusted_keys=[TRUSTED.public_key()], runtimes=["onnxruntime"])
    report = put_to_the_test(api, version)
    key = key_id(TRUSTED.public_key())
    if signer is TRUSTED:
        assert failed(report) == {}
        assert f"Signed by the trusted key {key}." in [each["sentence"] for each in report.content["checks"]]
        return
    assert set(failed(report)) == {"signature"}
    said = "The bundle is not signed"
    if signer is STRANGER:
        said = f"No trusted key made the bundle's signature (trusted: {key})."
    assert failed(report)["signature"].startswith(said)
    assert trial.runs == []


def test_a_damaged_case_is_not_passed_over(api: ApiHarness, case: str, trial: type[TrialStandIn]) -> None:
    version = api.install(version="1.1.0", title="Another title", activate=False)
    with api.records.read() as session:
        (row,) = list_cases(session)
        api.spool.absolute(row.path).write_bytes(b"damaged")
    assert f"The site's golden case {case} is damaged" in failed(put_to_the_test(api, version))["site_cases"]


def test_an_active_version_that_is_merely_not_trusted_now_is_not_called_damaged(
    api: ApiHarness, case: str, trial: type[TrialStandIn]
) -> None:
    version = api.install(version="1.1.0", title="Another title", activate=False)
    sign(api.registry.root / "threshold" / "1.0.0", STRANGER)
    sign(api.registry.root / "threshold" / version, TRUSTED)
    api.registry = Registry(api.registry.root, trusted_keys=[TRUSTED.public_key()], runtimes=["onnxruntime"])
    report = put_to_the_test(api, version, accept=True)
    said = failed(report)
    assert set(said) == {"active", "site_cases"}
    assert "with the active version 1.0.0: its signature is not trusted now" in said["active"]
    assert (
        f"case {case} cannot be used without version 1.0.0, which made it: its signature"
        in (said["site_cases"])
    )
    for sentence in said.values():
        assert "trust its maker's key" in sentence
        assert "damaged" not in sentence
    assert "labels" not in {check["name"] for check in report.content["checks"]}


def test_an_altered_active_version_is_told_from_a_damaged_case(
    api: ApiHarness, case: str, trial: type[TrialStandIn]
) -> None:
    version = api.install(version="1.1.0", title="Another title", activate=False)
    (api.registry.root / "threshold" / "1.0.0" / "card.md").write_text("changed")
    said = failed(put_to_the_test(api, version))
    assert set(said) == {"active", "site_cases"}
    for sentence in said.values():
        assert "1.0.0 of 'threshold' is no longer what was installed: 'card.md' was altered" in sentence
        assert "adding the same bundle again repairs it" in sentence
        assert "is damaged" not in sentence


def test_a_first_version_is_judged_alone(api: ApiHarness, trial: type[TrialStandIn]) -> None:
    version = api.install(activate=False)
    report = put_to_the_test(api, version)
    assert failed(report) == {}
    assert report.content["active"] is None


# --- The judgements on figures alone


def figures(
    version: str, *cases: dict[str, float] | None, seconds: float = 1.0, peak: int = 0
) -> VersionFigures:
    made = [
        CaseFigures(f"case{i}", dice, seconds, peak, "float32", sentence=None if dice else "It failed.")
        for i, dice in enumerate(cases)
    ]
    return VersionFigures(version, CaseFigures("golden", {"a": 1.0}, seconds, peak, "float32"), made)


RULES = GateRules(maximum_mean_dice_loss=0.01, maximum_case_dice_loss=0.05)


@pytest.mark.parametrize(
    ("now", "then", "passed"),
    [
        ([{"a": 0.90}], [{"a": 0.909}], True),
        ([{"a": 0.90}], [{"a": 0.911}], False),  # on average
        ([{"a": 0.99}, {"a": 0.90}], [{"a": 0.94}, {"a": 0.96}], False),  # in one case
        ([{"a": 0.99}, {"a": 0.95}], [{"a": 0.94}, {"a": 0.98}], True),
        ([{"a": 0.9, "new": 0.1}], [{"a": 0.9}], True),
        ([None], [{"a": 0.9}], False),
        ([{"a": 0.9}], [None], True),
    ],
)
def test_dice_is_held_against_the_active_version(
    now: list[dict[str, float] | None], then: list[dict[str, float] | None], passed: bool
) -> None:
    assert judge_dice(figures("2", *now), figures("1", *then), RULES).passed is passed


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(0, 1)), max_size=4))
def test_no_version_is_worse_than_itself(cases: list[dict[str, float]]) -> None:
    whole = [case for case in cases if case]
    assert judge_dice(figures("2", *whole), figures("1", *whole), GateRules()).passed


def test_a_smallest_dice_holds_without_an_active_version() -> None:
    rules = GateRules(minimum_dice=0.8)
    assert not judge_dice(figures("1", {"a": 0.79, "b": 0.9}), None, rules).passed
    assert judge_dice(figures("1", {"a": 0.8}), None, rules).passed
    assert not judge_count(2, GateRules(minimum_cases=3)).passed
    assert judge_count(3, GateRules(minimum_cases=3)).passed


def test_time_and_memory_count_by_ratio_and_by_what_anybody_notices() -> None:
    rules = GateRules(
        maximum_time_ratio=2, noticed_time_s=10, maximum_memory_ratio=1.5, noticed_memory_bytes=100
    )
    active = figures("1", {"a": 1.0}, seconds=10.0, peak=1000)
    for seconds, passed in ((19.9, True), (20.1, False)):
        assert judge_time(figures("2", {"a": 1.0}, seconds=seconds), active, rules).passed is passed
    for peak, passed in ((1500, True), (1501, False)):
        assert judge_memory(figures("2", {"a": 1.0}, peak=peak), active, rules).passed is passed
    small = figures("1", {"a": 1.0}, seconds=0.1, peak=10)
    assert judge_time(figures("2", {"a": 1.0}, seconds=1.0), small, rules).passed
    assert judge_memory(figures("2", {"a": 1.0}, peak=100), small, rules).passed


def test_an_int8_golden_case_has_the_limit_of_int8() -> None:
    for precision, passed in (("float32", False), ("int8", True)):
        assert judge_golden(CaseFigures("golden", {"a": 0.995}, 1.0, None, precision)).passed is passed


# --- Over HTTP, and in the records


def settle(api: ApiHarness) -> None:
    runner = GateRunner(api.settings, api.records, api.spool, api.registry, owner="worker")
    while runner.run_one(NEVER):
        pass


def test_activation_takes_a_passed_gate(api: ApiHarness, case: str, trial: type[TrialStandIn]) -> None:
    version = api.install(version="1.1.0", title="Another title", activate=False)
    activate = {"version": version}
    problem = assert_problem(api.post(f"{URL}/threshold/activate", json=activate), 409, "GATE_NOT_PASSED")
    assert "has not been through the gate" in problem["detail"]
    assert_problem(api.get(f"{URL}/threshold/{version}/gate"), 404, "NOT_FOUND")
    asked = api.post(f"{URL}/threshold/{version}/gate", json={})
    assert (asked.status_code, asked.json()["state"]) == (202, "queued")
    again = api.post(f"{URL}/threshold/{version}/gate", json={})
    assert again.json()["gate_id"] == asked.json()["gate_id"]
    assert_problem(api.post(f"{URL}/threshold/activate", json=activate), 409, "GATE_NOT_PASSED")
    settle(api)
    seen = api.get(f"{URL}/threshold/{version}/gate").json()
    assert (seen["state"], seen["against_version"]) == ("passed", "1.0.0")
    assert {check["passed"] for check in seen["checks"]} == {True}
    assert api.post(f"{URL}/threshold/activate", json=activate).json()["active_version"] == version
    (activation,) = api.get(f"{URL}/threshold/activations").json()
    assert (activation["state"], activation["gate_id"]) == ("on_probation", seen["gate_id"])


def test_a_gate_beside_another_version_does_not_count(
    api: ApiHarness, case: str, trial: type[TrialStandIn]
) -> None:
    version = api.install(version="1.1.0", title="Another title", activate=False)
    api.post(f"{URL}/threshold/{version}/gate", json={})
    settle(api)
    api.install(version="1.0.1", title="A third")  # becomes the active one meanwhile
    problem = assert_problem(
        api.post(f"{URL}/threshold/activate", json={"version": version}), 409, "GATE_NOT_PASSED"
    )
    assert "passed the gate beside 1.0.0; now 1.0.1 is active" in problem["detail"]


def test_a_failed_gate_is_overridden_with_a_reason_that_everybody_sees(
    api: ApiHarness, case: str, trial: type[TrialStandIn]
) -> None:
    version = api.install(version="1.1.0", thresholds=(150.5, 300.5), activate=False)
    trial.thresholds[version] = (150.5, 300.5)
    api.post(f"{URL}/threshold/{version}/gate", json={})
    settle(api)
    problem = assert_problem(
        api.post(f"{URL}/threshold/activate", json={"version": version}), 409, "GATE_NOT_PASSED"
    )
    assert "low has Dice 0.0000" in problem["detail"]
    short = {"version": version, "override_reason": "because"}
    assert_problem(api.post(f"{URL}/threshold/activate", json=short), 422, "INVALID_REQUEST")
    why = {"version": version, "override_reason": "The old one crashes on the new scanner."}
    assert api.post(f"{URL}/threshold/activate", json=why).json()["active_version"] == version
    with api.records.read() as session:
        (event,) = session.scalars(select(Event).where(Event.kind == "model.gate_overridden"))
        assert (event.actor, event.alert, event.subject) == ("admin", True, f"threshold@{version}")
        assert event.detail["reason"] == why["override_reason"]
        assert session.scalars(select(Activation)).one().override_reason == why["override_reason"]


def test_a_site_may_do_without_the_gate(api: ApiHarness, trial: type[TrialStandIn]) -> None:
    api.install()
    api.install(version="1.1.0", title="Another title", activate=False)
    without = api.settings.models.model_copy(update={"require_gate": False})
    object.__setattr__(api.settings, "models", without)
    activated = api.post(f"{URL}/threshold/activate", json={"version": "1.1.0"})
    assert activated.json()["active_version"] == "1.1.0"


def test_a_gate_whose_holder_died_is_run_again_and_not_for_ever(api: ApiHarness) -> None:
    api.install(activate=False)
    now = utc_now()
    with api.records.write() as session:
        request_gate(
            session,
            model_name="threshold",
            model_version="1.0.0",
            model_digest="d" * 64,
            accept_changed_labels=False,
            actor="admin",
            at=now,
        )
    for attempt in (1, 2, 3):
        with api.records.write() as session:
            gate = claim_gate(session, owner="worker", lease_s=10, now=now)
            assert gate is not None
            assert gate.attempt == attempt
            assert claim_gate(session, owner="other", lease_s=10, now=now) is None
        now += timedelta(seconds=11)
    with api.records.write() as session:
        assert claim_gate(session, owner="worker", lease_s=10, now=now) is None
        lost = latest_gate(session, "threshold", "1.0.0")
        assert lost is not None
        assert lost.state is GateState.FAILED
        assert "died 3 times" in lost.report["checks"][0]["sentence"]


def test_a_gate_that_makes_way_is_not_counted(api: ApiHarness, case: str, trial: type[TrialStandIn]) -> None:
    version = api.install(version="1.1.0", title="Another title", activate=False)
    api.post(f"{URL}/threshold/{version}/gate", json={})
    runner = GateRunner(api.settings, api.records, api.spool, api.registry, owner="worker")
    stop = threading.Event()
    trial.before = staticmethod(stop.set)  # type: ignore[method-assign]  # a job comes in
    for _ in range(5):
        assert runner.run_one(stop)
        with api.records.read() as session:
            gate = latest_gate(session, "threshold", version)
            assert gate is not None
            assert (gate.state, gate.attempt) == (GateState.QUEUED, 0)
    trial.before = staticmethod(lambda: None)  # type: ignore[method-assign]
    assert runner.run_one(NEVER)
    assert api.get(f"{URL}/threshold/{version}/gate").json()["state"] == "passed"


def test_figures_are_of_the_process(api: ApiHarness, case: str, trial: type[TrialStandIn]) -> None:
    version = api.install(version="1.1.0", title="Another title", activate=False)
    trial.seconds[version], trial.peak_bytes[version] = 100.0, 5000 * MIB
    assert set(failed(put_to_the_test(api, version))) == {"time", "memory"}
