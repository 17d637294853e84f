"""Each step of drawing an image from labels does what it says, by itself."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from tiny_head import LEFT, NUMBERS, RIGHT, tiny_numbers, write_tiny_heads

from training.errors import TrainingDataError
from training.synthesis.acquisition import Slices, acquire, random_bias, random_slices, tone
from training.synthesis.deformation import (
    INJECTIVE,
    Deformation,
    deform,
    random_coefficients_mm,
    random_matrix,
)
from training.synthesis.fields import (
    along_axes,
    control_shape,
    interpolation_matrix,
    slice_matrix,
    smooth_field,
    spline_matrix,
)
from training.synthesis.intensities import draw_intensities, paint
from training.synthesis.label_maps import ClassTable, LabelMap, LabelMapFolder
from training.synthesis.stripping import dilated, kept
from training.synthesis.structures import LEFT_TO_RIGHT, STRUCTURES, merged

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> LabelMapFolder:
    return LabelMapFolder(write_tiny_heads(tmp_path_factory.mktemp("heads") / "maps"))


@pytest.fixture(scope="module")
def table(folder: LabelMapFolder) -> ClassTable:
    return folder.table


@pytest.fixture(scope="module")
def head(folder: LabelMapFolder) -> LabelMap:
    return folder.read("one")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class TestStructures:
    def test_thirteen_pairs_and_three_in_the_middle(self) -> None:
        names = [s.name for s in STRUCTURES]
        assert [s.value for s in STRUCTURES] == list(range(1, 30))
        assert len(set(names)) == 29
        assert {"Left hippocampus", "Right cerebral cortex", "Third ventricle", "Brain stem"} <= set(names)
        assert [s.name.replace("Left", "Right") for s in STRUCTURES if s.side == "left"] == [
            s.name for s in STRUCTURES if s.side == "right"
        ]

    def test_the_inferior_horn_is_part_of_the_lateral_ventricle_and_air_of_nothing(self) -> None:
        left = next(s.value for s in STRUCTURES if s.name == "Left lateral ventricle")
        assert merged(np.array([4, 5, 43, 44, 0, 24, 530])).tolist() == [
            left,
            left,
            left + 1,
            left + 1,
            0,
            0,
            0,
        ]

    def test_every_left_number_has_the_partner_that_the_output_has(self) -> None:
        by_number = {n: s for s in STRUCTURES for n in s.numbers}
        for left, right in LEFT_TO_RIGHT.items():
            if left in by_number:
                assert by_number[right].name == by_number[left].name.replace("Left", "Right")


class TestLabelMaps:
    def test_a_map_comes_in_ras_whatever_its_file_has(self, head: LabelMap, table: ClassTable) -> None:
        np.testing.assert_array_equal(table.numbers[head.places], tiny_numbers(0))
        assert head.spacing_mm == 1.0

    def test_the_middle_is_the_brains(self, head: LabelMap, table: ClassTable) -> None:
        brain = ~np.isin(tiny_numbers(0), [0, 24, 502, 506])
        np.testing.assert_allclose(head.middle, ndimage.center_of_mass(brain))

    def test_sides_share_their_class_though_the_file_keeps_them_apart(self, table: ClassTable) -> None:
        place = {int(n): i for i, n in enumerate(table.numbers)}
        for left, right in zip(LEFT, RIGHT, strict=True):
            assert table.random_class[place[left]] == table.random_class[place[right]]
            assert table.swapped[place[left]] == place[right]
            assert table.swapped[place[right]] == place[left]
        assert table.swapped[place[14]] == place[14]

    def test_a_number_without_a_class_is_refused(self, tmp_path: Path) -> None:
        maps = LabelMapFolder(write_tiny_heads(tmp_path / "maps", ("one",)))
        path = maps.folder / "training_label_maps" / "one.nii.gz"
        strange = np.full((4, 4, 4), 77, np.float32)
        nibabel.save(nibabel.Nifti1Image(strange, np.eye(4)), path)
        with pytest.raises(TrainingDataError, match="77"):
            maps.read("one")

    def test_missing_tables_and_uneven_voxels_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingDataError, match="class tables"):
            ClassTable.read(tmp_path)
        maps = LabelMapFolder(write_tiny_heads(tmp_path / "maps", ("one",)))
        flat = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.diag([1, 1, 3, 1]))
        nibabel.save(flat, maps.folder / "training_label_maps" / "one.nii.gz")
        with pytest.raises(TrainingDataError, match="isotropic"):
            maps.read("one")
        with pytest.raises(TrainingDataError, match=r"two\.nii\.gz"):
            maps.read("two")


class TestFields:
    def test_products_along_axes_are_the_tensor_product(self) -> None:
        gen = torch.Generator().manual_seed(0)
        volume = torch.randn(2, 3, 4, 5, generator=gen)
        a, b, c = (torch.randn(m, n, generator=gen) for m, n in ((6, 3), (2, 4), (7, 5)))
        wanted = torch.einsum("kzyx,az,by,cx->kabc", volume, a, b, c)
        torch.testing.assert_close(along_axes(volume, [a, b, c]), wanted)
        torch.testing.assert_close(
            along_axes(volume, [None, b, None]), torch.einsum("kzyx,by->kzbx", volume, b)
        )

    @given(st.integers(2, 60), st.floats(1.5, 40))
    @settings(max_examples=60, deadline=None)
    def test_splines_are_a_partition_of_unity_that_reproduces_straight_lines(
        self, n: int, spacing: float
    ) -> None:
        matrix = spline_matrix(n, spacing)
        m = matrix.shape[1]
        assert matrix.min() >= 0
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
        knots = (np.arange(m) - (m - 1) / 2) * spacing + (n - 1) / 2
        np.testing.assert_allclose(matrix @ knots, np.arange(n), atol=1e-9 * n)

    def test_a_slice_has_the_stated_width_at_half_its_height(self) -> None:
        # Far inside, one voxel lit up at a distance of half the width gives half of what the middle gives.
        matrix = slice_matrix(41, 10.0, fwhm=8.0, shift=0.0)
        middle = matrix[2]
        assert middle.argmax() == 20
        assert middle[24] / middle[20] == pytest.approx(0.5, abs=1e-9)
        assert middle[16] / middle[20] == pytest.approx(0.5, abs=1e-9)

    @given(st.integers(5, 50), st.floats(1.0, 8), st.floats(0, 0.99), st.floats(0, 8))
    @settings(max_examples=60, deadline=None)
    def test_slices_and_back_keep_a_constant(self, n: int, spacing: float, phase: float, fwhm: float) -> None:
        shift = phase * min(spacing, n - 1)
        down, up = slice_matrix(n, spacing, fwhm, shift), interpolation_matrix(n, spacing, shift)
        np.testing.assert_allclose(up @ down @ np.ones(n), 1.0)

    def test_back_is_linear_between_the_samples(self) -> None:
        up = interpolation_matrix(13, 4.0, 2.0)  # samples at 2, 6 and 10
        np.testing.assert_allclose(
            up @ np.array([0.0, 4.0, 0.0]), [0, 0, 0, 1, 2, 3, 4, 3, 2, 1, 0, 0, 0], atol=1e-12
        )


def identity(**changes: object) -> Deformation:
    values = {
        "matrix": np.eye(3),
        "offset_mm": np.zeros(3),
        "coefficients_mm": np.zeros((3, *control_shape((24, 24, 24), 8.0))),
        "knot_mm": 8.0,
    }
    return Deformation(**{**values, **changes})  # type: ignore[arg-type]


def deformed(head: LabelMap, table: ClassTable, deformation: Deformation, shape=(24, 24, 24), spacing=1.0):
    middle = np.full(3, 11.5)  # of the array, so that the identity is one
    found = deform(
        torch.as_tensor(head.places), 1.0, middle, torch.as_tensor(table.swapped), shape, spacing, deformation
    )
    assert found.dtype == torch.uint8
    return table.numbers[found.numpy()]


class TestDeformation:
    def test_nothing_moved_is_the_map_itself(self, head: LabelMap, table: ClassTable) -> None:
        np.testing.assert_array_equal(deformed(head, table, identity()), tiny_numbers(0))

    def test_an_offset_of_whole_voxels_moves_and_leaves_air_behind(
        self, head: LabelMap, table: ClassTable
    ) -> None:
        found = deformed(head, table, identity(offset_mm=np.array([3.0, 0.0, -2.0])))
        wanted = np.zeros_like(tiny_numbers(0))
        wanted[:-3, :, 2:] = tiny_numbers(0)[3:, :, :-2]
        np.testing.assert_array_equal(found, wanted)

    @pytest.mark.parametrize("planes", [-3, 3])
    def test_beyond_the_map_there_is_air(self, table: ClassTable, planes: int) -> None:
        full = LabelMap("full", np.ones((24, 24, 24), np.uint8), 1.0, np.full(3, 11.5))
        found = deformed(full, table, identity(offset_mm=np.array([0.0, planes, 0.0])))
        filled = (found != 0).any(axis=(0, 2))
        wanted = np.arange(24) < 21 if planes > 0 else np.arange(24) >= 3
        np.testing.assert_array_equal(filled, wanted)

    def test_a_flip_mirrors_the_head_and_keeps_left_on_the_left(
        self, head: LabelMap, table: ClassTable
    ) -> None:
        found = deformed(head, table, identity(flipped=True))
        original = tiny_numbers(0)
        partner = LEFT_TO_RIGHT | {r: le for le, r in LEFT_TO_RIGHT.items()}
        wanted = np.vectorize(lambda n: partner.get(n, n))(original[:, :, ::-1])
        np.testing.assert_array_equal(found, wanted)
        assert not np.array_equal(found, original)
        on_the_left = found[:, :, :8]
        assert np.isin(LEFT, on_the_left).any()
        assert not np.isin(on_the_left, RIGHT).any()

    def test_a_quarter_turn_is_numpys(self, head: LabelMap, table: ClassTable) -> None:
        turn = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])  # z from y, y from -z
        found = deformed(head, table, identity(matrix=turn))
        z, y = np.meshgrid(np.arange(24), np.arange(24), indexing="ij")
        np.testing.assert_array_equal(found, tiny_numbers(0)[y, 23 - z])

    def test_a_coarser_grid_takes_the_nearest_voxels(self, head: LabelMap, table: ClassTable) -> None:
        found = deformed(head, table, identity(), shape=(8, 8, 8), spacing=3.0)
        np.testing.assert_array_equal(found, tiny_numbers(0)[1::3, 1::3, 1::3])

    def test_labels_stay_those_of_the_map_under_a_wild_deformation(
        self, head: LabelMap, table: ClassTable
    ) -> None:
        wild = identity(
            matrix=random_matrix(rng(1), rotation_degrees=40, scaling=0.3, shearing=0.1),
            coefficients_mm=random_coefficients_mm(rng(2), (24, 24, 24), 1.0, knot_mm=8.0, sd_mm=3.0),
        )
        assert set(np.unique(deformed(head, table, wild))) <= set(NUMBERS)

    @pytest.mark.parametrize("seed", range(4))
    def test_the_largest_displacement_does_not_fold(self, seed: int) -> None:
        shape, knot = (30, 30, 30), 7.0
        huge = random_coefficients_mm(rng(seed), shape, 1.0, knot_mm=knot, sd_mm=1000.0)
        assert np.abs(huge).max() == pytest.approx(INJECTIVE * knot)
        # Ten times finer than the voxels along each axis in turn would be slow: Jacobians of the voxel grid.
        u = smooth_field(torch.as_tensor(huge), shape, knot).numpy()
        jacobian = np.stack([np.stack(np.gradient(u[i]), axis=-1) for i in range(3)], axis=-2) + np.eye(3)
        assert np.linalg.det(jacobian).min() > 0

    def test_rotations_keep_volume_and_scaling_is_bounded(self) -> None:
        for seed in range(20):
            turned = random_matrix(rng(seed), rotation_degrees=30, scaling=0, shearing=0)
            np.testing.assert_allclose(turned @ turned.T, np.eye(3), atol=1e-12)
            scaled = random_matrix(rng(seed), rotation_degrees=0, scaling=0.2, shearing=0)
            assert np.all(np.abs(np.diag(scaled) - 1) <= 0.2)
            np.testing.assert_array_equal(scaled, np.diag(np.diag(scaled)))


class TestIntensities:
    @pytest.mark.parametrize("contrast", ["random", "t1", "t2", "flair"])
    def test_left_and_right_are_alike_and_nothing_is_negative(self, table: ClassTable, contrast: str) -> None:
        means, stds = draw_intensities(rng(3), table, contrast)  # type: ignore[arg-type]
        np.testing.assert_array_equal(means[table.swapped], means)
        np.testing.assert_array_equal(stds[table.swapped], stds)
        assert min(means.min(), stds.min()) >= 0
        other, _ = draw_intensities(rng(4), table, contrast)  # type: ignore[arg-type]
        assert not np.array_equal(means, other)

    @pytest.mark.parametrize(
        ("contrast", "order"),
        [("t1", "fluid < grey < white"), ("t2", "white < grey < fluid"), ("flair", "fluid < white < grey")],
    )
    def test_the_tissues_stand_in_the_order_of_the_contrast(
        self, table: ClassTable, contrast: str, order: str
    ) -> None:
        drawn = [draw_intensities(rng(s), table, contrast)[0] for s in range(60)]  # type: ignore[arg-type]
        average = dict(zip(table.numbers.tolist(), np.mean(drawn, axis=0), strict=True))
        tissue = {"fluid": average[4], "grey": average[3], "white": average[2]}
        assert order == " < ".join(sorted(tissue, key=tissue.__getitem__))

    def test_t1_means_are_those_of_the_priors(self, table: ClassTable) -> None:
        drawn = np.array([draw_intensities(rng(s), table, "t1")[0] for s in range(400)])
        wanted = table.t1_means[0][table.tissue_class]
        np.testing.assert_allclose(drawn.mean(axis=0), wanted, atol=5 * 5 / 20)  # five standard errors

    def test_each_label_has_its_mean_and_deviation(self, head: LabelMap, table: ClassTable) -> None:
        places = torch.as_tensor(head.places)
        means, stds = torch.linspace(10, 250, len(NUMBERS)), torch.linspace(0, 24, len(NUMBERS))
        image = paint(places, means, stds, torch.Generator().manual_seed(0))
        for place in np.unique(head.places):
            values = image[places == int(place)]
            error = 5 * float(stds[place]) / np.sqrt(len(values)) + 1e-4
            assert float(values.mean()) == pytest.approx(float(means[place]), abs=error)
            assert float(values.std(correction=0)) == pytest.approx(float(stds[place]), abs=error)


class TestAcquisition:
    def test_a_bias_is_positive_smooth_and_as_strong_as_stated(self) -> None:
        shape = (20, 20, 20)
        bias = random_bias(rng(0), shape, 2.0, knot_mm=20.0, log_sd=0.3, device=CPU)
        assert bias.shape == shape
        assert bias.min() > 0
        assert 0.05 < float(bias.log().std()) < 0.3  # a spline averages its coefficients
        assert float((bias.log()[1:] - bias.log()[:-1]).abs().max()) < 0.25
        assert torch.equal(
            random_bias(rng(0), shape, 2.0, knot_mm=20.0, log_sd=0.0, device=CPU), torch.ones(shape)
        )

    def test_voxels_as_fine_as_the_grid_leave_the_image_and_add_the_noise(self) -> None:
        image = torch.full((16, 16, 16), 100.0)
        fine = Slices(np.full(3, 1.0), np.full(3, 1.0), np.zeros(3))
        assert torch.equal(acquire(image, 1.0, fine, 0.0, torch.Generator()), image)
        noisy = acquire(image, 1.0, fine, 5.0, torch.Generator().manual_seed(1)) - image
        assert float(noisy.mean()) == pytest.approx(0, abs=5 * 5 / 64)
        assert float(noisy.std()) == pytest.approx(5, rel=0.1)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_thick_slices_blur_their_own_axis_alone(self, axis: int) -> None:
        image = torch.zeros(25, 25, 25)
        image[12, 12, 12] = 1000.0
        spacing = np.full(3, 1.0)
        spacing[axis] = 6.0
        seen = acquire(image, 1.0, Slices(spacing, spacing, np.zeros(3)), 0.0, torch.Generator())
        lit = torch.nonzero(seen > 1.0)
        extent = (lit.amax(dim=0) - lit.amin(dim=0)).tolist()
        assert extent[axis] > 6
        assert [extent[a] for a in range(3) if a != axis] == [0, 0]

    def test_magnitudes_are_not_negative(self) -> None:
        dark = torch.zeros(8, 8, 8)
        fine = Slices(np.full(3, 1.0), np.full(3, 1.0), np.zeros(3))
        assert acquire(dark, 1.0, fine, 10.0, torch.Generator().manual_seed(0)).min() == 0

    def test_thick_slices_lie_in_every_direction_and_as_often_as_asked(self) -> None:
        settings_of = {"thickest_mm": 7.0, "in_plane_mm": (0.7, 1.5), "isotropic_mm": (1.0, 2.0)}
        drawn = [random_slices(rng(s), thick_probability=0.5, **settings_of) for s in range(400)]
        thick = [s for s in drawn if np.ptp(s.spacing_mm) > 0]
        assert 160 < len(thick) < 240
        directions = np.bincount([int(s.spacing_mm.argmax()) for s in thick], minlength=3)
        assert directions.min() > 40
        assert all(2.0 <= s.spacing_mm.max() <= 7.0 for s in thick)
        assert all(np.all(s.thickness_mm <= s.spacing_mm) for s in drawn)

    def test_tone_keeps_the_order_between_0_and_1(self) -> None:
        values = torch.tensor([3.0, 5.0, 4.0, 13.0])
        torch.testing.assert_close(tone(values, 0.0), torch.tensor([0.0, 0.2, 0.1, 1.0]))
        torch.testing.assert_close(tone(values, float(np.log(2.0))), torch.tensor([0.0, 0.04, 0.01, 1.0]))
        assert torch.equal(tone(torch.full((3,), 7.0), 0.5), torch.zeros(3))


class TestStripping:
    def test_each_variant_keeps_what_it_says(self, head: LabelMap, table: ClassTable) -> None:
        numbers = tiny_numbers(0)
        places = torch.as_tensor(head.places)
        brain, csf = torch.as_tensor(table.brain), torch.as_tensor(table.numbers == 24)
        in_brain = np.isin(numbers, [*LEFT, *RIGHT, 14])
        assert kept(places, brain, csf, "head") is None
        np.testing.assert_array_equal(kept(places, brain, csf, "brain"), in_brain)
        np.testing.assert_array_equal(kept(places, brain, csf, "brain and CSF"), in_brain | (numbers == 24))
        np.testing.assert_array_equal(
            kept(places, brain, csf, "brain with a margin", 2),
            ndimage.binary_dilation(in_brain, np.ones((5, 5, 5))),
        )

    def test_no_margin_is_the_mask_itself(self) -> None:
        mask = torch.rand(4, 5, 6) > 0.5
        assert torch.equal(dilated(mask, 0), mask)
