"""The tables of the records. Times are UTC and naive; identifiers are the node's own (32 hex letters).

Nothing here decides anything: the transitions that are allowed live in ``instances``, ``jobs`` and
``deliveries``.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar
from uuid import uuid4

from sqlalchemy import JSON, BigInteger, Enum, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


def new_identifier() -> str:
    """An identifier of the node's own: 32 hexadecimal letters, safe as a file name."""
    return uuid4().hex


class InstanceKind(StrEnum):
    IMAGE = "image"
    OWN = "own"  # made by this node and sent back to it: recorded, and nothing follows
    OTHER = "other"  # not an image: recorded, and nothing follows


class SeriesState(StrEnum):
    RECEIVING = "receiving"
    COMPLETE = "complete"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"  # its input was corrected or deleted before it ended


TERMINAL_JOB_STATES = (JobState.SUCCEEDED, JobState.REFUSED, JobState.FAILED, JobState.CANCELLED)


class JobOrigin(StrEnum):
    DICOM = "dicom"
    UPLOAD = "upload"


class ResultKind(StrEnum):
    SEGMENTATION = "segmentation"  # DICOM-SEG
    LABELMAP = "labelmap"  # NIfTI
    MEASUREMENTS = "measurements"  # JSON
    REPORT = "report"  # DICOM SR with the volumes
    CAPTURE = "capture"  # DICOM secondary capture
    PREVIEW = "preview"  # PNG
    REFUSAL = "refusal"  # DICOM SR that says why there is no result


class RefusalObject(StrEnum):
    NONE = "none"  # nobody asked for one
    WANTED = "wanted"  # to be made if the job is refused
    MADE = "made"
    WITHHELD = "withheld"  # it cannot be told for sure whose it is


class DeliveryState(StrEnum):
    PENDING = "pending"
    SENT = "sent"
    COMMITTED = "committed"  # by storage commitment only
    PARKED = "parked"  # waits for a person; never purged
    CANCELLED = "cancelled"  # its input was corrected before it left


class Role(StrEnum):
    UPLOADER = "uploader"
    OPERATOR = "operator"
    ADMIN = "admin"


_ENUMERATIONS: tuple[type[StrEnum], ...] = (
    InstanceKind,
    SeriesState,
    JobState,
    JobOrigin,
    ResultKind,
    RefusalObject,
    DeliveryState,
    Role,
)


def as_text(kind: type[StrEnum]) -> Enum:
    """The column type of an enumeration: its values as text."""
    return Enum(kind, native_enum=False, length=16, values_callable=lambda e: [m.value for m in e])


