"""``/segmentations``: files in, their job, and what came of it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from service.api.access import Caller, CallerDep, check_role, visible_job
from service.api.multipart import declared_length, receive_form
from service.api.paging import Identifier
from service.api.problem import RETRY_AFTER_S, ProblemError, problem_responses
from service.api.results import ResultDocument, result_document
from service.api.schemas import DeletedDocument, Segmentation, segmentation, segmentation_path
from service.api.state import ApiState, State
from service.deletion import delete_job
from service.records.tables import Job, JobState, Result, ResultKind, Role
from service.uploads import Upload, find_bundle, submit

router = APIRouter(tags=["segmentations"])

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files", "model"],
                    "properties": {
                        "files": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                            "description": "One file per channel, in the order of the model's channels: "
                            ".nii, .nii.gz, or a .zip of one DICOM series. Where a route of the node tells "
                            "the channels of the model apart, one .zip of the whole study will do.",
                        },
                        "model": {"type": "string", "examples": ["hippocampus"]},
                        "version": {
                            "type": "string",
                            "examples": ["1.0.0"],
                            "description": "The active version unless given.",
                        },
                    },
                }
            }
        },
    }
}


class _WholeFile(FileResponse):
    """A file that is sent whole: Starlette's answers to a broken Range header are no problem documents."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [header for header in scope["headers"] if header[0] != b"range"]
        del self.headers["Accept-Ranges"]
        await super().__call__({**scope, "headers": headers}, receive, send)


_MEDIA_TYPE = {
    ResultKind.LABELMAP: "application/gzip",
    ResultKind.SEGMENTATION: "application/dicom",
    ResultKind.MEASUREMENTS: "application/json",
    ResultKind.REPORT: "application/dicom",
    ResultKind.CAPTURE: "application/dicom",
    ResultKind.PREVIEW: "image/png",
}
_SUFFIX = {
    ResultKind.LABELMAP: ".nii.gz",
    ResultKind.SEGMENTATION: ".dcm",
    ResultKind.MEASUREMENTS: ".json",
    ResultKind.REPORT: ".dcm",
    ResultKind.CAPTURE: ".dcm",
    ResultKind.PREVIEW: ".png",
}


@router.post(
    "/segmentations",
    status_code=HTTPStatus.ACCEPTED,
    openapi_extra=_FORM,
    responses={
        202: {
            "description": "The job, which waits or is there already",
            "headers": {"Location": {"schema": {"type": "string"}, "description": "Where the job is."}},
        },
        **problem_responses(404, 409, 415, 507),
    },
)
async def create_segmentation(
    request: Request, response: Response, state: State, caller: CallerDep
) -> Segmentation:
    """Upload an image, and have it segmented.

    The same files sent again with the same key, for the same model and version, give the same job.
    """
    maximum_bytes = state.settings.http.maximum_upload_bytes
    upload = await run_in_threadpool(state.desk.begin, declared_length(request), maximum_bytes=maximum_bytes)
    try:
        fields = await receive_form(
            request, upload, file_field="files", field_names=frozenset({"model", "version"})
        )
        document = await run_in_threadpool(_submit, state, caller, upload, fields)
    finally:
        await run_in_threadpool(upload.close)
    response.headers["Location"] = segmentation_path(document.job_id)
    return document


def _submit(state: ApiState, caller: Caller, upload: Upload, fields: Mapping[str, str]) -> Segmentation:
    name, version = fields.get("model", ""), fields.get("version") or None
    if not name:
        raise ProblemError(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "INVALID_REQUEST",
            "The field model is missing.",
            remedy=f"Name one of the models here: {', '.join(state.registry.names()) or 'none'}.",
        )
    job_id = submit(
        upload,
        state.records,
        state.spool,
        find_bundle(state.registry, name, version),
        requested_version=version,
        whole_study=state.settings.route_with_channels(name) is not None,
        key_id=caller.key_id,
        actor=caller.name,
        now=state.clock(),
    )
    with state.records.read() as session:
        return segmentation(session.get_one(Job, job_id))


