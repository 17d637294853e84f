"""LABELMAP segmentations: their places and words, what other programs read in them, and their proof."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
import SimpleITK
from findings import CREATED_AT, labelmap_of
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
from storage_scp import StorageScp

from models.manifest import Manifest
from models.volume import Affine, Labelmap, axis_codes
from service.dicom import segmentation as writer
from service.dicom.proof import prove_segmentation
from service.dicom.segmentation import build_segmentation, write_segmentation
from service.dicom.send import OutcomeKind, send_file
from service.dicom.series import SourceSeries, read_series
from service.errors import ProofError
from service.settings import Destination

LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
UIDS: dict[str, Any] = {
    "model_digest": "ab" * 32,
    "sop_instance_uid": "2.25.7001",
    "series_instance_uid": "2.25.7002",
    "content_datetime": CREATED_AT,
}


def on_grid(source: SourceSeries, labels: np.ndarray, affine: Affine) -> Labelmap:
    """Labels that were drawn on the phantom's own grid, brought to the grid of the series."""
    reversed_z = np.dot(affine[:3, 2], source.volume.affine[:3, 2]) < 0
    return labelmap_of(source, np.ascontiguousarray(labels[::-1] if reversed_z else labels))


def write(
    folder: Path, source: SourceSeries, labelmap: Labelmap, manifest: Manifest | None = None, **options: Any
) -> Path:
    dataset = build_segmentation(
        source, labelmap, manifest or phantom_manifest(), form="labelmap", **UIDS, **options
    )
    return write_segmentation(dataset, folder / "seg.dcm")


def prove(path: Path, source: SourceSeries, labelmap: Labelmap, manifest: Manifest | None = None) -> None:
    prove_segmentation(path, source, labelmap, manifest or phantom_manifest(), form="labelmap")


def written(folder: Path, affine: Affine | None = None) -> tuple[Path, SourceSeries, Labelmap]:
    affine = oblique_affine() if affine is None else affine
    source = read_series(write_classic_series(folder / "series", chiral_image(), affine))
    labelmap = on_grid(source, chiral_labels(), affine)
    return write(folder, source, labelmap), source, labelmap


def places_mm(labels: np.ndarray, affine: Affine) -> dict[int, np.ndarray]:
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


AFFINES = [*(all_orientations()[i] for i in (0, 5, 11, 18, 26, 33, 45)), oblique_affine()]


@pytest.mark.parametrize("affine", AFFINES, ids=axis_codes)
def test_highdicom_reads_the_same_places(tmp_path: Path, affine: Affine) -> None:
    path, source, labelmap = written(tmp_path, affine)
    prove(path, source, labelmap)
    read = highdicom.seg.segread(path).get_volume(combine_segments=True)
    index_to_mm = read.affine @ np.eye(4)[[2, 1, 0, 3]]
    assert_same_places(places_mm(read.array, index_to_mm), places_mm(chiral_labels(), affine))


@pytest.mark.parametrize("affine", [AFFINES[0], AFFINES[4], oblique_affine()], ids=axis_codes)
def test_dcmqi_reads_the_same_voxels(tmp_path: Path, affine: Affine) -> None:
    segimage2itkimage = program("segimage2itkimage", "dcmqi of PyPI")
    path, _, _ = written(tmp_path, affine)
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(
        [segimage2itkimage, "--inputDICOM", path, "--outputDirectory", out, "-t", "nrrd", "--mergeSegments"],
        check=True,
        capture_output=True,
    )
    (found,) = out.glob("*.nrrd")
    image = SimpleITK.ReadImage(str(found))
    to_mm = np.eye(4)
    to_mm[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    to_mm[:3, 3] = image.GetOrigin()
    read = SimpleITK.GetArrayFromImage(image)
    assert_same_places(places_mm(read, to_mm), places_mm(chiral_labels(), affine))


def test_enhanced_sources_are_referenced_by_frame(tmp_path: Path) -> None:
    paths = write_enhanced_series(
        tmp_path, chiral_image(), oblique_affine(), frame_order=[4, 0, 6, 1, 5, 2, 3]
    )
    source = read_series(paths)
    labelmap = on_grid(source, chiral_labels(), oblique_affine())
    path = write(tmp_path, source, labelmap)
    prove(path, source, labelmap)


def test_words_and_pixels(tmp_path: Path) -> None:
    path, _, labelmap = written(tmp_path)
    dataset = dcmread(path)
    assert dataset.SOPClassUID == LABEL_MAP_STORAGE
    assert dataset.SegmentationType == "LABELMAP"
    assert [s.SegmentNumber for s in dataset.SegmentSequence] == [0, 1, 2, 3]
    assert dataset.SeriesDescription == "AI, unverified: Phantom parts"
    assert dataset.ContributingEquipmentSequence[0].SoftwareVersions == UIDS["model_digest"]
    occupied = labelmap.array.any(axis=(1, 2))
    assert dataset.NumberOfFrames == occupied.sum() < len(occupied)
    np.testing.assert_array_equal(dataset.pixel_array, labelmap.array[occupied])


def test_empty_planes_are_kept_where_that_is_wanted(tmp_path: Path) -> None:
    _, source, labelmap = written(tmp_path)
    for form, frames in (("labelmap", 7), ("binary", 21)):
        dataset = build_segmentation(
            source, labelmap, phantom_manifest(), form=form, keep_empty_frames=True, **UIDS
        )
        path = write_segmentation(dataset, tmp_path / "kept.dcm")
        prove_segmentation(path, source, labelmap, phantom_manifest(), form=form)
        assert dcmread(path).NumberOfFrames == frames


def test_more_than_255_labels_take_16_bits(tmp_path: Path) -> None:
    source = read_series(write_classic_series(tmp_path / "s", chiral_image(), np.eye(4)))
    labels = np.arange(7 * 11 * 13, dtype=np.uint16).reshape(7, 11, 13) % 301
    labelmap = labelmap_of(source, labels)
    path = write(tmp_path, source, labelmap, phantom_manifest(300))
    prove(path, source, labelmap, phantom_manifest(300))
    dataset = dcmread(path)
    assert (dataset.BitsAllocated, len(dataset.SegmentSequence)) == (16, 301)
    np.testing.assert_array_equal(dataset.pixel_array, labels)


def test_two_builds_are_byte_identical(tmp_path: Path) -> None:
    path, source, labelmap = written(tmp_path)
    first = path.read_bytes()
    assert write(tmp_path, source, labelmap).read_bytes() == first


def test_a_storage_scp_gets_it_as_it_is_stored(tmp_path: Path) -> None:
    path, _, _ = written(tmp_path)
    with StorageScp(sop_class_uids=[LABEL_MAP_STORAGE]) as scp:
        destination = Destination(name="x", ae_title="PACS", host="127.0.0.1", port=scp.port)
        outcome = send_file(path, destination, calling_ae_title="SEGNODE")
        assert outcome.kind is OutcomeKind.DELIVERED
        (received,) = scp.objects
    assert received.sop_class_uid == LABEL_MAP_STORAGE
    assert received.data_set in path.read_bytes()


# --- the proof ----------------------------------------------------------------------------------------

WRITER_FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "flipped in x": lambda s: s[:, :, ::-1],
    "flipped in y": lambda s: s[:, ::-1],
    "flipped in z": lambda s: s[::-1],
    "one slice off": lambda s: np.roll(s, 1, axis=0),
    "labels swapped": lambda s: np.array([0, 2, 1, 3], s.dtype)[s],
    "one voxel": lambda s: np.where(np.arange(s.size).reshape(s.shape) == np.flatnonzero(s)[0], 0, s).astype(
        s.dtype
    ),
}


