"""Reorientation over all 48 axis codes: places in the patient never move, voxel values never change."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.volume import (
    Labelmap,
    Reorientation,
    Volume,
    axis_codes,
    is_axis_code,
    reorient,
    spacing_xyz_mm,
)

CODES = ["".join(letters) for pairs in permutations(["LR", "PA", "SI"]) for letters in product(*pairs)]
codes = st.sampled_from(CODES)
shapes = st.tuples(*[st.integers(1, 5)] * 3)
_DIRECTION = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}


def affine_of(code: str, spacing: tuple[float, float, float], tilt: float = 0.0) -> NDArray[np.float64]:
    """An affine of a code, turned by ``tilt`` radians about the patient's axes."""
    affine = np.eye(4)
    for axis, letter in enumerate(code):
        world, sign = _DIRECTION[letter]
        affine[:3, axis] = 0
        affine[world, axis] = sign * spacing[axis]
    cos, sin = np.cos(tilt), np.sin(tilt)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = (-31.5, 12.25, 7.0)
    return affine


def place(affine: NDArray[np.float64], z: int, y: int, x: int) -> NDArray[np.float64]:
    return (affine @ (x, y, z, 1.0))[:3]


def test_there_are_48_codes() -> None:
    assert len(set(CODES)) == 48
    assert all(map(is_axis_code, CODES))


@pytest.mark.parametrize("code", ["", "RA", "RASL", "RRS", "LRS", "ras", "XYZ", "RAX"])
def test_what_is_no_code(code: str) -> None:
    assert not is_axis_code(code)
    with pytest.raises(ValueError, match="axis codes"):
        Reorientation.between(code, "RAS")
    with pytest.raises(ValueError, match="axis codes"):
        Reorientation.between("RAS", code)


@given(codes, st.floats(-0.6, 0.6), st.tuples(*[st.floats(0.2, 9)] * 3))
def test_the_code_of_a_tilted_affine(code: str, tilt: float, spacing: tuple[float, float, float]) -> None:
    affine = affine_of(code, spacing, tilt)
    assert axis_codes(affine) == code
    assert spacing_xyz_mm(affine) == pytest.approx(spacing)


def test_codes_of_a_grid_between_two_axes_are_still_three_directions() -> None:
    affine = np.eye(4)
    affine[:3, :3] = [[1, 1, 0], [1, 1.0001, 0], [0, 0, 1]]
    assert is_axis_code(axis_codes(affine))


@pytest.mark.parametrize("column", [(0, 0, 0), (np.nan, 0, 0), (np.inf, 0, 0)])
def test_an_axis_without_length_has_no_code(column: tuple[float, float, float]) -> None:
    affine = np.eye(4)
    affine[:3, 1] = column
    with pytest.raises(ValueError, match="without length"):
        axis_codes(affine)


@given(codes, codes, shapes, st.integers(1, 2))
def test_reorienting_moves_no_voxel_in_the_patient(
    source: str, target: str, shape: tuple[int, int, int], channels: int
) -> None:
    affine = affine_of(source, (0.7, 1.1, 2.5), 0.2)
    array = np.arange(channels * np.prod(shape), dtype=np.float32).reshape(channels, *shape)
    volume = Volume(array, affine, "1.2.3")
    moved, change = reorient(volume, target)
    assert axis_codes(moved.affine) == target
    assert moved.frame_of_reference_uid == "1.2.3"
    assert sorted(moved.array.ravel()) == sorted(array.ravel())
    where = {value: place(affine, *index[1:]) for index, value in np.ndenumerate(array)}
    for index, value in np.ndenumerate(moved.array):
        assert np.allclose(place(moved.affine, *index[1:]), where[value], atol=1e-9)
    back = change.inverse()
    assert np.array_equal(back.apply(moved.array), array)
    assert np.allclose(back.apply_affine(moved.affine, moved.shape_zyx), affine, atol=1e-9)


@given(codes, codes, codes, shapes)
def test_two_steps_are_one(a: str, b: str, c: str, shape: tuple[int, int, int]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    detour = Reorientation.between(b, c).apply(Reorientation.between(a, b).apply(array))
    assert np.array_equal(detour, Reorientation.between(a, c).apply(array))


@given(codes, codes)
def test_the_inverse_is_the_way_back(source: str, target: str) -> None:
    assert Reorientation.between(source, target).inverse() == Reorientation.between(target, source)


@given(codes)
def test_staying_changes_nothing(code: str) -> None:
    assert Reorientation.between(code, code) == Reorientation((0, 1, 2), (False, False, False))


def test_volumes_in_millilitres() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[:2] = 3
    affine = affine_of("RAS", (0.5, 2.0, 1.0), 0.4)
    assert Labelmap(labels, affine).volumes_ml() == {3: pytest.approx(0.2)}
    assert Labelmap(np.zeros((2, 2, 2), np.uint16), affine).volumes_ml() == {}
