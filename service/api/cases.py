"""``/cases``: golden cases of the site, which every new version of their model is held against."""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from service.api.access import CallerDep
from service.api.governance_schemas import CaseDocument
from service.api.multipart import declared_length, receive_form
from service.api.paging import Identifier
from service.api.problem import ProblemError, problem_responses
from service.api.state import State
from service.records.governance_tables import SiteCase
from service.records.tables import Job
from service.site_cases import approve_case as approve_now
from service.site_cases import list_cases as list_now
from service.site_cases import remove_case as remove_now

router = APIRouter(tags=["models"])

_MAXIMUM_LABELMAP_BYTES = 512 * 1024**2
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["job"],
                    "properties": {
                        "job": {"type": "string", "description": "A job that has succeeded."},
                        "labelmap": {
                            "type": "string",
                            "format": "binary",
                            "description": "What was approved, NIfTI or DICOM-SEG.",
                        },
                        "as_produced": {
                            "type": "string",
                            "enum": ["true"],
                            "description": "Instead of a labelmap: the node's own result is right.",
                        },
                    },
                }
            }
        },
    }
}


@router.get("/cases")
def list_cases(
    state: State,
    _caller: CallerDep,
    model: Annotated[str | None, Query(pattern=r"^[a-z0-9-]{1,64}$")] = None,
) -> list[CaseDocument]:
    """The golden cases of the site, the oldest first."""
    with state.records.read() as session:
        return [_document(case, case.job) for case in list_now(session, model_name=model)]


@router.post(
    "/cases",
    status_code=HTTPStatus.CREATED,
    openapi_extra=_FORM,
    responses={201: {"description": "The golden case"}, **problem_responses(404, 409, 415, 507)},
)
async def approve_case(request: Request, response: Response, state: State, caller: CallerDep) -> CaseDocument:
    """Make a finished study a golden case, with the labelmap that was approved."""
    upload = await run_in_threadpool(
        state.desk.begin, declared_length(request), maximum_bytes=_MAXIMUM_LABELMAP_BYTES
    )
    try:
        fields = await receive_form(
            request, upload, file_field="labelmap", field_names=frozenset({"job", "as_produced"})
        )
        as_produced = fields.get("as_produced") == "true"
        if "job" not in fields or len(upload.files) != (0 if as_produced else 1):
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "INVALID_REQUEST",
                "The form does not say which job is approved, and with which labelmap.",
                remedy="Send job, and either one file in labelmap or as_produced=true.",
            )
        case = await run_in_threadpool(
            partial(
                approve_now,
                state.records,
                state.spool,
                state.registry,
                fields["job"],
                upload.files[0].path if upload.files else None,
                actor=caller.name,
                now=state.clock(),
            )
        )
    finally:
        await run_in_threadpool(upload.close)

    def describe() -> CaseDocument:
        with state.records.read() as session:
            return _document(case, session.get_one(Job, case.job_id))

    return await run_in_threadpool(describe)


@router.delete("/cases/{case_id}", status_code=HTTPStatus.NO_CONTENT, responses=problem_responses(404))
def remove_case(case_id: Identifier, state: State, caller: CallerDep) -> None:
    """Remove a golden case; its study is an ordinary one again."""
    remove_now(state.records, state.spool, case_id, actor=caller.name, now=state.clock())


def _document(case: SiteCase, job: Job) -> CaseDocument:
    return CaseDocument(
        case_id=case.case_id,
        job_id=case.job_id,
        model=case.model_name,
        study_instance_uid=job.study_instance_uid,
        source=case.source,
        labels=case.labels,
        approved_by=case.approved_by,
        created_at=case.created_at,
    )
