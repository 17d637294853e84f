"""NIfTI in and out: geometry against the standard's formulas, refusals with their figures."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models import nifti
from models.errors import ReasonCode, Refusal
from models.nifti import read_labelmap, read_nifti, write_nifti
from models.volume import Labelmap, axis_codes

RAS = np.array([[0, -1.2, 0, 10], [0.8, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1.0]])


def save(
    path: Path, array: NDArray[Any], affine: NDArray[np.float64] = RAS, *, sform: int = 1, qform: int = 1
) -> Path:
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    image.to_filename(path)
    return path


def voxels(shape: tuple[int, ...] = (3, 4, 5)) -> NDArray[np.int16]:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def refused(*paths: Path) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_nifti(paths)
    assert caught.value.remedy
    assert "patient-name" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_array_is_zyx_and_the_affine_is_lps(tmp_path: Path, suffix: str) -> None:
    volume = read_nifti([save(tmp_path / f"a{suffix}", voxels())])
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array[0], voxels().T)
    assert np.allclose(volume.affine, np.diag([-1, -1, 1, 1]) @ RAS)
    assert axis_codes(volume.affine) == "ALS"
    assert volume.frame_of_reference_uid is None


def test_another_reader_puts_every_voxel_at_the_same_place(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", voxels())
    volume, other = read_nifti([path]), SimpleITK.ReadImage(str(path))
    for index in ((0, 0, 0), (2, 1, 4), (1, 3, 0)):
        place = (volume.affine @ [*index, 1])[:3]
        assert np.allclose(other.TransformIndexToPhysicalPoint(index), place, atol=1e-5)
        assert other[index] == volume.array[0][index[::-1]]


def test_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels(), RAS)
    image.header.set_slope_inter(2.5, -1000)
    image.to_filename(tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = np.array([2.5, -1000], "<f4").tobytes()  # nibabel writes its own scale otherwise
    (tmp_path / "a.nii").write_bytes(raw)
    stored = np.frombuffer(bytes(raw[352:]), "<i2").reshape((5, 4, 3))
    assert np.allclose(read_nifti([tmp_path / "a.nii"]).array[0], stored * 2.5 - 1000)


def test_channels_are_stacked_in_order(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.nii", voxels() + 100 * i) for i in range(2)]
    assert read_nifti(paths).array[:, 0, 0, 0].tolist() == [0, 100]


@pytest.mark.parametrize(
    "content",
    [b"", b"not nifti", gzip.compress(b"no", mtime=0), b"\x1f\x8b broken"],
    ids=["nothing", "text", "gzip of text", "broken gzip"],
)
def test_what_is_not_nifti_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "patient-name.nii.gz"
    path.write_bytes(content)
    assert refused(path).reason is ReasonCode.UNREADABLE


def test_a_voxel_type_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.nii"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), path)
    damaged = bytearray(path.read_bytes())
    damaged[70:72] = (9999).to_bytes(2, "little")  # datatype, at byte 70 of the header
    path.write_bytes(damaged)
    assert refused(path).reason is ReasonCode.UNREADABLE


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "patient-name.nii").reason is ReasonCode.UNREADABLE


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"patient-name{suffix}", np.random.default_rng(0).normal(size=(20, 20, 20)))
    path.write_bytes(path.read_bytes()[:-3000])
    assert refused(path).reason is ReasonCode.UNREADABLE


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5, 2), (3, 4, 5, 1)])
def test_only_three_dimensions_are_a_volume(tmp_path: Path, shape: tuple[int, ...]) -> None:
    refusal = refused(save(tmp_path / "a.nii", voxels(shape)))
    assert refusal.reason is ReasonCode.NOT_A_VOLUME
    assert " x ".join(map(str, shape)) in refusal.message


@pytest.mark.parametrize(("sform", "qform"), [(0, 1), (1, 0), (2, 1), (1, 4)])
def test_one_form_is_enough(tmp_path: Path, sform: int, qform: int) -> None:
    volume = read_nifti([save(tmp_path / "a.nii", voxels(), sform=sform, qform=qform)])
    assert np.allclose(volume.affine, np.diag([-1, -1, 1, 1]) @ RAS, atol=1e-5)


def test_no_form_is_refused(tmp_path: Path) -> None:
    refusal = refused(save(tmp_path / "a.nii", voxels(), sform=0, qform=0))
    assert refusal.reason is ReasonCode.INVALID_GEOMETRY
    assert "qform_code 0" in refusal.message


@pytest.mark.parametrize(("shift_mm", "fits"), [(0.05, True), (0.2, False)])
def test_two_forms_must_agree_to_a_tenth_of_a_millimetre(tmp_path: Path, shift_mm: float, fits: bool) -> None:
    image = nibabel.Nifti1Image(voxels(), RAS)
    shifted = RAS.copy()
    shifted[0, 3] += shift_mm
    image.set_sform(shifted, 1)
    image.set_qform(RAS, 1)
    image.to_filename(tmp_path / "a.nii")
    if fits:
        assert read_nifti([tmp_path / "a.nii"]).affine[0, 3] == pytest.approx(-10 - shift_mm)
    else:
        refusal = refused(tmp_path / "a.nii")
        assert refusal.reason is ReasonCode.INVALID_GEOMETRY
        assert "0.2 mm" in refusal.message


def test_sheared_axes_are_refused(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.05
    refusal = refused(save(tmp_path / "a.nii", voxels(), affine, qform=0))
    assert refusal.reason is ReasonCode.INVALID_GEOMETRY
    assert "2.86 degrees" in refusal.message


@pytest.mark.parametrize("column", [(0.0, 0.0, 0.0), (np.nan, 0.0, 0.0)])
def test_axes_without_length_are_refused(tmp_path: Path, column: tuple[float, ...]) -> None:
    path = save(tmp_path / "a.nii", voxels(), qform=0)
    raw = bytearray(path.read_bytes())
    rows = np.frombuffer(bytes(raw[280:328]), "<f4").reshape(3, 4).copy()  # srow_x, srow_y, srow_z
    rows[:, 1] = column
    raw[280:328] = rows.tobytes()
    path.write_bytes(raw)
    assert refused(path).reason is ReasonCode.INVALID_GEOMETRY


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused_and_counted(tmp_path: Path, value: float) -> None:
    array = voxels().astype(np.float32)
    array[0, 0, :2] = value
    refusal = refused(save(tmp_path / "a.nii", array))
    assert refusal.reason is ReasonCode.INVALID_VALUES
    assert " 2 voxels" in refusal.message


def test_colour_is_refused(tmp_path: Path) -> None:
    rgb = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert refused(save(tmp_path / "a.nii", rgb)).reason is ReasonCode.UNSUPPORTED_PIXELS


def test_channels_on_other_grids_are_refused(tmp_path: Path) -> None:
    first = save(tmp_path / "1.nii", voxels())
    smaller = save(tmp_path / "2.nii", voxels((3, 4, 4)))
    assert refused(first, smaller).reason is ReasonCode.CHANNEL_GRIDS_DIFFER
    moved = RAS.copy()
    moved[2, 3] += 0.5
    refusal = refused(first, save(tmp_path / "3.nii", voxels(), moved))
    assert refusal.reason is ReasonCode.CHANNEL_GRIDS_DIFFER
    assert "0.5 mm" in refusal.message


def test_no_file_is_refused() -> None:
    assert refused().reason is ReasonCode.MISSING_CHANNEL


def test_a_header_that_promises_more_than_the_memory_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.nii.gz", voxels((10, 10, 10)))
    monkeypatch.setattr(nifti, "available_memory_bytes", lambda: 7999)
    assert refused(path).reason is ReasonCode.TOO_LARGE
    monkeypatch.setattr(nifti, "available_memory_bytes", lambda: 8000)
    read_nifti([path])


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(*[st.integers(1, 6)] * 3),
    st.sampled_from([np.uint8, np.uint16]),
    st.tuples(*[st.floats(0.3, 5)] * 3),
    st.floats(-0.7, 0.7),
)
def test_a_labelmap_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    dtype: type[Any],
    spacing: tuple[float, float, float],
    tilt: float,
) -> None:
    path = tmp_path_factory.mktemp("labelmap") / "a.nii.gz"
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    array[0, 0, 0] = np.iinfo(dtype).max
    affine = np.diag([*spacing, 1.0])
    cos, sin = np.cos(tilt), np.sin(tilt)
    affine[:3, :3] = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]) @ affine[:3, :3]
    affine[:3, 3] = (5, -7, 90)
    write_nifti(Labelmap(array, affine), path)
    back = read_labelmap(path)
    assert back.array.dtype == dtype
    assert np.array_equal(back.array, array)
    assert np.allclose(back.affine, affine, atol=1e-4)
    header = nibabel.load(path).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    labelmap = Labelmap(voxels().astype(np.uint8), np.eye(4))
    write_nifti(labelmap, tmp_path / "a.nii.gz")
    write_nifti(labelmap, tmp_path / "b.nii.gz")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert (tmp_path / "a.nii.gz").read_bytes()[4:8] == b"\0\0\0\0"  # gzip's time stamp


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.nii"
    write_nifti(Labelmap(voxels().astype(np.uint8), np.eye(4)), path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_nifti(Labelmap(np.zeros((2, 2, 2), np.uint8), np.eye(4)), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]


@pytest.mark.parametrize("value", [-1.0, 70000.0, 1.5, np.nan])
def test_an_image_is_no_labelmap(tmp_path: Path, value: float) -> None:
    with pytest.raises(Refusal, match="integers from 0 to 65535"):
        read_labelmap(save(tmp_path / "a.nii", np.full((2, 2, 2), value)))


def test_eight_orientations_of_one_volume(shared_data: Path) -> None:
    paths = sorted((shared_data / "nifti_orientations").rglob("*.nii*"))
    if not paths:
        pytest.skip("no orientations in the test data")
    for path in paths:
        volume, other = read_nifti([path]), SimpleITK.ReadImage(str(path))
        x, y, z = (n // 3 for n in other.GetSize())
        assert np.allclose(
            other.TransformIndexToPhysicalPoint((x, y, z)), (volume.affine @ [x, y, z, 1])[:3], atol=1e-2
        )
