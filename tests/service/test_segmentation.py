"""Segmentation objects: their places, their words, their bytes, and what other programs read in them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
import SimpleITK
from phantom import (
    all_orientations,
    chiral_image,
    chiral_labels,
    oblique_affine,
    phantom_manifest,
    write_classic_series,
    write_enhanced_series,
)
from programs import program
from pydicom import Dataset, dcmread
from pydicom.sr.coding import Code
from pydicom.uid import JPEGLSNearLossless

from models.errors import ReasonCode, Refusal
from models.manifest import Manifest
from models.volume import Affine, Labelmap, axis_codes
from service.dicom.proof import prove_segmentation
from service.dicom.segmentation import (
    EmptySegmentationError,
    SegmentationError,
    build_segmentation,
    segment_labels,
    write_segmentation,
)
from service.dicom.series import SourceSeries, read_series

UIDS: dict[str, Any] = {
    "model_digest": "0123456789abcdef" * 4,
    "sop_instance_uid": "2.25.7001",
    "series_instance_uid": "2.25.7002",
    "content_datetime": datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC),
}


def labelmap_on(source: SourceSeries, labels: np.ndarray, affine: Affine) -> Labelmap:
    """Labels that were drawn on the phantom's own grid, brought to the grid of the series."""
    reversed_z = np.dot(affine[:3, 2], source.volume.affine[:3, 2]) < 0
    array = labels[::-1] if reversed_z else labels
    return Labelmap(np.ascontiguousarray(array), source.volume.affine, source.frame_of_reference_uid)


def write(folder: Path, source: SourceSeries, labelmap: Labelmap, manifest: Manifest, **options: Any) -> Path:
    dataset = build_segmentation(source, labelmap, manifest, **UIDS, **options)
    return write_segmentation(dataset, folder / "seg.dcm")


def written(
    tmp_path: Path, *, affine: Affine | None = None, **options: Any
) -> tuple[Path, SourceSeries, Labelmap]:
    affine = oblique_affine() if affine is None else affine
    source = read_series(write_classic_series(tmp_path / "series", chiral_image(), affine, **options))
    labelmap = labelmap_on(source, chiral_labels(), affine)
    return write(tmp_path, source, labelmap, phantom_manifest()), source, labelmap


def places_mm(labels: np.ndarray, affine: Affine) -> dict[int, np.ndarray]:
    """For every label the sorted places of its voxels."""
    found = {}
    for value in np.unique(labels[labels > 0]):
        z, y, x = np.nonzero(labels == value)
        mm = (affine @ np.stack([x, y, z, np.ones_like(x)])).T[:, :3].round(2) + 0.0
        found[int(value)] = mm[np.lexsort(mm.T)]
    return found


def assert_same_places(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for value in one:
        np.testing.assert_allclose(one[value], other[value], atol=0.02)


# --- places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [*all_orientations(), oblique_affine()], ids=axis_codes)
def test_the_labels_keep_their_millimetres(tmp_path: Path, affine: Affine) -> None:
    path, source, labelmap = written(tmp_path, affine=affine)
    prove_segmentation(path, source, labelmap, phantom_manifest())
    read = highdicom.seg.segread(path).get_volume(combine_segments=True)
    index_to_mm = read.affine @ np.eye(4)[[2, 1, 0, 3]]  # highdicom counts slices, rows, columns
    assert_same_places(places_mm(read.array, index_to_mm), places_mm(chiral_labels(), affine))


@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_enhanced_sources_are_referenced_by_frame(tmp_path: Path, mirror: float) -> None:
    affine = oblique_affine()
    affine[:3, 2] *= mirror
    paths = write_enhanced_series(tmp_path, chiral_image(), affine, frame_order=[4, 0, 6, 1, 5, 2, 3])
    source = read_series(paths)
    labelmap = labelmap_on(source, chiral_labels(), affine)
    path = write(tmp_path, source, labelmap, phantom_manifest())
    prove_segmentation(path, source, labelmap, phantom_manifest())
    read = highdicom.seg.segread(path).get_volume(combine_segments=True)
    index_to_mm = read.affine @ np.eye(4)[[2, 1, 0, 3]]
    assert_same_places(places_mm(read.array, index_to_mm), places_mm(chiral_labels(), affine))
    enhanced = dcmread(paths[0])
    for frame in dcmread(path).PerFrameFunctionalGroupsSequence:
        image = frame.DerivationImageSequence[0].SourceImageSequence[0]
        source_frame = enhanced.PerFrameFunctionalGroupsSequence[image.ReferencedFrameNumber - 1]
        assert (
            source_frame.PlanePositionSequence[0].ImagePositionPatient
            == frame.PlanePositionSequence[0].ImagePositionPatient
        )


def plain_highdicom(
    paths: Sequence[Path], labels: np.ndarray, manifest: Manifest
) -> highdicom.seg.Segmentation:
    """The slow reference: highdicom told everything, and nothing done to what it makes."""
    images = sorted((dcmread(p) for p in paths), key=lambda d: d.InstanceNumber)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        "reference", Code("123110", "DCM", "Artificial Intelligence"), "1"
    )
    return highdicom.seg.Segmentation(
        images,
        labels,
        "BINARY",
        [
            highdicom.seg.SegmentDescription(
                number,
                label.name,
                Code(label.category.value, label.category.scheme, label.category.meaning),
                Code(label.type.value, label.type.scheme, label.type.meaning),
                "AUTOMATIC",
                algorithm,
            )
            for number, label in enumerate(manifest.labels, 1)
        ],
        "2.25.1",
        1,
        "2.25.2",
        1,
        "reference",
        "reference",
        "1",
        "1",
    )


