"""A whole node: studies over DICOM, uploads over HTTP, files by command; the same labels on every way."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from bundle_factory import expected_labels
from numpy.typing import NDArray
from phantom import test_uid as make_uid
from places import (
    AFFINE,
    assert_same_places,
    image,
    places_in_nifti,
    places_in_seg,
    places_of_labels,
    write_study,
)
from pydicom import dcmread
from running_node import SEGNODE, RunningNode
from storage_scp import StorageScp
from waiting import wait_until

from models.nifti import read_labelmap

NAME = "Zwiebelfisch^Ottokar"


def to_nifti(paths: list[Path], out: Path) -> Path:
    """A DICOM series as NIfTI, by ITK."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([str(p) for p in reader.GetGDCMSeriesFileNames(str(paths[0].parent))])
    SimpleITK.WriteImage(reader.Execute(), str(out))
    return out


def segment_by_command(node: RunningNode, source: Path, out: Path, model: str = "threshold") -> Path:
    subprocess.run(
        [*SEGNODE, "segment", str(source), "--model", model, "-o", str(out), "--config", str(node.config)],
        check=True,
        capture_output=True,
    )
    return out


def test_a_study_comes_back_as_one_seg_in_the_right_places(
    node: RunningNode, pacs: StorageScp, tmp_path: Path
) -> None:
    before = len(pacs.segmentations)
    paths = write_study(tmp_path, 1, PatientName=NAME)
    assert node.send(paths) == paths
    wait_until(lambda: len(pacs.segmentations) > before, 60, node.log)
    (job,) = [j for j in node.jobs() if j["study_instance_uid"] == make_uid("study", 1)]
    seg = node.fetch(job, "segmentation")
    assert pacs.segmentations[-1].data_set in seg  # what was delivered is what is stored
    expected = expected_labels(image(1)[None].astype(np.float32), (100.5, 300.5))
    assert_same_places(places_in_seg(seg), places_of_labels(expected, AFFINE))
    header = dcmread(io.BytesIO(seg), stop_before_pixels=True)
    assert (header.PatientID, str(header.PatientName)) == ("P1", NAME)
    assert header.StudyInstanceUID == make_uid("study", 1)
    assert header.ReferencedSeriesSequence[0].SeriesInstanceUID == make_uid("series", 1)
    assert header.SeriesDescription.startswith("AI, unverified")
    assert job["model"]["digest"] in header.to_json()


def test_the_same_study_again_and_the_result_sent_back_change_nothing(
    node: RunningNode, pacs: StorageScp, tmp_path: Path
) -> None:
    before = len(pacs.segmentations)
    paths = write_study(tmp_path / "study", 2)
    node.send(paths)
    wait_until(lambda: len(pacs.segmentations) > before, 60, node.log)
    (job,) = [j for j in node.jobs() if j["study_instance_uid"] == make_uid("study", 2)]
    (tmp_path / "seg.dcm").write_bytes(node.fetch(job, "segmentation"))
    assert node.send([*paths, tmp_path / "seg.dcm"])[-1].name == "seg.dcm"  # taken, and nothing follows
    marker = write_study(tmp_path / "later", 3)  # when this one has come out, the others would have too
    node.send(marker)
    wait_until(lambda: len(pacs.segmentations) > before + 1, 60, node.log)
    jobs = [j for j in node.jobs() if j["study_instance_uid"] == make_uid("study", 2)]
    assert [j["job_id"] for j in jobs] == [job["job_id"]]
    assert len(pacs.segmentations) == before + 2


def test_command_rest_and_dicom_give_the_same_labels_in_the_same_places(
    node: RunningNode, pacs: StorageScp, tmp_path: Path
) -> None:
    paths = write_study(tmp_path / "dicom", 4)
    nifti = to_nifti(paths, tmp_path / "case.nii.gz")
    before = len(pacs.segmentations)
    node.send(paths)
    wait_until(lambda: len(pacs.segmentations) > before, 60, node.log)
    (job,) = [j for j in node.jobs() if j["study_instance_uid"] == make_uid("study", 4)]
    wanted = places_in_seg(node.fetch(job, "segmentation"))
    assert set(wanted) == {1, 2}
    assert_same_places(places_in_nifti(node.fetch(job, "labelmap")), wanted)
    assert_same_places(places_in_nifti(segment_by_command(node, nifti, tmp_path / "a.nii.gz")), wanted)
    assert_same_places(places_in_seg(segment_by_command(node, paths[0].parent, tmp_path / "c.dcm")), wanted)
    uploaded = node.segment(nifti, model="threshold")
    assert uploaded["state"] == "succeeded", uploaded
    assert_same_places(places_in_nifti(node.fetch(uploaded, "labelmap")), wanted)
    assert uploaded["summary"]["volumes_ml"] == pytest.approx(job["summary"]["volumes_ml"], rel=1e-5)


def test_the_shipped_model_gives_the_same_on_every_way(
    node: RunningNode, shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "hippocampus_dicom" / "Study1_13_HCropVolume"
    nifti = to_nifti(sorted(folder.glob("*.dcm")), tmp_path / "case.nii.gz")
    seg = segment_by_command(node, folder, tmp_path / "out.dcm", model="hippocampus")
    wanted = places_in_seg(seg)
    assert set(wanted) == {1, 2}
    by_command = segment_by_command(node, nifti, tmp_path / "out.nii.gz", model="hippocampus")
    assert_same_places(places_in_nifti(by_command), wanted)
    uploaded = node.segment(nifti, model="hippocampus")
    assert np.array_equal(
        read_labelmap(by_command).array, _labelmap(node.fetch(uploaded, "labelmap"), tmp_path)
    )


def _labelmap(data: bytes, folder: Path) -> NDArray[np.integer]:
    path = folder / "fetched.nii.gz"
    path.write_bytes(data)
    return read_labelmap(path).array


def test_a_refusal_stands_in_the_records_with_its_reason(
    node: RunningNode, pacs: StorageScp, tmp_path: Path
) -> None:
    paths = write_study(tmp_path, 5)
    paths[4].unlink()
    node.send([p for p in paths if p.exists()])
    wait_until(lambda: any(_refused(j) for j in node.jobs()), 60, node.log)
    (job,) = [j for j in node.jobs() if j["study_instance_uid"] == make_uid("study", 5)]
    assert job["reason"]["code"] == "MISSING_SLICE"
    assert job["links"].keys() == {"self"}


def _refused(job: dict[str, object]) -> bool:
    return job["state"] == "refused"


def test_no_line_of_the_log_holds_a_patients_name(node: RunningNode) -> None:
    log = node.log()
    assert "job.succeeded" in log
    assert "Zwiebelfisch" not in log
    assert "Ottokar" not in log
