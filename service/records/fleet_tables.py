"""The tables of several hosts that share one node's records: workers, promised space, what jobs need."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from service.records.tables import Base


class WorkerRow(Base):
    """A worker that is, or was, at work. Its beat is written by the loop that consumes jobs."""

    __tablename__ = "worker"

    owner: Mapped[str] = mapped_column(String(128), primary_key=True)  # as in lease_owner
    host: Mapped[str] = mapped_column(String(64), index=True)
    started_at: Mapped[datetime]
    beat_at: Mapped[datetime]
    bell_heard_at: Mapped[datetime | None]  # its own message came back from the broker
    models: Mapped[list[str]]  # that it takes jobs of; empty for all
    memory_bytes: Mapped[int] = mapped_column(BigInteger)


class UploadPromise(Base):
    """Space of the spool that the uploads under way in one process may still fill."""

    __tablename__ = "upload_promise"

    desk_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(128))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    renewed_at: Mapped[datetime]


class JobNeed(Base):
    """A job that ran out of memory: how much the largest worker had that it was tried on."""

    __tablename__ = "job_need"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.job_id", ondelete="CASCADE"), primary_key=True)
    more_than_bytes: Mapped[int] = mapped_column(BigInteger)
