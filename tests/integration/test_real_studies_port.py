"""Every real series through the DICOM port of one running node: the right labels, or the reason.

The models are thresholds on the grids of the series, so what is expected is known for every voxel.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_factory import expected_labels, make_threshold_bundle
from phantom import chiral_labels, write_classic_series
from phantom import test_uid as make_uid
from places import assert_same_places, places_in_seg, places_of_labels
from pydicom import Dataset, dcmread
from real_series import CASES, NOBODYS, Case, files, labels_in, names, truth_of
from running_node import RunningNode
from storage_scp import StorageScp

from models.registry import Registry
from models.volume import axis_codes, reorient

MODELS: dict[str, dict[str, Any]] = {
    "one": {"spacing_mm": (1.0, 1.0, 1.0), "thresholds": (80.5, 700.5)},
    "two": {"spacing_mm": (2.0, 2.0, 2.0), "thresholds": (262.5, 900.5)},
    "upright": {"spacing_mm": (2.5, 1.2, 1.1), "thresholds": (100.5, 9999.5)},
}
OF_MODEL_TWO, SET_RIGHT = "siemens_enhanced", "to be set right"
ROUTES = [
    {"name": "two", "model": "two", "match": {"SeriesDescription": {"regex": OF_MODEL_TWO}}},
    {
        "name": "right",
        "model": "upright",
        "match": {"SeriesDescription": SET_RIGHT},
        "gantry_tilt": "resample",
        "volume": {"by": "EchoTime", "take": "first"},
    },
    {
        "name": "others",
        "model": "one",
        "match": {"SeriesDescription": {"regex": f"^(?!.*({OF_MODEL_TWO}|{SET_RIGHT}))"}},
    },
]
SHEARED = np.array([[1.1, 0, 0, -9.0], [0, 1.2, 0.7, 5.0], [0, 0, 2.5, 11.0], [0, 0, 0, 1]])
PHANTOM = (chiral_labels((7, 16, 18)) > 0).astype(np.int16)


class Port:
    """A node that was sent every case, each as a study of its own, and has ended all of its jobs."""

    def __init__(self, node: RunningNode, pacs: StorageScp) -> None:
        self.node, self.pacs = node, pacs
        self.taken: dict[str, tuple[int, int]] = {}  # of each case, how many objects of how many

    def send(self, name: str, paths: list[Path]) -> None:
        self.taken[name] = len(self.node.send(paths)), len(paths)

    def job(self, name: str) -> dict[str, Any]:
        (job,) = [j for j in self.jobs if j["study_instance_uid"] == make_uid("study", name)]
        return job

    def wait(self) -> None:
        self.jobs = self.node.wait_for_jobs(sum(n > 0 for n, _ in self.taken.values()), within_s=240)


def _as_study(case: Case, data: Path, folder: Path) -> list[Path]:
    """The files of a case with UIDs of its own, since several of the cases are one series in many codings.

    What has no UID stays without one.
    """
    folder.mkdir(parents=True)
    copies = []
    for number, path in enumerate(files(data / case.name)):
        with warnings.catch_warnings():  # values that break their VR are passed on
            warnings.simplefilter("ignore")
            dataset = dcmread(path)
            _set_uid(dataset, "StudyInstanceUID", make_uid("study", case.name))
            _set_uid(dataset, "SeriesInstanceUID", make_uid("series", case.name))
            _set_uid(dataset, "SOPInstanceUID", make_uid("instance", case.name, number))
            if "SOPInstanceUID" in dataset:
                dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.SeriesDescription = case.name[-60:]
            copies.append(folder / f"{number}.dcm")
            dataset.save_as(copies[-1])
    return copies


def _set_uid(dataset: Dataset, keyword: str, uid: str) -> None:
    if dataset.get(keyword):
        setattr(dataset, keyword, uid)


def _tilted_echoes(folder: Path) -> list[Path]:
    """Two echoes under a tilted gantry, of which the second shows something else."""

    def of_echo(number: int) -> Callable[[Dataset, int], None]:
        def edit(dataset: Dataset, z: int) -> None:
            dataset.SOPInstanceUID = make_uid("instance", SET_RIGHT, number, z)
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.EchoTime = ("30", "9.5")[number]

        return edit

    paths = []
    for number, image in enumerate((np.roll(PHANTOM, 3, axis=2) * 201, PHANTOM * 201)):
        paths += write_classic_series(
            folder / str(number),
            image,
            SHEARED,
            study_instance_uid=make_uid("study", SET_RIGHT),
            series_instance_uid=make_uid("series", SET_RIGHT),
            edit=of_echo(number),
            SeriesDescription=SET_RIGHT,
        )
    return paths


@pytest.fixture(scope="module")
def port(shared_data: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    root = tmp_path_factory.mktemp("port")
    shutil.copytree(models_dir, root / "registry")
    registry = Registry(root / "registry", runtimes=("onnxruntime",))
    for name, arguments in MODELS.items():
        bundle = make_threshold_bundle(root / name, name=name, patch_size=(64, 64, 64), **arguments)
        registry.add(bundle.folder, check_golden=False)
        registry.activate(name, "1.0.0")
    routes = [{**route, "quiet_time_s": 6.0, "destinations": ["pacs"]} for route in ROUTES]
    with (
        StorageScp() as pacs,
        RunningNode(
            root / "node",
            models=registry.root,
            destinations={"pacs": pacs.port},
            routes=routes,
            worker={"runtime": "onnxruntime"},
        ) as node,
    ):
        port = Port(node, pacs)
        port.send(SET_RIGHT, _tilted_echoes(root / "tilted"))
        for number, case in enumerate(CASES):
            if (shared_data / case.name).exists():
                port.send(case.name, _as_study(case, shared_data, root / str(number)))
        port.wait()
        yield port


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
def test_the_port_gives_the_labels_or_the_reason(port: Port, shared_data: Path, case: Case) -> None:
    files(shared_data / case.name)
    taken, sent = port.taken[case.name]
    if case.no_object == NOBODYS:
        assert taken == 0  # without UIDs there is nothing that could be sent or kept
        return
    assert taken == sent
    job = port.job(case.name)
    why = case.refused or case.no_object
    if why is not None:
        assert (job["state"], job["reason"]["code"]) == ("refused", why[0].value), job
        assert why[1] in job["reason"]["sentence"]
        assert job["reason"]["remedy"]
        return
    assert job["state"] == "succeeded", job
    image = truth_of(shared_data, case)
    found = labels_in(port.node.fetch(job, "labelmap"))
    expected, _ = reorient(image, axis_codes(found.affine))
    thresholds = MODELS[job["model"]["name"]]["thresholds"]
    labels = expected_labels(expected.array, thresholds)
    np.testing.assert_array_equal(found.array, labels)
    np.testing.assert_allclose(found.affine, expected.affine, atol=0.01)
    assert len(np.unique(labels)) > 1
    seg = dcmread(io.BytesIO(port.node.fetch(job, "segmentation")))
    ones = int(np.unpackbits(np.frombuffer(seg.PixelData, np.uint8)).sum())
    assert ones == np.count_nonzero(labels)


def test_the_port_sets_right_what_its_route_says(port: Port) -> None:
    job = port.job(SET_RIGHT)
    assert job["state"] == "succeeded", job
    expected = places_of_labels(PHANTOM, SHEARED)
    assert_same_places(places_in_seg(port.node.fetch(job, "segmentation")), expected)
    told = " ".join(json.loads(port.node.fetch(job, "measurements"))["warnings"])
    assert "by EchoTime 9.5 of 9.5, 30" in told
    assert "gantry tilt 15.6 degrees" in told
