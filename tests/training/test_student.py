"""Width-scaled plans and networks."""

from __future__ import annotations

import copy
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from results_folder import PLAIN, RESENC, architecture, tiny_plans

from training.errors import PlansError, StudentError
from training.student import (
    build_network,
    count_gflops,
    count_parameters,
    scaled_features,
    scaled_plans,
    student_plans_name,
)

RESENC_FEATURES = [32, 64, 128, 256, 320, 320]


def resenc(width: Fraction, last_stride: list[int]) -> dict[str, Any]:
    """The network of arXiv:2605.26382 and arXiv:2601.09191."""
    strides = [[1, 1, 1], *[[2, 2, 2]] * 4, last_stride]
    return {
        "architecture": architecture(
            RESENC, scaled_features(RESENC_FEATURES, width), strides, [1, 3, 4, 6, 6, 6], [1] * 5
        )
    }


@pytest.mark.parametrize(
    ("inputs", "outputs", "last_stride", "millions"),
    [
        (3, 2, [2, 2, 2], {1: "102.351", 4: "6.406"}),  # ISLES 2022
        (4, 5, [2, 2, 1], {1: "101.945", 4: "6.381"}),  # BraTS 2024
        (1, 114, [2, 2, 2], {1: "102.44", 2: "25.64", 4: "6.43"}),  # brain MRI
    ],
)
def test_parameter_counts_are_those_of_the_papers(
    inputs: int, outputs: int, last_stride: list[int], millions: dict[int, str]
) -> None:
    for divisor, expected in millions.items():
        with torch.device("meta"):
            network = build_network(resenc(Fraction(1, divisor), last_stride), inputs, outputs)
        digits = len(expected.split(".")[1])
        assert f"{count_parameters(network) / 1e6:.{digits}f}" == expected


@pytest.mark.parametrize(("divisor", "published"), [(1, 3364.88), (2, 853.28), (4, 219.35)])
def test_the_cost_of_a_patch_is_the_published_one(divisor: int, published: float) -> None:
    with torch.device("meta"):
        network = build_network(resenc(Fraction(1, divisor), [2, 2, 2]), 1, 114)
    # The publication's counter is not known; what it adds to the convolutions is under half a percent.
    assert count_gflops(network, 1, (160, 192, 160)) == pytest.approx(published, rel=5e-3)


def test_the_cost_of_one_convolution_is_two_operations_a_multiply_add() -> None:
    convolution = torch.nn.Sequential(torch.nn.Conv3d(4, 6, 3, padding=1, groups=2))
    assert count_gflops(convolution, 4, (5, 6, 7)) == 2 * 2 * 27 * 6 * 5 * 6 * 7 / 1e9


def test_channels_are_rounded_and_then_rounded_up() -> None:
    assert scaled_features([32, 64, 320], Fraction(1, 4)) == [8, 16, 80]
    assert scaled_features([30, 60, 110], Fraction(1, 4)) == [8, 15, 28]
    assert scaled_features([32, 64, 320], Fraction(1, 4), 16) == [16, 16, 80]
    assert scaled_features([32, 64], Fraction(1, 8), 8) == [8, 8]
    assert scaled_features([12, 64], Fraction(1, 2), 16) == [12, 32]  # never wider than the teacher


def test_channels_can_be_given_stage_by_stage() -> None:
    assert scaled_features([32, 64, 320], Fraction(1, 4), channels=(16, 32, 96)) == [16, 32, 96]
    for channels, said in (
        ((16, 32), "2 numbers"),
        ((16, 0, 96), "cannot have 0"),
        ((33, 64, 96), "cannot have 33"),
    ):
        with pytest.raises(StudentError, match=said):
            scaled_features([32, 64, 320], Fraction(1, 4), channels=channels)


@pytest.mark.parametrize("width", [Fraction(0), Fraction(-1, 4), Fraction(3, 2)])
def test_a_width_out_of_range_is_refused(width: Fraction) -> None:
    with pytest.raises(StudentError, match="over 0 and at most 1"):
        scaled_features([32], width)


def test_a_width_that_leaves_no_channel_is_refused() -> None:
    with pytest.raises(StudentError, match="leaves a stage of 8 channels with none"):
        scaled_features([8, 16], Fraction(1, 64))


