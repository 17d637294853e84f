"""Golden cases of the site: approved labelmaps as people bring them, on the node's grid, kept for good."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from api_harness import ApiHarness, assert_problem
from bundle_factory import write_nifti_ras
from findings import labelmap_of, make_finding, phantom_source
from governed_node import finish_job, image, labels_of
from phantom import chiral_labels, phantom_manifest
from pydicom import dcmread
from sqlalchemy import select

from models.errors import Refusal
from models.nifti import read_labelmap, write_nifti
from models.volume import Labelmap
from service.deletion import delete_job
from service.errors import ConflictError, NotFoundError
from service.profiles import Profile
from service.records.governance_tables import SiteCase
from service.records.tables import Event
from service.rendering import render
from service.site_cases import approve_case, list_cases, remove_case
from service.site_labelmap import read_approved

URL = "/api/v1/cases"


def approve(api: ApiHarness, job_id: str, labelmap: Path | None = None) -> SiteCase:
    return approve_case(api.records, api.spool, api.registry, job_id, labelmap, actor="operator", now=api.now)


def approved_array(api: ApiHarness, case: SiteCase) -> np.ndarray:
    return read_labelmap(api.spool.absolute(case.path)).array


def test_a_result_is_approved_as_produced_and_listed_and_removed(api: ApiHarness) -> None:
    api.install()
    job_id = finish_job(api)
    response = api.post(URL, key="operator", data={"job": job_id, "as_produced": "true"}, files=[])
    # Without files httpx sends a urlencoded form, which is none of ours.
    assert_problem(response, 415, "UNSUPPORTED_MEDIA_TYPE")
    form = [("job", (None, job_id)), ("as_produced", (None, "true"))]
    response = api.post(URL, key="operator", files=form)
    assert response.status_code == 201, response.text
    case = response.json()
    assert (case["source"], case["labels"], case["approved_by"]) == (
        "as_produced",
        ["low", "high"],
        "operator",
    )
    assert [each["case_id"] for each in api.get(URL, key="operator").json()] == [case["case_id"]]
    assert api.get(f"{URL}?model=other", key="operator").json() == []
    assert_problem(api.post(URL, key="operator", files=form), 409, "CONFLICT")
    stored = [path for path in api.spool_files() if path.startswith("cases/")]
    assert len(stored) == 1
    assert api.delete(f"{URL}/{case['case_id']}", key="operator").status_code == 204
    assert [path for path in api.spool_files() if path.startswith("cases/")] == []
    assert_problem(api.delete(f"{URL}/{case['case_id']}", key="operator"), 404, "NOT_FOUND")
    with api.records.read() as session:
        kinds = list(session.scalars(select(Event.kind).where(Event.kind.startswith("case."))))
    assert kinds == ["case.approved", "case.removed"]


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SPL", "AIR"])
def test_a_corrected_nifti_is_brought_back_however_a_viewer_turned_it(
    api: ApiHarness, tmp_path: Path, axes: str
) -> None:
    api.install()
    job_id = finish_job(api)
    corrected = labels_of(image())
    corrected[0, 0, 0] = 2
    write_nifti_ras(tmp_path / "corrected.nii.gz", corrected, (1.0, 1.0, 1.0))
    whole = nibabel.load(tmp_path / "corrected.nii.gz")
    change = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(whole.affine), nibabel.orientations.axcodes2ornt(tuple(axes))
    )
    turned = whole.as_reoriented(change)
    turned.set_sform(turned.affine, 1)
    turned.set_qform(turned.affine, 1)
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    sent = api.post(
        URL,
        key="operator",
        data={"job": job_id},
        files=[("labelmap", ("any", (tmp_path / "turned.nii.gz").read_bytes()))],
    )
    assert sent.status_code == 201, sent.text
    assert sent.json()["source"] == "nifti"
    with api.records.read() as session:
        (case,) = list_cases(session)
    assert np.array_equal(approved_array(api, case), corrected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a[:, :, :-1], "does not lie on the grid"),
        (lambda a: np.where(a == 2, 9, a), "no labels of threshold: \\[9\\]"),
        (lambda a: a * 0, "is empty"),
    ],
)
def test_a_labelmap_that_proves_nothing_is_refused(
    api: ApiHarness, tmp_path: Path, change: object, said: str
) -> None:
    api.install()
    job_id = finish_job(api)
    write_nifti_ras(tmp_path / "l.nii.gz", change(labels_of(image())), (1.0, 1.0, 1.0))  # type: ignore[operator]
    with pytest.raises(Refusal, match=said):
        approve(api, job_id, tmp_path / "l.nii.gz")
    assert [path for path in api.spool_files() if path.startswith("cases/")] == []


@pytest.mark.parametrize("form", ["binary", "labelmap"])
def test_a_segmentation_is_read_by_its_codes_and_places(tmp_path: Path, form: str) -> None:
    source = phantom_source(tmp_path / "series")
    finding = make_finding(source)
    (tmp_path / "out").mkdir()
    profile = Profile.model_validate({"segmentation": form})
    files = render(finding, profile, tmp_path / "out", 1, lambda: None)
    (name,) = (each.name for each in files if each.kind == "segmentation")
    grid = labelmap_of(source)
    read = read_approved(tmp_path / "out" / name, grid, phantom_manifest())
    assert np.array_equal(read.array, chiral_labels())
    # The same frames on the same patient, as a viewer stores them whose rows run the other way.
    flipped = Labelmap(np.ascontiguousarray(grid.array[:, ::-1]), _flipped(grid))
    assert np.array_equal(
        read_approved(tmp_path / "out" / name, flipped, phantom_manifest()).array, chiral_labels()[:, ::-1]
    )
    moved = Labelmap(grid.array, grid.affine + np.array([[0, 0, 0, 0.4]] + [[0, 0, 0, 0]] * 3))
    with pytest.raises(Refusal, match="does not lie on the voxels"):
        read_approved(tmp_path / "out" / name, moved, phantom_manifest())
    dataset = dcmread(tmp_path / "out" / name)
    last = dataset.SegmentSequence[-1]
    last.SegmentedPropertyTypeCodeSequence[0].CodeValue = "1"
    dataset.save_as(tmp_path / "other.dcm")
    with pytest.raises(Refusal, match="those of no label"):
        read_approved(tmp_path / "other.dcm", grid, phantom_manifest())


def _flipped(grid: Labelmap) -> np.ndarray:
    flip = np.eye(4)
    flip[1, 1], flip[1, 3] = -1, grid.array.shape[1] - 1
    return np.asarray(grid.affine @ flip)


def test_what_is_no_labelmap_at_all_is_refused(api: ApiHarness, tmp_path: Path) -> None:
    api.install()
    job_id = finish_job(api)
    dicom = b"\0" * 128 + b"DICM" + b"\xff" * 50
    for content in (b"", b"no image", b"\x1f\x8b" + b"x" * 30, dicom):
        (tmp_path / "file").write_bytes(content)
        (tmp_path / "file.nii.gz").unlink(missing_ok=True)
        (tmp_path / "file.nii").unlink(missing_ok=True)
        with pytest.raises(Refusal):
            approve(api, job_id, tmp_path / "file")


def test_only_a_finished_job_is_approved(api: ApiHarness) -> None:
    api.install()
    waiting = api.enqueue(owner="uploader")
    with pytest.raises(ConflictError, match="queued and has no labelmap"):
        approve(api, waiting)
    with pytest.raises(NotFoundError):
        approve(api, "0" * 32)


def test_what_a_case_rests_on_is_not_deleted(api: ApiHarness) -> None:
    api.install()
    job_id = finish_job(api)
    case = approve(api, job_id)
    with pytest.raises(ConflictError, match=f"golden case {case.case_id}"):
        delete_job(api.records, api.spool, job_id, actor="admin", now=api.now)
    remove_case(api.records, api.spool, case.case_id, actor="operator", now=api.now)
    assert delete_job(api.records, api.spool, job_id, actor="admin", now=api.now).jobs == 1


def test_the_form_must_say_what_is_approved(api: ApiHarness) -> None:
    api.install()
    job_id = finish_job(api)
    for form in (
        [("job", (None, job_id))],
        [("as_produced", (None, "true"))],
        [("job", (None, job_id)), ("as_produced", (None, "true")), ("labelmap", ("l", b"x"))],
    ):
        assert_problem(api.post(URL, key="operator", files=form), 422, "INVALID_REQUEST")


def test_write_and_read_are_inverse(tmp_path: Path) -> None:
    array = labels_of(image())
    write_nifti(Labelmap(array, np.eye(4)), tmp_path / "l.nii.gz")
    assert np.array_equal(read_labelmap(tmp_path / "l.nii.gz").array, array)
