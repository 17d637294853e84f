"""Rigid registration: it finds a motion that is known, the same one every time, and not too far."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray
from phantom import oblique_affine
from scipy.spatial.transform import Rotation
from scipy.special import expit

from models.errors import ReasonCode, Refusal
from models.volume import Affine, Volume
from service.registration import register_rigid

FRAME = "2.25.1"
FIXED_AFFINE = oblique_affine((3.0, 3.0, 4.0), (6.0, -4.0, 3.0), (-40.0, -45.0, 8.0))
FIXED_SHAPE = (20, 30, 27)
MOVING_AFFINE = oblique_affine((3.2, 3.2, 3.2), (-10.0, 5.0, 8.0), (-46.0, -42.0, 4.0))
MOVING_SHAPE = (27, 30, 29)


def motion(angle_degrees: float, shift_mm: tuple[float, float, float]) -> Affine:
    """A rotation about a point within the phantom, and a shift."""
    centre = np.array([0.0, 0.0, 45.0])
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.radians(angle_degrees) * np.array([0.48, 0.6, 0.64])).as_matrix()
    matrix[:3, 3] = centre + shift_mm - matrix[:3, :3] @ centre
    return matrix


def head(shape_zyx: tuple[int, int, int], affine: Affine, *, inverted: bool = False) -> NDArray[np.float32]:
    """A smooth head with two bodies in it, told by the place in the patient alone."""
    zyx = np.indices(shape_zyx).reshape(3, -1)
    x, y, z = (affine @ np.vstack([zyx[::-1], np.ones(zyx.shape[1])]))[:3]
    inside = expit((1 - (x / 30) ** 2 - (y / 36) ** 2 - ((z - 45) / 32) ** 2) * 8)
    one = expit(10 - ((x - 12) ** 2 + (y - 8) ** 2 + (z - 38) ** 2) / 10)
    other = expit(10 - ((x + 9) ** 2 + (y + 14) ** 2 + (z - 55) ** 2) / 6)
    values = inside * ((500 - 300 * one - 420 * other) if inverted else (300 + 500 * one + 250 * other))
    return values.astype(np.float32).reshape(shape_zyx)


def pair(moved_by: Affine) -> tuple[Volume, Volume]:
    """One head twice, with other contrast and on another grid, the second time moved."""
    fixed = head(FIXED_SHAPE, FIXED_AFFINE)
    moving = head(MOVING_SHAPE, np.linalg.inv(moved_by) @ MOVING_AFFINE, inverted=True)
    return Volume(fixed[None], FIXED_AFFINE, FRAME), Volume(moving[None], MOVING_AFFINE, FRAME)


def apart_mm(one: Affine, other: Affine) -> float:
    """How far apart two motions put a point of the head, at most."""
    points = np.array([[x, y, z, 1.0] for x in (-30, 30) for y in (-36, 36) for z in (13, 77)])
    return float(np.linalg.norm((points @ (one - other).T)[:, :3], axis=1).max())


def test_a_known_motion_is_found_and_found_again() -> None:
    true = motion(6.0, (5.0, -4.0, 3.0))
    fixed, moving = pair(true)
    found = register_rigid(fixed, moving, limit_mm=30, name="T2")
    assert apart_mm(np.eye(4), true) > 6
    assert apart_mm(found.transform, true) < 1.5  # half a voxel
    assert found.rotation_degrees == pytest.approx(6.0, abs=1.0)
    again = register_rigid(fixed, moving, limit_mm=30, name="T2")
    np.testing.assert_array_equal(again.transform, found.transform)
    assert json.dumps(found.figures()) == json.dumps(again.figures())
    assert found.figures()["metric"] < 0


def test_in_another_frame_of_reference_it_begins_with_centre_on_centre() -> None:
    true = motion(4.0, (160.0, -90.0, 200.0))  # nothing overlaps where they lie
    fixed, _ = pair(np.eye(4))
    far = MOVING_AFFINE.copy()
    far[:3, 3] += (160.0, -90.0, 200.0)
    array = head(MOVING_SHAPE, np.linalg.inv(true) @ far, inverted=True)
    found = register_rigid(fixed, Volume(array[None], far, "2.25.2"), limit_mm=30, name="T2")
    assert apart_mm(found.transform, true) < 1.5
    assert found.moved_mm < 30


def test_an_implausible_motion_is_refused_with_its_figures() -> None:
    fixed, moving = pair(motion(6.0, (5.0, -4.0, 3.0)))
    with pytest.raises(Refusal) as caught:
        register_rigid(fixed, moving, limit_mm=4, name="T2")
    assert caught.value.reason is ReasonCode.REGISTRATION_FAILED
    assert "the channel T2 by up to" in caught.value.message
    assert "at most 4 mm" in caught.value.message
    assert caught.value.remedy


def test_images_that_do_not_overlap_are_refused() -> None:
    fixed, moving = pair(np.eye(4))
    far = MOVING_AFFINE.copy()
    far[:3, 3] += 900.0
    with pytest.raises(Refusal) as caught:
        register_rigid(fixed, Volume(moving.array, far, FRAME), limit_mm=30, name="T2")
    assert caught.value.reason is ReasonCode.REGISTRATION_FAILED
