"""From a results folder to a bundle: what is written, what is proved, what is refused."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from results_folder import (
    PATCH,
    tiny_checkpoint,
    tiny_dataset,
    tiny_plans,
    write_nifti_image,
    write_results,
)
from typer.testing import CliRunner

from models.bundle import Bundle
from models.errors import GoldenCaseError
from models.golden import check_golden_case_everywhere, dice_per_label
from models.manifest import Head, Metrics, NormalizationScheme, Postprocessing
from models.nifti import read_labelmap, read_nifti
from models.segmenter import Segmenter
from models.volume import axis_codes
from training.card import model_card
from training.cli import build_app
from training.description import BODY_STRUCTURE, distinct_color, read_description, template
from training.errors import ExportError, LabelsFileError, TrainingDataError
from training.evaluate import CaseResult, Evaluation
from training.export import Exported, ExportRequest, export_bundle, metrics_of, source_commit, width_of
from training.icbm_crop import icbm_crop
from training.metrics import Agreement
from training.onnx_export import compare_with_torch
from training.reference import make_predictor, postprocess, predict_labelmap
from training.teacher import ResultsFolder
from training.training_files import choose_orientation, orientation_of, volume_ranges_ml

LABELS_YAML: dict[str, Any] = {
    "title": "Two balls",
    "intended_use": "Tests.",
    "licence": "CC0",
    "data": "Random numbers",
    "data_licence": "CC0",
    "channels": [{"name": "T1", "modality": "MR", "keywords": ["t1"]}],
    "labels": [
        {
            "value": 2,
            "name": "Shell",
            "type": {"value": "5366008", "meaning": "Hippocampus"},
            "laterality": "left",
            "color_rgb": [1, 2, 3],
            "volume_range_ml": [0.5, 2],
        },
        {"value": 1, "name": "Core", "type": {"value": "4958002", "meaning": "Amygdala"}},
    ],
    "input_limits": {"modalities": ["MR"], "spacing_mm": [0.5, 2], "minimum_slices": 4},
    "notes": "## A note\n\nSeen by a test.",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The networks are too small for two threads, which would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the tests of this module share."""
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def request_(folder: Path) -> ExportRequest:
    """A request that succeeds."""
    (folder / "labels.yaml").write_text(yaml.safe_dump(LABELS_YAML))
    return ExportRequest(
        results=write_results(folder / "results"),
        name="two-balls",
        output=folder / "bundle",
        golden_images=(write_nifti_image(folder / "image.nii.gz"),),
        labels_file=folder / "labels.yaml",
        orientation="RAS",
        method="random weights",
    )


@pytest.fixture(scope="module")
def exported(request_: ExportRequest) -> Exported:
    return export_bundle(request_)


def test_the_bundle_proves_itself_on_every_runtime(exported: Exported) -> None:
    assert Bundle.open(exported.bundle.folder).digest == exported.bundle.digest
    assert set(exported.golden_dice) == {"Core", "Shell"}
    for dice in check_golden_case_everywhere(exported.bundle).values():
        assert min(dice.values()) >= 0.999
    assert exported.agreements[0].argmax_agreement == 1.0
    assert exported.agreements[0].max_difference < 1e-3 < exported.agreements[0].max_logit


def test_the_manifest_says_what_the_results_folder_says(exported: Exported, request_: ExportRequest) -> None:
    manifest = exported.bundle.manifest
    assert (manifest.name, manifest.version, manifest.title) == ("two-balls", "0.1.0", "Two balls")
    assert manifest.orientation == "RAS"
    core, shell = manifest.labels
    assert (core.value, core.name, core.color_rgb) == (1, "Core", distinct_color(0))
    assert (shell.value, shell.laterality, shell.color_rgb) == (2, "left", (1, 2, 3))
    assert shell.volume_range_ml == (0.5, 2.0)
    channel = manifest.channels[0]
    assert (channel.modality, channel.normalization) == ("MR", NormalizationScheme.ZSCORE)
    assert channel.intensity is not None
    assert channel.intensity.percentile_99_5 == 8.0
    assert manifest.inference.head is Head.SOFTMAX
    assert manifest.inference.patch_size == tuple(PATCH)
    assert manifest.inference.mirror_axes == ()
    assert manifest.preprocessing.spacing_mm == (1.0, 1.0, 1.0)
    assert manifest.preprocessing.resampling_data.order == 3
    assert manifest.preprocessing.resampling_probabilities.order == 1
    assert manifest.provenance.method == "random weights"
    assert manifest.provenance.library_versions["torch"] == torch.__version__
    assert manifest.input_limits.minimum_slices == 4


