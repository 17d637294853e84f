"""Each loss against a slow, obvious reference in float64; who gets a gradient; what changes nothing."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.distillation.base import IGNORED, Channels, Inputs, Method, Projections, labels_at
from training.distillation.cwd import spatial_divergence
from training.distillation.dcd import Dcd, DcdOptions, exact_detail_loss, released_detail_loss
from training.distillation.freekd import Freekd, FreekdOptions, haar_levels, mask_overlap
from training.distillation.ifvd import variation_map
from training.distillation.logits import Logits, LogitsOptions, soft_divergence
from training.distillation.reco import class_balance, token_affinity
from training.distillation.registry import METHODS, build_method, parse_options
from training.errors import RecipeError
from training.wavelets import ALL_BANDS, DETAIL_BANDS, WaveletTransform, octant

CHANNELS = Channels(student=(4, 6), teacher=(8, 12))
SAME = Channels(student=(8, 12), teacher=(8, 12))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_inputs(channels: Channels = CHANNELS, *, seed: int = 0, classes: int = 3) -> Inputs:
    sizes = ((16, 18, 14), (8, 9, 7))
    labels = torch.randint(0, classes, (2, *sizes[0]), generator=torch.Generator().manual_seed(seed))
    labels[0, :2] = IGNORED

    def logits(base: int) -> tuple[Tensor, ...]:
        return tuple(random(2, classes, *size, seed=base + i) for i, size in enumerate(sizes))

    def features(numbers: tuple[int, ...], base: int) -> tuple[Tensor, ...]:
        return tuple(
            random(2, c, *size, seed=base + i) for i, (c, size) in enumerate(zip(numbers, sizes, strict=True))
        )

    return Inputs(
        student_logits=logits(10 + seed),
        teacher_logits=logits(20 + seed),
        labels=labels,
        student_features=features(channels.student, 30 + seed),
        teacher_features=features(channels.teacher, 40 + seed),
    )


def make_identity(method: Method) -> None:
    """Set φ to the identity, so that equal features are equal after it."""
    for module in method.modules():
        if isinstance(module, Projections):
            for convolution in module.values():
                nn.init.dirac_(convolution.weight)


def built(name: str, channels: Channels = CHANNELS, **options: object) -> Method:
    torch.manual_seed(0)
    method = build_method(name, parse_options(name, options), channels)
    if isinstance(method, Freekd):
        method.learned.fill_(True)
    return method


# --- what holds for every method ----------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_the_student_and_the_projection_and_never_the_teacher(name: str) -> None:
    method, inputs = built(name), make_inputs()
    tensors = {
        field: tuple(t.clone().requires_grad_() for t in getattr(inputs, field))
        for field in ("student_logits", "teacher_logits", "student_features", "teacher_features")
    }
    loss = method(replace(inputs, **tensors))
    assert loss.ndim == 0
    assert loss.dtype == torch.float32
    loss.backward()
    side = "student_features" if method.needs_features and not _compares_logits(method) else "student_logits"
    assert tensors[side][0].grad is not None
    assert tensors[side][0].grad.abs().sum() > 0
    for field in ("teacher_logits", "teacher_features"):
        assert all(t.grad is None for t in tensors[field])
    for parameter in method.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


def _compares_logits(method: Method) -> bool:
    return getattr(getattr(method, "options", None), "on", "") == "logits"


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_to_learn_where_student_and_teacher_agree(name: str) -> None:
    inputs = make_inputs(SAME)
    equal = replace(inputs, student_logits=inputs.teacher_logits, student_features=inputs.teacher_features)
    method = built(name, SAME)
    make_identity(method)
    assert method(equal).item() == pytest.approx(0.0, abs=1e-6)
    assert method(inputs).item() > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_descent_lowers_the_term(name: str) -> None:
    """The term can be learned: thirty steps on the student's side lower it by a tenth at least."""
    method, inputs = built(name), make_inputs()
    logits = [t.clone().requires_grad_() for t in inputs.student_logits]
    features = [t.clone().requires_grad_() for t in inputs.student_features]
    trained = [*logits, *features, *(p for p in method.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(30):
        loss = method(replace(inputs, student_logits=tuple(logits), student_features=tuple(features)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", METHODS)
def test_the_projection_is_in_the_checkpoint(name: str) -> None:
    method, other = built(name), built(name)
    for parameter in other.parameters():
        parameter.data.fill_(0.5)
    other.load_state_dict(method.state_dict())
    assert other(make_inputs()).item() == pytest.approx(method(make_inputs()).item())


def test_an_unknown_method_or_option_is_named() -> None:
    with pytest.raises(RecipeError, match="no distillation method 'magic'"):
        parse_options("magic", {})
    with pytest.raises(RecipeError, match="'dcd' has no option 'level'"):
        parse_options("dcd", {"level": 3})
    with pytest.raises(RecipeError, match="temperature must be positive"):
        parse_options("logits", {"temperature": 0})
    with pytest.raises(RecipeError, match="bands must be some of"):
        parse_options("dcd", {"bands": ["LLL", "XYZ"]})
    with pytest.raises(ValueError, match="stages"):
        build_method("dcd", parse_options("dcd", {"stages": [5]}), CHANNELS)


# --- logits -------------------------------------------------------------------------------------------


def slow_divergence(student: Tensor, teacher: Tensor, labels: Tensor, tau: float, activation: str) -> float:
    total, voxels = 0.0, 0
    s_all, t_all = student.double().numpy(), teacher.double().numpy()
    for n, z, y, x in np.ndindex(labels.shape):
        if labels[n, z, y, x] == IGNORED:
            continue
        voxels += 1
        s, t = s_all[n, :, z, y, x] / tau, t_all[n, :, z, y, x] / tau
        if activation == "softmax":
            p, q = np.exp(t) / np.exp(t).sum(), np.exp(s) / np.exp(s).sum()
            total += float((p * np.log(p / q)).sum())
        else:
            p, q = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(-s))
            total += float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum())
    return tau**2 * total / voxels


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_logits_equal_the_formula(tau: float, activation: str) -> None:
    inputs = replace(make_inputs(), activation=activation)
    expected = slow_divergence(
        inputs.student_logits[0], inputs.teacher_logits[0], inputs.labels, tau, activation
    )
    method = Logits(LogitsOptions(temperature=tau), CHANNELS)
    assert method(inputs).item() == pytest.approx(expected, rel=1e-5)


def test_logits_do_not_see_what_is_ignored() -> None:
    inputs = make_inputs()
    changed = inputs.student_logits[0].clone()
    changed[0, :, :2] += 100.0 * random(3, 2, 18, 14, seed=9)
    method = Logits(LogitsOptions(), CHANNELS)
    other = replace(inputs, student_logits=(changed, inputs.student_logits[1]))
    assert method(other).item() == method(inputs).item()


def test_softmax_logits_may_be_shifted() -> None:
    inputs = make_inputs()
    shifted = tuple(t + 5.0 for t in inputs.student_logits)
    method = Logits(LogitsOptions(), CHANNELS)
    assert method(replace(inputs, student_logits=shifted)).item() == pytest.approx(
        method(inputs).item(), rel=1e-4
    )


def test_several_scales_are_weighted_like_deep_supervision() -> None:
    inputs = make_inputs()
    terms = [
        soft_divergence(s, t, labels_at(inputs.labels, tuple(s.shape[2:])) != IGNORED, 3.0, "softmax").item()
        for s, t in zip(inputs.student_logits, inputs.teacher_logits, strict=True)
    ]
    expected = (terms[0] + 0.5 * terms[1]) / 1.5
    assert Logits(LogitsOptions(scales=2), CHANNELS)(inputs).item() == pytest.approx(expected, rel=1e-5)


def test_logits_survive_extreme_values() -> None:
    inputs = make_inputs()
    extreme = replace(
        inputs, student_logits=tuple(1e4 * t for t in inputs.student_logits), activation="sigmoid"
    )
    assert math.isfinite(Logits(LogitsOptions(), CHANNELS)(extreme).item())


# --- DCD ----------------------------------------------------------------------------------------------


def test_dcd_is_the_formula_written_out() -> None:
    """ℓ_i by its definition: project both sides apart, subtract, square, average; sum over the stages."""
    from training.wavelets import detail_parts, exact_levels

    inputs, method = make_inputs(), built("dcd", levels=2, small_maps="skip")
    expected = 0.0
    for i in range(2):
        student = method.projections[str(i)](inputs.student_features[i]).double()
        teacher = inputs.teacher_features[i].double()
        levels = exact_levels(tuple(teacher.shape[2:]), 2)
        if levels:
            pairs = zip(detail_parts(student, levels), detail_parts(teacher, levels), strict=True)
            expected += sum((s - t).square().mean().item() for s, t in pairs) / levels
    assert method(inputs).item() == pytest.approx(expected, rel=1e-5)


def loss_of_difference(difference: Tensor, options: DcdOptions) -> Tensor:
    """The loss of a student that is by so much off a teacher whose features are zero."""
    return exact_detail_loss(difference, torch.zeros_like(difference), lambda features: features, options)


def test_dcd_in_space_equals_dcd_on_coefficients_by_parseval() -> None:
    difference = random(2, 3, 32, 56, 28, seed=1).double()
    in_space = loss_of_difference(difference, DcdOptions(idwt=True))
    on_coefficients = loss_of_difference(difference, DcdOptions(idwt=False))
    assert in_space.item() == pytest.approx(on_coefficients.item(), rel=1e-9)


@pytest.mark.parametrize("band", ALL_BANDS)
def test_dcd_is_blind_to_lll_and_hhh(band: str) -> None:
    transform = WaveletTransform("db4")
    coefficients = torch.zeros(1, 2, 16, 16, 16, dtype=torch.float64)
    coefficients[octant(band, (16, 16, 16))] = random(1, 2, 8, 8, 8, seed=3).double()
    loss = loss_of_difference(transform.inverse(coefficients), DcdOptions(levels=1)).item()
    assert loss == pytest.approx(0.0, abs=1e-15) if band not in DETAIL_BANDS else loss > 1e-3


def test_dcd_uses_haar_or_nothing_on_maps_that_are_too_small() -> None:
    small = random(1, 2, 4, 4, 4, seed=4)
    assert loss_of_difference(small, DcdOptions(small_maps="haar")).item() > 0
    assert loss_of_difference(small, DcdOptions(small_maps="skip")).item() == 0
    assert loss_of_difference(random(1, 2, 1, 4, 4, seed=4), DcdOptions()).item() == 0


def test_dcd_of_chosen_stages_is_part_of_the_whole() -> None:
    inputs, whole = make_inputs(), built("dcd")
    parts = []
    for stage in (0, 1):
        part = built("dcd", stages=[stage])
        part.projections.load_state_dict(
            {k: v for k, v in whole.projections.state_dict().items() if k.startswith(f"{stage}.")}
        )
        parts.append(part(inputs).item())
    assert whole(inputs).item() == pytest.approx(sum(parts), rel=1e-5)


def test_the_released_variant_has_a_frozen_projection_and_no_adjoint() -> None:
    method = built("dcd", variant="released")
    assert all(not p.requires_grad for p in method.parameters())
    # All eight bands together would give the array back if synthesis were the adjoint of analysis.
    array = random(1, 1, 32, 32, 32, seed=5)
    every_band = replace(DcdOptions(variant="released", levels=1), bands=ALL_BANDS)
    exact = loss_of_difference(array, DcdOptions(levels=1, bands=ALL_BANDS)).item()
    assert exact == pytest.approx(array.square().mean().item(), rel=1e-5)
    assert abs(released_detail_loss(array, every_band).item() - exact) > 0.05 * exact


def test_the_published_ablations_can_be_asked_for() -> None:
    inputs = make_inputs()
    variants = [
        {"bands": ["LLL"]},
        {"bands": ["HHH"]},
        {"bands": list(ALL_BANDS)},
        {"levels": 1},
        {"idwt": False},
        {"stages": [1]},
        {"learnable_projection": False},
        {"variant": "released"},
        {"wavelet": "haar"},
    ]
    values = [built("dcd", **variant)(inputs).item() for variant in variants]
    assert all(math.isfinite(v) and v > 0 for v in values)
    assert not any(p.requires_grad for p in built("dcd", learnable_projection=False).parameters())


# --- the other methods ----------------------------------------------------------------------------------


def test_fitnets_is_the_mean_squared_difference_summed_over_stages() -> None:
    inputs, method = make_inputs(), built("fitnets")
    expected = sum(
        (method.projections[str(i)](inputs.student_features[i]) - inputs.teacher_features[i])
        .double()
        .square()
        .mean()
        .item()
        for i in range(2)
    )
    assert method(inputs).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_cwd_equals_the_formula(tau: float) -> None:
    inputs = make_inputs()
    s_all, t_all = inputs.student_logits[0].double().numpy(), inputs.teacher_logits[0].double().numpy()
    n, c = s_all.shape[:2]
    total = 0.0
    for i, k in np.ndindex(n, c):
        s, t = np.exp(s_all[i, k].ravel() / tau), np.exp(t_all[i, k].ravel() / tau)
        q, p = s / s.sum(), t / t.sum()
        total += float((p * np.log(p / q)).sum())
    expected = tau**2 * total / (n * c)
    assert spatial_divergence(
        inputs.student_logits[0], inputs.teacher_logits[0], tau
    ).item() == pytest.approx(expected, rel=1e-4)
    assert built("cwd", on="features")(inputs).item() > 0


def test_ifvd_equals_the_formula() -> None:
    inputs = make_inputs()
    features, labels = inputs.student_features[0].double().numpy(), inputs.labels.numpy()
    expected = np.zeros(labels.shape)
    for n in range(labels.shape[0]):
        for k in np.unique(labels[n]):
            members = labels[n] == k
            centre = features[n][:, members].mean(axis=1)
            norms = np.linalg.norm(features[n][:, members], axis=0) * np.linalg.norm(centre)
            expected[n][members] = centre @ features[n][:, members] / norms
    ours = variation_map(inputs.student_features[0], inputs.labels)
    np.testing.assert_allclose(ours.numpy(), expected.reshape(2, -1), atol=1e-5)


def test_ifvd_compares_angles_and_not_lengths() -> None:
    inputs, method = make_inputs(SAME), built("ifvd", SAME)
    longer = tuple(3.0 * t for t in inputs.teacher_features)
    assert method(replace(inputs, student_features=longer)).item() == pytest.approx(0.0, abs=1e-8)


def test_affinity_equals_the_formula_and_needs_no_width() -> None:
    inputs, method = make_inputs(), built("affinity")
    expected = []
    for n in range(2):
        valid = (inputs.labels[n] != IGNORED).flatten()
        matrices = []
        for logits in (inputs.student_logits[0], inputs.teacher_logits[0]):
            p = torch.softmax(logits[n].double().flatten(1)[:, valid], dim=0)
            matrices.append((p @ p.T).flatten())
        a, b = matrices
        expected.append(1 - (a @ b / (a.norm() * b.norm())).item())
    assert method(inputs).item() == pytest.approx(np.mean(expected), rel=1e-3)


def test_reco_counts_every_class_alike() -> None:
    labels = torch.zeros(1, 4, 4, 4, dtype=torch.long)
    labels[0, 0, 0, :2] = 1
    labels[0, 3] = IGNORED
    weights = class_balance(labels)
    for k in (0, 1):
        assert weights[labels.flatten(1) == k].sum().item() == pytest.approx(1.0)
    assert weights[labels.flatten(1) == IGNORED].sum().item() == 0.0


def test_reco_context_does_not_depend_on_the_width_or_the_scale() -> None:
    features = random(1, 4, 16, 16, 16, seed=6)
    wider = torch.cat([features, features], dim=1)
    torch.testing.assert_close(token_affinity(features), token_affinity(5.0 * features), atol=1e-5, rtol=0)
    torch.testing.assert_close(token_affinity(features), token_affinity(wider), atol=1e-5, rtol=0)
    assert token_affinity(features).shape == (1, 512, 512)


class TinyTeacher(nn.Module):
    """A network with an encoder and a decoder, as nnU-Net's have."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv3d(1, 8, 3, padding=1)
            self.second = nn.Conv3d(8, 12, 3, padding=1, stride=2)

        def forward(self, x: Tensor) -> list[Tensor]:
            first = torch.relu(self.first(x))
            return [first, torch.relu(self.second(first))]

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose3d(12, 8, 2, stride=2)
            self.head = nn.Conv3d(16, 3, 1)

        def forward(self, skips: list[Tensor]) -> Tensor:
            return self.head(torch.cat([skips[0], self.up(skips[1])], dim=1))

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = self.Encoder(), self.Decoder()


def test_freekd_learns_its_prompts_on_the_teacher_and_leaves_the_teacher_alone() -> None:
    torch.manual_seed(0)
    teacher = TinyTeacher().requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    method = Freekd(FreekdOptions(prompt_iterations=5), CHANNELS)
    with pytest.raises(AssertionError, match="prepare"):
        method(make_inputs())
    drawn = {k: v.clone() for k, v in method.prompts.items()}
    images = [random(1, 1, 16, 16, 16, seed=i) for i in range(5)]
    method.prepare(teacher, images, "softmax")
    for stage, prompts in method.prompts.items():
        assert not prompts.requires_grad
        assert (prompts - drawn[stage]).abs().max() > 0
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key])
    learned = {k: v.clone() for k, v in method.prompts.items()}
    method.prepare(teacher, images, "softmax")  # a resumed run does not learn them again
    assert all(torch.equal(method.prompts[k], learned[k]) for k in learned)


def test_freekd_masks_overlap_fully_where_they_are_the_same() -> None:
    one = torch.rand(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert mask_overlap(one.expand(1, 3, 4, 4, 4)).item() == pytest.approx(1.0)
    apart = torch.zeros(1, 2, 2, 1, 1)
    apart[0, 0, 0], apart[0, 1, 1] = 1, 1
    assert mask_overlap(apart).item() == 0.0
    assert mask_overlap(one).item() == 0.0
    assert [haar_levels((n, 9, 9), 3) for n in (1, 2, 3, 8)] == [0, 1, 2, 3]


# --- shared pieces ------------------------------------------------------------------------------------


def test_labels_are_copied_to_coarser_grids_and_never_averaged() -> None:
    labels = torch.randint(0, 100, (1, 16, 18, 14), generator=torch.Generator().manual_seed(1))
    labels[labels == 50] = IGNORED
    coarse = labels_at(labels, (8, 9, 7))
    assert coarse.shape == (1, 8, 9, 7)
    assert set(coarse.unique().tolist()) <= set(labels.unique().tolist())
    assert labels_at(labels, (16, 18, 14)) is labels


def test_dcd_is_a_method_of_the_paper_by_default() -> None:
    options = DcdOptions()
    assert (options.wavelet, options.levels, options.bands, options.idwt) == ("db4", 3, DETAIL_BANDS, True)
    assert isinstance(built("dcd"), Dcd)
