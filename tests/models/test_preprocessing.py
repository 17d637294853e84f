"""Preprocessing against nnU-Net's preprocessor, kept here as the slow reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nnunet_reference import ReferenceModel, reference_model
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from scipy import ndimage

from models.errors import ReasonCode, Refusal
from models.manifest import Channel, NormalizationScheme
from models.preprocessing import fill_holes, nonzero_box, normalise, place, preprocess, restore, transpose


def image(shape: tuple[int, ...], channels: int = 1) -> NDArray[np.float32]:
    rng = np.random.default_rng(7)
    out = (200 * rng.normal(size=(channels, *shape)) + 50).astype(np.float32)
    out[:, :2] = 0
    out[:, :, -3:] = 0
    out[0, :, :, 0] = 0  # only the other channels reach to here
    out[:, shape[0] // 2, shape[1] // 2, shape[2] // 2] = 0
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_mask": True},
        {"schemes": ("CTNormalization", "ZScoreNormalization"), "use_mask": True},
        {"schemes": ("RescaleTo01Normalization", "NoNormalization")},
        {"transpose_forward": (2, 0, 1), "spacing": (1.5, 1.0, 0.8)},
        {"spacing": (5.0, 1.0, 1.2)},
    ],
)
def test_equal_to_nnunets_preprocessor(options: dict[str, Any]) -> None:
    model: ReferenceModel = reference_model(**options)
    array = image((12, 14, 16), len(options.get("schemes", "1")))
    spacing = (1.1, 0.9, 1.3)
    plans = PlansManager(model.plans)
    expected, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        array, None, {"spacing": list(spacing)}, plans, plans.get_configuration("3d_fullres"), model.dataset
    )
    manifest = model.manifest()
    before = array.copy()
    turned = transpose(array, manifest.preprocessing)
    placement = place(turned, spacing, manifest.preprocessing)
    out = preprocess(turned, placement, manifest)
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, atol=1e-5 * float(np.abs(expected).max()))
    assert np.array_equal(array, before), "the input was changed"
    assert placement.shape_before == tuple(properties["shape_before_cropping"])
    assert placement.shape_cropped == tuple(properties["shape_after_cropping_and_before_resampling"])
    assert [[s.start, s.stop] for s in placement.box] == [
        list(map(int, side)) for side in properties["bbox_used_for_cropping"]
    ]


def test_restore_puts_labels_back_where_they_came_from() -> None:
    model = reference_model(transpose_forward=(2, 0, 1))
    how = model.manifest().preprocessing
    array = image((12, 14, 16))
    turned = transpose(array, how)
    placement = place(turned, (1, 1, 1), how)
    cropped = turned[(0, *placement.box)]
    back = restore((cropped > 0).astype(np.uint8), placement, how)
    assert np.array_equal(back, (array[0] > 0) & (array[0] != 0))


@settings(deadline=None, max_examples=80)
@given(hnp.arrays(bool, st.tuples(*[st.integers(1, 7)] * 3)))
def test_holes_are_filled_as_scipy_does(mask: NDArray[np.bool_]) -> None:
    assert np.array_equal(fill_holes(mask), ndimage.binary_fill_holes(mask))


@settings(deadline=None, max_examples=80)
@given(hnp.arrays(bool, st.tuples(*[st.integers(1, 7)] * 3)).filter(np.any))
def test_the_box_is_that_of_the_filled_mask(mask: NDArray[np.bool_]) -> None:
    filled = ndimage.find_objects(ndimage.binary_fill_holes(mask).astype(int))[0]
    assert nonzero_box(mask[None].astype(np.float32)) == filled


def test_the_box_of_several_channels_holds_all() -> None:
    array = np.zeros((2, 6, 6, 6), np.float32)
    array[0, 1, 2, 3], array[1, 4, 1, 3] = 1, -1
    assert nonzero_box(array) == (slice(1, 5), slice(1, 3), slice(3, 4))


def test_nothing_but_zeros_is_refused() -> None:
    with pytest.raises(Refusal) as caught:
        nonzero_box(np.zeros((1, 3, 3, 3), np.float32))
    assert caught.value.reason is ReasonCode.INVALID_VALUES


def test_a_field_of_view_without_a_voxel_is_refused() -> None:
    how = reference_model(spacing=(9.0, 1.0, 1.0)).manifest().preprocessing
    with pytest.raises(Refusal, match="no voxel") as caught:
        place(np.ones((1, 3, 20, 20), np.float32), (1, 1, 1), how)
    assert caught.value.reason is ReasonCode.OUT_OF_LIMITS


def test_rgb_is_scaled_and_other_values_are_refused() -> None:
    channel = Channel(name="red", normalization=NormalizationScheme.RGB_0_1)
    values = np.array([[[0.0, 51.0, 255.0]]], np.float32)
    normalise(values, channel, None)
    assert values.ravel().tolist() == pytest.approx([0, 0.2, 1])
    with pytest.raises(Refusal, match="0 to 256"):
        normalise(np.array([[[0.0, 256.0]]], np.float32), channel, None)
