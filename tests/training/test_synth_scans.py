"""Held-out heads, real scans and repeated acquisitions are measured as stated."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from bundle_factory import make_threshold_bundle
from tiny_head import write_tiny_heads

from models.manifest import CodedConcept, Label, Laterality
from models.nifti import read_labelmap, read_nifti
from models.volume import Labelmap, Removed, Volume
from training.errors import TrainingDataError
from training.golden_files import write_image
from training.preprocess import write_json
from training.synthesis import cases, consistency, golden, plausible, real_scans, scan_report
from training.synthesis.label_maps import LabelMapFolder
from training.synthesis.structures import STRUCTURES

RAS_MM = np.diag([-1.0, -1.0, 1.0, 1.0])
CONCEPT = CodedConcept(value="1", meaning="x")


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> LabelMapFolder:
    return LabelMapFolder(write_tiny_heads(tmp_path_factory.mktemp("heads") / "maps", ("one", "two")))


def label(value: int, name: str, side: Laterality | None = None, limits=None) -> Label:
    return Label(
        value=value,
        name=name,
        category=CONCEPT,
        type=CONCEPT,
        laterality=side,
        color_rgb=(200, 10 * value, 0),
        volume_range_ml=limits,
    )


PAIR = (
    label(1, "Left cerebral cortex", Laterality.LEFT, (0.5, 2.0)),
    label(2, "Right cerebral cortex", Laterality.RIGHT, (0.5, 2.0)),
    label(3, "Brain stem", None, (0.1, 0.2)),
)


def head(size: int = 20) -> tuple[Volume, Labelmap]:
    array = np.zeros((size, size, size), np.uint8)
    array[5:15, 5:15, 2:8] = 1
    array[5:15, 5:15, 12:16] = 2
    return Volume(array[None] * 50.0 + np.float32(1), RAS_MM), Labelmap(array, RAS_MM)


class TestCases:
    def test_written_cases_are_readable_and_the_same_each_time(
        self, maps: LabelMapFolder, tmp_path: Path
    ) -> None:
        arguments = {"count": 2, "seed": 4, "shape": (24, 26, 22), "spacing_mm": 1.0}
        names = cases.write_cases(maps, ["two"], tmp_path / "a", **arguments)
        again = cases.write_cases(maps, ["one", "two"], tmp_path / "b", **arguments)
        assert len(names) == 2
        assert set(names) < set(again)
        for name in names:
            image = read_nifti([tmp_path / "a" / "images" / f"{name}.nii.gz"])
            labels = read_labelmap(tmp_path / "a" / "labels" / f"{name}.nii.gz")
            assert image.shape_zyx == labels.array.shape == (24, 26, 22)
            np.testing.assert_array_equal(image.affine, RAS_MM)
            assert set(np.unique(labels.array)) <= {0, *range(1, 30)}
            assert labels.array.any()
            for kind in ("images", "labels"):
                one, other = (tmp_path / run / kind / f"{name}.nii.gz" for run in "ab")
                assert one.read_bytes() == other.read_bytes()

    def test_the_command_writes_a_list_and_a_picture(
        self, maps: LabelMapFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_json(tmp_path / "split.json", {"claim": ["one"]})
        monkeypatch.setattr(cases, "WHOLE_HEAD", (24, 24, 24))
        arguments = [str(maps.folder), str(tmp_path / "split.json"), "claim", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["cases", *arguments, "--count", "1"])
        cases.main()
        assert len(list((tmp_path / "out" / "images").iterdir())) == 1
        samples = cases.draw(maps, "one", 3, seed=0, shape=(24, 24, 24), spacing_mm=1.0)
        assert cases.draw_samples(samples, tmp_path / "samples.png").stat().st_size > 2000


class TestRealScans:
    def test_volumes_ranges_and_symmetry(self) -> None:
        volume, labelmap = head()
        measured = real_scans.measure("head", volume, labelmap, PAIR, 1.25)
        assert measured.volumes_ml == {
            "Left cerebral cortex": 0.6,
            "Right cerebral cortex": 0.4,
            "Brain stem": 0.0,
        }
        assert measured.outside == ("Right cerebral cortex", "Brain stem")
        assert measured.asymmetry == {"cerebral cortex": 0.4}
        assert measured.spacing_mm == (1.0, 1.0, 1.0)

    def test_what_postprocessing_left_out_is_told(self) -> None:
        volume, labelmap = head()
        assert real_scans.measure("head", volume, labelmap, PAIR, 1.0).islands == 0
        less = replace(labelmap, removed=Removed(2, {1: 30, 2: 12}, 0.04))
        measured = real_scans.measure("head", volume, less, PAIR, 1.0)
        assert (measured.islands, measured.removed_ml) == (2, 0.042)

    def test_tissues_are_compared_where_they_are_over_one_half(self) -> None:
        _, labelmap = head()
        grey = np.isin(labelmap.array, [1, 2]).astype(np.float32)
        grey[5:15, 5:15, 2:5] = 0  # 300 of the 1000 voxels are no grey matter
        grey[0, 0, 1] = 0.49
        white = np.zeros_like(grey)
        white[0, 0, 0] = 1
        maps_of = {k: Volume(v[None] * 255, RAS_MM) for k, v in (("grey", grey), ("white", white))}
        found = real_scans.tissue_dice(labelmap, PAIR, maps_of)
        assert found == {"grey": pytest.approx(2 * 700 / 1700, abs=1e-4), "white": 0.0}

    def test_a_dicom_series_is_read_like_the_same_volume_in_nifti(self, shared_data: Path) -> None:
        volume = real_scans.read_scan(shared_data / "dicom_philips_t1")
        assert 170 in volume.shape_zyx
        assert abs(np.linalg.det(volume.affine[:3, :3])) == pytest.approx(1.0, abs=0.3)

    def test_nothing_to_read_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingDataError):
            real_scans.read_scan(tmp_path)

    def test_the_overlay_is_drawn_in_the_labels_colours(self, tmp_path: Path) -> None:
        volume, labelmap = head()
        path = real_scans.draw_overlay(volume, labelmap, PAIR, "head", tmp_path / "overlay.png")
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
        reddish = (pixels[:, 0] > 100) & (pixels[:, 0] > pixels[:, 2] + 60)
        assert reddish.sum() > 500

    def test_the_command_measures_the_template_and_a_scan(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = make_threshold_bundle(tmp_path / "bundle")
        volume, _ = head()
        write_image(volume.array[0], volume.affine, tmp_path / "one.nii.gz")
        files = dict.fromkeys(("t1", "grey", "white"), tmp_path / "one.nii.gz")
        monkeypatch.setattr(real_scans, "icbm_files", lambda: files)
        arguments = [str(tmp_path / "bundle"), str(tmp_path / "out"), str(tmp_path / "one.nii.gz")]
        monkeypatch.setattr(sys, "argv", ["real_scans", *arguments])
        real_scans.main()
        content = json.loads((tmp_path / "out" / "scans.json").read_text())
        assert content["bundle_digest"] == bundle.digest
        assert len(content["scans"]) == 2
        assert set(content["icbm152_tissue_dice"]) == {"grey", "white"}


class TestConsistency:
    @pytest.mark.parametrize("plane", sorted(consistency.PLANES))
    def test_thick_slices_lie_where_they_should(self, plane: str) -> None:
        axis = consistency.PLANES[plane]
        ramp = np.broadcast_to(
            np.arange(24.0, dtype=np.float32).reshape([24 if a == axis else 1 for a in range(3)]),
            (24, 24, 24),
        )
        thick = consistency.reacquired(Volume(np.ascontiguousarray(ramp)[None], RAS_MM), axis, 4.0)
        assert thick.shape_zyx == tuple(6 if a == axis else 24 for a in range(3))
        # The ramp's value is the place in mm; the slices' own affine must say the same.
        index = np.zeros(4)
        index[3] = 1
        for i in range(1, 5):  # profiles at the ends are cut off
            index[2 - axis] = i
            place = abs((thick.affine @ index)[2 - axis])
            value = np.take(thick.array[0], i, axis=axis)
            np.testing.assert_allclose(value, place, atol=0.03)

    def test_one_millimetre_is_the_scan_itself(self) -> None:
        volume, _ = head()
        assert consistency.reacquired(volume, 0, 1.0) is volume

    def test_the_largest_deviation_counts(self) -> None:
        volumes = {"a": {"x": 2.0, "y": 0.0}, "b": {"x": 2.5, "y": 0.1}, "c": {"x": 1.2, "y": 0.0}}
        assert consistency.deviations(volumes, "a") == {"x": 0.4, "y": 1.0}

    def test_the_command_writes_every_acquisition(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_threshold_bundle(tmp_path / "bundle")
        volume, _ = head()
        write_image(volume.array[0], volume.affine, tmp_path / "one.nii.gz")
        arguments = [str(tmp_path / "bundle"), str(tmp_path / "out.json"), str(tmp_path / "one.nii.gz")]
        monkeypatch.setattr(sys, "argv", ["consistency", *arguments])
        consistency.main()
        content = json.loads((tmp_path / "out.json").read_text())
        found, reference = content["volumes_ml"], content["reference"]
        for name, wanted in found[reference].items():
            off = max(abs(volumes[name] - wanted) for volumes in found.values())
            beyond = off > content["tolerance"][name] * wanted or not wanted
            assert (name in content["beyond_tolerance"]) == beyond
        assert set(found) == {"1x1x1"} | {f"1x1x{t} {p}" for t in (3, 6) for p in consistency.PLANES}

    def test_small_structures_may_differ_by_more(self) -> None:
        assert [consistency.tolerance(ml) for ml in (200.0, 10.0, 9.9, 1.0, 0.5)] == [
            0.1,
            0.1,
            0.2,
            0.2,
            0.35,
        ]


class TestReport:
    def test_every_structure_of_the_bundle_has_a_limit_of_asymmetry(self) -> None:
        sided = {s.name.removeprefix("Left ") for s in STRUCTURES if s.side == "left"}
        assert set(plausible.SYMMETRIC_WITHIN) == sided

    def test_every_structure_of_the_bundle_has_a_published_range(self) -> None:
        assert set(plausible.PUBLISHED) == {
            s.name.removeprefix("Left ") for s in STRUCTURES if s.side != "right"
        }
        assert all(0 < known.low_ml < known.high_ml for known in plausible.PUBLISHED.values())

    @pytest.mark.parametrize(
        ("name", "volumes", "fine"),
        [
            ("caudate", (3.0, 3.0), True),
            ("caudate", (5.0, 3.0), False),
            ("caudate", (3.0, 2.2), False),
            ("hippocampus", (3.32, 5.68), True),
            ("Brain stem", (20.0,), True),
            ("Brain stem", (30.0,), False),
            ("Third ventricle", (0.5,), False),
            ("corpus callosum", (1.0,), None),
        ],
    )
    def test_volumes_are_held_against_what_was_published(
        self, name: str, volumes: tuple[float, ...], fine: bool | None
    ) -> None:
        assert plausible.is_published(name, *volumes) is fine

    def test_the_tables_mark_what_is_doubtful(self) -> None:
        volume, labelmap = head()
        caudate = (label(1, "Left caudate", Laterality.LEFT), label(2, "Right caudate", Laterality.RIGHT))
        stem = label(3, "Brain stem", None, (0.1, 0.2))
        less = replace(labelmap, removed=Removed(2, {1: 30, 2: 12}, 0.04))
        scans = {
            "scans": [asdict(real_scans.measure("one", volume, less, (*caudate, stem), 1.25))],
            "icbm152_tissue_dice": {"grey": 0.8125, "white": 0.75},
        }
        volumes = {"Left caudate": 3.0, "Brain stem": 20.0}
        content = {
            "reference": "1x1x1",
            "volumes_ml": {"1x1x1": volumes, "1x1x6 axial": {"Left caudate": 3.3, "Brain stem": 15.0}},
            "tolerance": {"Left caudate": 0.2, "Brain stem": 0.1},
            "beyond_tolerance": ["Brain stem"],
        }
        sides = ("Left caudate", "Right caudate", "Brain stem")
        found = {
            name: {"dice": 0.8 - i / 10, "volume_ml": 4.0 + i, "atlas_ml": 5.0}
            for i, name in enumerate(sides)
        }
        atlas = {"scan": "icbm.nii", "atlas": "all.nii", "mean_dice": 0.7, "structures": found}
        text = scan_report.report((*caudate, stem), scans, content, atlas)
        assert "icbm.nii beside all.nii: mean Dice 0.700 of 3 structures" in text
        assert "| caudate | 0.80 / 0.70 | 4 / 5 | 5 / 5 |" in text
        assert "| Brain stem | 0.60 | 6 | 5 |" in text
        assert "| caudate |  /  | 2.28 to 4.89 | ***0.6 / 0.4*** |" in text
        assert "| Brain stem | 0.1 to 0.2 | 16.3 to 27.8 | **0** |" in text
        assert "| one | 20x20x20 | 1x1x1 | 1.2 | 1 of 3 | 2: 0.042 mL |" in text
        assert "deep grey 0.812, white matter 0.750" in text
        assert "| Left caudate (3 mL) | 20% | +10.0% |  |" in text
        assert "| Brain stem (20 mL) | 10% | -25.0% | beyond |" in text
        assert "1 of 2 structures stay within their tolerance." in text
        assert "fcon1000_icbm_tr.csv" in text

    def test_the_command_fills_the_document_and_refuses_figures_of_another_bundle(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = make_threshold_bundle(tmp_path / "bundle")
        volume, labelmap = head()
        measured = asdict(real_scans.measure("one", volume, labelmap, bundle.manifest.labels, 1.0))
        document = tmp_path / "README.md"
        document.write_text(f"before\n{scan_report.BEGIN}\nobsolete\n{scan_report.END}\nafter\n")
        arguments = [str(tmp_path / "bundle"), str(tmp_path), str(document)]
        monkeypatch.setattr(sys, "argv", ["scan_report", *arguments])
        write_json(tmp_path / "scans.json", {"bundle_digest": bundle.digest, "scans": [measured]})
        scan_report.main()
        once = document.read_text()
        assert once.startswith("before\n")
        assert once.endswith("after\n")
        assert "obsolete" not in once
        assert "| low |" in once
        scan_report.main()
        assert document.read_text() == once
        write_json(tmp_path / "scans.json", {"bundle_digest": "0" * 64, "scans": [measured]})
        with pytest.raises(TrainingDataError, match="another bundle"):
            scan_report.main()
        with pytest.raises(TrainingDataError, match="has no"):
            scan_report.into("unmarked", "text")


def test_the_golden_image_is_the_whole_template_at_2_mm() -> None:
    pytest.importorskip("nilearn")
    whole = read_nifti([real_scans.icbm_files()["t1"]])
    small = golden.small_brain()
    assert small.shape_zyx == tuple(n // 2 for n in whole.shape_zyx)
    assert np.array_equal(small.array, small.array.round())
    total = whole.array.sum() / 8
    assert float(small.array.sum()) == pytest.approx(float(total), rel=0.01)
