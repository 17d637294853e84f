"""The tables of model governance and retention, beside those of studies and jobs.

What belongs to a job or a delivery here goes with it when that is deleted.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from service.records.tables import Base, Job, as_text, new_identifier


class GateState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PASSED = "passed"
    FAILED = "failed"


class ActivationState(StrEnum):
    ON_PROBATION = "on_probation"
    CONFIRMED = "confirmed"
    ROLLED_BACK = "rolled_back"  # by the node itself
    REPLACED = "replaced"  # by a person, before it had stood the test
    FAILED = "failed"  # there was nothing to go back to


class ComparisonState(StrEnum):
    DONE = "done"
    FAILED = "failed"


class SiteCase(Base):
    """A finished study whose labelmap a person has approved: a golden case of the site."""

    __tablename__ = "site_case"
    __table_args__ = (UniqueConstraint("job_id"),)

    case_id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_identifier)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.job_id"))  # its inputs are the case's
    model_name: Mapped[str] = mapped_column(String(64), index=True)
    path: Mapped[str]  # of the approved labelmap, relative to the spool
    sha256: Mapped[str] = mapped_column(String(64))
    source: Mapped[str] = mapped_column(String(16))  # as_produced, nifti, segmentation
    labels: Mapped[list[str]]  # that occur in it
    approved_by: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[datetime]

    job: Mapped[Job] = relationship()


class Gate(Base):
    """One run of the gate for one version; ``report`` is what it found."""

    __tablename__ = "gate"
    __table_args__ = (
        Index("ix_gate_version", "model_name", "model_version", "requested_at"),
        Index("ix_gate_queue", "state", "requested_at"),
    )

    gate_id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_identifier)
    model_name: Mapped[str] = mapped_column(String(64))
    model_version: Mapped[str] = mapped_column(String(64))
    model_digest: Mapped[str] = mapped_column(String(64))
    against_version: Mapped[str | None] = mapped_column(String(64))
    against_digest: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[GateState] = mapped_column(as_text(GateState), default=GateState.QUEUED)
    attempt: Mapped[int] = mapped_column(default=0)  # the fence
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_expires_at: Mapped[datetime | None]
    requested_by: Mapped[str] = mapped_column(String(128))
    requested_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    report: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Activation(Base):
    """A version that was made the active one, and whether it has stood the test since."""

    __tablename__ = "activation"
    __table_args__ = (Index("ix_activation_state", "state", "model_name"),)

    activation_id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_identifier)
    model_name: Mapped[str] = mapped_column(String(64))
    model_version: Mapped[str] = mapped_column(String(64))
    model_digest: Mapped[str] = mapped_column(String(64))
    previous_version: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[ActivationState] = mapped_column(as_text(ActivationState))
    gate_id: Mapped[str | None] = mapped_column(ForeignKey("gate.gate_id"))
    override_reason: Mapped[str | None]  # why it was activated without a passed gate
    activated_by: Mapped[str] = mapped_column(String(128))
    activated_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    reason: Mapped[str | None]  # why it was rolled back


class Shadow(Base):
    """A candidate that runs beside the active version; running while ``stopped_at`` is null."""

    __tablename__ = "shadow"
    __table_args__ = (Index("ix_shadow_model", "model_name", "stopped_at"),)

    shadow_id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_identifier)
    model_name: Mapped[str] = mapped_column(String(64))
    model_version: Mapped[str] = mapped_column(String(64))
    model_digest: Mapped[str] = mapped_column(String(64))
    started_by: Mapped[str] = mapped_column(String(128))
    started_at: Mapped[datetime]
    stopped_at: Mapped[datetime | None]
    stopped_by: Mapped[str | None] = mapped_column(String(128))


class Comparison(Base):
    """One study under a candidate, beside what the active version had made of it."""

    __tablename__ = "comparison"
    __table_args__ = (UniqueConstraint("shadow_id", "job_id"),)

    comparison_id: Mapped[str] = mapped_column(String(32), primary_key=True, default=new_identifier)
    shadow_id: Mapped[str] = mapped_column(ForeignKey("shadow.shadow_id"), index=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.job_id", ondelete="CASCADE"), index=True)
    study_instance_uid: Mapped[str | None] = mapped_column(String(64))
    active_version: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[ComparisonState] = mapped_column(as_text(ComparisonState))
    labels: Mapped[dict[str, Any]] = mapped_column(default=dict)  # Dice and volumes of each
    seconds: Mapped[float | None]  # of the candidate, from the files to the labelmap
    active_seconds: Mapped[float | None]
    peak_bytes: Mapped[int | None] = mapped_column(BigInteger)
    code: Mapped[str | None] = mapped_column(String(64))
    reason: Mapped[str | None]
    created_at: Mapped[datetime]


class Commitment(Base):
    """What is asked of a destination about one delivery: to confirm that it keeps the object."""

    __tablename__ = "commitment"

    delivery_id: Mapped[str] = mapped_column(
        ForeignKey("delivery.delivery_id", ondelete="CASCADE"), primary_key=True
    )
    transaction_uid: Mapped[str] = mapped_column(String(64), index=True)
    requests: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime]  # when it is asked again, unless a report has come
    requested_at: Mapped[datetime]
    committed_at: Mapped[datetime | None]
    last_error: Mapped[str | None]


class Purge(Base):
    """A job whose files are gone by the rules of retention. Its rows stay: a recall must find it."""

    __tablename__ = "purge"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.job_id", ondelete="CASCADE"), primary_key=True)
    purged_at: Mapped[datetime] = mapped_column(index=True)