@pytest.mark.parametrize(
    "affine", [np.diag([0.9, 1.1, 2.0, 1.0]), oblique_affine()], ids=["axial", "oblique"]
)
def test_the_fast_writer_equals_plain_highdicom(tmp_path: Path, affine: Affine) -> None:
    labels = np.random.default_rng(5).integers(0, 13, (7, 11, 13)).astype(np.uint8)
    labels[:2] = 0  # planes without any label, too
    manifest = phantom_manifest(12)
    paths = write_classic_series(tmp_path / "series", chiral_image(), affine)
    source = read_series(paths)
    path = write(tmp_path, source, labelmap_on(source, labels, affine), manifest)
    fast = highdicom.seg.segread(path)
    slow = plain_highdicom(paths, labels, manifest)
    slow.save_as(tmp_path / "slow.dcm")
    slow = highdicom.seg.segread(tmp_path / "slow.dcm")

    assert fast.NumberOfFrames == slow.NumberOfFrames
    frames = [_by_segment_and_place(segmentation) for segmentation in (fast, slow)]
    assert frames[0].keys() == frames[1].keys()
    for key, (pixels, group) in frames[0].items():
        expected_pixels, expected = frames[1][key]
        np.testing.assert_array_equal(pixels, expected_pixels)
        assert (
            group.DerivationImageSequence[0].SourceImageSequence
            == expected.DerivationImageSequence[0].SourceImageSequence
        )
    volumes = [s.get_volume(combine_segments=True) for s in (fast, slow)]
    np.testing.assert_array_equal(volumes[0].array, volumes[1].array)
    np.testing.assert_allclose(volumes[0].affine, volumes[1].affine, atol=1e-6)


def _by_segment_and_place(segmentation: highdicom.seg.Segmentation) -> dict[Any, tuple[np.ndarray, Dataset]]:
    groups = segmentation.PerFrameFunctionalGroupsSequence
    return {
        (
            group.SegmentIdentificationSequence[0].ReferencedSegmentNumber,
            *(round(float(v), 6) for v in group.PlanePositionSequence[0].ImagePositionPatient),
        ): (pixels, group)
        for pixels, group in zip(segmentation.pixel_array, groups, strict=True)
    }


# --- bytes --------------------------------------------------------------------------------------------


def test_two_builds_are_byte_identical(tmp_path: Path) -> None:
    paths = write_classic_series(tmp_path / "series", chiral_image(), oblique_affine())
    contents = []
    for given in (paths, paths[::-1]):
        source = read_series(given)
        labelmap = labelmap_on(source, chiral_labels(), oblique_affine())
        contents.append(write(tmp_path, source, labelmap, phantom_manifest()).read_bytes())
    script = tmp_path / "again.py"  # another process, with another hash seed and another clock
    script.write_text(
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[3:]\n"
        "import test_segmentation as t\n"
        "folder = Path(sys.argv[1])\n"
        "source = t.read_series(sorted(folder.iterdir()))\n"
        "labelmap = t.labelmap_on(source, t.chiral_labels(), t.oblique_affine())\n"
        "(folder.parent / 'b').mkdir()\n"
        "t.write(folder.parent / 'b', source, labelmap, t.phantom_manifest())\n"
    )
    here = Path(__file__).resolve()
    paths_to_import = [str(here.parent), str(here.parents[1] / "support"), str(here.parents[2])]
    subprocess.run(
        [sys.executable, script, tmp_path / "series", "-", *paths_to_import],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "99", "TZ": "Asia/Tokyo"},
    )
    contents.append((tmp_path / "b" / "seg.dcm").read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_the_file_is_synced_and_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, source, labelmap = written(tmp_path)
    synced: list[str] = []
    plain = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), plain(fd))
    )
    dataset = build_segmentation(source, labelmap, phantom_manifest(), **UIDS)
    write_segmentation(dataset, path)
    file, folder = (Path(name) for name in synced)
    assert file.parent == folder == tmp_path  # first the file, under a name that is not its own yet
    assert file.match(".seg.dcm.*.part")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seg.dcm", "series"]
    assert dcmread(path).file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"


