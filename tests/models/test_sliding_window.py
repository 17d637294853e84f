"""Tiles, weights and streaming against nnU-Net's functions and a plain sum over the whole volume."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.sliding_window_prediction import (
    compute_gaussian,
    compute_steps_for_sliding_window,
)
from numpy.typing import NDArray

from models.kernels import Workers
from models.sliding_window import Tiling, gaussian_weights, pad, stream_features, tile_starts


@pytest.mark.parametrize("patch", [(16, 16, 16), (12, 20, 33), (1, 5, 7), (64, 48, 40)])
def test_the_weights_are_nnunets_to_the_bit(patch: tuple[int, int, int]) -> None:
    cpu = torch.device("cpu")
    expected = compute_gaussian(patch, value_scaling_factor=10, dtype=torch.float16, device=cpu)
    weights = gaussian_weights(patch)
    assert weights.dtype == np.float32
    assert np.array_equal(weights, expected.float().numpy())
    assert weights.min() > 0


@given(st.integers(1, 600), st.integers(1, 200), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_the_starts_are_nnunets(size: int, patch: int, step: float) -> None:
    size = max(size, patch)
    starts = tile_starts(size, patch, step)
    assert list(starts) == compute_steps_for_sliding_window((size,), (patch,), step)[0]
    assert starts[0] == 0
    assert starts[-1] == size - patch


shapes = st.tuples(*[st.integers(1, 26)] * 3)
patches = st.tuples(*[st.integers(2, 9)] * 3)


@given(shapes, patches)
def test_every_tile_is_visited_once_and_every_plane_finished_once(
    shape: tuple[int, int, int], patch: tuple[int, int, int]
) -> None:
    tiling = Tiling.of(shape, patch, 0.5)
    corners, planes = [], []
    for start, final, tiles in tiling.layers():
        corners += tiles
        planes += range(start, final)
    assert len(corners) == len(set(corners)) == tiling.count
    assert planes == list(range(tiling.shape[tiling.axis]))


def fake_network(tile: NDArray[np.float32]) -> NDArray[np.float32]:
    """Depends on where in the tile a voxel is, so that overlaps disagree."""
    ramp = np.linspace(-1, 1, tile[0].size, dtype=np.float32).reshape(tile.shape[1:])
    return np.stack((tile[0], tile[0] * ramp, ramp))


def plain_sum(image: NDArray[np.float32], tiling: Tiling) -> NDArray[np.float64]:
    """The slow reference: every channel of the whole volume, in float64."""
    weights = gaussian_weights(tiling.patch).astype(np.float64)
    total, norm = np.zeros((3, *tiling.shape)), np.zeros(tiling.shape)
    for _, _, tiles in tiling.layers():
        for corner in tiles:
            cut = tuple(slice(c, c + p) for c, p in zip(corner, tiling.patch, strict=True))
            total[(slice(None), *cut)] += fake_network(image[(slice(None), *cut)]) * weights
            norm[cut] += weights
    return np.asarray(total / norm)


@settings(deadline=None, max_examples=40)
@given(shapes, patches, st.integers(1, 3))
def test_what_streams_out_is_the_weighted_mean(
    shape: tuple[int, int, int], patch: tuple[int, int, int], threads: int
) -> None:
    tiling = Tiling.of(shape, patch, 0.5)
    image = pad(np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32), tiling)
    expected = plain_sum(image, tiling)
    workers, done = Workers(threads), []
    finished = 0
    for planes in stream_features(image, tiling, fake_network, 3, workers, done.append):
        assert planes.features.shape[1:] == tiling.held_shape
        assert planes.first == finished
        # One plane before the new ones is still there, for whoever interpolates.
        first = max(planes.first - 1, 0)
        features = np.moveaxis(planes.features[:3], tiling.axis + 1, 0)[first - planes.origin :]
        wanted = np.moveaxis(expected, tiling.axis + 1, 0)[first : planes.last]
        np.testing.assert_allclose(features[: len(wanted)], wanted, atol=2e-5)
        finished = planes.last
    workers.close()
    assert finished == tiling.shape[tiling.axis]
    assert done == list(range(1, tiling.count + 1))


def test_only_one_patch_of_planes_is_held_along_the_longest_axis() -> None:
    tiling = Tiling.of((40, 60, 500), (32, 32, 32), 0.5)
    assert tiling.axis == 2
    assert tiling.held_shape == (40, 60, 33)


@given(shapes, patches)
def test_padding_is_nnunets(shape: tuple[int, int, int], patch: tuple[int, int, int]) -> None:
    from acvl_utils.cropping_and_padding.padding import pad_nd_image

    image = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(1, *shape)
    expected, _ = pad_nd_image(image, patch, "constant", {"constant_values": 0}, True, None)
    assert np.array_equal(pad(image, Tiling.of(shape, patch, 0.5)), expected)
