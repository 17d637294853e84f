"""When a series is complete, and what is enqueued then.

A series is complete for a route when it has received nothing for the route's ``quiet_time_s``; where the
route takes one series of a study, when the whole study has. Where a route names the series that a study must
have (``complete_when``), a series is complete earlier: when it and all of those have received nothing for
``settled_after_s``. What comes later makes a new job, as ever. Routes with different quiet times look at one
series at different moments: it stays open until every route that takes it has had its turn.

Nothing is dropped in silence: a series that no route takes leaves an event, and one that a route takes but
that must not run leaves a refused job. Every step may be repeated: a job is one per set of instances and
model, so a sweep that died in the middle is simply done again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from models.errors import Refusal
from service.headers import read_attributes
from service.logs import get_logger
from service.records.database import Records
from service.records.events import record_event
from service.records.instances import complete_series, current_instances, quiet_series, study_is_quiet
from service.records.jobs import queue_length
from service.records.supersession import enqueue_newest, refuse_at_once
from service.records.tables import Instance, Job, JobOrigin, Series, SeriesState
from service.records.work import NewInput, NewJob, input_key
from service.required_series import are_present
from service.routes import Route
from service.routing import (
    SeriesFacts,
    check_study_age,
    choose,
    choose_channels,
    takes,
    wanted_keywords,
)
from service.settings import Settings
from service.spool import Spool

log = get_logger(__name__)

_ACTOR = "completeness"
_REMEMBERED_SERIES = 20_000  # about a kilobyte each


class Completeness:
    """Closes series that have gone quiet, and enqueues what the routes want of them.

    Parameters
    ----------
    settings : Settings
        The routes.
    records : Records
        Where series are found and jobs are put.
    spool : Spool
        Where the headers lie that routes look at.
    """

    def __init__(self, settings: Settings, records: Records, spool: Spool) -> None:
        self._routes = settings.routes
        self._profile_keys = settings.profile_keys
        self._records = records
        self._spool = spool
        self._keywords = wanted_keywords(settings.routes)
        self._remembered: dict[tuple[str, datetime, int], SeriesFacts] = {}
        self._had_turn: set[tuple[str, datetime, str]] = set()  # series, last instance, route
        self._room: dict[str, int] = {}  # how many jobs a route with a queue limit may still make
        self._full: frozenset[str] = frozenset()  # the routes that have alerted that there is none

    def sweep(self, now: datetime) -> int:
        """Look at every open series that may be quiet enough; return how many jobs were made.

        Each series is one transaction, so receivers are never kept waiting for long.
        """
        shortest_s = min((_shortest_wait_s(route) for route in self._routes), default=0.0)
        with self._records.read() as session:
            quiet = quiet_series(session, quiet_since=now - timedelta(seconds=shortest_s))
        if quiet:
            self._count_queues(now)
        made = 0
        for series in quiet:
            if self._routes and not any(self._has_room(route) for route in self._routes):
                break
            try:
                made += self._look_at(series, now)
            except OSError as error:
                log.error("series.waits", series_id=series.series_id, error=error.strerror)
            except IntegrityError:  # another worker made the same job at the same moment
                log.info("series.looked_at_by_another", series_id=series.series_id)
        return made

    def _look_at(self, series: Series, now: datetime) -> int:
        """Let every route that is due have its turn at one series, and close it after the last."""
        turn = (series.series_id, series.last_instance_at)
        unreadable: Refusal | None = None
        wanting: list[Route] = []
        due: list[Route] = []
        with self._records.read() as session:
            try:
                facts = self._facts(session, series)
            except Refusal as refusal:
                facts, unreadable = None, refusal
            if facts is not None:
                wanting = [route for route in self._routes if takes(route, facts)]
                open_turns = [route for route in wanting if (*turn, route.name) not in self._had_turn]
                due = [route for route in open_turns if self._is_due(session, route, series, now)]
                if open_turns and not due:
                    return 0
        made = 0
        with self._records.write(alone=True) as session:
            locked = session.get(Series, series.series_id, with_for_update=True)
            if locked is None or (locked.state, locked.last_instance_at) != (
                SeriesState.RECEIVING,
                series.last_instance_at,
            ):
                return 0  # another slice has come, the series was deleted, or another worker has closed it
            for route in due:
                assert facts is not None
                made += self._apply(session, route, facts, now)
            after = self._had_turn | {(*turn, route.name) for route in due}
            if all((*turn, route.name) in after for route in wanting):
                self._close(session, series, facts, unreadable, not_routed=not wanting, now=now)
                after = {done for done in after if done[:2] != turn}
        self._had_turn = after  # only now: the transaction is committed
        return made

    def _close(
        self,
        session: Session,
        series: Series,
        facts: SeriesFacts | None,
        unreadable: Refusal | None,
        *,
        not_routed: bool,
        now: datetime,
    ) -> None:
        complete_series(session, series.series_id, last_instance_at=series.last_instance_at, at=now)
        if unreadable is not None:
            detail = {"code": unreadable.reason.value, "reason": unreadable.message}
            self._tell(session, "series.unreadable", series.series_id, now, alert=True, detail=detail)
        elif facts is None:
            self._tell(session, "series.empty", series.series_id, now)  # all of it was corrected away
        elif not_routed:
            self._tell(session, "series.not_routed", series.series_id, now)

    def _has_room(self, route: Route) -> bool:
        return self._room.get(route.name, 1) > 0

    def _is_due(self, session: Session, route: Route, series: Series, now: datetime) -> bool:
        if not self._has_room(route):
            return False
        if route.required_series and self._has_settled(route, series, now):
            settled = self._series_in_study(session, route, series.study_instance_uid, now)
            if are_present(route.required_series, settled):
                return True
        if not route.takes_one_of_a_study:
            return series.last_instance_at <= now - timedelta(seconds=route.quiet_time_s)
        return study_is_quiet(session, series.study_instance_uid, now=now, quiet_time_s=route.quiet_time_s)

    def _apply(self, session: Session, route: Route, facts: SeriesFacts, now: datetime) -> int:
        """Enqueue what a route wants of a series, or of its study. Returns the number of new jobs."""
        matching = [facts]
        if route.takes_one_of_a_study:
            in_study = self._series_in_study(session, route, facts.study_instance_uid, now)
            matching = [each for each in in_study if takes(route, each)]
        chosen: Sequence[SeriesFacts] = matching
        channels: dict[str, SeriesFacts] = {}
        try:
            if route.channels:
                channels = choose_channels(route, matching)
                chosen = tuple(channels.values())
            else:
                chosen = choose(route, matching)
            for one in chosen:
                check_study_age(route, one, now=now)
        except Refusal as refusal:
            return self._refuse(session, route, chosen, refusal, now)
        if channels:
            return self._enqueue(session, route, _new_job_of_channels(session, route, channels), now)
        return sum(self._enqueue(session, route, _new_job(session, route, [one]), now) for one in chosen)

    def _series_in_study(
        self, session: Session, route: Route, study_instance_uid: str, now: datetime
    ) -> list[SeriesFacts]:
        """Every series of a study that can be read, closed ones too.

        For a route that may take a study before it is quiet, those that are still arriving are left out.
        """
        of_study = select(Series).where(Series.study_instance_uid == study_instance_uid)
        found = []
        for series in session.scalars(of_study.order_by(Series.series_instance_uid)):
            if route.required_series and not self._has_settled(route, series, now):
                continue
            try:
                facts = self._facts(session, series)
            except Refusal:
                continue  # it raises an alert of its own when it is looked at
            if facts is not None:
                found.append(facts)
        return found

    def _has_settled(self, route: Route, series: Series, now: datetime) -> bool:
        return series.last_instance_at <= now - timedelta(seconds=route.settled_after_s)

    def _enqueue(self, session: Session, route: Route, new: NewJob, now: datetime) -> int:
        job, is_new = enqueue_newest(
            session, new, at=now, one_per_study=route.takes_one_of_a_study, profile_keys=self._profile_keys
        )
        if is_new:
            if route.name in self._room:
                self._room[route.name] -= 1
            detail = {"route": route.name, "model": route.model, "instances": len(new.inputs)}
            if job.supersedes_job_id:
                detail["supersedes"] = job.supersedes_job_id
            self._tell(session, "job.queued", job.job_id, now, detail=detail)
        else:
            self._tell_what_is_ignored(session, route, new, job, now)
        return int(is_new)

    def _tell_what_is_ignored(
        self, session: Session, route: Route, new: NewJob, job: Job, now: datetime
    ) -> None:
        """One model gives one result of one series: the route that came first has chosen how.

        Two series of one study whose instances bear the same UIDs break the standard (PS3.5 section 9). Their
        results would bear the same UIDs as well, so the second series has none, and a person must look.
        """
        if None not in (new.series_id, job.series_id) and new.series_id != job.series_id:
            detail: dict[str, object] = {"route": route.name, "job_id": job.job_id}
            self._tell(session, "series.same_instances", str(new.series_id), now, alert=True, detail=detail)
        if job.requested_version != route.version:
            detail = {"route": route.name, "version": route.version, "used": job.requested_version}
            self._tell(session, "route.version_ignored", job.job_id, now, alert=True, detail=detail)
        first = next((each for each in self._routes if each.name == job.route_name), None)
        if first is not None and _rules(first) != _rules(route):
            detail = {"route": route.name, "used": first.name}
            self._tell(session, "route.reading_ignored", job.job_id, now, alert=True, detail=detail)

    def _refuse(
        self, session: Session, route: Route, matching: Sequence[SeriesFacts], refusal: Refusal, now: datetime
    ) -> int:
        job, is_new = refuse_at_once(
            session,
            _new_job(session, route, matching),
            code=refusal.reason.value,
            reason=refusal.message,
            remedy=refusal.remedy,
            at=now,
            one_per_study=route.takes_one_of_a_study,
            profile_keys=self._profile_keys,
        )
        if is_new:
            detail = {"route": route.name, "code": refusal.reason.value}
            self._tell(session, "job.refused", job.job_id, now, detail=detail)
        return int(is_new)

    def _count_queues(self, now: datetime) -> None:
        """See which routes' queues are full: their series wait. The first sweep that finds one alerts."""
        limits = {r.name: r.queue_limit for r in self._routes if r.queue_limit is not None}
        with self._records.read() as session:
            self._room = {name: n - queue_length(session, route_name=name) for name, n in limits.items()}
        full = frozenset(name for name, room in self._room.items() if room <= 0)
        for name in sorted(full - self._full):
            with self._records.write() as session:
                detail = {"limit": limits[name]}
                self._tell(session, "route.queue_full", name, now, alert=True, detail=detail)
        self._full = full

    def _facts(self, session: Session, series: Series) -> SeriesFacts | None:
        """What routes may know of a series; None where it has no instance any more.

        Raises Refusal (UNREADABLE).
        """
        key = (series.series_id, series.last_instance_at, series.instance_count)
        if key not in self._remembered:
            instances = current_instances(session, series.series_id)
            if not instances:
                return None
            while len(self._remembered) >= _REMEMBERED_SERIES:
                self._remembered.pop(next(iter(self._remembered)))
            self._remembered[key] = self._read_facts(series, instances)
        return self._remembered[key]

    def _read_facts(self, series: Series, instances: Sequence[Instance]) -> SeriesFacts:
        return SeriesFacts(
            series_id=series.series_id,
            study_instance_uid=series.study_instance_uid,
            series_instance_uid=series.series_instance_uid,
            instances=len(instances),
            calling_ae_title=series.calling_ae_title,
            called_ae_title=series.called_ae_title,
            attributes=read_attributes(self._spool.absolute(instances[0].path), self._keywords),
        )

    def _tell(
        self,
        session: Session,
        kind: str,
        subject: str,
        now: datetime,
        *,
        alert: bool = False,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        record_event(
            session, kind, actor=_ACTOR, at=now, subject=subject, alert=alert, detail=dict(detail or {})
        )


def _shortest_wait_s(route: Route) -> float:
    """The least time after the last instance at which a route may take a series."""
    return route.settled_after_s if route.required_series else route.quiet_time_s


def _rules(route: Route) -> tuple[object, ...]:
    """What a route says of how its images are taken."""
    return route.reading, route.alignment, route.guard


def _new_job(session: Session, route: Route, several: Sequence[SeriesFacts]) -> NewJob:
    """The job that a route makes of one series, or of several that are refused together."""
    instances = [i for facts in several for i in current_instances(session, facts.series_id)]
    return NewJob(
        origin=JobOrigin.DICOM,
        model_name=route.model,
        input_key=input_key((i.sop_instance_uid, f"{i.revision}:{i.identity_digest}") for i in instances),
        inputs=[NewInput(path=i.path, instance_id=i.instance_id) for i in instances],
        requested_version=route.version,
        route_name=route.name,
        destinations=route.destinations,
        refusal_destinations=route.destinations if route.refusal_objects else (),
        study_instance_uid=several[0].study_instance_uid,
        series_id=several[0].series_id if len(several) == 1 else None,
        priority=route.priority,
    )


def _new_job_of_channels(session: Session, route: Route, channels: Mapping[str, SeriesFacts]) -> NewJob:
    """The job that a route makes of the series that are its model's channels, in the route's order.

    What a series is taken for is part of what makes the job: the same series in other roles are another.
    """
    inputs, identities = [], []
    for number, (name, facts) in enumerate(channels.items()):
        for each in current_instances(session, facts.series_id):
            inputs.append(
                NewInput(path=each.path, channel=number, channel_name=name, instance_id=each.instance_id)
            )
            identities.append((each.sop_instance_uid, f"{each.revision}:{each.identity_digest}:{name}"))
    reference = channels[route.reference] if route.reference is not None else next(iter(channels.values()))
    whole = _new_job(session, route, list(channels.values()))
    return replace(whole, inputs=inputs, input_key=input_key(identities), series_id=reference.series_id)