# --- words --------------------------------------------------------------------------------------------


def test_segments_are_numbered_from_one_and_told_by_their_codes(tmp_path: Path) -> None:
    source = read_series(write_classic_series(tmp_path / "s", chiral_image(), np.eye(4)))
    labels = chiral_labels() * 2  # values 2, 4 and 6 of a model with seven labels
    manifest = phantom_manifest(7, laterality=[None, "left", None, "right", None, "both"])
    labelmap = labelmap_on(source, labels, np.eye(4))
    assert [label.value for label in segment_labels(labelmap, manifest)] == [2, 4, 6]
    path = write(tmp_path, source, labelmap, manifest)
    prove_segmentation(path, source, labelmap, manifest)
    segments = dcmread(path).SegmentSequence
    assert [s.SegmentNumber for s in segments] == [1, 2, 3]
    assert [s.SegmentLabel for s in segments] == ["part 2", "part 4", "part 6"]
    assert [s.SegmentedPropertyTypeCodeSequence[0].CodeValue for s in segments] == [
        "99000002",
        "99000004",
        "99000006",
    ]
    sides = [
        s.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning
        for s in segments
    ]
    assert sides == ["Left", "Right", "Right and left"]
    for segment, value in zip(segments, (2, 4, 6), strict=True):
        color = highdicom.color.CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue)
        np.testing.assert_allclose(color.to_rgb(), manifest.labels[value - 1].color_rgb, atol=2)
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        assert segment.SegmentAlgorithmName == "Phantom parts"
        assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "1.2.3"


def test_the_object_says_where_it_comes_from(tmp_path: Path) -> None:
    path, source, _ = written(tmp_path)
    dataset = dcmread(path)
    assert dataset.SeriesDescription == "AI, unverified: Phantom parts"
    assert dataset.ContributingEquipmentSequence[0].SoftwareVersions == UIDS["model_digest"]
    assert dataset.SOPInstanceUID == dataset.file_meta.MediaStorageSOPInstanceUID == "2.25.7001"
    assert (dataset.SeriesInstanceUID, dataset.StudyInstanceUID) == ("2.25.7002", "2.25.101")
    assert (dataset.PatientID, dataset.PatientName) == ("PHANTOM-1", "Phantom^Test")
    assert (dataset.FrameOfReferenceUID, dataset.AccessionNumber) == ("2.25.103", "ACC1")
    assert (dataset.ContentDate, dataset.ContentTime) == ("20260203", "040506.000789")
    assert dataset.InstanceCreationDate == dataset.SeriesDate == "20260203"
    assert dataset.LossyImageCompression == "00"
    series = dataset.ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == source.series_instance_uid
    assert {i.ReferencedSOPInstanceUID for i in series.ReferencedInstanceSequence} == set(
        source.sop_instance_uids
    )
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert [float(v) for v in measures.PixelSpacing] == pytest.approx([1.1, 0.9])
    assert float(measures.SpacingBetweenSlices) == pytest.approx(2.0)


def test_long_titles_fit_their_elements(tmp_path: Path) -> None:
    source = read_series(write_classic_series(tmp_path / "s", chiral_image(), np.eye(4)))
    labelmap = labelmap_on(source, chiral_labels(), np.eye(4))
    path = write(tmp_path, source, labelmap, phantom_manifest(title="T" * 64), device_serial_number="N" * 99)
    assert dcmread(path).SeriesDescription == ("AI, unverified: " + "T" * 64)[:64]


