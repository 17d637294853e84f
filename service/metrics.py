"""Figures for Prometheus, read from the records at every scrape: no process keeps a counter of its own.

Labels are states, reason codes, and names from the configuration; nothing in them comes from a study.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from models.errors import BundleError, RegistryError
from models.registry import Registry
from service.records.database import Records
from service.records.fleet import jobs_no_worker_takes, live_workers
from service.records.tables import (
    Delivery,
    DeliveryState,
    Event,
    Job,
    JobState,
    Series,
    SeriesState,
)
from service.spool import Spool


def render_metrics(records: Records, spool: Spool, registry: Registry, *, now: datetime) -> bytes:
    """All figures as they are now, in Prometheus' text format."""
    collectors = CollectorRegistry()
    collectors.register(NodeCollector(records, spool, registry, now=now))
    return generate_latest(collectors)


class NodeCollector(Collector):
    """Reads the records, the spool's disk and the registry when it is collected.

    Parameters
    ----------
    now : datetime
        The time that ages are counted to, UTC and naive.
    """

    def __init__(self, records: Records, spool: Spool, registry: Registry, *, now: datetime) -> None:
        self._records = records
        self._spool = spool
        self._registry = registry
        self._now = now

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        with self._records.read() as session:
            yield from self._jobs(session)
            yield from self._workers(session)
            yield from self._deliveries(session)
            yield self._series(session)
            yield self._alerts(session)
        yield _gauge("segnode_spool_free_bytes", "Free on the spool's disk.", self._spool.free_bytes())
        yield _gauge(
            "segnode_spool_low_watermark_bytes",
            "Below this nothing new is accepted.",
            self._spool.low_watermark_bytes,
        )
        yield self._models()

    def _jobs(self, session: Session) -> Iterator[Metric]:
        counts = dict(session.execute(select(Job.state, func.count()).group_by(Job.state)).all())
        jobs = GaugeMetricFamily("segnode_jobs", "Jobs in the records, by state.", labels=["state"])
        for state in JobState:
            jobs.add_metric([state], counts.get(state, 0))
        yield jobs

        ended = GaugeMetricFamily(
            "segnode_jobs_without_result",
            "Jobs refused or failed, by reason.",
            labels=["state", "reason_code"],
        )
        query = (
            select(Job.state, Job.reason_code, func.count())
            .where(Job.state.in_((JobState.REFUSED, JobState.FAILED)))
            .group_by(Job.state, Job.reason_code)
        )
        for state, reason_code, count in session.execute(query):
            ended.add_metric([state, reason_code or "unknown"], count)
        yield ended

        oldest = session.scalar(select(func.min(Job.created_at)).where(Job.state == JobState.QUEUED))
        yield _gauge(
            "segnode_oldest_queued_job_age_seconds", "Age of the oldest job that waits.", self._age_s(oldest)
        )
        last = session.scalar(select(func.max(Job.finished_at)).where(Job.state == JobState.SUCCEEDED))
        success = GaugeMetricFamily(
            "segnode_last_success_age_seconds", "Time since a job last succeeded; absent before the first."
        )
        if last is not None:
            success.add_metric([], self._age_s(last))
        yield success

    def _workers(self, session: Session) -> Iterator[Metric]:
        live = live_workers(session, now=self._now)
        yield _gauge("segnode_workers", "Workers that look for jobs, or hold one.", len(live))
        yield _gauge(
            "segnode_jobs_no_worker_takes",
            "Jobs that wait and whose model no living worker takes.",
            jobs_no_worker_takes(session, now=self._now),
        )

    def _deliveries(self, session: Session) -> Iterator[Metric]:
        deliveries = GaugeMetricFamily(
            "segnode_deliveries", "Deliveries, by state and destination.", labels=["state", "destination"]
        )
        query = select(Delivery.state, Delivery.destination, func.count()).group_by(
            Delivery.state, Delivery.destination
        )
        rows = session.execute(query).all()
        for state, destination, count in rows:
            deliveries.add_metric([state, destination], count)
        yield deliveries
        parked = sum(count for state, _, count in rows if state is DeliveryState.PARKED)
        yield _gauge("segnode_parked_deliveries", "Deliveries that wait for a person.", parked)
        oldest = session.scalar(
            select(func.min(Delivery.created_at)).where(Delivery.state == DeliveryState.PENDING)
        )
        yield _gauge(
            "segnode_oldest_pending_delivery_age_seconds",
            "Age of the oldest delivery that was not made yet.",
            self._age_s(oldest),
        )

    def _series(self, session: Session) -> Metric:
        counts = dict(session.execute(select(Series.state, func.count()).group_by(Series.state)).all())
        series = GaugeMetricFamily("segnode_series", "Series in the records, by state.", labels=["state"])
        for state in SeriesState:
            series.add_metric([state], counts.get(state, 0))
        return series

    def _alerts(self, session: Session) -> Metric:
        alerts = GaugeMetricFamily(
            "segnode_alerts",
            "Lines of the audit trail that someone should look at, by kind.",
            labels=["kind"],
        )
        query = select(Event.kind, func.count()).where(Event.alert).group_by(Event.kind)
        for kind, count in session.execute(query):
            alerts.add_metric([kind], count)
        return alerts

    def _models(self) -> Metric:
        active = GaugeMetricFamily(
            "segnode_active_model",
            "1 if the active version can run.",
            labels=["name", "version", "digest"],
        )
        for name in self._registry.names():
            version = self._registry.active_version(name)
            if version is not None:
                usable = is_usable(self._registry, name)
                digest = self._registry.get(name, version).digest if usable else ""
                active.add_metric([name, version, digest], usable)
        return active

    def _age_s(self, since: datetime | None) -> float:
        return 0.0 if since is None else max(0.0, (self._now - since).total_seconds())


def is_usable(registry: Registry, name: str) -> bool:
    """True if a model has an active version that is not withdrawn and still is what was installed."""
    try:
        registry.active(name)
    except (BundleError, RegistryError):
        return False
    return True


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=value)