class Base(DeclarativeBase):
    """All tables. Enumerations are stored as their text, so that the database can be read by a person."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: JSON,
        list[str]: JSON,
        **{kind: as_text(kind) for kind in _ENUMERATIONS},
    }


class Series(Base):
    """A series as it arrives: from the first instance until quiet, and again when a late one comes."""

    __tablename__ = "series"
    __table_args__ = (
        UniqueConstraint("study_instance_uid", "series_instance_uid"),
        Index("ix_series_state_quiet", "state", "last_instance_at"),
    )

    series_id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_identifier)
    study_instance_uid: Mapped[str] = mapped_column(String(64), index=True)
    series_instance_uid: Mapped[str] = mapped_column(String(64))
    modality: Mapped[str | None]
    state: Mapped[SeriesState]
    calling_ae_title: Mapped[str | None] = mapped_column(String(16))
    called_ae_title: Mapped[str | None] = mapped_column(String(16))
    instance_count: Mapped[int] = mapped_column(default=0)
    first_instance_at: Mapped[datetime]
    last_instance_at: Mapped[datetime]
    completed_at: Mapped[datetime | None]

    instances: Mapped[list[Instance]] = relationship(back_populates="series")


class Instance(Base):
    """One received object, in one revision. A correction adds a revision and keeps the old one."""

    __tablename__ = "instance"
    __table_args__ = (
        UniqueConstraint("series_instance_uid", "sop_instance_uid", "revision"),
        Index("ix_instance_sop", "sop_instance_uid"),
    )

    instance_id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_identifier)
    series_id: Mapped[str | None] = mapped_column(ForeignKey("series.series_id"), index=True)
    study_instance_uid: Mapped[str] = mapped_column(String(64), index=True)
    series_instance_uid: Mapped[str] = mapped_column(String(64))
    sop_instance_uid: Mapped[str] = mapped_column(String(64))
    sop_class_uid: Mapped[str] = mapped_column(String(64))
    transfer_syntax_uid: Mapped[str] = mapped_column(String(64))
    kind: Mapped[InstanceKind]
    identity_digest: Mapped[str] = mapped_column(String(64))  # of patient and study identifiers
    patient_id: Mapped[str | None]  # of any length: hospitals break their VR
    revision: Mapped[int] = mapped_column(default=1)
    current: Mapped[bool] = mapped_column(default=True)
    path: Mapped[str]  # relative to the spool
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    calling_ae_title: Mapped[str | None] = mapped_column(String(16))
    called_ae_title: Mapped[str | None] = mapped_column(String(16))
    peer_address: Mapped[str | None] = mapped_column(String(64))
    received_at: Mapped[datetime]

    series: Mapped[Series | None] = relationship(back_populates="instances")


class Job(Base):
    """One segmentation to be made: of one set of inputs, by one model."""

    __tablename__ = "job"
    __table_args__ = (
        UniqueConstraint("input_key", "model_name"),
        Index("ix_job_queue", "state", "priority", "created_at"),
        Index("ix_job_refusal_object", "refusal_object", "state"),
    )

    job_id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_identifier)
    origin: Mapped[JobOrigin]
    model_name: Mapped[str] = mapped_column(String(64))
    requested_version: Mapped[str | None] = mapped_column(String(64))
    route_name: Mapped[str | None] = mapped_column(String(64))
    destinations: Mapped[list[str]] = mapped_column(default=list)
    refusal_destinations: Mapped[list[str]] = mapped_column(default=list)  # of a refusal object
    refusal_object: Mapped[RefusalObject] = mapped_column(default=RefusalObject.NONE)
    input_key: Mapped[str] = mapped_column(String(64))
    study_instance_uid: Mapped[str | None] = mapped_column(String(64), index=True)
    series_id: Mapped[str | None] = mapped_column(ForeignKey("series.series_id"), index=True)
    owner_key_id: Mapped[str | None] = mapped_column(ForeignKey("api_key.key_id"), index=True)
    supersedes_job_id: Mapped[str | None] = mapped_column(ForeignKey("job.job_id"))
    priority: Mapped[int] = mapped_column(default=0)

    state: Mapped[JobState] = mapped_column(default=JobState.QUEUED)
    attempt: Mapped[int] = mapped_column(default=0)  # the fence: a report on another attempt is void
    failures: Mapped[int] = mapped_column(default=0)  # the job itself went wrong
    lapses: Mapped[int] = mapped_column(default=0)  # the process or machine that held it died
    not_before: Mapped[datetime | None]
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_expires_at: Mapped[datetime | None]
    progress_stage: Mapped[str | None] = mapped_column(String(32))
    progress_fraction: Mapped[float] = mapped_column(default=0.0)

    reason_code: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str | None]
    remedy: Mapped[str | None]
    model_version: Mapped[str | None] = mapped_column(String(64))
    model_digest: Mapped[str | None] = mapped_column(String(64), index=True)
    runtime: Mapped[str | None] = mapped_column(String(32))
    precision: Mapped[str | None] = mapped_column(String(16))
    summary: Mapped[dict[str, Any]] = mapped_column(default=dict)  # volumes per label, warnings, figures

    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    inputs: Mapped[list[JobInput]] = relationship(back_populates="job", order_by="JobInput.position")
    results: Mapped[list[Result]] = relationship(back_populates="job", order_by="Result.path")


class JobInput(Base):
    """One input file of a job: a received instance, or an uploaded file. Exactly one of the two."""

    __tablename__ = "job_input"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.job_id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    channel: Mapped[int] = mapped_column(default=0)
    channel_name: Mapped[str | None] = mapped_column(String(64))  # of the model, where chosen by name
    instance_id: Mapped[str | None] = mapped_column(ForeignKey("instance.instance_id"), index=True)
    path: Mapped[str]  # relative to the spool

    job: Mapped[Job] = relationship(back_populates="inputs")


class Result(Base):
    """One file that a job produced. What is stored here is what every delivery sends."""

    __tablename__ = "result"

    result_id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_identifier)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.job_id"), index=True)
    kind: Mapped[ResultKind]
    path: Mapped[str]  # relative to the spool
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    sop_class_uid: Mapped[str | None] = mapped_column(String(64))
    sop_instance_uid: Mapped[str | None] = mapped_column(String(64), index=True)
    profile: Mapped[str | None] = mapped_column(String(16))  # of the destinations that get it; null for all
    withheld: Mapped[str | None]  # why it is parked until a person lets it go
    created_at: Mapped[datetime]

    job: Mapped[Job] = relationship(back_populates="results")


class Delivery(Base):
    """One result on its way to one destination."""

    __tablename__ = "delivery"
    __table_args__ = (
        UniqueConstraint("result_id", "destination"),
        Index("ix_delivery_queue", "state", "next_attempt_at"),
    )

    delivery_id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_identifier)
    result_id: Mapped[str] = mapped_column(ForeignKey("result.result_id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("job.job_id"), index=True)
    destination: Mapped[str] = mapped_column(String(64))
    state: Mapped[DeliveryState] = mapped_column(default=DeliveryState.PENDING)
    attempt: Mapped[int] = mapped_column(default=0)  # the fence
    failure_statuses: Mapped[int] = mapped_column(default=0)  # how often the peer answered 0xCxxx
    next_attempt_at: Mapped[datetime]
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_expires_at: Mapped[datetime | None]
    last_status: Mapped[int | None]  # the DIMSE status last answered
    last_error: Mapped[str | None]
    created_at: Mapped[datetime]
    sent_at: Mapped[datetime | None]

    result: Mapped[Result] = relationship()


class ApiKey(Base):
    """A key for the HTTP interface. Only its hash is kept."""

    __tablename__ = "api_key"

    key_id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_identifier)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[Role]
    key_hash: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Event(Base):
    """The audit trail: who did what to what. Rows are only ever added."""

    __tablename__ = "event"

    event_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[datetime]
    kind: Mapped[str] = mapped_column(String(64), index=True)
    alert: Mapped[bool] = mapped_column(default=False)  # someone should look at this
    actor: Mapped[str] = mapped_column(String(128))
    subject: Mapped[str] = mapped_column(String(128), default="")  # an identifier of the node's own
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict)
    origin: Mapped[str] = mapped_column(String(64), default="")  # the address that the actor acted from
    outcome: Mapped[str] = mapped_column(String(16), default="success")  # or refused, or failure
    # Its place in the chain, from 1 without a gap, and the digest there: see service.records.chain.
    chain_index: Mapped[int | None] = mapped_column(BigInteger, index=True, unique=True)
    digest: Mapped[str | None] = mapped_column(String(64))
