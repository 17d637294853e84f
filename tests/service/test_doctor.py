"""The doctor finds what would keep a node from working, and says what to do about it."""

from __future__ import annotations

import re
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from bundle_factory import make_threshold_bundle
from postgresql import PostgresServer

from models.registry import Registry
from service import doctor
from service.diagnosis import Finding, Health
from service.doctor import examine
from service.mounts import Mount
from service.records import database
from service.records.database import Records, utc_now
from service.records.migrate import upgrade
from service.settings import Settings

DESTINATION = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 104}
ROUTE = {"name": "mr", "model": "threshold", "match": {"Modality": "MR"}, "destinations": ["pacs"]}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """The threshold model 1.0.0, active."""
    made = Registry(tmp_path / "registry", runtimes=("onnxruntime",))
    made.add(make_threshold_bundle(tmp_path / "bundle").folder)
    made.activate("threshold", "1.0.0")
    return made


def settings(tmp_path: Path, **changes: Any) -> Settings:
    """A configuration in which nothing is wrong."""
    (tmp_path / "data").mkdir(mode=0o700, exist_ok=True)
    values: dict[str, Any] = {
        "data_dir": tmp_path / "data",
        "dicom": {"port": 0, "peers": [{"ae_title": "PACS"}]},
        "http": {"port": 0},
        "storage": {"low_watermark_bytes": 0, "reserve_bytes": 0},
        "destinations": [DESTINATION],
        "routes": [ROUTE],
    }
    return Settings(**{**values, **changes})


def findings(settings: Settings, registry: Registry, echo: str | None = None) -> dict[str, Finding]:
    found = list(examine(settings, registry, echo=lambda _: echo))
    for finding in found:
        assert (finding.health is Health.OK) == (finding.remedy == ""), finding
    return {finding.what: finding for finding in found}


def test_a_healthy_node(tmp_path: Path, registry: Registry) -> None:
    healthy = settings(tmp_path)
    upgrade(healthy.records_url)
    found = findings(healthy, registry)
    assert {f.what for f in found.values() if f.health is Health.PROBLEM} == set()
    assert {"data folder", "disk", "database", "DICOM port", "HTTP port", "machine", "runtime"} <= set(found)
    assert {"model threshold 1.0.0", "peers", "route mr", "destination pacs"} <= set(found)


def test_looking_changes_nothing(tmp_path: Path, registry: Registry) -> None:
    fresh = settings(tmp_path, data_dir=tmp_path / "not" / "there")
    assert findings(fresh, registry)["data folder"].health is Health.OK
    assert not (tmp_path / "not").exists()


def test_a_data_folder_that_is_a_file(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "data").write_text("")
    wrong = Settings(data_dir=tmp_path / "data" / "below")
    assert next(iter(doctor.check_data_dir(wrong))).health is Health.OK  # its parent can be written to


def test_a_full_disk(tmp_path: Path, registry: Registry) -> None:
    full = settings(tmp_path, storage={"low_watermark_bytes": 1 << 60, "reserve_bytes": 0})
    assert findings(full, registry)["disk"].health is Health.PROBLEM


def test_an_old_database(tmp_path: Path, registry: Registry) -> None:
    old = settings(tmp_path)
    Records(old.records_url).engine.connect().close()
    found = findings(old, registry)["database"]
    assert (found.health, "upgrades it" in found.remedy) == (Health.WARNING, True)


def test_a_database_that_does_not_answer_keeps_its_password_to_itself(
    tmp_path: Path, registry: Registry
) -> None:
    unreachable = settings(tmp_path, database_url=f"sqlite:///{tmp_path}/data")
    found = findings(unreachable, registry)["database"]
    assert found.health is Health.PROBLEM


