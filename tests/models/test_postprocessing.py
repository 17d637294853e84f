"""Only the largest component is kept: as nnU-Net does it, told to the voxel, in no more memory than said."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundle_factory import make_threshold_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nnunetv2.postprocessing.remove_connected_components import (
    remove_all_but_largest_component_from_segmentation as nnunets,
)
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import ndimage

from models.manifest import Manifest, Postprocessing
from models.postprocessing import BYTES_PER_VOXEL, keep_largest
from models.segmenter import Segmenter
from models.volume import Labelmap, Removed, Volume
from service.guard import guard_removed

FOREGROUND = Postprocessing(largest_component_of_foreground=True)


def slow(labels: NDArray[np.uint8], rules: Postprocessing) -> tuple[NDArray[np.uint8], int]:
    """nnU-Net's own function, label by label, and the islands counted on whole arrays."""
    groups = [[int(v) for v in np.unique(labels) if v]] if rules.largest_component_of_foreground else []
    groups += [[value] for value in rules.largest_component_of_labels]
    islands = 0
    for group in groups:
        left = nnunets(labels, group)
        islands += ndimage.label((labels != left), np.ones((3, 3, 3)))[1]
        labels = left
    return labels, islands


@settings(max_examples=150, deadline=None)
@given(
    labels=hnp.arrays(
        st.sampled_from([np.uint8, np.uint16]),
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=9),
        elements=st.sampled_from([0, 0, 0, 0, 0, 1, 2, 4]),
        fill=st.just(0),
    ),
    foreground=st.booleans(),
    values=st.permutations([1, 2, 4]).flatmap(lambda p: st.integers(0, 3).map(lambda n: tuple(p[:n]))),
)
def test_it_keeps_what_nnunet_keeps(
    labels: NDArray[np.uint8], foreground: bool, values: tuple[int, ...]
) -> None:
    if not foreground and not values:
        values = (1,)
    rules = Postprocessing(largest_component_of_foreground=foreground, largest_component_of_labels=values)
    expected, islands = slow(labels, rules)
    found = np.asfortranarray(labels)  # whatever the order in memory
    removed = keep_largest(found, rules)
    assert np.array_equal(found, expected)
    assert removed.islands == islands
    lost = labels[labels != expected]
    assert removed.voxels == {int(v): int((lost == v).sum()) for v in np.unique(lost)}
    assert removed.share == pytest.approx(lost.size / max(1, np.count_nonzero(labels)))


def test_corners_connect_and_equal_components_are_all_kept() -> None:
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 1
    labels[4, 4, 3:5] = 2
    labels[0, 5, 5] = 1
    assert keep_largest(labels, FOREGROUND) == Removed(1, {1: 1}, 1 / 5)
    assert np.count_nonzero(labels) == 4


def test_memory_stays_under_what_the_estimate_adds() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (60, 61, 62)).astype(np.uint8)
    rules = Postprocessing(largest_component_of_foreground=True, largest_component_of_labels=(1, 2))
    tracemalloc.start()
    keep_largest(labels, rules)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (BYTES_PER_VOXEL + 0.5) * labels.size


def test_the_engine_does_it_on_the_grid_of_the_input_and_says_so(tmp_path: Path) -> None:
    """Two boxes, one of them in the air far from the other, on an axis that is turned and resampled."""
    bundle = make_threshold_bundle(tmp_path / "bundle", orientation="RAS")
    image = np.zeros((1, 30, 28, 26), np.float32)
    image[0, 2:12, 3:13, 3:13] = 200
    image[0, 20:23, 20:22, 20:22] = 400
    volume = Volume(image, np.diag([1.0, -1.0, 2.0, 1.0]))
    plain = Segmenter(bundle, threads=1)
    before = plain.segment(volume)
    plain.close()
    assert before.removed is None
    asking = replace(bundle, manifest=bundle.manifest.model_copy(update={"postprocessing": FOREGROUND}))
    model = Segmenter(asking, threads=1)
    try:
        after = model.segment(volume)
        more = model.estimate_peak_bytes((400, 400, 400), (1, 1, 1))
    finally:
        model.close()
    assert more > 0
    expected, islands = slow(before.array, FOREGROUND)
    lost = before.array[before.array != expected]
    assert islands == 1
    assert np.array_equal(after.array, expected)
    assert after.removed == Removed(
        1,
        {int(v): int((lost == v).sum()) for v in np.unique(lost)},
        lost.size / np.count_nonzero(before.array),
    )
    (sentence,) = guard_removed(asking.manifest, after)
    assert f"1, together {lost.size * 2 / 1000:.3g} mL" in sentence


def test_the_estimate_of_memory_counts_it_where_nothing_else_is_larger(tmp_path: Path) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle", patch_size=(16, 16, 16))
    asking = replace(bundle, manifest=bundle.manifest.model_copy(update={"postprocessing": FOREGROUND}))
    long = (10, 10, 100_000)
    estimates = []
    for each in (bundle, asking):
        model = Segmenter(each, threads=1)
        model._base_bytes = 0
        estimates.append(model.estimate_peak_bytes(long, (1, 1, 1)))
        model.close()
    assert estimates[1] >= estimates[0]
    assert estimates[1] >= (4 + 4 + 2 + BYTES_PER_VOXEL) * 10**7


def manifest_with(tmp_path: Path, **postprocessing: object) -> Manifest:
    manifest = make_threshold_bundle(tmp_path / "bundle").manifest
    return Manifest.model_validate({**manifest.model_dump(), "postprocessing": postprocessing})


@pytest.mark.parametrize(
    ("postprocessing", "says"),
    [
        ({"largest_component_of_labels": [3]}, "must be a label"),
        ({"largest_component_of_labels": [1, 1]}, "each label once"),
        ({}, "leave it out"),
        ({"largest_component_of_foreground": True, "minimum_voxels": 3}, "Extra inputs"),
        ({"largest_component_of_foreground": True, "maximum_removed_share": 1.5}, "less than or equal to 1"),
    ],
)
def test_a_manifest_that_asks_for_something_else_is_refused(
    tmp_path: Path, postprocessing: dict[str, object], says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        manifest_with(tmp_path, **postprocessing)


def test_a_manifest_asks_for_nothing_unless_it_says_so(tmp_path: Path) -> None:
    assert make_threshold_bundle(tmp_path / "bundle").manifest.postprocessing is None
    asked = manifest_with(tmp_path / "other", largest_component_of_labels=[2])
    assert asked.postprocessing == Postprocessing(largest_component_of_labels=(2,))
    assert Manifest.model_validate_json(asked.model_dump_json()) == asked


def test_nothing_found_is_nothing_removed() -> None:
    rules = Postprocessing(largest_component_of_foreground=True, largest_component_of_labels=(1,))
    empty = np.zeros((2, 3, 4), np.uint8)
    assert keep_largest(empty, rules) == Removed(0, {}, 0.0)
    assert Labelmap(empty, np.eye(4)).removed is None
