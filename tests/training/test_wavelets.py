"""The wavelet transform is exact: it can be undone, keeps energy, and its bands mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor

from training.wavelets import (
    ALL_BANDS,
    DETAIL_BANDS,
    WaveletTransform,
    analysis_matrix,
    detail_coefficients,
    detail_parts,
    exact_levels,
    octant,
)

WAVELETS = ["haar", "db2", "db4", "sym4"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("size", [2, 4, 6, 8, 10, 40, 128])
def test_the_matrix_is_orthonormal(size: int, wavelet: str) -> None:
    matrix = analysis_matrix(size, wavelet)
    # PyWavelets tabulates db4's taps to about 1e-12.
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [8, 14, 32])
def test_the_matrix_is_pywavelets_periodisation_up_to_a_shift(size: int) -> None:
    signal = random(size).numpy()
    ours = analysis_matrix(size, "db4").numpy() @ signal
    theirs = [np.concatenate(pywt.dwt(np.roll(signal, k), "db4", mode="periodization")) for k in range(size)]
    assert any(np.allclose(ours, other, atol=1e-9) for other in theirs)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_an_odd_length_has_no_matrix(size: int) -> None:
    with pytest.raises(ValueError, match="even"):
        analysis_matrix(size)


def test_a_wavelet_that_is_not_orthogonal_is_refused() -> None:
    with pytest.raises(ValueError, match="not orthogonal"):
        analysis_matrix(8, "bior2.2")


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("shape", [(8, 8, 8), (12, 10, 14), (9, 7, 11), (2, 3, 5)])
def test_the_transform_can_be_undone(shape: tuple[int, int, int], wavelet: str) -> None:
    array, transform = random(2, 3, *shape), WaveletTransform(wavelet)
    back = transform.inverse(transform(array), shape)
    torch.testing.assert_close(back, array, atol=1e-9, rtol=0)


def test_the_transform_is_exact_in_float32_too() -> None:
    array, transform = random(1, 4, 40, 56, 40).float(), WaveletTransform("db4")
    assert (transform.inverse(transform(array)) - array).abs().max() < 1e-5


def test_the_energy_of_the_coefficients_is_the_energy_of_the_array() -> None:
    array = random(2, 3, 12, 10, 14)
    assert WaveletTransform("db4")(array).square().sum() == pytest.approx(array.square().sum().item())


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_projections_of_all_bands_and_the_rest_add_up_to_the_array(levels: int) -> None:
    array = random(1, 2, 16, 24, 8)
    every_detail = tuple(band for band in ALL_BANDS if band != "LLL")
    parts = detail_parts(array, levels, bands=every_detail)
    rest = detail_parts(array, levels, bands=("LLL",))[-1]  # LLL of the coarsest level: all that is left
    torch.testing.assert_close(sum(parts) + rest, array, atol=1e-9, rtol=0)


def test_a_projection_is_one_and_has_the_energy_of_its_coefficients() -> None:
    array = random(1, 2, 16, 24, 32)
    coefficients = detail_coefficients(array, 2)
    for level, part in enumerate(detail_parts(array, 2)):
        energy = coefficients[level].square().sum()
        assert part.square().sum() == pytest.approx(energy.item(), rel=1e-9)
        torch.testing.assert_close(detail_parts(part, 2)[level], part, atol=1e-9, rtol=0)


@pytest.mark.parametrize("band", ALL_BANDS)
def test_a_band_holds_what_its_letters_say(band: str) -> None:
    """A pattern that alternates along exactly the H axes lies in that band alone."""
    axes = [torch.tensor([1.0, -1.0 if letter == "H" else 1.0]).repeat(4) for letter in band]
    array = torch.einsum("z,y,x->zyx", *axes)[None, None].double()
    coefficients = WaveletTransform("haar")(array)
    for other in ALL_BANDS:
        energy = coefficients[octant(other, (8, 8, 8))].square().sum()
        assert energy == pytest.approx(512.0 if other == band else 0.0)


@pytest.mark.parametrize("band", ALL_BANDS)
def test_only_the_chosen_bands_are_seen(band: str) -> None:
    transform = WaveletTransform("db4")
    coefficients = torch.zeros(1, 1, 16, 16, 16, dtype=torch.float64)
    where = octant(band, (16, 16, 16))
    coefficients[where] = random(1, 1, 8, 8, 8)
    seen = detail_parts(transform.inverse(coefficients), 1)[0].square().sum()
    expected = coefficients.square().sum() if band in DETAIL_BANDS else torch.tensor(0.0)
    assert seen.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    ("shape", "levels"),
    [
        ((128, 128, 128), 3),
        ((56, 56, 56), 3),
        ((40, 56, 40), 2),
        ((14, 99, 99), 1),
        ((13, 99, 99), 0),
        ((4, 4, 4), 0),
    ],
)
def test_small_maps_get_fewer_levels(shape: tuple[int, ...], levels: int) -> None:
    assert exact_levels(shape, 3) == levels