@pytest.mark.parametrize("fault", WRITER_FAULTS)
def test_voxels_in_the_wrong_place_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plain = writer.pack_labelmap_frames
    change = WRITER_FAULTS[fault]
    monkeypatch.setattr(
        writer, "pack_labelmap_frames", lambda s, **how: plain(np.ascontiguousarray(change(s)), **how)
    )
    path, source, labelmap = written(tmp_path)
    with pytest.raises(ProofError, match=r"voxels differ, the first at x \d+, y \d+, z \d+"):
        prove(path, source, labelmap)


def _frame(dataset: Dataset, number: int = 0) -> Dataset:
    return dataset.PerFrameFunctionalGroupsSequence[number]


def _swap_names(dataset: Dataset) -> None:
    one, two = dataset.SegmentSequence[1:3]
    one.SegmentNumber, two.SegmentNumber = 2, 1
    dataset.SegmentSequence = [dataset.SegmentSequence[0], two, one, dataset.SegmentSequence[3]]


def _unknown_number(dataset: Dataset) -> None:
    dataset.PixelData = b"\x09" + dataset.PixelData[1:]


FILE_FAULTS: dict[str, tuple[Callable[[Dataset], Any], str]] = {
    "segments swapped": (_swap_names, "voxels differ"),
    "a number of no segment": (_unknown_number, "no segment's"),
    "no background": (
        lambda d: setattr(d, "SegmentSequence", d.SegmentSequence[1:]),
        "no segment 0 for the background",
    ),
    "a background of something": (
        lambda d: setattr(d.SegmentSequence[0], "SegmentLabel", "part 1"),
        "segment 0 is not the background",
    ),
    "a position": (
        lambda d: setattr(_frame(d).PlanePositionSequence[0], "ImagePositionPatient", [0, 0, 0]),
        "mm away from every slice",
    ),
    "a frame twice": (
        lambda d: setattr(_frame(d, 1), "PlanePositionSequence", _frame(d).PlanePositionSequence),
        "shows slice 2 once more",
    ),
    "another source image": (
        lambda d: setattr(_frame(d), "DerivationImageSequence", _frame(d, 1).DerivationImageSequence),
        "names another source image",
    ),
    "signed": (lambda d: setattr(d, "PixelRepresentation", 1), "unsigned numbers"),
    "pixel data short": (lambda d: setattr(d, "PixelData", d.PixelData[:-20]), "is short"),
    "a binary one": (lambda d: setattr(d, "SegmentationType", "BINARY"), "not a LABELMAP"),
    "the patient": (lambda d: setattr(d, "PatientID", "SOMEBODY"), "its PatientID is not"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_faults_in_the_file_are_caught(tmp_path: Path, fault: str) -> None:
    path, source, labelmap = written(tmp_path)
    change, words = FILE_FAULTS[fault]
    dataset = dcmread(path)
    change(dataset)
    dataset.save_as(path)
    with pytest.raises(ProofError, match=words):
        prove(path, source, labelmap)


def test_a_binary_object_is_no_label_map(tmp_path: Path) -> None:
    path, source, labelmap = written(tmp_path)
    with pytest.raises(ProofError, match="not a BINARY"):
        prove_segmentation(path, source, labelmap, phantom_manifest())
