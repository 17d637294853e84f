"""A study of two channels on two grids: over DICOM, over HTTP and by command it gives the same labels."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bundle_factory import expected_labels, make_threshold_bundle
from numpy.typing import NDArray
from phantom import test_uid as make_uid
from phantom import write_classic_series
from places import AFFINE, assert_same_places, image, places_in_seg, places_of_labels
from running_node import ROUTE, SEGNODE, RunningNode
from storage_scp import StorageScp
from waiting import wait_until

from models.registry import Registry

CHANNELS = {
    "channel 0": {"SeriesDescription": {"regex": "^T1"}},
    "channel 1": {"SeriesDescription": {"regex": "FLAIR"}},
}
# Every second row and column of a grid half a voxel off: linear interpolation of a ramp is exact.
COARSE = AFFINE.copy()
COARSE[:3, :2] *= 2
COARSE[:3, 3] -= 0.5 * AFFINE[:3, 0] + 0.5 * AFFINE[:3, 1]


def ramp(shape_zyx: tuple[int, int, int], step: float, start: float) -> NDArray[np.float64]:
    """12 more for every fine column, as seen from a grid of this step: labels end where it is too much."""
    x = start + step * np.arange(shape_zyx[2])
    return np.broadcast_to(20 + 12 * x, shape_zyx)


def write_study(folder: Path, number: int, *, without: str = "") -> dict[str, list[Path]]:
    """A study of a T1, a coarser FLAIR and a T2 that nobody asked for; its files by channel."""
    arrays = {
        "T1": (image(number), AFFINE),
        "FLAIR": (ramp((9, 8, 10), 2.0, -0.5).astype(np.int16), COARSE),
        "T2": (image(number + 1), AFFINE),
    }
    return {
        name: write_classic_series(
            folder / name,
            array,
            affine,
            patient_id=f"P{number}",
            study_instance_uid=make_uid("channels", number),
            series_instance_uid=make_uid("channels", number, name),
            SeriesDescription=f"{name} ax",
        )
        for name, (array, affine) in arrays.items()
        if name != without
    }


def expected(number: int) -> dict[int, NDArray[np.float64]]:
    images = np.stack([image(number), ramp((9, 14, 18), 1.0, 0.0)]).astype(np.float32)
    return places_of_labels(expected_labels(images, (100.5, 300.5)), AFFINE)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, pacs: StorageScp) -> Iterator[RunningNode]:
    root = tmp_path_factory.mktemp("channels")
    bundle = make_threshold_bundle(root / "model", channels=2, spacing_mm=(2.5, 1.2, 1.5))
    registry = Registry(root / "registry", runtimes=("onnxruntime",))
    registry.add(bundle.folder, check_golden=False)
    registry.activate("threshold", "1.0.0")
    route = {**ROUTE, "channels": CHANNELS, "settled_after_s": 5.0}
    with RunningNode(
        root / "node", models=registry.root, destinations={"pacs": pacs.port}, routes=[route]
    ) as running:
        yield running


def zipped(path: Path, files: list[Path]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number, file in enumerate(files):
            archive.write(file, f"{number}.dcm")
    return path


def test_over_dicom_a_study_of_two_channels_gives_one_result(
    node: RunningNode, pacs: StorageScp, tmp_path: Path
) -> None:
    study = write_study(tmp_path, 1)
    files = [path for name in ("FLAIR", "T2", "T1") for path in study[name]]
    assert node.send(files) == files
    wait_until(lambda: len(pacs.segmentations) == 1, 60, node.log)
    (job,) = node.jobs()
    assert [each["name"] for each in job["summary"]["channels"]] == ["channel 0", "channel 1"]
    assert [each["series_instance_uid"] for each in job["summary"]["channels"]] == [
        make_uid("channels", 1, "T1"),
        make_uid("channels", 1, "FLAIR"),
    ]
    assert_same_places(places_in_seg(node.fetch(job, "segmentation")), expected(1))


@pytest.mark.parametrize("whole", [True, False], ids=["study", "one-for-each"])
def test_over_http_and_by_command_it_is_the_same(node: RunningNode, tmp_path: Path, whole: bool) -> None:
    study = write_study(tmp_path / "dicom", 2)
    if whole:
        archives = [zipped(tmp_path / "study.zip", [path for files in study.values() for path in files])]
    else:
        archives = [zipped(tmp_path / f"{name}.zip", study[name]) for name in ("T1", "FLAIR")]
    job = node.segment(*archives, model="threshold")
    assert job["state"] == "succeeded", job
    assert_same_places(places_in_seg(node.fetch(job, "segmentation")), expected(2))
    if not whole:
        return
    out = tmp_path / "out.dcm"
    subprocess.run(
        [*SEGNODE, "segment", tmp_path / "dicom", "--model", "threshold", "-o", out, "--config", node.config],
        check=True,
        capture_output=True,
    )
    assert_same_places(places_in_seg(out), expected(2))


def test_a_missing_channel_is_refused_by_name_over_dicom_and_http(node: RunningNode, tmp_path: Path) -> None:
    study = write_study(tmp_path / "dicom", 3, without="FLAIR")
    files = [path for each in study.values() for path in each]
    job = node.segment(zipped(tmp_path / "study.zip", files), model="threshold")
    assert job["reason"]["code"] == "MISSING_CHANNEL"
    assert "the channel channel 1;" in job["reason"]["sentence"]
    node.send(files)
    wait_until(lambda: any(job["origin"] == "dicom" and job["reason"] for job in node.jobs()), 60, node.log)
    over_dicom = next(job for job in node.jobs() if job["origin"] == "dicom" and job["reason"])
    assert over_dicom["reason"]["code"] == "MISSING_CHANNEL"