def test_student_plans_are_stock_plans_that_differ_in_channels_alone() -> None:
    plans = tiny_plans()
    plans["configurations"]["2d"] = {"patch_size": [16, 16]}
    before = copy.deepcopy(plans)
    student = scaled_plans(plans, Fraction(1, 2), batch_size=5)
    assert plans == before
    assert student["plans_name"] == "nnUNetPlansWidth1of2"
    assert set(student["configurations"]) == {"3d_fullres"}
    settings = PlansManager(json.loads(json.dumps(student))).get_configuration("3d_fullres")
    assert settings.network_arch_init_kwargs["features_per_stage"] == [4, 8]
    assert settings.batch_size == 5
    assert settings.data_identifier == "nnUNetPlans_3d_fullres"

    expected = before["configurations"]["3d_fullres"]
    expected["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8]
    expected["batch_size"] = 5
    assert settings.configuration == expected
    rest = {key: value for key, value in student.items() if key not in ("configurations", "plans_name")}
    assert rest == {key: before[key] for key in rest}


def test_inheritance_is_written_out() -> None:
    plans = tiny_plans()
    parent = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_lowres"] = {
        "inherits_from": "3d_fullres",
        "spacing": [2.0, 2.0, 2.0],
        "next_stage": "3d_cascade_fullres",
    }
    student = scaled_plans(plans, Fraction(1, 4), configuration="3d_lowres")["configurations"]["3d_lowres"]
    assert student["spacing"] == [2.0, 2.0, 2.0]
    assert student["patch_size"] == parent["patch_size"]
    assert not {"inherits_from", "next_stage"} & set(student)


def test_the_name_tells_width_and_rounding() -> None:
    assert student_plans_name("nnUNetPlans", Fraction(1, 4)) == "nnUNetPlansWidth1of4"
    assert student_plans_name("nnUNetPlans", Fraction(1, 4), 16) == "nnUNetPlansWidth1of4By16"


def test_a_name_that_nnunet_could_not_read_back_is_refused() -> None:
    with pytest.raises(StudentError, match="two underscores"):
        scaled_plans(tiny_plans(), Fraction(1, 2), plans_name="a__b")


def test_an_unknown_network_is_refused_by_name() -> None:
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "some.where.PrimusXXL"
    with pytest.raises(PlansError, match="'PrimusXXL' is not known"):
        scaled_plans(plans, Fraction(1, 2))


def test_a_configuration_that_is_not_there_is_refused() -> None:
    with pytest.raises(PlansError, match="3d_cascade_fullres"):
        scaled_plans(tiny_plans(), Fraction(1, 2), configuration="3d_cascade_fullres")


@pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans format")
def test_plans_before_2_5_are_understood_as_nnunet_understands_them() -> None:
    plans = tiny_plans()
    settings = plans["configurations"]["3d_fullres"]
    del settings["architecture"]
    settings |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 8,
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "num_pool_per_axis": [1, 1, 1],
        "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2]],
        "conv_kernel_sizes": [[3, 3, 3], [3, 3, 3]],
    }
    student = scaled_plans(plans, Fraction(1, 2))["configurations"]["3d_fullres"]
    assert student["architecture"]["network_class_name"] == PLAIN
    assert student["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8]


def test_both_networks_give_logits_of_the_inputs_shape() -> None:
    torch.manual_seed(0)
    for name in (PLAIN, RESENC):
        settings = {"architecture": architecture(name, [4, 8], [[1, 1, 1], [2, 2, 2]], [1, 1], [1])}
        network = build_network(settings, 2, 3).eval()
        with torch.inference_mode():
            assert network(torch.zeros(1, 2, 8, 8, 8)).shape == (1, 3, 8, 8, 8)


def test_genuine_plans_of_a_large_network_can_be_scaled(shared_data: Path) -> None:
    plans = json.loads(
        (shared_data / "nnunet_plans" / "pancreas" / "nnUNetResEncUNetMPlans.json").read_text()
    )
    teacher = plans["configurations"]["3d_fullres"]
    teacher["architecture"]["network_class_name"] = RESENC  # a classifier's head beside the same U-Net
    student = scaled_plans(plans, Fraction(1, 4))["configurations"]["3d_fullres"]
    features = teacher["architecture"]["arch_kwargs"]["features_per_stage"]
    assert student["architecture"]["arch_kwargs"]["features_per_stage"] == [f // 4 for f in features]
    with torch.device("meta"):
        small, large = build_network(student, 1, 2), build_network(teacher, 1, 2)
    assert count_parameters(large) / count_parameters(small) == pytest.approx(16, rel=0.02)


def test_genuine_plans_with_another_network_are_refused(shared_data: Path) -> None:
    path = shared_data / "nnunet_plans" / "pancreas" / "nnUNetResEncUNetMPlans.json"
    with pytest.raises(PlansError, match="ResidualEncoderUNetWithClassifier"):
        scaled_plans(json.loads(path.read_text()), Fraction(1, 4))