def test_a_port_that_somebody_listens_on(tmp_path: Path, registry: Registry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = settings(tmp_path, http={"port": listener.getsockname()[1]})
        assert findings(taken, registry)["HTTP port"].health is Health.WARNING


def test_an_address_that_is_not_here(tmp_path: Path) -> None:
    assert doctor.check_port("DICOM port", "203.0.113.1", 11112).health is Health.PROBLEM


def test_a_destination_that_does_not_answer(tmp_path: Path, registry: Registry) -> None:
    found = findings(settings(tmp_path), registry, echo="no connection.")["destination pacs"]
    assert found.health is Health.PROBLEM
    assert found.message == "PACS@127.0.0.1:104: no connection."


@pytest.mark.parametrize(
    ("route", "health"),
    [
        ({"model": "absent"}, Health.PROBLEM),
        ({"version": "9.9.9"}, Health.PROBLEM),
        ({"destinations": []}, Health.WARNING),
    ],
)
def test_a_route_that_leads_nowhere(
    tmp_path: Path, registry: Registry, route: dict[str, Any], health: Health
) -> None:
    assert findings(settings(tmp_path, routes=[ROUTE | route]), registry)["route mr"].health is health


def test_a_route_that_does_not_tell_the_channels_of_its_model_apart(
    tmp_path: Path, registry: Registry
) -> None:
    bundle = make_threshold_bundle(tmp_path / "two", name="two", channels=2)
    registry.add(bundle.folder, check_golden=False)
    registry.activate("two", "1.0.0")
    t1, flair = {"SeriesDescription": "T1"}, {"SeriesDescription": "FLAIR"}
    for model, channels, said in (
        ("two", {}, "does not tell them apart"),
        ("two", {"channel 0": t1, "FLAIR": flair}, "It names the channels channel 0, FLAIR; two 1.0.0 has"),
        ("threshold", {"channel 0": t1, "channel 1": flair}, "threshold 1.0.0 has channel 0."),
        ("two", {"channel 1": t1, "channel 0": flair}, None),
    ):
        route = ROUTE | {"model": model, "channels": channels}
        found = findings(settings(tmp_path, routes=[route]), registry)["route mr"]
        assert (found.health is Health.OK) == (said is None), found
        assert said is None or said in found.message


def test_a_withdrawn_model_and_an_altered_one(tmp_path: Path, registry: Registry) -> None:
    registry.withdraw("threshold", "1.0.0")
    assert findings(settings(tmp_path), registry)["route mr"].health is Health.PROBLEM
    (registry.root / "threshold" / "1.0.0" / "card.md").write_text("changed")
    assert findings(settings(tmp_path), registry)["model threshold 1.0.0"].health is Health.PROBLEM


def test_a_node_that_nobody_can_reach_and_that_does_nothing(tmp_path: Path, registry: Registry) -> None:
    idle = findings(settings(tmp_path, dicom={"port": 0}, routes=[]), registry)
    assert idle["peers"].health is Health.WARNING
    assert idle["routes"].health is Health.WARNING


def test_sqlite_on_a_network_file_system_is_a_problem_and_postgresql_is_tried_there(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "mount_of", lambda _: Mount("nfs4", frozenset({"rw"})))
    on_a_file = settings(tmp_path)
    assert [f.health for f in doctor.check_data_dir(on_a_file)] == [Health.OK, Health.PROBLEM]
    on_a_server = settings(tmp_path, database_url="postgresql+psycopg://segnode@postgres/segnode")
    told = list(doctor.check_data_dir(on_a_server))
    assert [(f.what, f.health) for f in told] == [("data folder", Health.OK), ("shared folder", Health.OK)]
    assert "nfs4" in told[1].message


def test_the_clock_of_the_database_server(
    tmp_path: Path, postgresql: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgresql.database() as url:
        node = settings(tmp_path, database_url=url)
        found = {finding.what: finding for finding in doctor.check_database(node)}
        assert {what: f.health for what, f in found.items()} == {"clock": Health.OK, "database": Health.OK}
        monkeypatch.setattr(database, "utc_now", lambda: utc_now() - timedelta(minutes=3))
        clock = doctor.check_clock(node)
    assert clock.health is Health.WARNING
    assert re.search(r"(179|180) s behind", clock.message)
