"""A real PACS: Orthanc routes everything to the node, results that came back too, and gets one result."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from orthanc import Orthanc
from places import assert_same_places, places_in_nifti, places_in_seg, places_of_labels
from programs import program
from pydicom import dcmread
from running_node import RunningNode
from waiting import wait_until

ROUTE = {
    "name": "hippocampus",
    "model": "hippocampus",
    "match": {"Modality": "MR"},
    "quiet_time_s": 6.0,
    "destinations": ["orthanc"],
}


@pytest.fixture(scope="module")
def pacs_and_node(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path
) -> Iterator[tuple[Orthanc, RunningNode]]:
    program("Orthanc", "orthanc")
    with Orthanc(tmp_path_factory.mktemp("orthanc")) as orthanc:
        node = RunningNode(
            tmp_path_factory.mktemp("node"),
            models=models_dir,
            destinations={"orthanc": orthanc.dicom_port},
            routes=[ROUTE],
        )
        with node:
            orthanc.start(node_port=node.dicom_port)
            yield orthanc, node


@pytest.fixture(scope="module")
def result(
    pacs_and_node: tuple[Orthanc, RunningNode], shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The SEG of a real series, as the PACS holds it after a routing round."""
    orthanc, node = pacs_and_node
    folder = shared_data / "hippocampus_dicom" / "Study1_13_HCropVolume"
    orthanc.upload(sorted(folder.glob("*.dcm")))
    wait_until(lambda: all(map(orthanc.instances_of_modality, ("SEG", "SR"))), 120, node.log)
    (seg,) = orthanc.instances_of_modality("SEG")
    path = tmp_path_factory.mktemp("result") / "seg.dcm"
    path.write_bytes(orthanc.file(seg))
    return path


def test_the_result_is_in_the_study_that_it_was_made_from(
    pacs_and_node: tuple[Orthanc, RunningNode], result: Path
) -> None:
    orthanc, _ = pacs_and_node
    (study,) = orthanc.get("/studies")
    modalities = sorted(
        orthanc.get(f"/series/{series}")["MainDicomTags"]["Modality"]
        for series in orthanc.get(f"/studies/{study}")["Series"]
    )
    assert modalities == ["MR", "SEG", "SR"]


def test_what_was_routed_back_to_the_node_gave_no_second_result(
    pacs_and_node: tuple[Orthanc, RunningNode], result: Path, shared_data: Path
) -> None:
    orthanc, node = pacs_and_node
    own = dcmread(result, stop_before_pixels=True)
    study = f"/studies/{own.StudyInstanceUID}"
    n_images = own.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    with_seg_and_sr = len(n_images) + 2
    wait_until(lambda: node.get(study)["instance_count"] == with_seg_and_sr, 60, node.log)
    # Once more, by hand: the whole study, result included.
    (whole,) = orthanc.get("/studies")
    sent = orthanc.client.post("/modalities/segnode/store", json={"Resources": [whole]}, timeout=120)
    assert sent.is_success
    assert sent.json()["FailedInstancesCount"] == 0
    # A second study comes out behind it: whatever the first would have started has started by then.
    orthanc.upload(sorted((shared_data / "hippocampus_dicom" / "Study3_11_HCropVolume").glob("*.dcm")))
    wait_until(lambda: len(orthanc.instances_of_modality("SEG")) >= 2, 120, node.log)
    jobs = node.wait_for_jobs(2)
    assert [job["state"] for job in jobs] == ["succeeded", "succeeded"]
    assert len({job["study_instance_uid"] for job in jobs}) == 2
    assert len(orthanc.instances_of_modality("SEG")) == 2
    assert orthanc.jobs_failed() == []


def test_the_seg_stands_before_dciodvfy(result: Path) -> None:
    checked = subprocess.run(
        [program("dciodvfy", "dicom3tools"), str(result)], capture_output=True, text=True, check=False
    )
    said = checked.stdout + checked.stderr
    assert "Segmentation" in said
    assert [line for line in said.splitlines() if line.startswith("Error")] == []


def test_dcmqi_reads_the_same_voxels(result: Path, tmp_path: Path) -> None:
    subprocess.run(
        [
            program("segimage2itkimage", "dcmqi"),
            "--inputDICOM",
            str(result),
            "--outputDirectory",
            str(tmp_path),
            "-t",
            "nii",
            "-p",
            "seg",
            "--mergeSegments",
        ],
        check=True,
        capture_output=True,
    )
    (merged,) = tmp_path.glob("seg*.nii.gz")
    image = nibabel.load(merged)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    places = places_of_labels(np.asanyarray(image.dataobj).astype(int).transpose(2, 1, 0), affine)
    assert_same_places(places, places_in_seg(result))


def test_the_node_gives_the_same_over_rest(pacs_and_node: tuple[Orthanc, RunningNode], result: Path) -> None:
    _, node = pacs_and_node
    series = dcmread(result, stop_before_pixels=True)
    (job,) = [j for j in node.jobs() if j["study_instance_uid"] == series.StudyInstanceUID]
    assert_same_places(places_in_nifti(node.fetch(job, "labelmap")), places_in_seg(result))
    stored = dcmread(io.BytesIO(node.fetch(job, "segmentation")))
    assert stored.PixelData == dcmread(result).PixelData
