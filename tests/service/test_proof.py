"""The proof of a segmentation passes what is right and catches every fault that is planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phantom import chiral_image, chiral_labels, oblique_affine, phantom_manifest, write_classic_series
from pydicom import Dataset, dcmread
from pydicom.tag import Tag

from models.volume import Labelmap
from service.dicom import segmentation as writer
from service.dicom.proof import prove_segmentation
from service.dicom.segmentation import build_segmentation, write_segmentation
from service.dicom.series import SourceSeries, read_series
from service.errors import ProofError

Frames = list[tuple[int, int]]
UIDS: dict[str, Any] = {
    "model_digest": "ab" * 32,
    "sop_instance_uid": "2.25.7001",
    "series_instance_uid": "2.25.7002",
    "content_datetime": datetime(2026, 2, 3, tzinfo=UTC),
}


@pytest.fixture
def source(tmp_path: Path) -> SourceSeries:
    return read_series(write_classic_series(tmp_path / "series", chiral_image(), oblique_affine()))


@pytest.fixture
def labelmap(source: SourceSeries) -> Labelmap:
    return Labelmap(chiral_labels(), source.volume.affine, source.frame_of_reference_uid)


def write(folder: Path, source: SourceSeries, labelmap: Labelmap) -> Path:
    return write_segmentation(
        build_segmentation(source, labelmap, phantom_manifest(), **UIDS), folder / "seg.dcm"
    )


def test_what_is_right_passes(tmp_path: Path, source: SourceSeries, labelmap: Labelmap) -> None:
    prove_segmentation(write(tmp_path, source, labelmap), source, labelmap, phantom_manifest())


@pytest.mark.parametrize("decimals", [3, 4, 6])
def test_cosines_that_a_vendor_rounded_pass(tmp_path: Path, decimals: int) -> None:
    """Across half a metre, cosines of three decimals are off by more than any tolerance in millimetres."""

    def rounded(dataset: Dataset, z: int) -> None:
        cosines = [f"{float(v):.{decimals}f}" for v in dataset.ImageOrientationPatient]
        dataset.ImageOrientationPatient = cosines

    affine = oblique_affine((45.0, 45.0, 2.0))
    source = read_series(write_classic_series(tmp_path / "series", chiral_image(), affine, edit=rounded))
    labelmap = Labelmap(chiral_labels(), source.volume.affine, source.frame_of_reference_uid)
    prove_segmentation(write(tmp_path, source, labelmap), source, labelmap, phantom_manifest())


# --- faults of the writer, planted in it --------------------------------------------------------------


def change_voxels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
    plain = writer.pack_frames
    return lambda segments, count, **how: plain(np.ascontiguousarray(change(segments)), count, **how)


def _swap_segments(segments: np.ndarray) -> np.ndarray:
    return np.array([0, 2, 1, 3], segments.dtype)[segments]


def _swap_inside_one_box(segments: np.ndarray) -> np.ndarray:
    """Two voxels of different labels trade places: all volumes and nearly all voxels stay."""
    changed = segments.copy()
    one, two = np.argwhere(segments == 1)[0], np.argwhere(segments == 2)[0]
    changed[tuple(one)], changed[tuple(two)] = 2, 1
    return changed


def _one_voxel(segments: np.ndarray) -> np.ndarray:
    changed = segments.copy()
    changed[tuple(np.argwhere(segments == 1)[-1])] = 0
    return changed


VOXEL_FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "flipped in x": lambda s: s[:, :, ::-1],
    "flipped in y": lambda s: s[:, ::-1],
    "flipped in z": lambda s: s[::-1],
    "turned half around": lambda s: s[:, ::-1, ::-1],
    "one slice off": lambda s: np.roll(s, 1, axis=0),
    "one row off": lambda s: np.roll(s, 1, axis=1),
    "one column off": lambda s: np.roll(s, -1, axis=2),
    "labels swapped": _swap_segments,
    "two voxels swapped": _swap_inside_one_box,
    "one voxel lost": _one_voxel,
}


@pytest.mark.parametrize("fault", VOXEL_FAULTS)
def test_voxels_in_the_wrong_place_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: SourceSeries, labelmap: Labelmap, fault: str
) -> None:
    monkeypatch.setattr(writer, "pack_frames", change_voxels(VOXEL_FAULTS[fault]))
    path = write(tmp_path, source, labelmap)
    with pytest.raises(
        ProofError, match=r"voxels differ, the first at x \d+, y \d+, z \d+: label \d"
    ) as caught:
        prove_segmentation(path, source, labelmap, phantom_manifest())
    assert "PHANTOM-1" not in str(caught.value)
    if fault in ("two voxels swapped", "one voxel lost"):
        count = 1 + (fault == "two voxels swapped")
        assert f"{count} of {labelmap.array.size} voxels differ" in caught.value.message


def test_bits_in_the_wrong_order_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: SourceSeries, labelmap: Labelmap
) -> None:
    plain = np.packbits
    monkeypatch.setattr(np, "packbits", lambda bits, bitorder: plain(bits, bitorder="big"))
    path = write(tmp_path, source, labelmap)
    monkeypatch.undo()
    with pytest.raises(ProofError, match=r"voxels differ|overlaps"):
        prove_segmentation(path, source, labelmap, phantom_manifest())


def test_frames_that_each_start_on_a_byte_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: SourceSeries, labelmap: Labelmap
) -> None:
    """11 x 13 pixels are no whole number of bytes, and frames follow each other without a gap."""
    plain = writer.pack_frames

    def aligned(segments: np.ndarray, count: int, *, keep_empty: bool) -> tuple[Frames, bytes]:
        frames, _ = plain(segments, count)
        return frames, b"".join(np.packbits(segments[z] == n, bitorder="little").tobytes() for n, z in frames)

    monkeypatch.setattr(writer, "pack_frames", aligned)
    path = write(tmp_path, source, labelmap)
    with pytest.raises(ProofError, match=r"voxels differ|overlaps"):
        prove_segmentation(path, source, labelmap, phantom_manifest())


SOURCE_FAULTS: dict[str, Callable[[SourceSeries], SourceSeries]] = {
    "positions reversed": lambda s: replace(s, positions_mm=s.positions_mm[::-1]),
    "positions one off": lambda s: replace(s, positions_mm=np.roll(s.positions_mm, 1, axis=0)),
    "positions moved": lambda s: replace(s, positions_mm=s.positions_mm + np.array([0.0, 0.4, 0.0])),
    "positions in RAS": lambda s: replace(s, positions_mm=s.positions_mm * [-1.0, -1.0, 1.0]),
    "rows for columns": lambda s: replace(s, orientation=s.orientation[3:] + s.orientation[:3]),
    "a row mirrored": lambda s: replace(
        s, orientation=tuple(-v for v in s.orientation[:3]) + s.orientation[3:]
    ),
    "pixel spacing swapped": lambda s: replace(s, pixel_spacing_mm=s.pixel_spacing_mm[::-1]),
    "frame of reference": lambda s: replace(s, frame_of_reference_uid="2.25.666"),
    "source series": lambda s: replace(s, series_instance_uid="2.25.666"),
    "an image not referenced": lambda s: replace(
        s, sop_instance_uids=(*s.sop_instance_uids[:-1], "2.25.666")
    ),
    "frames named wrongly": lambda s: replace(
        s, frame_numbers=(s.frame_numbers[1], s.frame_numbers[0], *s.frame_numbers[2:])
    ),
    "patient": lambda s: _other(s, "PatientID", "SOMEBODY"),
    "patient's name": lambda s: _other(s, "PatientName", "Some^Body"),
    "issuer": lambda s: _other(s, "IssuerOfPatientID", "elsewhere"),
    "study": lambda s: _other(s, "StudyInstanceUID", "2.25.666"),
    "loss concealed": lambda s: replace(s, lossy=True, lossy_ratio="10", lossy_method="ISO_10918_1"),
}


def _other(source: SourceSeries, keyword: str, value: str) -> SourceSeries:
    elements = {**source.identity.elements, keyword: value}
    return replace(source, identity=replace(source.identity, elements=elements))


@pytest.mark.parametrize("fault", SOURCE_FAULTS)
def test_an_object_of_another_source_is_caught(
    tmp_path: Path, source: SourceSeries, labelmap: Labelmap, fault: str
) -> None:
    """The writer is told something else than the truth, by which the proof then goes."""
    path = write(tmp_path, SOURCE_FAULTS[fault](source), labelmap)
    with pytest.raises(ProofError) as caught:
        prove_segmentation(path, source, labelmap, phantom_manifest())
    for private in ("PHANTOM-1", "SOMEBODY", "Phantom^Test"):
        assert private not in str(caught.value)


# --- faults in the file -------------------------------------------------------------------------------


def _codes_swapped(dataset: Dataset) -> None:
    one, two = dataset.SegmentSequence[:2]
    kinds = one.SegmentedPropertyTypeCodeSequence, two.SegmentedPropertyTypeCodeSequence
    two.SegmentedPropertyTypeCodeSequence, one.SegmentedPropertyTypeCodeSequence = kinds


def _segments_swapped(dataset: Dataset) -> None:
    """Names and codes together change their numbers: every word is right, and stands for other voxels."""
    one, two = dataset.SegmentSequence[:2]
    one.SegmentNumber, two.SegmentNumber = 2, 1
    dataset.SegmentSequence = [two, one, dataset.SegmentSequence[2]]


def _frame(dataset: Dataset, number: int = 0) -> Dataset:
    return dataset.PerFrameFunctionalGroupsSequence[number]


def _turned(dataset: Dataset) -> None:
    """By less than a twentieth of a millimetre at the far corner, which no tolerance in millimetres sees."""
    (plane,) = dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    cosines = np.array(plane.ImageOrientationPatient, float)
    cosines[3:] += 1e-3 * cosines[:3]
    plane.ImageOrientationPatient = [f"{c:.12f}" for c in cosines]


def _drop_frame(dataset: Dataset) -> None:
    dataset.PerFrameFunctionalGroupsSequence = dataset.PerFrameFunctionalGroupsSequence[:-1]


def _repeat_frame(dataset: Dataset) -> None:
    _frame(dataset, 1).PlanePositionSequence = _frame(dataset, 0).PlanePositionSequence


def _overlap(dataset: Dataset) -> None:
    """A voxel of segment 2 is set in segment 1 as well, whose frames are painted first."""
    size = dataset.Rows * dataset.Columns
    frame_of = {
        (f.SegmentIdentificationSequence[0].ReferencedSegmentNumber, str(f.PlanePositionSequence[0])): i
        for i, f in enumerate(dataset.PerFrameFunctionalGroupsSequence)
    }
    bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
    place = next(place for number, place in frame_of if number == 2 and (1, place) in frame_of)
    first, second = frame_of[1, place] * size, frame_of[2, place] * size
    bits[first + int(np.argmax(bits[second : second + size]))] = 1
    dataset.PixelData = np.packbits(bits, bitorder="little").tobytes()


FILE_FAULTS: dict[str, tuple[Callable[[Dataset], Any], str]] = {
    "codes of two segments": (_codes_swapped, "segment 1 are those of no label"),
    "two segments": (_segments_swapped, "voxels differ"),
    "segment numbers": (lambda d: setattr(d.SegmentSequence[2], "SegmentNumber", 7), "not consecutive"),
    "a laterality": (
        lambda d: setattr(
            d.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0],
            "SegmentedPropertyTypeModifierCodeSequence",
            [d.SegmentSequence[0].SegmentedPropertyCategoryCodeSequence[0]],
        ),
        "no label of the model",
    ),
    "a frame's segment": (
        lambda d: setattr(_frame(d).SegmentIdentificationSequence[0], "ReferencedSegmentNumber", 9),
        "frame 1 shows segment 9",
    ),
    "a frame's position": (
        lambda d: setattr(_frame(d).PlanePositionSequence[0], "ImagePositionPatient", [0, 0, 0]),
        "mm away from every slice",
    ),
    "the orientation": (_turned, "frame 1 does not state the orientation"),
    "the pixel spacing": (
        lambda d: setattr(
            d.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0], "PixelSpacing", ["1.11", "0.9"]
        ),
        "do not lie along",
    ),
    "segments that overlap": (_overlap, "overlaps another segment"),
    "a frame twice": (_repeat_frame, "wrongly or once more"),
    "a frame without position": (lambda d: _frame(d).pop("PlanePositionSequence"), "ImagePositionPatient"),
    "a frame less": (_drop_frame, "frames and describes"),
    "pixel data short": (lambda d: setattr(d, "PixelData", d.PixelData[:-40]), "is short"),
    "rows and columns": (lambda d: (setattr(d, "Rows", 13), setattr(d, "Columns", 11)), "13 x 11 pixels"),
    "fractional": (lambda d: setattr(d, "SegmentationType", "FRACTIONAL"), "not a BINARY"),
    "no segmentation": (lambda d: setattr(d, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.7"), "not a BINARY"),
    "in the source series": (
        lambda d: setattr(d, "SeriesInstanceUID", "2.25.102"),
        "series of its own source",
    ),
    "no references": (lambda d: d.pop(Tag("ReferencedSeriesSequence")), "source series, and that alone"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_faults_in_the_file_are_caught(
    tmp_path: Path, source: SourceSeries, labelmap: Labelmap, fault: str
) -> None:
    change, words = FILE_FAULTS[fault]
    path = write(tmp_path, source, labelmap)
    dataset = dcmread(path)
    change(dataset)
    dataset.save_as(path)
    with pytest.raises(ProofError, match=words):
        prove_segmentation(path, source, labelmap, phantom_manifest())


def test_a_damaged_file_is_caught(tmp_path: Path, source: SourceSeries, labelmap: Labelmap) -> None:
    path = write(tmp_path, source, labelmap)
    whole = path.read_bytes()
    for cut in (0, 100, 500, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(ProofError):
            prove_segmentation(path, source, labelmap, phantom_manifest())


def test_labels_of_another_model_version_are_caught(
    tmp_path: Path, source: SourceSeries, labelmap: Labelmap
) -> None:
    path = write(tmp_path, source, labelmap)
    fewer = replace(labelmap, array=np.where(labelmap.array == 3, 0, labelmap.array).astype(np.uint8))
    with pytest.raises(ProofError, match="not the labels that were found"):
        prove_segmentation(path, source, fewer, phantom_manifest())