def test_loss_in_the_source_is_told_in_the_result(tmp_path: Path) -> None:
    path, source, labelmap = written(tmp_path, transfer_syntax=JPEGLSNearLossless)
    dataset = dcmread(path)
    assert dataset.LossyImageCompression == "01"
    assert dataset.LossyImageCompressionMethod == "ISO_14495_1"
    assert float(dataset.LossyImageCompressionRatio) >= 1
    prove_segmentation(path, source, labelmap, phantom_manifest())


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientID", "P" * 90),
        ("PatientName", "N" * 200),
        ("PatientBirthDate", "unknown"),
        ("AccessionNumber", "A" * 40),
        ("StudyTime", "25:00:99"),
        ("StudyID", "S" * 30),
    ],
)
def test_identifiers_that_break_their_vr_are_passed_on(tmp_path: Path, keyword: str, value: str) -> None:
    def edit(dataset: Dataset, z: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setattr(dataset, keyword, value)

    path, source, labelmap = written(tmp_path, edit=edit)
    prove_segmentation(path, source, labelmap, phantom_manifest())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = dcmread(path)[keyword].value
    assert kept == ("" if keyword in ("PatientBirthDate", "StudyTime") else value)


@pytest.mark.parametrize("name", ["Müller^Jürgen", "Yamada^Tarou=山田^太郎=やまだ^たろう", "Ελλάς^Άννα"])
def test_names_of_any_script_survive(tmp_path: Path, name: str) -> None:
    path, source, labelmap = written(tmp_path, SpecificCharacterSet="ISO_IR 192", PatientName=name)
    assert str(dcmread(path).PatientName) == name
    prove_segmentation(path, source, labelmap, phantom_manifest())


# --- what cannot be encoded ---------------------------------------------------------------------------


def test_nothing_found_is_no_segmentation(tmp_path: Path) -> None:
    _, source, labelmap = written(tmp_path)
    empty = replace(labelmap, array=np.zeros_like(labelmap.array))
    with pytest.raises(EmptySegmentationError):
        build_segmentation(source, empty, phantom_manifest(), **UIDS)


def test_a_labelmap_of_another_model_or_grid_is_not_encoded(tmp_path: Path) -> None:
    _, source, labelmap = written(tmp_path)
    with pytest.raises(SegmentationError, match=r"does not define: \[3\]"):
        build_segmentation(source, labelmap, phantom_manifest(2), **UIDS)
    with pytest.raises(SegmentationError, match="voxels"):
        build_segmentation(source, replace(labelmap, array=labelmap.array[1:]), phantom_manifest(), **UIDS)
    shifted = labelmap.affine.copy()
    shifted[2, 3] += 0.5
    with pytest.raises(SegmentationError, match=r"0\.500 mm away"):
        build_segmentation(source, replace(labelmap, affine=shifted), phantom_manifest(), **UIDS)


def test_without_identity_or_frame_of_reference_nothing_is_encoded(tmp_path: Path) -> None:
    _, source, labelmap = written(tmp_path)
    nobody = replace(source.identity, elements={**source.identity.elements, "PatientID": ""})
    for broken, reason in (
        (replace(source, identity=nobody), ReasonCode.IDENTITY_MISSING),
        (replace(source, frame_of_reference_uid=None), ReasonCode.INVALID_GEOMETRY),
    ):
        with pytest.raises(Refusal) as caught:
            build_segmentation(broken, labelmap, phantom_manifest(), **UIDS)
        assert caught.value.reason is reason


def test_more_than_255_labels(tmp_path: Path) -> None:
    source = read_series(write_classic_series(tmp_path / "s", chiral_image(), np.eye(4)))
    labels = np.arange(7 * 11 * 13, dtype=np.uint16).reshape(7, 11, 13) % 301
    labelmap = Labelmap(labels, source.volume.affine)
    path = write(tmp_path, source, labelmap, phantom_manifest(300))
    prove_segmentation(path, source, labelmap, phantom_manifest(300))
    assert len(dcmread(path).SegmentSequence) == 300


# --- other programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classic", "enhanced", "lossy", "ct"])
def test_dciodvfy_finds_no_error(tmp_path: Path, kind: str) -> None:
    dciodvfy = program("dciodvfy", "dicom3tools")
    if kind == "enhanced":
        source = read_series(write_enhanced_series(tmp_path, chiral_image(), oblique_affine()))
        path = write(
            tmp_path, source, labelmap_on(source, chiral_labels(), oblique_affine()),
            phantom_manifest(laterality=["left"]),
        )  # fmt: skip
    else:
        options = {"lossy": {"transfer_syntax": JPEGLSNearLossless}, "ct": {"modality": "CT"}}
        path, _, _ = written(tmp_path, **options.get(kind, {}))
    said = subprocess.run([dciodvfy, path], capture_output=True, text=True, check=False).stderr
    assert "Segmentation" in said.splitlines()
    assert [line for line in said.splitlines() if line.startswith("Error")] == []


@pytest.mark.parametrize(
    "affine", [all_orientations()[i] for i in (0, 11, 26, 45)] + [oblique_affine()], ids=axis_codes
)
def test_dcmqi_reads_the_same_voxels(tmp_path: Path, affine: Affine) -> None:
    segimage2itkimage = program("segimage2itkimage", "dcmqi of PyPI")
    path, _, _ = written(tmp_path, affine=affine)
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(
        [segimage2itkimage, "--inputDICOM", path, "--outputDirectory", out, "-t", "nrrd", "--mergeSegments"],
        check=True,
        capture_output=True,
    )
    images = list(out.glob("*.nrrd"))
    assert len(images) == 1
    image = SimpleITK.ReadImage(str(images[0]))
    to_mm = np.eye(4)
    to_mm[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    to_mm[:3, 3] = image.GetOrigin()
    read = SimpleITK.GetArrayFromImage(image)
    assert_same_places(places_mm(read, to_mm), places_mm(chiral_labels(), affine))
