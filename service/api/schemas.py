"""What the HTTP interface says, as Pydantic models. Nothing here names a patient."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from service.records.tables import (
    Delivery,
    DeliveryState,
    Event,
    Job,
    JobOrigin,
    JobState,
    ResultKind,
    SeriesState,
)

API_PREFIX = "/api/v1"

_IDENTIFIER_EXAMPLE = "0f8fad5bd9cb469fa16570867728950e"
_STUDY_EXAMPLE = "1.2.826.0.1.3680043.8.498.1"


def _in_utc(time: Any) -> Any:
    return time.replace(tzinfo=UTC) if isinstance(time, datetime) and time.tzinfo is None else time


Time = Annotated[datetime, BeforeValidator(_in_utc)]
"""A time of the records (UTC, naive), said with its time zone."""

Item = TypeVar("Item")


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True)


class Page(_Document, Generic[Item]):
    """Part of a list, newest first."""

    items: list[Item]
    next: str | None = Field(description="Give it as `after` to read on; null at the end.")


class Progress(_Document):
    """How far the present attempt is."""

    stage: str | None = Field(examples=["forward"])
    fraction: float = Field(ge=0, le=1, examples=[0.4])


class JobModel(_Document):
    """Which model a job asks for, and which weights it ran on."""

    name: str = Field(examples=["hippocampus"])
    requested_version: str | None = Field(description="Null: the active version when the job starts.")
    version: str | None = Field(examples=["1.0.0"], description="Bound when the job starts.")
    digest: str | None = Field(description="SHA-256 of the bundle's SHA256SUMS.")


class Reason(_Document):
    """Why a job was refused or has failed."""

    code: str = Field(examples=["GANTRY_TILT"])
    sentence: str = Field(examples=["The gantry is tilted by 18.5 degrees."])
    remedy: str


class Segmentation(_Document):
    """A job: one segmentation to be made, or made."""

    job_id: str = Field(examples=[_IDENTIFIER_EXAMPLE])
    state: JobState
    origin: JobOrigin
    model: JobModel
    progress: Progress
    reason: Reason | None
    study_instance_uid: str | None = Field(examples=[_STUDY_EXAMPLE])
    route: str | None
    destinations: list[str]
    priority: int
    attempt: int
    failures: int = Field(description="How often the job itself went wrong.")
    lapses: int = Field(description="How often the process that held it died.")
    supersedes_job_id: str | None
    superseded_by_job_id: str | None = Field(
        description="The newer job whose result replaces what this one has made; null unless there is one."
    )
    runtime: str | None
    precision: str | None
    summary: dict[str, Any] = Field(description="Volumes per label in mL, warnings, figures of the run.")
    created_at: Time
    started_at: Time | None
    finished_at: Time | None
    links: dict[str, str] = Field(examples=[{"self": f"{API_PREFIX}/segmentations/{_IDENTIFIER_EXAMPLE}"}])


class SeriesDocument(_Document):
    """A series as it was received."""

    series_instance_uid: str
    modality: str | None
    state: SeriesState
    instance_count: int
    calling_ae_title: str | None
    called_ae_title: str | None
    first_instance_at: Time
    last_instance_at: Time
    completed_at: Time | None


class StudySummary(_Document):
    """A study that was received over DICOM."""

    study_instance_uid: str = Field(examples=[_STUDY_EXAMPLE])
    state: SeriesState = Field(description="complete when every series is")
    series_count: int
    instance_count: int
    first_instance_at: Time
    last_instance_at: Time


class DeliveryDocument(_Document):
    """One result on its way to one destination."""

    delivery_id: str = Field(examples=[_IDENTIFIER_EXAMPLE])
    job_id: str
    result_id: str
    destination: str = Field(examples=["pacs"])
    state: DeliveryState
    attempt: int
    last_status: str | None = Field(examples=["0xA700"], description="The DIMSE status last answered.")
    last_error: str | None
    next_attempt_at: Time | None = Field(description="Null unless pending.")
    created_at: Time
    sent_at: Time | None


class StudyDocument(_Document):
    """All that the node holds of a study."""

    study_instance_uid: str
    instance_count: int = Field(description="Every received object, also those that are not images.")
    series: list[SeriesDocument]
    jobs: list[Segmentation]
    deliveries: list[DeliveryDocument]


class DeletedDocument(_Document):
    """What was deleted."""

    instances: int
    jobs: int
    files: int
    size_bytes: int


class ModelVersion(_Document):
    """An installed version of a model."""

    version: str = Field(examples=["1.0.0"])
    digest: str | None = Field(description="Null where the version cannot be used.")
    title: str | None
    channels: list[str] = Field(description="In the order in which an upload's files are sent.")
    labels: list[str]
    active: bool
    withdrawn: bool
    fault: str | None = Field(
        description="Why the version cannot be used, and what to do; null where it can."
    )


class ModelDocument(_Document):
    """A model with its installed versions."""

    name: str = Field(examples=["hippocampus"])
    active_version: str | None
    versions: list[ModelVersion]


class Activation(BaseModel):
    """Which version is to be active."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"version": "1.1.0"}]})

    version: str = Field(min_length=1, max_length=64)
    accept_changed_labels: bool = Field(
        default=False, description="Confirms that labels, channels or orientation may change."
    )
    override_reason: str | None = Field(
        default=None,
        min_length=10,
        max_length=500,
        description="Why it is activated without a passed gate: stands in the audit trail, with who did it.",
    )


