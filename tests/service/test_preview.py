"""The preview over HTTP: stored with every result, and the picture that the secondary capture shows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from api_harness import ApiHarness, assert_problem
from bundle_factory import expected_labels, make_threshold_bundle, write_nifti_ras
from PIL import Image
from small_node import image_array

from models.nifti import read_nifti
from models.segmenter import Segmenter
from models.volume import Labelmap
from service.overlay import draw_overlay
from service.pipeline import run
from service.pipeline_job import PipelineJob
from service.records.jobs import succeed_job
from service.records.tables import ResultKind, Role
from service.records.work import NewResult, Outcome

SPACING_ZYX_MM = (2.0, 1.25, 1.5)
URL = "/api/v1/segmentations"


def run_on_nifti(folder: Path, api: ApiHarness) -> tuple[Path, Path]:
    """Input and output folder of a run of the pipeline."""
    image = folder / "image.nii.gz"
    write_nifti_ras(image, image_array().astype(np.float32), SPACING_ZYX_MM)
    bundle = make_threshold_bundle(folder / "b", spacing_mm=SPACING_ZYX_MM)
    segmenter = Segmenter(bundle, runtime="onnxruntime", threads=1)
    job = PipelineJob(((image,),), api.now, folder / "out")
    run(job, segmenter, bundle.manifest, bundle.digest)
    segmenter.close()
    return image, folder / "out"


def test_it_is_the_picture_of_the_result(tmp_path: Path, api: ApiHarness) -> None:
    image, out = run_on_nifti(tmp_path, api)
    volume = read_nifti([image])
    labels = expected_labels(volume.array, (100.5, 300.5))
    manifest = make_threshold_bundle(tmp_path / "again", spacing_mm=SPACING_ZYX_MM).manifest
    title = f"{manifest.title} {manifest.version}"
    expected = draw_overlay(volume, Labelmap(labels, volume.affine), manifest.labels, title=title)
    with Image.open(out / "preview.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def test_it_is_served_to_those_who_may_see_the_job(tmp_path: Path, api: ApiHarness) -> None:
    _, out = run_on_nifti(tmp_path, api)
    job_id = api.enqueue(owner="uploader")
    assert_problem(api.get(f"{URL}/{job_id}/preview.png"), 409, "RESULT_NOT_READY")
    job = api.claim(job_id)
    folder = api.spool.results_dir / job_id
    api.spool.make_folder(folder)
    content = (out / "preview.png").read_bytes()
    (folder / "preview.png").write_bytes(content)
    result = NewResult(ResultKind.PREVIEW, api.spool.relative(folder / "preview.png"), len(content), "0" * 64)
    with api.records.write() as session:
        succeed_job(session, job_id, job.attempt, Outcome([result], "r", "float32"), now=api.now)

    link = api.get(f"{URL}/{job_id}", key="uploader").json()["links"]["preview"]
    assert link == f"{URL}/{job_id}/preview.png"
    response = api.get(link, key="uploader")
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert response.content == content
    with Image.open(io.BytesIO(response.content)) as picture:
        assert picture.format == "PNG"
    api.make_key("another", Role.UPLOADER)
    assert_problem(api.get(link, key="another"), 404, "NOT_FOUND")
    assert_problem(api.get(f"{URL}/{job_id}/report"), 404, "NO_SUCH_RESULT")
