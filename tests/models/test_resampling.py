"""Resampling against nnU-Net's own functions, kept here as the slow reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.resampling.default_resampling import (
    compute_new_shape,
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)

from models.errors import UnsupportedModelError
from models.manifest import Resampling
from models.resampling import (
    Taps,
    check_logits_resampling,
    logits_taps,
    resample_image,
    resampled_shape,
    separate_axis,
)

sizes = st.integers(1, 14)
spacings = st.tuples(*[st.sampled_from([0.4, 0.8, 1.0, 1.3, 3.0, 4.0, 5.0])] * 3)


def image(shape: tuple[int, ...], channels: int = 1) -> Any:
    return np.random.default_rng(1).normal(size=(channels, *shape)).astype(np.float32)


@given(spacings, spacings, st.sampled_from([None, True, False]))
def test_the_separate_axis_is_nnunets(
    old: tuple[float, float, float], new: tuple[float, float, float], force: bool | None
) -> None:
    separate, axis = determine_do_sep_z_and_axis(force, old, new)
    assert separate_axis(old, new, force) == (axis if separate else None)


@given(st.tuples(*[st.integers(1, 700)] * 3), st.tuples(*[st.floats(0.1, 6)] * 3), spacings)
def test_the_new_shape_is_nnunets(
    shape: tuple[int, int, int], old: tuple[float, float, float], new: tuple[float, float, float]
) -> None:
    assert resampled_shape(shape, old, new) == tuple(compute_new_shape(shape, old, new))


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(sizes, sizes, sizes),
    st.tuples(sizes, sizes, sizes),
    spacings,
    spacings,
    st.integers(0, 3),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([None, True, False]),
)
def test_images_are_resampled_as_nnunet_does(
    shape: tuple[int, int, int],
    new_shape: tuple[int, int, int],
    old: tuple[float, float, float],
    new: tuple[float, float, float],
    order: int,
    order_z: int,
    force: bool | None,
) -> None:
    data = image(shape, 2)
    expected = resample_data_or_seg_to_shape(
        data, new_shape, old, new, order=order, order_z=order_z, force_separate_z=force
    )
    how = Resampling(order=order, order_z=order_z, force_separate_z=force)
    out = resample_image(data, new_shape, old, new, how)
    assert out.dtype == np.float32
    assert out.shape == (2, *new_shape)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_overshoot_is_clipped_slice_by_slice_where_z_is_separate() -> None:
    data = np.zeros((1, 2, 8, 8), np.float32)
    data[0, 0, :, 4:] = 1
    data[0, 1, :, 4:] = 100
    how = Resampling(order=3)
    out = resample_image(data, (2, 20, 20), (5, 1, 1), (5, 0.4, 0.4), how)
    assert (out[0, 0].min(), out[0, 0].max()) == (0, 1)
    assert (out[0, 1].min(), out[0, 1].max()) == (0, 100)


def test_nothing_happens_where_the_shape_stays() -> None:
    data = image((4, 5, 6))
    assert resample_image(data, (4, 5, 6), (1, 1, 1), (1.01, 1, 1), Resampling(order=3)) is data


def apply_taps(data: Any, taps: tuple[Taps, Taps, Taps]) -> Any:
    for axis, tap in enumerate(taps, 1):
        part = tap.part.reshape([-1 if a == axis else 1 for a in range(4)])
        data = data.take(tap.low, axis) * (1 - part) + data.take(tap.high, axis) * part
    return data


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(sizes, sizes, sizes),
    st.tuples(sizes, sizes, sizes),
    spacings,
    spacings,
    st.integers(0, 1),
    st.integers(0, 1),
    st.sampled_from([None, True]),
)
def test_logits_are_resampled_as_nnunet_does(
    shape: tuple[int, int, int],
    new_shape: tuple[int, int, int],
    old: tuple[float, float, float],
    new: tuple[float, float, float],
    order: int,
    order_z: int,
    force: bool | None,
) -> None:
    data = image(shape, 2)
    expected = resample_data_or_seg_to_shape(
        data, new_shape, old, new, order=order, order_z=order_z, force_separate_z=force
    )
    taps = logits_taps(
        shape, new_shape, old, new, Resampling(order=order, order_z=order_z, force_separate_z=force)
    )
    np.testing.assert_allclose(apply_taps(data, taps), expected, atol=2e-6)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1))
def test_taps_never_go_back_and_never_leave_the_source(source: int, target: int, order: int) -> None:
    taps = Taps.between(source, target, order)
    assert np.all(np.diff(taps.low) >= 0)
    assert np.all(np.diff(taps.high) >= 0)
    assert taps.low.min() >= 0
    assert taps.high.max() < source
    assert np.all(taps.high - taps.low <= 1)
    assert np.all((taps.part >= 0) & (taps.part < 1))


@pytest.mark.parametrize(("order", "order_z"), [(2, 0), (3, 0), (1, 3)])
def test_splines_for_probabilities_are_refused_by_name(order: int, order_z: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"order {order} .order_z {order_z}"):
        check_logits_resampling(Resampling(order=order, order_z=order_z))
