"""The commands: what they do, what they print where, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import highdicom
import nibabel
import numpy as np
import pytest
from bundle_factory import expected_labels, make_threshold_bundle
from command_line import Segnode
from phantom import test_uid as make_uid
from phantom import write_classic_series
from places import AFFINE, assert_same_places, image, places_in_nifti, places_in_seg, places_of_labels
from pydicom import dcmread
from storage_scp import StorageScp

from models.bundle import Bundle
from service.errors import SettingsError
from service.settings import load_settings

TILTED = AFFINE @ np.array([[1, 0, 0, 0], [0, 1, 0.4, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_threshold_bundle(tmp_path / "bundle")


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    return write_classic_series(tmp_path / "series", image(), AFFINE)


WANTED = places_of_labels(expected_labels(image()[None], (100.5, 300.5)), AFFINE)


def test_version(segnode: Segnode) -> None:
    result = segnode("--version")
    assert (result.status, result.out) == (0, f"segnode {version('segnode')}\n")


def test_help_names_every_command(segnode: Segnode) -> None:
    out = segnode("--help").out
    for command in ("serve", "receive", "api", "worker", "segment", "send", "models", "keys", "doctor"):
        assert f" {command} " in out


def test_an_unknown_command_is_a_usage_error(segnode: Segnode) -> None:
    assert segnode("segmnt").status == 2


def test_segment_writes_nifti_and_prints_volumes(
    segnode: Segnode, bundle: Bundle, series: list[Path]
) -> None:
    result = segnode("segment", series[0].parent, "--bundle", bundle.folder, "-o", "out.nii.gz")
    assert result.status == 0, result.err
    assert_same_places(places_in_nifti(Path("out.nii.gz")), WANTED)
    rows = dict(line.rsplit(maxsplit=1) for line in result.out.splitlines())
    voxel_ml = 1.5 * 1.2 * 2.5 / 1000
    assert float(rows["low"]) == pytest.approx(len(WANTED[1]) * voxel_ml, abs=0.005)
    assert sorted(p.name for p in Path().iterdir() if "out" in p.name) == ["out.nii.gz"]


def test_segment_writes_a_seg_from_a_zip(segnode: Segnode, bundle: Bundle, series: list[Path]) -> None:
    with ZipFile("series.zip", "w") as archive:
        for path in series:
            archive.write(path, f"DICOM/{path.name}")
    result = segnode("segment", "series.zip", "--bundle", bundle.folder, "-o", "out.dcm")
    assert result.status == 0, result.err
    assert_same_places(places_in_seg(Path("out.dcm")), WANTED)


def test_segment_writes_the_volumes_as_a_dicom_sr_beside_the_labels(
    segnode: Segnode, bundle: Bundle, series: list[Path]
) -> None:
    given = ("segment", series[0].parent, "--bundle", bundle.folder)
    result = segnode(*given, "-o", "out.dcm", "--measurements", "sr.dcm")
    assert result.status == 0, result.err
    report = highdicom.sr.MeasurementReport.from_sequence([highdicom.sr.srread("sr.dcm")])
    groups = report.get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == ["low", "high"]
    voxel_ml = 1.5 * 1.2 * 2.5 / 1000
    volumes = [group.get_measurements()[0].value for group in groups]
    assert volumes == pytest.approx([len(WANTED[value]) * voxel_ml for value in (1, 2)], rel=1e-6)
    named = {group.referenced_segment.referenced_sop_instance_uid for group in groups}
    assert named == {dcmread("out.dcm").SOPInstanceUID}


def test_a_refusal_ends_with_3_and_its_code_first(segnode: Segnode, bundle: Bundle, tmp_path: Path) -> None:
    write_classic_series(tmp_path / "tilted", image(), TILTED)
    result = segnode("segment", "tilted", "--bundle", bundle.folder, "-o", "out.nii.gz")
    assert result.status == 3
    assert result.err.startswith("GANTRY_TILT: ")
    assert "degrees" in result.err.splitlines()[0]
    assert "Traceback" not in result.err
    assert not Path("out.nii.gz").exists()


def test_a_tilted_gantry_is_set_right_on_request(segnode: Segnode, bundle: Bundle, tmp_path: Path) -> None:
    write_classic_series(tmp_path / "tilted", image(), TILTED)
    given = ("segment", "tilted", "--bundle", bundle.folder, "--gantry-tilt", "resample")
    result = segnode(*given, "-o", "out.dcm")
    assert result.status == 0, result.err
    assert "gantry tilt" in " ".join(result.err.split())
    assert places_in_seg(Path("out.dcm")).keys() == {1, 2}
    assert segnode(*given[:-1], "upright", "-o", "out.dcm").status == 2


def test_one_volume_of_several_is_taken_on_request(segnode: Segnode, bundle: Bundle, tmp_path: Path) -> None:
    for echo, array in (("9.5", image()), ("30", np.zeros_like(image()) + 7)):
        write_classic_series(
            tmp_path / "echoes" / echo,
            array,
            AFFINE,
            EchoTime=echo,
            edit=lambda dataset, z, echo=echo: setattr(dataset, "SOPInstanceUID", make_uid(echo, z)),
        )
    given = ("segment", "echoes", "--bundle", bundle.folder, "-o", "out.nii.gz")
    assert segnode(*given).err.startswith("MULTI_VOLUME: ")
    result = segnode(*given, "--volume", "EchoTime:first")
    assert result.status == 0, result.err
    assert_same_places(places_in_nifti(Path("out.nii.gz")), WANTED)
    assert "by EchoTime 9.5 of 9.5, 30" in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("lacks", "code"),
    [({"frame_of_reference_uid": ""}, "INVALID_GEOMETRY"), ({"patient_id": ""}, "IDENTITY_MISSING")],
)
def test_what_only_a_dicom_object_needs_is_not_asked_for_a_nifti_file(
    segnode: Segnode, bundle: Bundle, tmp_path: Path, lacks: dict[str, str], code: str
) -> None:
    write_classic_series(tmp_path / "anonymised", image(), AFFINE, **lacks)
    given = ("segment", "anonymised", "--bundle", bundle.folder, "-o")
    assert segnode(*given, "out.nii.gz").status == 0
    assert_same_places(places_in_nifti(Path("out.nii.gz")), WANTED)
    for wanted in (("out.dcm",), ("again.nii.gz", "--measurements", "sr.dcm")):
        result = segnode(*given, *wanted)
        assert (result.status, result.err.split(":")[0]) == (3, code)
        assert not Path(wanted[0]).exists()


def test_a_seg_of_nothing_is_an_error_with_a_remedy(segnode: Segnode, bundle: Bundle, tmp_path: Path) -> None:
    write_classic_series(tmp_path / "dark", np.minimum(image(), 90), AFFINE)
    result = segnode("segment", "dark", "--bundle", bundle.folder, "-o", "out.dcm")
    assert result.status == 1
    assert result.err.startswith("NOTHING_FOUND: ")
    assert segnode("segment", "dark", "--bundle", bundle.folder, "-o", "out.nii.gz").status == 0


def test_no_file_of_an_earlier_run_stays_beside_those_of_this_one(
    segnode: Segnode, bundle: Bundle, series: list[Path], tmp_path: Path
) -> None:
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path("out").iterdir()}

    Path("out").mkdir()
    rest = ("--bundle", bundle.folder, "-o", "out/seg.dcm", "--measurements", "out/sr.dcm")
    assert segnode("segment", series[0].parent, *rest).status == 0
    earlier = files()
    assert earlier.keys() == {"seg.dcm", "sr.dcm"}
    write_classic_series(tmp_path / "tilted", image(), TILTED)
    assert segnode("segment", "tilted", *rest).status == 3
    assert files() == earlier  # a run without a result touches nothing
    write_classic_series(tmp_path / "dark", np.minimum(image(), 90), AFFINE)
    nothing = segnode("segment", "dark", *rest)
    assert (nothing.status, nothing.err.split(":")[0]) == (1, "NOTHING_FOUND")
    assert files().keys() == {"sr.dcm"}
    assert "there is no seg.dcm" in nothing.err
    assert files()["sr.dcm"] != earlier["sr.dcm"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("case.nii.gz", "-o", "out.nii.gz"), "--model"),
        (("case.nii.gz", "--bundle", "bundle", "--model", "x", "-o", "out.nii.gz"), "--model"),
        (("case.nii.gz", "--bundle", "bundle", "-o", "out.png"), ".nii.gz or .dcm"),
        (("case.nii.gz", "--bundle", "bundle", "-o", "nowhere/out.nii.gz"), "no folder"),
        (("case.nii.gz", "--bundle", "bundle", "-o", "out.dcm"), "DICOM series"),
        (("case.nii.gz", "--bundle", "bundle", "-o", "o.nii.gz", "--measurements", "sr.dcm"), "DICOM series"),
        (("series", "--bundle", "bundle", "-o", "out.dcm", "--measurements", "sr.txt"), "end in .dcm"),
        (("series", "--bundle", "bundle", "-o", "out.dcm", "--measurements", "out.dcm"), "is taken by"),
        (("series", "--bundle", "bundle", "-o", "out.dcm", "--measurements", "no/sr.dcm"), "no folder"),
        (("series", "--bundle", "bundle", "-o", "folder.dcm"), "is a directory"),
        (("series", "--bundle", "bundle", "-o", "out.dcm", "--volume", "first"), "is not like EchoTime"),
        (("series", "--bundle", "bundle", "-o", "out.dcm", "--volume", "Hue:first"), "Hue is none of"),
        (("absent.nii.gz", "--bundle", "bundle", "-o", "out.nii.gz"), "does not exist"),
    ],
)
def test_what_is_not_understood_ends_with_2(
    segnode: Segnode, bundle: Bundle, series: list[Path], arguments: tuple[str, ...], said: str
) -> None:
    nibabel.save(nibabel.Nifti1Image(image().astype(np.int16), np.eye(4)), "case.nii.gz")
    Path("folder.dcm").mkdir()
    result = segnode("segment", *arguments)
    assert result.status == 2
    assert said in " ".join(result.err.split())


def test_a_damaged_bundle_is_an_error(segnode: Segnode, bundle: Bundle, series: list[Path]) -> None:
    (bundle.folder / "card.md").write_text("changed")
    result = segnode("segment", series[0].parent, "--bundle", bundle.folder, "-o", "out.nii.gz")
    assert result.status == 1
    assert result.err.startswith("BUNDLE_INVALID: 'card.md' was altered")


def test_models_from_add_to_withdraw(segnode: Segnode, bundle: Bundle, tmp_path: Path) -> None:
    Path("node.yaml").write_text("data_dir: data\n")
    config = ("--config", "node.yaml")
    assert segnode("models", "add", bundle.folder, "--activate", *config).status == 0
    newer = make_threshold_bundle(tmp_path / "newer", version="1.1.0", thresholds=(20.5, 300.5))
    assert segnode("models", "add", newer.folder, *config).status == 0
    assert segnode("models", "activate", "threshold", "1.1.0", *config).status == 0
    listed = segnode("models", "list", *config).out
    assert [line.split()[:2] for line in listed.splitlines()[1:]] == [
        ["threshold", "1.0.0"],
        ["threshold", "1.1.0"],
    ]
    assert newer.digest in listed
    assert segnode("models", "rollback", "threshold", *config).status == 0
    assert segnode("models", "verify", "threshold", *config).err.startswith("threshold 1.0.0 is whole")
    assert segnode("models", "withdraw", "threshold", "1.1.0", *config).status == 0
    again = segnode("models", "activate", "threshold", "1.1.0", *config)
    assert (again.status, again.err.split(":")[0]) == (1, "MODEL_WITHDRAWN")


def test_segment_takes_the_model_of_the_node_that_is_configured(
    segnode: Segnode, bundle: Bundle, series: list[Path]
) -> None:
    Path("node.yaml").write_text("data_dir: data\n")
    config = ("--config", "node.yaml")
    assert segnode("models", "add", bundle.folder, "--activate", *config).status == 0
    source = series[0].parent
    result = segnode("segment", source, "--model", "threshold@1.0.0", "-o", "out.nii.gz", *config)
    assert result.status == 0, result.err
    assert_same_places(places_in_nifti(Path("out.nii.gz")), WANTED)
    missing = segnode("segment", source, "--model", "threshold@9.0.0", "-o", "out.nii.gz", *config)
    assert (missing.status, missing.err.split(":")[0]) == (1, "MODEL_UNKNOWN")


def test_keys_are_shown_once_and_work_until_revoked(segnode: Segnode) -> None:
    created = segnode("keys", "create", "pacs admin", "--role", "operator", "--days", "30")
    assert created.status == 0, created.err
    secret = created.out.strip()
    assert secret.startswith("sgn_")
    listed = segnode("keys", "list")
    assert secret not in listed.out
    (row,) = listed.out.splitlines()[1:]
    assert "pacs admin" in row
    assert row.endswith("valid")
    assert segnode("keys", "revoke", row.split()[0]).status == 0
    assert segnode("keys", "list").out.splitlines()[1].endswith("revoked")
    twice = segnode("keys", "create", "pacs admin")
    assert (twice.status, twice.err.split(":")[0]) == (1, "CONFLICT")


def test_send_takes_a_folder_and_tells_what_was_not_taken(segnode: Segnode, series: list[Path]) -> None:
    (series[0].parent / "README.txt").write_text("not DICOM")
    with StorageScp(statuses=[0xA700]) as pacs:
        peer = f"PACS@127.0.0.1:{pacs.port}"
        some = segnode("send", series[0].parent, peer)
        assert some.status == 1
        assert "0xA700" in some.err
        assert f"NOT_SENT: {peer} took 8 of 9 files" in some.err
        every = segnode("send", series[0].parent, peer)
        assert every.status == 0, every.err
        assert "took all of 9 files" in every.err
        assert len(pacs.objects) == 17


@pytest.mark.parametrize("peer", ["PACS", "PACS@host", "@host:104", "A" * 17 + "@host:104", "P@host:99999"])
def test_send_to_something_that_is_no_peer(segnode: Segnode, series: list[Path], peer: str) -> None:
    assert segnode("send", series[0].parent, peer).status == 2


def test_a_wrong_configuration_names_every_error(segnode: Segnode) -> None:
    Path("node.yaml").write_text(json.dumps({"dicom": {"port": 700000}, "colour": "blue"}))
    result = segnode("doctor", "--config", "node.yaml")
    assert result.status == 1
    assert result.err.startswith("SETTINGS_INVALID: 2 error(s)")
    assert "dicom.port" in result.err
    assert "colour" in result.err


def test_starting_a_command_imports_nothing_heavy() -> None:
    script = (
        "import sys; from service import cli; "
        "heavy = {'numpy', 'sqlalchemy', 'pydicom', 'fastapi', 'openvino', 'onnxruntime', 'torch'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_example_configuration_is_one() -> None:
    example = Path(__file__).resolve().parents[2] / "deploy" / "examples" / "node.yaml"
    settings = load_settings(example)
    assert [route.destinations for route in settings.routes] == [("pacs",)]
    assert settings.dicom.peers[0].ae_title == settings.destinations[0].ae_title == "PACS"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http: {prot: 1}", "http.prot: there is no such key, did you mean port"),
        (
            "routes: [{name: a, model: m, match: {Modality: MR}, quiet_tim_s: 3}]",
            "routes.0.quiet_tim_s: there is no such key, did you mean quiet_time_s",
        ),
        ("zzzzzz: 1", "zzzzzz: there is no such key\n"),
        ("http: {port: 1}\nroutes: [\n  - a", "is not YAML from line 3, column 3 on: "),
    ],
)
def test_a_configuration_that_is_misspelt_is_told_in_words_that_help(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "node.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path / "node.yaml")
    assert said in f"{caught.value.message}\n"
    assert "string>" not in caught.value.message