class RecalledDelivery(_Document):
    """Where a result of a version went."""

    delivery_id: str
    destination: str
    state: DeliveryState
    sop_instance_uid: str | None
    sent_at: Time | None


class RecalledJob(_Document):
    """A job that ran on a version."""

    job_id: str
    study_instance_uid: str | None = Field(description="Null for an upload that is not DICOM.")
    state: JobState
    model_digest: str | None
    finished_at: Time | None
    deliveries: list[RecalledDelivery]


class EventDocument(_Document):
    """A line of the audit trail."""

    event_id: int
    at: Time
    kind: str = Field(examples=["model.activated"])
    alert: bool
    actor: str
    subject: str
    origin: str = Field(examples=["10.1.2.3"], description="The address that the actor acted from.")
    outcome: Literal["success", "refused", "failure"]
    detail: dict[str, Any]
    chain_index: int | None = Field(description="Its place in the chain; see `segnode audit verify`.")
    digest: str | None


class Health(_Document):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(_Document):
    """Whether the node can do its work: true for each part that is in order."""

    ready: bool
    records: bool
    spool: bool
    model: bool


_LINK_OF_KIND = {
    ResultKind.LABELMAP: "labelmap",
    ResultKind.SEGMENTATION: "segmentation",
    ResultKind.MEASUREMENTS: "measurements",
    ResultKind.REPORT: "report",
    ResultKind.CAPTURE: "capture",
    ResultKind.PREVIEW: "preview.png",
}


def segmentation(job: Job) -> Segmentation:
    """Describe a job; its session must still be open."""
    own = segmentation_path(job.job_id)
    names = [_LINK_OF_KIND[kind] for kind in _LINK_OF_KIND if any(r.kind is kind for r in job.results)]
    links = {"self": own} | {name.partition(".")[0]: f"{own}/{name}" for name in names}
    if job.results:
        links["results"] = f"{own}/results"
    reason = None
    if job.reason_code is not None:
        reason = Reason(code=job.reason_code, sentence=job.reason or "", remedy=job.remedy or "")
    return Segmentation(
        job_id=job.job_id,
        state=job.state,
        origin=job.origin,
        model=JobModel(
            name=job.model_name,
            requested_version=job.requested_version,
            version=job.model_version,
            digest=job.model_digest,
        ),
        progress=Progress(stage=job.progress_stage, fraction=min(max(job.progress_fraction, 0.0), 1.0)),
        reason=reason,
        study_instance_uid=job.study_instance_uid,
        route=job.route_name,
        destinations=job.destinations,
        priority=job.priority,
        attempt=job.attempt,
        failures=job.failures,
        lapses=job.lapses,
        supersedes_job_id=job.supersedes_job_id,
        superseded_by_job_id=job.summary.get("superseded_by_job_id"),
        runtime=job.runtime,
        precision=job.precision,
        summary=job.summary,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        links=links,
    )


def segmentation_path(job_id: str) -> str:
    """Where a job is found."""
    return f"{API_PREFIX}/segmentations/{job_id}"


def delivery_document(delivery: Delivery) -> DeliveryDocument:
    """Describe a delivery."""
    return DeliveryDocument(
        delivery_id=delivery.delivery_id,
        job_id=delivery.job_id,
        result_id=delivery.result_id,
        destination=delivery.destination,
        state=delivery.state,
        attempt=delivery.attempt,
        last_status=None if delivery.last_status is None else f"0x{delivery.last_status:04X}",
        last_error=delivery.last_error,
        next_attempt_at=delivery.next_attempt_at if delivery.state is DeliveryState.PENDING else None,
        created_at=delivery.created_at,
        sent_at=delivery.sent_at,
    )


def event_document(event: Event) -> EventDocument:
    """Describe a line of the audit trail."""
    return EventDocument.model_validate(event)
