"""The doctor finds what would keep a node from working, and says what to do about it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from bundle_factory import make_threshold_bundle

from models.registry import Registry
from service import doctor
from service.doctor import Finding, Health, examine
from service.records.database import Records
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
    (tmp_path / "data").mkdir(exist_ok=True)
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
    assert doctor._file_system(Path("/x/y"), _mounts(tmp_path, "srv /x nfs4 rw 0 0\n")) == "nfs4"
    assert doctor._file_system(Path("/xy"), _mounts(tmp_path, "srv /x nfs4 rw 0 0\n")) == ""


def _mounts(folder: Path, lines: str) -> Path:
    path = folder / "mounts"
    path.write_text(lines)
    return path


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