def test_postprocessing_of_the_labels_file_is_in_manifest_card_and_golden_case(
    exported: Exported, request_: ExportRequest, tmp_path: Path
) -> None:
    """A network with random weights finds islands everywhere, which nnU-Net's function takes away."""
    asked = {"largest_component_of_foreground": True, "largest_component_of_labels": [2, 1]}
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump({**LABELS_YAML, "postprocessing": asked}))
    again = export_bundle(
        replace(request_, output=tmp_path / "bundle", labels_file=tmp_path / "labels.yaml")
    ).bundle
    rules = again.manifest.postprocessing
    assert rules == Postprocessing(**asked)
    assert exported.bundle.manifest.postprocessing is None
    assert (
        "- Of these the largest connected component alone is kept: all labels together, Core, Shell;"
        in (again.folder / "card.md").read_text()
    )
    before = read_labelmap(exported.bundle.golden_labelmap_path).array
    after = read_labelmap(again.golden_labelmap_path).array
    assert np.array_equal(after, postprocess(before, rules))
    assert 0 < np.count_nonzero(after) < np.count_nonzero(before)
    check_golden_case_everywhere(again)


def test_the_card_repeats_the_manifest_and_ends_with_the_notes(exported: Exported) -> None:
    card = (exported.bundle.folder / "card.md").read_text()
    assert "| 2 | Shell | 5366008 SCT Hippocampus | left | 0.5 to 2 |" in card
    assert "Nothing was measured" in card
    assert card.endswith("Seen by a test.\n")


def test_the_network_file_is_plain_and_says_nothing_of_the_machine(exported: Exported) -> None:
    data = (exported.bundle.folder / "student.onnx").read_bytes()
    model = onnx.load_model_from_string(data)
    assert [v.name for v in model.graph.input] == ["image"]
    assert [v.name for v in model.graph.output] == ["logits"]
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param == "N"
    assert [d.dim_value for d in dims[1:]] == [1, *PATCH]
    assert {opset.domain for opset in model.opset_import} == {""}
    for word in (b"site-packages", b"torch", b"stack_trace", os.fsencode(Path.cwd())):
        assert word not in data


def test_the_same_results_folder_gives_the_same_bytes(
    exported: Exported, request_: ExportRequest, folder: Path
) -> None:
    again = export_bundle(replace(request_, output=folder / "again"))
    assert again.bundle.digest == exported.bundle.digest


