"""The benchmark on a whole head: its series and its NIfTI file are one head, and both sides run on them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_factory import make_threshold_bundle
from results_folder import write_results

from models.nifti import read_nifti
from models.volume import Volume
from service.dicom.series import read_series
from training.golden_files import write_image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def whole_head(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    return importlib.import_module("whole_head")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A box of 100 x 80 x 60 mm in air, oblique to no axis, off the middle."""
    array = np.zeros((24, 30, 28), np.float32)
    array[6:18, 5:25, 4:24] = np.random.default_rng(0).uniform(200, 400, (12, 20, 20))
    affine = np.diag([5.0, -4.0, 5.0, 1.0])
    affine[:3, 3] = (-60, 80, 12)
    path = tmp_path / "scan.nii.gz"
    write_image(array, affine, path)
    return path


def test_the_series_and_the_file_are_one_head_of_the_stated_size(
    whole_head: Any, scan: Path, tmp_path: Path
) -> None:
    head = whole_head.write_head(scan, 32, tmp_path / "head")
    series = read_series(sorted(Path(head["series"]).iterdir())).volume
    file: Volume = read_nifti([Path(head["image"])])
    assert series.shape_zyx == file.shape_zyx == (32, 32, 32)
    np.testing.assert_allclose(series.affine, file.affine, atol=1e-3)
    assert np.array_equal(series.array, file.array)
    given = read_nifti([scan])

    def centre(volume: Volume) -> Any:
        z, y, x = (float(i.mean()) for i in np.nonzero(volume.array[0] > 0.3 * volume.array.max()))
        return volume.affine @ [x, y, z, 1]

    np.testing.assert_allclose(centre(series), centre(given), atol=4)  # half a voxel of 8 mm


def test_both_sides_run_and_their_log_makes_the_rows(whole_head: Any, scan: Path, tmp_path: Path) -> None:
    bundle = make_threshold_bundle(tmp_path / "bundle")
    job = {
        **whole_head.write_head(scan, 24, tmp_path / "head"), "bundle": str(bundle.folder), "threads": 1,
        "results": str(write_results(tmp_path / "results")), "checkpoint": "final", "mirroring": False,
        "cache": str(tmp_path / "cache"), "out": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    log = whole_head.Log(tmp_path / "log.jsonl")
    log.begin("a machine")
    paths = []
    for name, side in whole_head.SIDES.items():
        record = side(job)
        paths.append(Path(record.pop("labelmap")))
        assert min(record["seconds"].values()) >= 0
        log.add({"name": name, "size": 24, "threads": 1, **record})
    assert {"segmentation", "report", "labelmap"} <= set(log.runs(whole_head.NODE)[0]["files"])
    assert whole_head.agreement(paths[0], paths[0]) == {"equal": 1.0, "smallest_dice": 1.0}
    assert whole_head.agreement(*paths)["equal"] < 1
    log.add({"name": "agreement", "postprocessed": False, **whole_head.agreement(*paths)})
    rows = whole_head.markdown(whole_head.Log(tmp_path / "log.jsonl"))
    assert "24³ voxels of 10.6667 mm" in rows
    assert sum(line.startswith(("| segnode", "| nnU-Net")) for line in rows.splitlines()) == 2
    assert "On a machine." in rows
    document = f"before\n{whole_head.BEGIN}\n{whole_head.END}\nafter\n"
    assert whole_head.into(document, rows) == f"before\n{rows}\nafter\n"


def test_the_readme_shows_nothing_but_a_committed_log(whole_head: Any) -> None:
    readme = (ROOT / "README.md").read_text()
    logs = sorted((ROOT / "tests" / "benchmarks" / "results").glob("whole-head*.jsonl"))
    texts = [whole_head.markdown(whole_head.Log(path)) for path in [*logs, None]]
    assert any(whole_head.into(readme, text) == readme for text in texts)
