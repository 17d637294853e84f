"""Metrics against slow references written out, and the rule for labels that are not there."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from training.metrics import compare, dice, paired_test, summarise, surface, surface_agreement

SPACING = (2.0, 1.0, 0.5)


def blobs(seed: int, shape: tuple[int, int, int] = (12, 14, 16)) -> NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    centre = rng.uniform(4, 8, 3)[:, None, None, None]
    return ((grid - centre) ** 2).sum(0) < rng.uniform(2, 4) ** 2


def slow_surface_points(mask: NDArray[np.bool_]) -> list[tuple[int, ...]]:
    points = []
    for voxel in np.argwhere(mask):
        for axis in range(3):
            for step in (-1, 1):
                other = voxel.copy()
                other[axis] += step
                outside = other[axis] in (-1, mask.shape[axis])
                if outside or not mask[tuple(other)]:
                    points.append(tuple(int(v) for v in voxel))
    return sorted(set(points))


@pytest.mark.parametrize("seed", range(5))
def test_surface_metrics_equal_the_definition(seed: int) -> None:
    p, r = blobs(seed), blobs(seed + 100)
    points_p, points_r = (np.array(slow_surface_points(m)) * SPACING for m in (p, r))
    assert [tuple(v) for v in np.argwhere(surface(p))] == slow_surface_points(p)
    distances = np.linalg.norm(points_p[:, None] - points_r[None], axis=2)
    there, back = distances.min(axis=1), distances.min(axis=0)
    tolerance = 1.5
    nsd, hd95 = surface_agreement(p, r, SPACING, tolerance)
    assert nsd == pytest.approx(
        ((there <= tolerance).sum() + (back <= tolerance).sum()) / (len(there) + len(back))
    )
    assert hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))


def test_dice_equals_the_definition_and_is_symmetric() -> None:
    p, r = blobs(1), blobs(2)
    expected = 2 * (p & r).sum() / (p.sum() + r.sum())
    assert dice(p, r) == dice(r, p) == pytest.approx(expected)
    assert dice(p, p) == 1.0


def test_a_moved_mask_is_as_far_away_as_it_was_moved() -> None:
    mask = np.zeros((10, 10, 10), bool)
    mask[3:6, 3:6, 3:6] = True
    moved = np.roll(mask, 1, axis=0)
    nsd, hd95 = surface_agreement(mask, moved, (2.0, 1.0, 1.0), 1.0)
    assert hd95 == 2.0
    assert nsd < 1.0
    assert surface_agreement(mask, moved, (2.0, 1.0, 1.0), 2.0)[0] == 1.0


def test_what_is_in_neither_agrees_and_what_is_in_one_only_does_not() -> None:
    nothing, something = np.zeros((4, 4, 4), int), np.zeros((4, 4, 4), int)
    something[1:3, 1:3, 1:3] = 1
    both = compare(nothing, nothing, 1, SPACING, 1.0)
    assert (both.dice, both.nsd, both.hd95_mm) == (1.0, 1.0, 0.0)
    for p, r in ((nothing, something), (something, nothing)):
        one = compare(p, r, 1, SPACING, 1.0)
        assert (one.dice, one.nsd) == (0.0, 0.0)
        assert one.hd95_mm == pytest.approx(np.linalg.norm(np.array([8.0, 4.0, 2.0])))
    assert compare(something, something, 1, SPACING, 1.0).reference_ml == pytest.approx(8 * 1.0 / 1000)


def test_a_mask_that_fills_the_volume_has_a_surface() -> None:
    full = np.ones((4, 4, 4), bool)
    assert surface_agreement(full, full, SPACING, 0.0) == (1.0, 0.0)


def test_summaries_and_paired_tests_are_scipys() -> None:
    a, b = [0.8, 0.9, 0.85, 0.7, 0.95], [0.7, 0.85, 0.8, 0.72, 0.9]
    summary = summarise(a)
    assert (summary.mean, summary.cases) == (pytest.approx(np.mean(a)), 5)
    assert summary.standard_error == pytest.approx(stats.sem(a))
    assert summarise([0.5]).standard_error == 0.0
    test = paired_test(a, b)
    assert test.mean_difference == pytest.approx(np.mean(a) - np.mean(b))
    assert test.t_test_p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert test.wilcoxon_p == pytest.approx(stats.wilcoxon(np.array(a) - np.array(b)).pvalue)
    assert paired_test(a, a).t_test_p == 1.0