def test_onnx_and_pytorch_agree_on_any_batch(exported: Exported, request_: ExportRequest) -> None:
    network = ResultsFolder.open(request_.results).network()
    x = torch.randn(3, 1, *PATCH, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(exported.bundle.folder / "student.onnx")
    found = session.run(["logits"], {"image": x.numpy()})[0]
    with torch.inference_mode():
        np.testing.assert_allclose(found, network(x).numpy(), atol=1e-4)


def test_a_network_that_is_not_the_trained_one_is_caught(exported: Exported, request_: ExportRequest) -> None:
    network = ResultsFolder.open(request_.results).network()
    patch = np.random.default_rng(0).normal(size=(1, *PATCH)).astype(np.float32)
    path = exported.bundle.folder / "student.onnx"
    assert compare_with_torch(network, path, patch, sigmoid=False).argmax_agreement == 1.0
    with torch.no_grad():  # every logit a hundredth larger: no label changes
        for parameter in network.decoder.seg_layers[-1].parameters():
            parameter.mul_(1.01)
    with pytest.raises(ExportError, match="not the trained one"):
        compare_with_torch(network, path, patch, sigmoid=False)


def test_a_failure_leaves_nothing_behind(
    request_: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagree(bundle: Bundle) -> dict[str, float]:
        raise GoldenCaseError("Dice 0.5")

    monkeypatch.setattr("training.export.check_golden_case", disagree)
    with pytest.raises(GoldenCaseError):
        export_bundle(replace(request_, output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_version_is_never_overwritten(exported: Exported, request_: ExportRequest) -> None:
    with pytest.raises(ExportError, match="exists already"):
        export_bundle(request_)
    assert Bundle.open(exported.bundle.folder).digest == exported.bundle.digest


def test_the_golden_case_is_what_nnunets_predictor_gives(exported: Exported, request_: ExportRequest) -> None:
    """The stock predictor, float16 sums and all, on the image that was given, not on the bundle's copy."""
    stock = make_predictor(ResultsFolder.open(request_.results), mirroring=False, stock=True)
    expected = predict_labelmap(stock, list(request_.golden_images))
    golden = read_labelmap(exported.bundle.golden_labelmap_path)
    assert (golden.array == expected).mean() > 0.995  # random weights have many near ties
    given, kept = read_nifti(request_.golden_images), read_nifti(exported.bundle.golden_image_paths)
    np.testing.assert_array_equal(given.array, kept.array)
    np.testing.assert_allclose(given.affine, kept.affine)


def test_float32_sums_differ_from_float16_in_little(request_: ExportRequest) -> None:
    results = ResultsFolder.open(request_.results)
    exact, stock = (make_predictor(results, mirroring=False, stock=s) for s in (False, True))
    data = torch.randn(1, 24, 20, 18, generator=torch.Generator().manual_seed(3))
    ours, theirs = (p.predict_logits_from_preprocessed_data(data) for p in (exact, stock))
    assert (ours.dtype, theirs.dtype) == (torch.float32, torch.float16)
    difference = (ours - theirs.float()).abs()
    assert (difference < 0.05).float().mean() > 0.98  # the rest are corners, where float16 weights are tiny
    assert difference.max() > 0


def test_a_golden_image_of_another_orientation_is_turned(
    exported: Exported, request_: ExportRequest, tmp_path: Path
) -> None:
    turned = write_nifti_image(tmp_path / "image.nii.gz", axes="ILA")
    bundle = export_bundle(replace(request_, output=tmp_path / "out", golden_images=(turned,))).bundle
    kept = read_nifti(bundle.golden_image_paths)
    assert axis_codes(read_nifti([turned]).affine) == "ILA"
    assert axis_codes(kept.affine) == "RAS"
    np.testing.assert_array_equal(kept.array, read_nifti(exported.bundle.golden_image_paths).array)


def test_two_channels_two_folds_regions_and_mirroring(tmp_path: Path) -> None:
    plans, dataset = tiny_plans(2), tiny_dataset(2, regions=True)
    plans |= {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}
    plans["configurations"]["3d_fullres"]["spacing"] = [1.25, 1.0, 1.0]
    images = tuple(write_nifti_image(tmp_path / f"{c}.nii.gz", shape=(16, 19, 16)) for c in "ab")
    exported = export_bundle(
        ExportRequest(
            results=write_results(tmp_path / "r", plans, dataset, folds=("0", "1")),
            name="regions",
            output=tmp_path / "out",
            golden_images=images,
            generic_codes=True,
            orientation="any",
            mirroring=True,
        )
    )
    manifest = exported.bundle.manifest
    assert manifest.orientation == "any"
    assert manifest.inference.head is Head.SIGMOID
    assert manifest.inference.regions_class_order == (1, 2)
    assert manifest.inference.mirror_axes == (0, 1, 2)
    assert [w.file for w in manifest.weights] == ["student.fold_0.onnx", "student.fold_1.onnx"]
    assert manifest.weights[0].sha256 != manifest.weights[1].sha256
    assert {label.type for label in manifest.labels} == {BODY_STRUCTURE}
    assert len(exported.agreements) == 2


def test_one_image_a_channel_is_needed(request_: ExportRequest, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="one image for each of 1 channels, not 0"):
        export_bundle(replace(request_, output=tmp_path / "out", golden_images=()))


def test_a_golden_image_that_shows_nothing_is_refused(request_: ExportRequest, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tiny_plans(), tiny_dataset())
    for name, value in checkpoint["network_weights"].items():
        if name.endswith("seg_layers.0.bias"):
            value.copy_(torch.tensor([1e4, 0.0, 0.0]))
    results = write_results(tmp_path / "r", checkpoint=checkpoint)
    with pytest.raises(ExportError, match="finds no label"):
        export_bundle(replace(request_, results=results, output=tmp_path / "out"))


# Orientation


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_a_reader_that_reorients_means_ras(reader: str, tmp_path: Path) -> None:
    write_nifti_image(tmp_path / "a.nii.gz", axes="LAS")
    assert choose_orientation(reader, stated=None, training_images=tmp_path) == "RAS"
    with pytest.raises(ExportError, match="cannot be LPS"):
        choose_orientation(reader, stated="LPS", training_images=None)


def test_the_training_images_tell_the_orientation(tmp_path: Path) -> None:
    for name in ("a", "sub/b"):
        write_nifti_image(tmp_path / f"{name}.nii.gz", axes="LAS")
    assert choose_orientation("SimpleITKIO", stated=None, training_images=tmp_path) == "LAS"
    with pytest.raises(ExportError, match="says RAS, the training images are LAS"):
        choose_orientation("SimpleITKIO", stated="RAS", training_images=tmp_path)
    write_nifti_image(tmp_path / "c.nii.gz", axes="RAS")
    assert orientation_of(tmp_path) == "any"


def test_without_any_word_on_the_orientation_nothing_is_exported(
    request_: ExportRequest, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="does not say how its training images were oriented") as caught:
        export_bundle(replace(request_, output=tmp_path / "out", orientation=None))
    assert "--training-images" in caught.value.remedy
    with pytest.raises(ExportError, match="'RAX' is not an orientation"):
        export_bundle(replace(request_, output=tmp_path / "out", orientation="RAX"))


def test_a_folder_without_images_tells_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match="holds no NIfTI image"):
        orientation_of(tmp_path)
    (tmp_path / "a.nii.gz").write_bytes(b"not an image")
    with pytest.raises(TrainingDataError, match=r"a\.nii\.gz"):
        orientation_of(tmp_path)


@pytest.mark.parametrize("axes", ["RAS", "LPI"])
def test_the_engine_agrees_with_nnunet_whatever_the_orientation_given_to_it(
    exported: Exported, tmp_path: Path, axes: str
) -> None:
    """The same patient stored in another orientation gives the same labels at the same places."""
    turned = write_nifti_image(tmp_path / "image.nii.gz", axes=axes)
    segmenter = Segmenter(exported.bundle)
    labels = segmenter.segment(read_nifti([turned]))
    segmenter.close()
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(labels.array.T, nibabel.load(turned).affine))
    golden = read_labelmap(exported.bundle.golden_labelmap_path).array
    dice = dice_per_label(np.asarray(canonical.dataobj).T, golden, exported.bundle.manifest.labels)
    assert min(dice.values()) >= 0.999


# The labels file


def test_without_codes_a_template_is_written_and_named(request_: ExportRequest, tmp_path: Path) -> None:
    with pytest.raises(LabelsFileError, match="holds no codes") as caught:
        export_bundle(replace(request_, output=tmp_path / "out", labels_file=None))
    assert "two-balls-labels.yaml" in caught.value.remedy
    content = yaml.safe_load((tmp_path / "two-balls-labels.yaml").read_text())
    assert [(label["value"], label["name"]) for label in content["labels"]] == [(1, "core"), (2, "shell")]
    # As it stands it is refused; with codes filled in it is understood.
    results = ResultsFolder.open(request_.results)
    with pytest.raises(LabelsFileError, match=r"labels\.0\.type\.value"):
        read_description(tmp_path / "two-balls-labels.yaml", results, template_path=tmp_path / "t.yaml")
    for label in content["labels"]:
        label["type"] = {"value": "5366008", "meaning": "Hippocampus"}
    (tmp_path / "filled.yaml").write_text(yaml.safe_dump(content))
    read_description(tmp_path / "filled.yaml", results, template_path=tmp_path / "t.yaml")


def test_a_template_that_somebody_has_begun_is_kept(request_: ExportRequest, tmp_path: Path) -> None:
    begun = tmp_path / "two-balls-labels.yaml"
    begun.write_text("title: mine")
    with pytest.raises(LabelsFileError):
        export_bundle(replace(request_, output=tmp_path / "out", labels_file=None))
    assert begun.read_text() == "title: mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS_YAML["labels"][:1]}, r"describes the labels \[2\], the model writes \[1, 2\]"),
        ({"labels": LABELS_YAML["labels"] * 2}, "stands there twice"),
        ({"channels": []}, "0 channels"),
        ({"titel": "x"}, "titel"),
        ({"title": None}, "title"),
    ],
)
def test_a_wrong_labels_file_is_refused(
    request_: ExportRequest, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "labels.yaml"
    path.write_text(yaml.safe_dump(LABELS_YAML | change))
    results = ResultsFolder.open(request_.results)
    with pytest.raises(LabelsFileError, match=message):
        read_description(path, results, template_path=tmp_path / "t.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"!!python/object:os.system {}"])
def test_a_labels_file_that_is_not_plain_yaml_is_refused(
    request_: ExportRequest, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "labels.yaml").write_bytes(content)
    results = ResultsFolder.open(request_.results)
    with pytest.raises(LabelsFileError, match="cannot be read as YAML"):
        read_description(tmp_path / "labels.yaml", results, template_path=tmp_path / "t.yaml")


def test_the_template_names_every_field_of_a_label(request_: ExportRequest) -> None:
    assert "laterality" in template(ResultsFolder.open(request_.results))


def test_neighbouring_labels_have_colours_that_differ() -> None:
    colours = [np.array(distinct_color(i)) for i in range(60)]
    assert min(np.abs(a - b).sum() for a, b in itertools.pairwise(colours)) > 100
    assert len({tuple(c) for c in colours}) == 60


def test_volumes_of_the_training_labels(tmp_path: Path) -> None:
    for i, (ones, twos) in enumerate(((100, 0), (200, 50), (300, 50))):
        flat = np.zeros(1000, np.uint8)
        flat[:ones], flat[ones : ones + twos] = 1, 2
        image = nibabel.Nifti1Image(flat.reshape(10, 10, 10), np.diag([2.0, 2, 2, 1]))
        image.set_qform(image.affine, code=1)
        nibabel.save(image, tmp_path / f"{i}.nii.gz")
    paths = sorted(tmp_path.iterdir())
    assert volume_ranges_ml(paths, [1, 2], percentiles=(0, 100)) == {1: (0.8, 2.4), 2: (0.0, 0.4)}
    low, high = volume_ranges_ml(paths, [1])[1]
    assert 0.8 <= low < 0.83
    assert 2.37 < high <= 2.4
    with pytest.raises(TrainingDataError):
        volume_ranges_ml([], [1])


# Where it came from


def test_teacher_width_figures_volumes_and_an_own_card(request_: ExportRequest, tmp_path: Path) -> None:
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [16, 32]
    teacher = write_results(tmp_path / "teacher", plans)
    (tmp_path / "labelsTr").mkdir()
    ones = nibabel.Nifti1Image(np.ones((10, 10, 10), np.uint8), np.eye(4))
    ones.set_qform(ones.affine, code=1)
    nibabel.save(ones, tmp_path / "labelsTr" / "a.nii.gz")
    (tmp_path / "mine.md").write_text("# Mine\n")
    request = replace(
        request_,
        output=tmp_path / "out",
        teacher=teacher,
        metrics=Metrics(evaluated_on="nothing", cases=1, dice={"float32": {"Core": 0.5, "Shell": 0.25}}),
        recipe="dcd",
        training_labels=tmp_path / "labelsTr",
        card=tmp_path / "mine.md",
    )
    manifest = export_bundle(request).bundle.manifest
    assert manifest.provenance.teacher_digest == ResultsFolder.open(teacher).digest
    assert (manifest.provenance.width, manifest.provenance.recipe) == ("1/2", "dcd")
    core, shell = manifest.labels
    assert core.volume_range_ml == (1.0, 1.0)
    assert shell.volume_range_ml == (0.5, 2.0)  # the labels file's own word stands
    assert "| float32 | 0.5000 | 0.2500 |" in model_card(manifest)
    assert (tmp_path / "out" / "card.md").read_text() == "# Mine\n"


def evaluation(dice: list[float], *, case: str = "a") -> Evaluation:
    """An evaluation of one label on as many cases as there are figures."""

    def agreement(value: float) -> Agreement:
        return Agreement(dice=value, nsd=1.0, hd95_mm=0.0, reference_ml=1.0, predicted_ml=1.0)

    return Evaluation(
        name="x",
        bundle_digest="0" * 64,
        precision="float32",
        runtime="onnxruntime",
        tolerance_mm=1.0,
        peak_memory_bytes=1,
        cases=tuple(CaseResult(f"{case}{i}", 1.0, {"Core": agreement(d)}) for i, d in enumerate(dice)),
    )


def test_figures_are_means_over_the_same_cases() -> None:
    metrics = metrics_of({"teacher": evaluation([0.5, 1.0]), "float32": evaluation([0.25, 0.5])}, "two cases")
    assert metrics.dice == {"teacher": {"Core": 0.75}, "float32": {"Core": 0.375}}
    assert (metrics.cases, metrics.evaluated_on) == (2, "two cases")
    with pytest.raises(ExportError, match="'float32' is of other cases"):
        metrics_of({"teacher": evaluation([0.5]), "float32": evaluation([0.5], case="b")}, "x")
    with pytest.raises(ExportError, match="no evaluation"):
        metrics_of({}, "x")


def test_a_width_is_a_fraction_where_one_says_it() -> None:
    assert width_of([8, 16], [32, 64]) == "1/4"
    assert width_of([16, 16], [32, 64]) == "[16, 16] of [32, 64] channels"


def test_the_commit_is_the_one_that_git_tells() -> None:
    commit = source_commit()
    if commit is None:
        pytest.skip("not a git checkout")
    assert len(commit.removesuffix("+changes")) == 40


# The commands


def test_the_command_exports(request_: ExportRequest, tmp_path: Path) -> None:
    write_nifti_image(tmp_path / "imagesTr" / "a_0000.nii.gz", axes="LPS")
    arguments = ["export", request_.results, "--name", "balls", "-o", tmp_path / "out", "--version", "1.2.3"]
    arguments += ["--golden-image", request_.golden_images[0], "--labels-file", request_.labels_file]
    arguments += ["--training-images", tmp_path / "imagesTr", "--fold", "0"]
    evaluation([0.5]).save(tmp_path / "student.json")
    arguments += ["--evaluation", f"float32={tmp_path / 'student.json'}", "--evaluated-on", "one case"]
    result = CliRunner().invoke(build_app(), [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tmp_path / "out")
    assert (bundle.manifest.version, bundle.manifest.orientation) == ("1.2.3", "LPS")
    assert bundle.manifest.metrics == metrics_of({"float32": evaluation([0.5])}, "one case")
    assert f"model digest {bundle.digest}" in result.output
    assert "golden case, Shell: Dice 1.0" in result.output


def test_an_error_is_one_line_and_a_status(tmp_path: Path) -> None:
    arguments = ["export", str(tmp_path / "none"), "--name", "x", "-o", str(tmp_path / "out")]
    code = "import sys; from training.cli import main; sys.argv = ['segnode-train', *sys.argv[1:]]; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--golden-image", "a.nii.gz"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("RESULTS_FOLDER_INVALID: 'none' is not a folder.")
    assert "Traceback" not in done.stderr


def test_the_plan_command_shows_and_writes_students(request_: ExportRequest, tmp_path: Path) -> None:
    arguments = ["plan", request_.results, "--width", "1/2", "--width", "1/4", "-o", tmp_path]
    result = CliRunner().invoke(build_app(), [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for name, features in (("nnUNetPlansWidth1of2", [4, 8]), ("nnUNetPlansWidth1of4", [2, 4])):
        plans = json.loads((tmp_path / f"{name}.json").read_text())
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        assert architecture["arch_kwargs"]["features_per_stage"] == features
    assert CliRunner().invoke(build_app(), ["plan", str(request_.results), "--width", "a/b"]).exit_code == 2


# The template crop


def test_the_template_crop_lies_where_it_says() -> None:
    pytest.importorskip("nilearn")
    crop = icbm_crop()
    assert crop.array.shape == (1, 36, 50, 36)
    middle = crop.affine @ np.array([18, 25, 18, 1.0])  # voxel index x, y, z
    np.testing.assert_allclose(middle[:3], [27, 22, -14], atol=0.51)  # LPS of -27, -22, -14 in RAS
    with pytest.raises(TrainingDataError, match="over the template's border"):
        icbm_crop((-90, 0, 0))
