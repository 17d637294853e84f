"""A channel on the reference's grid: the same values at the same millimetres, and nothing made up outside."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray
from phantom import oblique_affine

from models.volume import Affine, Volume
from service.alignment import AlignedChannel, alignment_warnings, resample_linear
from service.channel_rules import IN_ORDER, AlignmentRules
from service.reading import ReadingRules, VolumeRule
from service.registration import Registration

FIXED = Volume(np.zeros((1, 9, 14, 12), np.float32), oblique_affine((1.1, 0.9, 2.2), (8.0, 15.0, -20.0)))
NOTHING = np.eye(4)


def at_the_same_place(shape_zyx: tuple[int, int, int], affine: Affine) -> NDArray[np.float64]:
    """A value that is linear in the millimetres of the patient: interpolation gives it exactly."""
    zyx = np.indices(shape_zyx).reshape(3, -1)
    x, y, z = (affine @ np.vstack([zyx[::-1], np.ones(zyx.shape[1])]))[:3]
    return (1000 + 3 * x - 2 * y + 5 * z).reshape(shape_zyx)


def around(volume: Volume, spacing_mm: float, margin_mm: float) -> tuple[tuple[int, int, int], Affine]:
    """An upright grid that holds all of another one."""
    size = np.array(volume.shape_zyx[::-1]) - 1
    corners = (np.array([[*(size * c), 1.0] for c in np.ndindex(2, 2, 2)]) @ volume.affine.T)[:, :3]
    low, high = corners.min(axis=0) - margin_mm, corners.max(axis=0) + margin_mm
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = low
    x, y, z = (int(n) for n in np.ceil((high - low) / spacing_mm) + 1)
    return (z, y, x), affine


@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_values_stay_at_their_millimetres_in_oblique_and_in_mirrored_grids(mirror: float) -> None:
    shape, affine = around(FIXED, 1.7, 4.0)
    array = at_the_same_place(shape, affine).astype(np.float32)
    if mirror < 0:
        array, affine = array[:, :, ::-1], affine.copy()
        affine[0, 3] += affine[0, 0] * (shape[2] - 1)
        affine[0, 0] *= -1
    resampled, covered = resample_linear(Volume(array[None], affine), FIXED, NOTHING)
    assert covered == 1.0
    assert resampled.dtype == np.float32
    np.testing.assert_allclose(resampled, at_the_same_place(FIXED.shape_zyx, FIXED.affine), rtol=1e-5)


def test_it_is_what_itk_gives_within_the_channel() -> None:
    values = np.random.default_rng(0).normal(50, 20, (7, 11, 10)).astype(np.float32)
    affine = oblique_affine((1.5, 1.5, 2.5), (-5.0, 10.0, 12.0), tuple(FIXED.affine[:3, 3]))

    def image(array: NDArray[np.float32], to_mm: Affine) -> SimpleITK.Image:
        made = SimpleITK.GetImageFromArray(array)
        spacing = np.linalg.norm(to_mm[:3, :3], axis=0)
        made.SetSpacing(spacing.tolist())
        made.SetOrigin(to_mm[:3, 3].tolist())
        made.SetDirection((to_mm[:3, :3] / spacing).ravel().tolist())
        return made

    grid = image(FIXED.array[0], FIXED.affine)
    outside = -999.0
    expected = SimpleITK.GetArrayFromImage(
        SimpleITK.Resample(image(values, affine), grid, SimpleITK.Transform(), SimpleITK.sitkLinear, outside)
    )
    resampled, covered = resample_linear(Volume(values[None], affine), FIXED, NOTHING)
    inside = expected != outside
    assert 0.2 < inside.mean() < 1.0
    np.testing.assert_allclose(resampled[inside], expected[inside], rtol=1e-4, atol=1e-3)
    assert (resampled[~inside] == values.min()).mean() > 0.99  # ITK's border and this one differ by rounding
    assert covered == pytest.approx(inside.mean(), abs=0.01)


def test_the_outer_half_of_the_outermost_voxels_belongs_to_them_and_what_is_beyond_is_empty() -> None:
    values = np.array([5.0, 10.0, 20.0], np.float32).reshape(1, 1, 3)
    channel = Volume(values[None], np.diag([4.0, 4.0, 4.0, 1.0]))
    fine = np.eye(4)
    fine[0, 3] = -4.0
    line = Volume(np.zeros((1, 1, 1, 17), np.float32), fine)  # x from -4 to 12 mm, the channel from -2 to 10
    resampled, covered = resample_linear(channel, line, NOTHING)
    assert resampled[0, 0].tolist() == [
        5.0, 5.0, 5.0, 5.0, 5.0, 6.25, 7.5, 8.75, 10.0, 12.5, 15.0, 17.5, 20.0, 20.0, 20.0, 5.0, 5.0,
    ]  # fmt: skip
    assert covered == 13 / 17


def test_a_motion_moves_the_channel_and_not_the_grid() -> None:
    values = np.arange(10, dtype=np.float32).reshape(1, 1, 10)
    line = Volume(values[None], np.eye(4))
    to_channel = np.eye(4)
    to_channel[0, 3] = 2.0  # a place of the grid lies 2 mm further in the channel
    resampled, _ = resample_linear(line, line, to_channel)
    assert resampled[0, 0].tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 0, 0]


def test_each_channel_has_a_sentence_and_figures() -> None:
    registration = Registration(np.eye(4), -1.25, 40, 2.5, 3.25)
    reference = AlignedChannel("T1", "1.2", reference=True)
    moved = AlignedChannel("T2", "1.3", resampled=True, covered=0.9, registration=registration)
    assert reference.sentence("T1") == "Channel T1: series 1.2, the reference."
    assert "rotated by 2.50 degrees, moved by up to 3.25 mm, metric -1.2500" in moved.sentence("T1")
    assert moved.figures()["registration"]["transform_lps_mm"][0] == [1.0, 0.0, 0.0, 0.0]
    (warning,) = alignment_warnings([reference, moved])
    assert warning.startswith("The channel T2 shows 90.0% of the reference's")


def test_what_a_route_says_of_its_channels_is_part_of_every_uid() -> None:
    rules = [
        IN_ORDER,
        AlignmentRules(reference="T1"),
        AlignmentRules(registration="rigid"),
        AlignmentRules(registration="rigid", registration_limit_mm=5),
        AlignmentRules(volumes={"DWI": VolumeRule(by="DiffusionBValue", equals=1000)}),
    ]
    digests = [each.mixed_into("digest") for each in rules]
    assert digests[0] == "digest"
    assert len({*digests, ReadingRules(gantry_tilt="resample").mixed_into("digest")}) == 6
