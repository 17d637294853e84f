"""A bundle proves on this machine, on every runtime, that it does what it did in training."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from bundle_factory import make_threshold_bundle, write_nifti_ras
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models import golden
from models.bundle import seal
from models.errors import GoldenCaseError, RuntimeUnavailableError, UnsupportedModelError
from models.golden import check_golden_case, check_golden_case_everywhere, dice_per_label
from models.manifest import Label, Precision
from models.runtimes import available_runtimes

RUNTIMES = available_runtimes()


@pytest.mark.parametrize("runtime", [*RUNTIMES, "auto"])
def test_a_right_golden_case_agrees(tmp_path: Path, runtime: str) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle")
    assert check_golden_case(bundle, runtime=runtime) == {"low": 1.0, "high": 1.0}


@pytest.mark.parametrize(
    "variant",
    [
        {"channels": 2},
        {"head": "sigmoid"},
        {"folds": 2},
        {"slow_convolutions": 2},
        {"orientation": "LPS"},
        {"mirror_axes": (0, 1, 2)},
        {"spacing_mm": (3.0, 0.8, 0.9)},
        {"patch_size": (16, 24, 32)},
        {"thresholds": (50.5,), "labels": ("only",)},
    ],
    ids=lambda variant: next(iter(variant)),
)
def test_the_variants_of_the_factory_agree(tmp_path: Path, variant: dict[str, object]) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle", **variant)
    assert set(check_golden_case(bundle).values()) == {1.0}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_wrong_golden_case_is_an_error_with_its_figures(tmp_path: Path, runtime: str) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle", golden="wrong")
    with pytest.raises(GoldenCaseError) as caught:
        check_golden_case(bundle, runtime=runtime)
    assert f"threshold 1.0.0 disagrees on {runtime} in float32: Dice low 0." in caught.value.message
    assert "at least 0.999 is needed" in caught.value.message


@pytest.mark.parametrize(
    ("kind", "says"),
    [("empty", "empty labelmap"), ("unknown", r"no labels: \[3\]"), ("shifted", "different grids")],
)
def test_a_golden_case_that_proves_nothing_is_an_error(tmp_path: Path, kind: str, says: str) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle", golden=kind)
    with pytest.raises(GoldenCaseError, match=says):
        check_golden_case(bundle)


def test_an_unreadable_golden_case_is_an_error(tmp_path: Path) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle")
    bundle.golden_labelmap_path.write_bytes(b"no NIfTI")
    with pytest.raises(GoldenCaseError, match="cannot be read"):
        check_golden_case(seal(bundle.folder))


def test_a_golden_image_that_the_engine_refuses_is_an_error(tmp_path: Path) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle")
    image = np.full((20, 22, 24), np.nan, np.float32)
    write_nifti_ras(bundle.golden_image_paths[0], image, (1.0, 1.0, 1.0))
    with pytest.raises(GoldenCaseError, match=r"was refused|cannot be read"):
        check_golden_case(seal(bundle.folder))


def test_int8_has_a_wider_limit_than_float32(tmp_path: Path) -> None:
    """Three of some 700 voxels wrong give a Dice between the two limits."""
    bundle = make_threshold_bundle(tmp_path / "bundle", int8=True)
    labelmap = nibabel.load(bundle.golden_labelmap_path)
    array = np.asarray(labelmap.dataobj).transpose(2, 1, 0).copy()
    array[tuple(np.argwhere(array == 2)[:3].T)] = 0
    write_nifti_ras(bundle.golden_labelmap_path, array, (1.0, 1.0, 1.0))
    bundle = seal(bundle.folder)

    with pytest.raises(GoldenCaseError, match=r"in float32: Dice high 0\.99"):
        check_golden_case(bundle, precision=Precision.FLOAT32)
    assert 0.99 <= check_golden_case(bundle, precision=Precision.INT8)["high"] < 0.999


def test_every_runtime_and_precision_is_checked(tmp_path: Path) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle", int8=True)
    dice = check_golden_case_everywhere(bundle)
    int8_on = {"openvino"} if "openvino" in RUNTIMES else set(RUNTIMES)
    assert set(dice) == {(r, Precision.FLOAT32) for r in RUNTIMES} | {(r, Precision.INT8) for r in int8_on}
    assert set(check_golden_case_everywhere(bundle, runtimes=["onnxruntime"])) == {
        ("onnxruntime", Precision.FLOAT32),
        ("onnxruntime", Precision.INT8),
    }


def test_one_runtime_that_disagrees_fails_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last runtime and precision that is looked at gives another labelmap."""

    class Segmenter(golden.Segmenter):
        def segment(self, volume, **arguments):
            result = super().segment(volume, **arguments)
            if self.runtime_name == RUNTIMES[-1]:
                result.array[...] = 1
            return result

    monkeypatch.setattr(golden, "Segmenter", Segmenter)
    bundle = make_threshold_bundle(tmp_path / "bundle")
    with pytest.raises(GoldenCaseError, match=f"disagrees on {RUNTIMES[-1]}"):
        check_golden_case_everywhere(bundle)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle")
    with pytest.raises(RuntimeUnavailableError, match="no runtime"):
        check_golden_case_everywhere(bundle, runtimes=[])
    with pytest.raises(RuntimeUnavailableError):
        check_golden_case(bundle, runtime="tensorrt")
    with pytest.raises(UnsupportedModelError, match="int8"):
        check_golden_case(bundle, precision=Precision.INT8)


def _labels(n: int) -> list[Label]:
    code = {"value": "123037004", "meaning": "Anatomical Structure"}
    return [
        Label.model_validate(
            {"value": i, "name": str(i), "category": code, "type": code, "color_rgb": (0, 0, 0)}
        )
        for i in range(1, n + 1)
    ]


@pytest.mark.parametrize(
    ("result", "expected", "dice"),
    [
        ([0, 0], [0, 0], 1.0),
        ([1, 0], [0, 0], 0.0),
        ([0, 0], [1, 0], 0.0),
        ([1, 0], [0, 1], 0.0),
        ([1, 1], [1, 0], 2 / 3),
        ([1, 1], [1, 1], 1.0),
    ],
)
def test_dice_by_hand(result: list[int], expected: list[int], dice: float) -> None:
    found = dice_per_label(np.array([[result]]), np.array([[expected]]), _labels(1))
    assert found == {"1": pytest.approx(dice)}


maps = hnp.arrays(np.uint8, (2, 3, 4), elements=st.integers(0, 3))


@given(maps, maps)
def test_dice_is_symmetric_and_equals_its_set_definition(a: np.ndarray, b: np.ndarray) -> None:
    dice = dice_per_label(a, b, _labels(3))
    assert dice == dice_per_label(b, a, _labels(3))
    for value in (1, 2, 3):
        in_a, in_b = ({tuple(p) for p in np.argwhere(m == value)} for m in (a, b))
        size = len(in_a) + len(in_b)
        assert dice[str(value)] == (2 * len(in_a & in_b) / size if size else 1.0)
