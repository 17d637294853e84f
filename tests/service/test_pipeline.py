"""Files in, results out: the pipeline with the real engine on small phantoms."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from bundle_factory import expected_labels, make_threshold_bundle, write_nifti_ras
from phantom import SERIES_INSTANCE_UID, write_classic_series
from small_node import AFFINE, image_array

from models.bundle import Bundle
from models.errors import ReasonCode, Refusal
from models.nifti import read_labelmap
from models.segmenter import Progress, Segmenter
from models.volume import Labelmap
from service import archive, rendering
from service.channel_rules import AlignmentRules
from service.errors import ProofError
from service.pipeline import PipelineOutcome, overall_fraction, run
from service.pipeline_job import PipelineJob

CREATED_AT = datetime(2026, 3, 4, 5, 6, 7)  # noqa: DTZ001  # times in the records are naive
THRESHOLDS = (100.5, 300.5)
SPACING_ZYX_MM = (2.0, 1.25, 1.5)  # of AFFINE: nothing is resampled


@dataclass(frozen=True)
class Model:
    """A bundle and its segmenter."""

    bundle: Bundle
    segmenter: Segmenter

    def run(self, job: PipelineJob, **keywords: object) -> PipelineOutcome:
        manifest, digest = self.bundle.manifest, self.bundle.digest
        return run(job, self.segmenter, manifest, digest, **keywords)  # type: ignore[arg-type]

    def under(self, **changes: object) -> Model:
        """The same network under a manifest with changes."""
        manifest = self.bundle.manifest.model_copy(update=changes)
        return replace(self, bundle=replace(self.bundle, manifest=manifest))

    def with_limits(self, **limits: object) -> Model:
        return self.under(input_limits=self.bundle.manifest.input_limits.model_copy(update=limits))


def opened(folder: Path, **arguments: object) -> Model:
    keywords = {"thresholds": THRESHOLDS, "spacing_mm": SPACING_ZYX_MM, **arguments}
    bundle = make_threshold_bundle(folder, **keywords)  # type: ignore[arg-type]
    return Model(bundle, Segmenter(bundle, runtime="onnxruntime", threads=1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    made = opened(tmp_path_factory.mktemp("model") / "b")
    yield made
    made.segmenter.close()


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    made = opened(tmp_path_factory.mktemp("model2") / "b", channels=2)
    yield made
    made.segmenter.close()


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    return write_classic_series(tmp_path / "series", image_array(), AFFINE)


def job(folder: Path, *channels: list[Path] | Path, **changes: object) -> PipelineJob:
    paths = tuple(tuple(c) if isinstance(c, list) else (c,) for c in channels)
    return PipelineJob(paths, CREATED_AT, folder / "out", **changes)  # type: ignore[arg-type]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def zip_of(path: Path, *members: Path | tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as opened:
        for member in members:
            name, data = (
                member
                if isinstance(member, tuple)
                else (f"{member.parent.name}/{member.name}", member.read_bytes())
            )
            opened.writestr(name, data)
    return path


def refused(model: Model, asked: PipelineJob) -> Refusal:
    """The refusal of a run that must leave nothing behind."""
    beside = set(asked.output_dir.parent.iterdir())
    with pytest.raises(Refusal) as caught:
        model.run(asked)
    assert set(asked.output_dir.parent.iterdir()) == beside
    assert caught.value.remedy
    return caught.value


def test_a_series_becomes_a_segmentation_a_labelmap_and_measurements(
    model: Model, series: list[Path], tmp_path: Path
) -> None:
    seen: list[Progress] = []
    outcome = model.run(job(tmp_path, series), progress=seen.append)
    out = tmp_path / "out"
    expected = expected_labels(image_array()[None].astype(np.float32), THRESHOLDS)

    kinds = [file.kind for file in outcome.files]
    assert kinds == ["segmentation", "report", "labelmap", "measurements", "preview"]
    for file in outcome.files:
        data = (out / file.name).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert sorted(files_of(out)) == sorted(file.name for file in outcome.files)

    labelmap = read_labelmap(out / "labelmap.nii.gz")
    np.testing.assert_array_equal(labelmap.array, expected)
    np.testing.assert_allclose(labelmap.affine, AFFINE, atol=1e-4)
    seg = pydicom.dcmread(out / "segmentation.dcm")
    assert seg.SOPInstanceUID == outcome.files[0].sop_instance_uid
    assert seg.SOPClassUID == outcome.files[0].sop_class_uid == "1.2.840.10008.5.1.4.1.1.66.4"
    assert seg.ContentDate == "20260304"
    assert {item.SoftwareVersions for item in seg.ContributingEquipmentSequence} >= {model.bundle.digest}

    voxel_ml = 1.5 * 1.25 * 2 / 1000
    volumes = {"low": (expected == 1).sum() * voxel_ml, "high": (expected == 2).sum() * voxel_ml}
    assert outcome.summary["volumes_ml"] == pytest.approx(volumes, abs=1e-4)
    assert outcome.summary["warnings"] == []
    written = json.loads((out / "measurements.json").read_text())
    assert written["volumes_ml"] == outcome.summary["volumes_ml"]
    assert written["model"]["digest"] == model.bundle.digest
    assert written["segmentation_sop_instance_uid"] == seg.SOPInstanceUID

    fractions = [overall_fraction(progress) for progress in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_a_second_run_gives_the_same_bytes(model: Model, series: list[Path], tmp_path: Path) -> None:
    model.run(job(tmp_path, series))
    first = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    model.run(job(tmp_path, list(reversed(series))))
    assert files_of(tmp_path / "out") == first
    with gzip.open(tmp_path / "out/labelmap.nii.gz") as stream:
        stream.read()
        assert stream.mtime == 0


@pytest.mark.parametrize("what", ["digest", "settings", "patient", "slices"])
def test_the_uid_changes_with_everything_that_makes_the_result(
    model: Model, series: list[Path], tmp_path: Path, what: str
) -> None:
    def uid(name: str, paths: list[Path], used: Model = model, **changes: object) -> str | None:
        asked = replace(job(tmp_path, paths, **changes), output_dir=tmp_path / name)
        return used.run(asked).files[0].sop_instance_uid

    changed: dict[str, object] = {}
    paths, used = series, model
    if what == "digest":
        used = replace(model, bundle=replace(model.bundle, digest="f" * 64))
    elif what == "settings":
        changed = {"settings_digest": "other"}
    elif what == "patient":
        paths = write_classic_series(tmp_path / "other", image_array(), AFFINE, patient_id="PHANTOM-2")
    else:
        paths = series[:-1]
    assert uid("a", series) != uid("b", paths, used, **changed)


def test_a_newer_result_names_the_one_that_it_supersedes(
    model: Model, series: list[Path], tmp_path: Path
) -> None:
    model.run(job(tmp_path, series, supersedes=("2.25.4",)))
    assert json.loads((tmp_path / "out/measurements.json").read_text())["supersedes_sop_instance_uids"] == [
        "2.25.4"
    ]


def test_nothing_found_is_a_success_without_a_segmentation(model: Model, tmp_path: Path) -> None:
    array = np.minimum(image_array(), 90)
    outcome = model.run(job(tmp_path, write_classic_series(tmp_path / "s", array, AFFINE)))
    assert [file.kind for file in outcome.files] == ["report", "labelmap", "measurements", "preview"]
    assert outcome.summary["volumes_ml"] == {"low": 0.0, "high": 0.0}
    assert "Nothing was found" in outcome.summary["sentence"]
    assert not read_labelmap(tmp_path / "out/labelmap.nii.gz").array.any()


def test_nifti_in_gives_nifti_out(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "image.nii.gz"
    write_nifti_ras(path, image_array().astype(np.float32), SPACING_ZYX_MM)
    outcome = model.run(job(tmp_path, path))
    assert [file.kind for file in outcome.files] == ["labelmap", "measurements", "preview"]
    labelmap = read_labelmap(tmp_path / "out/labelmap.nii.gz")
    np.testing.assert_array_equal(
        labelmap.array, expected_labels(image_array()[None].astype(np.float32), THRESHOLDS)
    )


def test_a_volume_far_from_those_of_the_training_is_warned_about(
    model: Model, series: list[Path], tmp_path: Path
) -> None:
    labels = model.bundle.manifest.labels
    doubtful = (labels[0].model_copy(update={"volume_range_ml": (1.0, 2.0)}), *labels[1:])
    (warning,) = model.under(labels=doubtful).run(job(tmp_path, series)).summary["warnings"]
    assert "low has 0.09 mL; the training cases had 1 to 2 mL" in warning


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_an_archive_or_a_folder_of_a_series_gives_what_its_files_give(
    model: Model, series: list[Path], tmp_path: Path, form: str
) -> None:
    model.run(job(tmp_path, series))
    expected = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    given = zip_of(tmp_path / "s.zip", *series) if form == "zip" else series[0].parent
    model.run(job(tmp_path, given))
    assert files_of(tmp_path / "out") == expected


def test_what_is_not_dicom_in_an_archive_is_left_out_with_a_warning(
    model: Model, series: list[Path], tmp_path: Path
) -> None:
    given = zip_of(tmp_path / "s.zip", *series, ("README.txt", b"hello"), ("../../evil", b"x" * 200))
    (warning,) = model.run(job(tmp_path, given)).summary["warnings"]
    assert warning == "Left out: 2 of 10 files, which are not DICOM."
    assert not (tmp_path.parent / "evil").exists()


class TestRefusals:
    def test_several_series_in_an_archive(self, model: Model, series: list[Path], tmp_path: Path) -> None:
        other = write_classic_series(tmp_path / "o", image_array(), AFFINE, series_instance_uid="2.25.9")
        refusal = refused(model, job(tmp_path, zip_of(tmp_path / "s.zip", *series, *other)))
        assert refusal.reason is ReasonCode.AMBIGUOUS_SERIES
        assert "2 series" in refusal.message

    def test_an_archive_without_dicom(self, model: Model, tmp_path: Path) -> None:
        refusal = refused(model, job(tmp_path, zip_of(tmp_path / "s.zip", ("a.txt", b"a"))))
        assert refusal.reason is ReasonCode.NOT_A_VOLUME

    def test_a_damaged_archive(self, model: Model, series: list[Path], tmp_path: Path) -> None:
        path = zip_of(tmp_path / "s.zip", *series)
        data = bytearray(path.read_bytes())
        data[400:420] = b"\xff" * 20
        path.write_bytes(data)
        assert refused(model, job(tmp_path, path)).reason is ReasonCode.UNREADABLE

    def test_an_archive_that_is_cut_short(self, model: Model, series: list[Path], tmp_path: Path) -> None:
        path = zip_of(tmp_path / "s.zip", *series)
        path.write_bytes(path.read_bytes()[:-300])
        assert refused(model, job(tmp_path, path)).reason is ReasonCode.UNREADABLE

    def test_an_archive_that_unpacks_to_too_much(
        self, model: Model, series: list[Path], tmp_path: Path
    ) -> None:
        asked = job(tmp_path, zip_of(tmp_path / "s.zip", *series), unpack_limit_bytes=3000)
        refusal = refused(model, asked)
        assert refusal.reason is ReasonCode.TOO_LARGE
        assert "3000 bytes" in refusal.message

    def test_a_bomb(self, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(archive, "RATIO_COUNTS_FROM_BYTES", 2**20)
        bomb = zip_of(tmp_path / "s.zip", ("zeros", bytes(8 * 2**20)))
        refusal = refused(model, job(tmp_path, bomb))
        assert refusal.reason is ReasonCode.TOO_LARGE
        assert "times its own size" in refusal.message

    def test_too_many_members(self, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(archive, "MAXIMUM_MEMBERS", 3)
        given = zip_of(tmp_path / "s.zip", *((str(i), b"x") for i in range(4)))
        assert refused(model, job(tmp_path, given)).reason is ReasonCode.TOO_LARGE

    def test_the_wrong_modality(self, model: Model, series: list[Path], tmp_path: Path) -> None:
        refusal = refused(model.with_limits(modalities=("CT", "PT")), job(tmp_path, series))
        assert refusal.reason is ReasonCode.WRONG_MODALITY
        assert "is MR; threshold takes CT or PT" in refusal.message

    @pytest.mark.parametrize(
        ("limits", "figures"),
        [
            ({"spacing_mm": (0.5, 1.9)}, "1.5 x 1.25 x 2 mm (x, y, z); the model takes 0.5 to 1.9 mm"),
            ({"spacing_mm": (1.3, 3.0)}, "voxel spacing"),
            ({"field_of_view_mm": (15.5, 100.0)}, "21 x 15 x 16 mm"),
            ({"field_of_view_mm": (10.0, 20.0)}, "field of view"),
            ({"minimum_slices": 9}, "8 slices; the model takes 9 or more"),
        ],
    )
    def test_a_grid_outside_the_limits(
        self, model: Model, series: list[Path], tmp_path: Path, limits: dict, figures: str
    ) -> None:
        refusal = refused(model.with_limits(**limits), job(tmp_path, series))
        assert refusal.reason is ReasonCode.OUT_OF_LIMITS
        assert figures in refusal.message

    def test_a_grid_on_the_limits_is_taken(self, model: Model, series: list[Path], tmp_path: Path) -> None:
        limits = {"spacing_mm": (1.25, 2.0), "field_of_view_mm": (15.0, 21.0), "minimum_slices": 8}
        assert model.with_limits(**limits).run(job(tmp_path, series)).files

    def test_a_file_of_rubbish(self, model: Model, tmp_path: Path) -> None:
        path = tmp_path / "x.nii"
        path.write_bytes(b"rubbish" * 100)
        assert refused(model, job(tmp_path, path)).reason is ReasonCode.UNREADABLE

    def test_another_number_of_channels(self, model: Model, series: list[Path], tmp_path: Path) -> None:
        refusal = refused(model, job(tmp_path, series, series))
        assert refusal.reason is ReasonCode.MISSING_CHANNEL


def said_in_report(path: Path) -> tuple[list[str], dict[str, int]]:
    """The comments of a report, and how many images of each series it names as evidence."""
    report = pydicom.dcmread(path)
    comments = [
        each.TextValue
        for each in report.ContentSequence
        if each.ConceptNameCodeSequence[0].CodeMeaning == "Comment"
    ]
    evidence = {
        series.SeriesInstanceUID: len(series.ReferencedSOPSequence)
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
    }
    return comments, evidence


def brought_by_itk(
    array: np.ndarray, affine: np.ndarray, shape_zyx: tuple[int, int, int], onto: np.ndarray
) -> np.ndarray:
    """Linear interpolation through patient coordinates by ITK."""

    def image(values: np.ndarray, to_mm: np.ndarray) -> SimpleITK.Image:
        made = SimpleITK.GetImageFromArray(values.astype(np.float32))
        spacing = np.linalg.norm(to_mm[:3, :3], axis=0)
        made.SetSpacing(spacing.tolist())
        made.SetOrigin(to_mm[:3, 3].tolist())
        made.SetDirection((to_mm[:3, :3] / spacing).ravel().tolist())
        return made

    given, grid = image(array, affine), image(np.zeros(shape_zyx), onto)
    resampled = SimpleITK.Resample(given, grid, SimpleITK.Transform(), SimpleITK.sitkLinear, -1.0)
    return SimpleITK.GetArrayFromImage(resampled)


class TestSeveralChannels:
    @staticmethod
    def other(tmp_path: Path, affine: np.ndarray = AFFINE, **changes: object) -> list[Path]:
        array = np.full((8, 12, 14), 50, np.int16)
        array[0, 0, 0] = 0
        keywords = {"series_instance_uid": "2.25.8", **changes}
        return write_classic_series(tmp_path / "other", array, affine, **keywords)  # type: ignore[arg-type]

    def test_one_series_for_each(self, two_channels: Model, series: list[Path], tmp_path: Path) -> None:
        outcome = two_channels.run(job(tmp_path, series, self.other(tmp_path)))
        background = np.full((8, 12, 14), 50, np.float32)
        background[0, 0, 0] = 0
        images = np.stack([image_array().astype(np.float32), background])
        labelmap = read_labelmap(tmp_path / "out/labelmap.nii.gz")
        np.testing.assert_array_equal(labelmap.array, expected_labels(images, THRESHOLDS))
        assert outcome.files[0].kind == "segmentation"

    def test_the_report_names_every_channel(
        self, two_channels: Model, series: list[Path], tmp_path: Path
    ) -> None:
        outcome = two_channels.run(job(tmp_path, series, self.other(tmp_path)))
        said, evidence = said_in_report(tmp_path / "out/report.dcm")
        assert f"Channel channel 0: series {SERIES_INSTANCE_UID}, the reference." in said
        assert "Channel channel 1: series 2.25.8, on the grid of channel 0." in said
        assert {SERIES_INSTANCE_UID: 8, "2.25.8": 8}.items() <= evidence.items()
        first, second = outcome.summary["channels"]
        assert (first["reference"], first["resampled"], second["resampled"]) == (True, False, False)

    def test_another_grid_is_brought_to_the_references(
        self, two_channels: Model, series: list[Path], tmp_path: Path
    ) -> None:
        moved = AFFINE.copy()
        moved[:3, 3] += (-3.0, 1.25, -1.0)  # two columns, one row, half a slice
        moved[1, 1] = 2.5
        values = np.arange(10 * 10 * 18, dtype=np.int16).reshape(10, 10, 18) % 97
        other = write_classic_series(tmp_path / "other", values, moved, series_instance_uid="2.25.8")
        outcome = two_channels.run(job(tmp_path, series, other))
        expected = np.array([image_array(), brought_by_itk(values, moved, (8, 12, 14), AFFINE)])
        labelmap = read_labelmap(tmp_path / "out/labelmap.nii.gz")
        assert labelmap.array.shape == (8, 12, 14)
        np.testing.assert_array_equal(labelmap.array, expected_labels(expected, THRESHOLDS))
        said, _ = said_in_report(tmp_path / "out/report.dcm")
        assert "Channel channel 1: series 2.25.8, interpolated linearly onto the grid of channel 0." in said
        assert outcome.summary["channels"][1] | {"covered": 1.0} == outcome.summary["channels"][1]

    def test_the_route_says_which_channel_is_the_reference_and_which_is_which(
        self, two_channels: Model, series: list[Path], tmp_path: Path
    ) -> None:
        moved = AFFINE.copy()
        moved[:3, 3] += (1.5, 0.0, 0.0)
        other = write_classic_series(
            tmp_path / "other", np.ones((8, 12, 13), np.int16) * 50 + np.eye(13, dtype=np.int16)[:12],
            moved, series_instance_uid="2.25.8",
        )  # fmt: skip
        asked = job(
            tmp_path, other, series,
            channel_names=("channel 1", "channel 0"), alignment=AlignmentRules(reference="channel 1"),
        )  # fmt: skip
        outcome = two_channels.run(asked)
        seg = pydicom.dcmread(tmp_path / "out/segmentation.dcm")
        assert [each.SeriesInstanceUID for each in seg.ReferencedSeriesSequence] == ["2.25.8"]
        assert [each["reference"] for each in outcome.summary["channels"]] == [False, True]
        labelmap = read_labelmap(tmp_path / "out/labelmap.nii.gz")
        images = np.stack([image_array()[..., 1:].astype(np.float32), np.full((8, 12, 13), 50, np.float32)])
        images[1] += np.eye(13)[:12]
        np.testing.assert_array_equal(labelmap.array, expected_labels(images, THRESHOLDS))

    @pytest.mark.parametrize(
        "change",
        [
            {"channel_names": ("channel 0", "T2")},
            {"alignment": AlignmentRules(reference="T2")},
        ],
    )
    def test_channels_that_the_model_does_not_have(
        self, two_channels: Model, series: list[Path], tmp_path: Path, change: dict
    ) -> None:
        refusal = refused(two_channels, job(tmp_path, series, self.other(tmp_path), **change))
        assert refusal.reason is ReasonCode.MISSING_CHANNEL
        assert "T2" in refusal.message

    def test_a_channel_that_shows_half_is_warned_about_and_one_that_shows_less_is_refused(
        self, two_channels: Model, series: list[Path], tmp_path: Path
    ) -> None:
        outcome = two_channels.run(job(tmp_path, series, self.other(tmp_path)[:-2]))
        (warning,) = outcome.summary["warnings"]
        assert warning.startswith("The channel channel 1 shows 75.0% of the reference's field of view")
        fewer = self.other(tmp_path / "fewer")[:-5]
        shutil.rmtree(tmp_path / "out")
        refusal = refused(two_channels, job(tmp_path, series, fewer))
        assert refusal.reason is ReasonCode.CHANNEL_GRIDS_DIFFER
        assert "channel 1 shows only 38%" in refusal.message

    def test_frames_of_reference_that_differ(
        self, two_channels: Model, series: list[Path], tmp_path: Path
    ) -> None:
        other = self.other(tmp_path, frame_of_reference_uid="2.25.77")
        refusal = refused(two_channels, job(tmp_path, series, other))
        assert refusal.reason is ReasonCode.CHANNEL_GRIDS_DIFFER
        assert "channel 1" in refusal.message

    def test_a_registration_is_recorded(
        self, two_channels: Model, series: list[Path], tmp_path: Path
    ) -> None:
        other = write_classic_series(
            tmp_path / "other", image_array(seed=3) // 8 + 1, AFFINE,
            series_instance_uid="2.25.8", frame_of_reference_uid="2.25.77",
        )  # fmt: skip
        rules = AlignmentRules(registration="rigid")
        outcome = two_channels.run(job(tmp_path, series, other, alignment=rules))
        figures = outcome.summary["channels"][1]["registration"]
        assert figures["method"].startswith("rigid; Mattes mutual information")
        assert figures["moved_mm"] < 2.0  # a slice
        said, _ = said_in_report(tmp_path / "out/report.dcm")
        (sentence,) = [each for each in said if each.startswith("Channel channel 1")]
        assert f"metric {figures['metric']:.4f}" in sentence
        measurements = json.loads((tmp_path / "out/measurements.json").read_text())
        assert measurements["channels"][1]["registration"] == figures
        strict = AlignmentRules(registration="rigid", registration_limit_mm=1e-6)
        shutil.rmtree(tmp_path / "out")
        refusal = refused(two_channels, job(tmp_path, series, other, alignment=strict))
        assert refusal.reason is ReasonCode.REGISTRATION_FAILED

    @pytest.mark.parametrize("change", [{"patient_id": "PHANTOM-2"}, {"study_instance_uid": "2.25.66"}])
    def test_channels_of_two_patients_or_studies(
        self, two_channels: Model, series: list[Path], tmp_path: Path, change: dict
    ) -> None:
        refusal = refused(two_channels, job(tmp_path, series, self.other(tmp_path, **change)))
        assert refusal.reason is ReasonCode.IDENTITY_CONFLICT
        assert "PHANTOM" not in str(refusal)

    def test_nifti_and_dicom_mixed(self, two_channels: Model, series: list[Path], tmp_path: Path) -> None:
        path = tmp_path / "image.nii.gz"
        write_nifti_ras(path, image_array().astype(np.float32), SPACING_ZYX_MM)
        refusal = refused(two_channels, job(tmp_path, series, path))
        assert refusal.reason is ReasonCode.CHANNEL_GRIDS_DIFFER


def test_nothing_is_handed_on_that_was_not_proven(
    model: Model, series: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = rendering.build_segmentation

    def build_shifted(source, labelmap, *rest, **keywords):
        moved = Labelmap(np.roll(labelmap.array, 1, axis=2), labelmap.affine, labelmap.frame_of_reference_uid)
        return build(source, moved, *rest, **keywords)

    monkeypatch.setattr(rendering, "build_segmentation", build_shifted)
    with pytest.raises(ProofError):
        model.run(job(tmp_path, series))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_what_a_killed_run_has_left_is_in_nobodys_way(
    model: Model, series: list[Path], tmp_path: Path
) -> None:
    left = tmp_path / ".out.unfinished"
    left.mkdir()
    (left / "segmentation.dcm").write_bytes(b"half")
    model.run(job(tmp_path, series))
    assert sorted(files_of(tmp_path / "out")) == [
        "labelmap.nii.gz",
        "measurements.json",
        "preview.png",
        "report.dcm",
        "segmentation.dcm",
    ]
    assert not left.exists()


def test_results_are_never_written_over(model: Model, series: list[Path], tmp_path: Path) -> None:
    model.run(job(tmp_path, series))
    with pytest.raises(OSError, match="not empty"):
        model.run(job(tmp_path, series))
    assert not (tmp_path / ".out.unfinished").exists()