@router.get("/segmentations/{job_id}", responses=problem_responses(404))
def read_segmentation(job_id: Identifier, state: State, caller: CallerDep) -> Segmentation:
    """State, progress, and why it was refused or has failed."""
    with state.records.read() as session:
        return segmentation(visible_job(session, caller, job_id))


def _file_responses(kind: ResultKind, description: str) -> dict[int | str, dict[str, Any]]:
    return {
        200: {
            "description": description,
            "content": {_MEDIA_TYPE[kind]: {"schema": {"type": "string", "format": "binary"}}},
            "headers": {"Repr-Digest": {"schema": {"type": "string"}, "description": "SHA-256, RFC 9530."}},
        },
        **problem_responses(404, 409, 410),
    }


@router.get(
    "/segmentations/{job_id}/labelmap",
    response_class=FileResponse,
    responses=_file_responses(ResultKind.LABELMAP, "The labelmap, NIfTI"),
)
def read_labelmap(job_id: Identifier, state: State, caller: CallerDep) -> FileResponse:
    """The labelmap on the grid of the input, as .nii.gz."""
    return _result_file(state, caller, job_id, ResultKind.LABELMAP)


@router.get(
    "/segmentations/{job_id}/segmentation",
    response_class=FileResponse,
    responses=_file_responses(ResultKind.SEGMENTATION, "The DICOM-SEG"),
)
def read_segmentation_object(job_id: Identifier, state: State, caller: CallerDep) -> FileResponse:
    """The DICOM-SEG, where the input was DICOM and something was found.

    Where there are several, for destinations with profiles of their own or one for each label, it is the
    first; `/segmentations/{job_id}/results` lists them all.
    """
    return _result_file(state, caller, job_id, ResultKind.SEGMENTATION)


@router.get(
    "/segmentations/{job_id}/measurements",
    response_class=FileResponse,
    responses=_file_responses(ResultKind.MEASUREMENTS, "Volumes per label in mL, JSON"),
)
def read_measurements(job_id: Identifier, state: State, caller: CallerDep) -> FileResponse:
    """Volumes per label, and which model on which runtime made them."""
    return _result_file(state, caller, job_id, ResultKind.MEASUREMENTS)


@router.get(
    "/segmentations/{job_id}/report",
    response_class=FileResponse,
    responses=_file_responses(ResultKind.REPORT, "The DICOM SR"),
)
def read_report(job_id: Identifier, state: State, caller: CallerDep) -> FileResponse:
    """Volumes per label as a DICOM structured report (TID 1500), where the input was DICOM."""
    return _result_file(state, caller, job_id, ResultKind.REPORT)


@router.get(
    "/segmentations/{job_id}/capture",
    response_class=FileResponse,
    responses=_file_responses(ResultKind.CAPTURE, "The DICOM secondary capture"),
)
def read_capture(job_id: Identifier, state: State, caller: CallerDep) -> FileResponse:
    """The picture of three planes as DICOM, where a destination takes it."""
    return _result_file(state, caller, job_id, ResultKind.CAPTURE)


@router.get(
    "/segmentations/{job_id}/preview.png",
    response_class=FileResponse,
    responses=_file_responses(ResultKind.PREVIEW, "A picture, PNG"),
)
def read_preview(job_id: Identifier, state: State, caller: CallerDep) -> FileResponse:
    """Three planes with the labels, in radiological convention: for looking, not for diagnosis."""
    return _result_file(state, caller, job_id, ResultKind.PREVIEW)


@router.get("/segmentations/{job_id}/results", responses=problem_responses(404, 409))
def list_results(job_id: Identifier, state: State, caller: CallerDep) -> list[ResultDocument]:
    """Every file that the job has made: one segmentation for each label, say, where a destination takes that.

    The order is that of the profiles and labels; the first segmentation is the one that
    `/segmentations/{job_id}/segmentation` gives.
    """
    with state.records.read() as session:
        job = visible_job(session, caller, job_id)
        if job.state is not JobState.SUCCEEDED:
            raise _no_result_yet(job)
        return [result_document(each, state.spool, _media_type(each.kind)) for each in job.results]


