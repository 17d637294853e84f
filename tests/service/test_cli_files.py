"""What a newcomer's machine refuses: a place that cannot be written to, a full disk, no models yet."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_factory import make_threshold_bundle
from command_line import Segnode
from waiting import wait_until

from models.registry import Registry
from service import doctor
from service.commands import settings as command_settings
from service.commands.files import files_error_of
from service.diagnosis import Health
from service.routes import Route
from service.settings import Settings

ROUTE = Route.model_validate({"name": "mr", "model": "hippocampus", "match": {"Modality": "MR"}})
NODE = "data_dir: data\ndicom: {port: 0}\nhttp: {port: 0}\n"


def refuse_writing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Whoever runs the tests may be root, to whom nothing is refused."""
    asked = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: asked(path, mode) and not (Path(path) == folder and mode & os.W_OK)
    )


@pytest.mark.parametrize("option", ["--output", "--measurements"])
def test_segment_says_first_that_a_folder_cannot_be_written_to(
    segnode: Segnode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    series = tmp_path / "series"
    series.mkdir()
    (tmp_path / "closed").mkdir()
    refuse_writing(monkeypatch, Path("closed"))
    files = {"--output": "out.dcm", "--measurements": "sr.dcm"} | {option: "closed/it.dcm"}
    result = segnode("segment", series, "--model", "m", *(text for pair in files.items() for text in pair))
    assert result.status == 2
    assert "the folder closed cannot be written to" in " ".join(result.err.split())


def test_accept_says_first_that_its_pdf_cannot_be_written(segnode: Segnode, tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text(NODE)
    for output, sentence in [("nowhere/it.pdf", "there is no folder nowhere"), (".", ". is a folder")]:
        result = segnode("accept", "-o", output, "--config", "node.yaml")
        assert result.status == 2
        assert sentence in result.err


@pytest.mark.parametrize(
    ("error", "line", "remedy"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied.", "right to it"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.", "Free some space"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system.", "written to"),
    ],
)
def test_what_the_file_system_refuses_is_a_line_and_a_remedy(
    segnode: Segnode, monkeypatch: pytest.MonkeyPatch, error: OSError, line: str, remedy: str
) -> None:
    def fail(_config: Path | None) -> Settings:
        raise error

    monkeypatch.setattr(command_settings, "load", fail)
    monkeypatch.setattr("service.commands.models.load", fail)
    result = segnode("models", "list")
    told, advice = result.err.splitlines()
    assert (result.status, told) == (1, f"FILES: {line}")
    assert remedy in advice


def test_an_error_that_names_no_file_is_no_error_of_files() -> None:
    assert files_error_of(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")) is None


def test_a_part_makes_the_data_folder_for_its_user_alone_and_ends_while_its_supervisor_lives(
    tmp_path: Path,
) -> None:
    (tmp_path / "node.yaml").write_text(NODE)
    part = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "receive", "--supervised", "--config", "node.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert part.stdout is not None
        assert part.stderr is not None
        assert part.stdout.readline().startswith(b"{")
        part.send_signal(signal.SIGTERM)
        wait_until(lambda: part.poll() is not None)
        assert (part.returncode, b"Fatal" in part.stderr.read()) == (0, False)
    finally:
        part.kill()
        part.communicate()
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700


def test_a_damaged_version_does_not_hide_the_others(segnode: Segnode, tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text(NODE)
    registry = Registry(tmp_path / "data" / "models", runtimes=("onnxruntime",))
    for name, version in [("gone", "1.0.0"), ("whole", "1.0.0")]:
        registry.add(make_threshold_bundle(tmp_path / name, name=name, version=version).folder)
        registry.activate(name, version)
    shutil.rmtree(tmp_path / "data" / "models" / "gone" / "1.0.0")
    result = segnode("models", "list", "--config", "node.yaml")
    assert result.status == 1
    states = {line.split()[0]: line.split()[2:4] for line in result.out.splitlines()[1:]}
    assert states["gone"] == ["active", "damaged"]
    assert states["whole"][0] == "active"
    assert result.err.startswith("REGISTRY: Version 1.0.0 of 'gone'")


def test_restoring_what_is_not_there_is_a_usage_error(segnode: Segnode) -> None:
    assert segnode("restore", "nowhere").status == 2


def test_doctor_knows_the_models_that_serve_will_install(tmp_path: Path) -> None:
    empty = Registry(tmp_path / "registry")
    (found,) = doctor.check_models(empty)
    assert found.health is Health.OK
    assert "hippocampus" in found.message
    assert doctor.check_route(ROUTE, empty).health is Health.OK
    other = ROUTE.model_copy(update={"model": "nobody-has-it"})
    assert doctor.check_route(other, empty).health is Health.PROBLEM


def test_doctor_expects_no_unsigned_model_where_signatures_are_asked_for(tmp_path: Path) -> None:
    strict = Registry(tmp_path / "registry", trusted_keys=())
    (found,) = doctor.check_models(strict)
    assert found.health is Health.WARNING
    assert doctor.check_route(ROUTE, strict).health is Health.PROBLEM


def test_doctor_names_a_data_folder_that_others_can_open(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o755)
    found = next(iter(doctor.check_data_dir(Settings(data_dir=tmp_path / "data"))))
    assert found.health is Health.WARNING
    assert "0755" in found.message


def test_doctor_goes_on_where_it_may_not_look_into_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    settings.data_dir.mkdir(mode=0o700)
    registry = Registry(settings.registry_dir, runtimes=("onnxruntime",))
    registry.add(make_threshold_bundle(tmp_path / "bundle").folder)
    monkeypatch.setattr(doctor, "_opens", lambda _folder: False)
    monkeypatch.setattr(doctor, "_writable", lambda _folder: False)
    found = {finding.what: finding for finding in doctor.examine(settings, registry, echo=lambda _: None)}
    assert found["data folder"].health is Health.PROBLEM
    assert "runtime" in found
    assert not {"database", "model threshold 1.0.0", "peers"} & set(found)