@router.get(
    "/segmentations/{job_id}/results/{result_id}",
    response_class=FileResponse,
    responses={
        200: {
            "description": "The file",
            "content": {
                kind: {"schema": {"type": "string", "format": "binary"}}
                for kind in sorted(set(_MEDIA_TYPE.values()))
            },
            "headers": {"Repr-Digest": {"schema": {"type": "string"}, "description": "SHA-256, RFC 9530."}},
        },
        **problem_responses(404, 409, 410),
    },
)
def read_result(job_id: Identifier, result_id: Identifier, state: State, caller: CallerDep) -> FileResponse:
    """One file that the job has made."""
    with state.records.read() as session:
        job = visible_job(session, caller, job_id)
        if job.state is not JobState.SUCCEEDED:
            raise _no_result_yet(job)
        result = next((each for each in job.results if each.result_id == result_id), None)
    if result is None:
        raise ProblemError(
            HTTPStatus.NOT_FOUND,
            "NO_SUCH_RESULT",
            f"Job {job_id} has no result {result_id}.",
            remedy=f"{segmentation_path(job_id)}/results lists what it has.",
        )
    return _send(state, job_id, result)


def _result_file(state: ApiState, caller: Caller, job_id: str, kind: ResultKind) -> FileResponse:
    with state.records.read() as session:
        job = visible_job(session, caller, job_id)
        if job.state is not JobState.SUCCEEDED:
            raise _no_result_yet(job)
        result = next((r for r in job.results if r.kind is kind), None)
    if result is None:
        raise ProblemError(
            HTTPStatus.NOT_FOUND,
            "NO_SUCH_RESULT",
            f"Job {job_id} has no {kind}.",
            remedy="Its links name what it has; a DICOM-SEG takes DICOM input in which something was found.",
        )
    return _send(state, job_id, result)


def _media_type(kind: ResultKind) -> str:
    return _MEDIA_TYPE.get(kind, "application/dicom")


def _no_result_yet(job: Job) -> ProblemError:
    if job.state in (JobState.QUEUED, JobState.RUNNING):
        return ProblemError(
            HTTPStatus.CONFLICT,
            "RESULT_NOT_READY",
            f"Job {job.job_id} is {job.state}, {job.progress_fraction:.0%} done.",
            remedy=f"Ask again after a while; {segmentation_path(job.job_id)} tells its progress.",
            retryable=True,
            headers={"Retry-After": str(RETRY_AFTER_S // 12)},
        )
    return ProblemError(
        HTTPStatus.CONFLICT,
        job.reason_code or "NO_RESULT",
        f"Job {job.job_id} is {job.state} and has no result. {job.reason or ''}".strip(),
        remedy=job.remedy or "",
    )


def _send(state: ApiState, job_id: str, result: Result) -> FileResponse:
    path = state.spool.absolute(result.path)
    if not path.is_file():
        raise ProblemError(
            HTTPStatus.GONE,
            "RESULT_GONE",
            f"The {result.kind} of job {job_id} is no longer on the node.",
            remedy="Send the input again.",
        )
    digest = base64.b64encode(bytes.fromhex(result.sha256)).decode()
    return _WholeFile(
        path,
        media_type=_media_type(result.kind),
        filename=f"{job_id}{_SUFFIX.get(result.kind, '.dcm')}",
        headers={"Repr-Digest": f"sha-256=:{digest}:"},
    )


@router.delete("/segmentations/{job_id}", responses=problem_responses(404, 409))
def delete_segmentation(job_id: Identifier, state: State, caller: CallerDep) -> DeletedDocument:
    """Delete a job, its results and its uploaded files; one's own, or with the role admin any."""
    with state.records.read() as session:
        if visible_job(session, caller, job_id).owner_key_id != caller.key_id:
            check_role(caller, Role.ADMIN)
    deleted = delete_job(state.records, state.spool, job_id, actor=caller.name, now=state.clock())
    return DeletedDocument.model_validate(deleted)
