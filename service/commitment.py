"""Have destinations confirm that they keep what they were sent; only then a delivery is committed.

The worker asks, for a whole destination at once; the report comes on the association of the request, or on
another that the peer opens to the node's own listener. Either way it is matched by its Transaction UID.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from uuid import uuid4

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.dicom.commitment import NO_SUCH_OBJECT, CommitmentReport, request_commitment
from service.dicom.send import OutcomeKind, SendOutcome
from service.governance_rules import CommitmentRules
from service.logs import get_logger
from service.records.commitments import (
    Uncommitted,
    begin_request,
    due_commitments,
    last_error_of,
    park_uncommitted,
    put_off,
    take_report,
)
from service.records.database import Records, utc_now
from service.records.events import record_event
from service.settings import Settings

_ACTOR = "commitment"
_MOST_AT_ONCE = 100

log = get_logger(__name__)


class ReportDesk:
    """Takes the reports of peers, wherever they come in.

    Parameters
    ----------
    records, rules
        The node's.
    """

    def __init__(self, records: Records, rules: CommitmentRules) -> None:
        self._records = records
        self._rules = rules

    def take(self, report: CommitmentReport) -> bool:
        """Write a report down; False if no such request is known, or the records are away."""
        now = utc_now()
        try:
            with self._records.write() as session:
                confirmed = take_report(
                    session,
                    report.transaction_uid,
                    report.stored,
                    report.failed,
                    not_there=NO_SUCH_OBJECT,
                    retry_after_s=self._rules.first_retry_s,
                    now=now,
                )
                if confirmed is None:
                    log.warning("commitment.unknown_report", transaction_uid=report.transaction_uid)
                    return False
                for kind, delivery_ids, alert in (
                    ("delivery_committed", confirmed.committed, False),
                    ("delivery_not_kept", confirmed.not_there, True),
                    ("delivery_not_committed", confirmed.refused, False),
                ):
                    for delivery_id in delivery_ids:
                        detail = {"destination": confirmed.destination}
                        record_event(
                            session,
                            kind,
                            actor=_ACTOR,
                            at=now,
                            subject=delivery_id,
                            alert=alert,
                            detail=detail,
                        )
        except SQLAlchemyError as error:
            log.error("commitment.report_not_taken", error_type=type(error).__name__)
            return False
        log.info(
            "commitment.reported",
            destination=confirmed.destination,
            committed=len(confirmed.committed),
            sent_again=len(confirmed.not_there),
            refused=len(confirmed.refused),
        )
        return True


class Committer:
    """Asks for what is due, one destination at a time. Several of them may work on the same records.

    Parameters
    ----------
    settings, records
        The node's.
    request : callable
        Asks a peer; :func:`service.dicom.commitment.request_commitment` unless a test gives another.
    """

    def __init__(
        self,
        settings: Settings,
        records: Records,
        *,
        request: Callable[..., SendOutcome] = request_commitment,
    ) -> None:
        self._settings = settings
        self._rules = settings.commitment
        self._records = records
        self._request = request
        self._desk = ReportDesk(records, settings.commitment)
        self._asking = {d.name for d in settings.destinations if d.storage_commitment}

    def run_once(self, now: datetime) -> bool:
        """Ask one destination about all that is due; False if nothing is."""
        if not self._asking:
            return False
        transaction_uid = f"2.25.{uuid4().int}"
        due_at = now + timedelta(seconds=self._rules.report_timeout_s)
        with self._records.write() as session:
            due = due_commitments(session, self._asking, now=now, limit=_MOST_AT_ONCE)
            hopeless = [each for each in due if each.requests >= self._rules.maximum_requests]
            asked = [each for each in due if each.requests < self._rules.maximum_requests]
            for each in hopeless:
                error = last_error_of(session, each.delivery_id) or "It gives no report."
                self._park(session, each, error, now)
            begin_request(session, asked, transaction_uid, due_at=due_at, now=now)
        if asked:
            self._ask(transaction_uid, asked, now)
        return bool(due)

    def _ask(self, transaction_uid: str, asked: list[Uncommitted], now: datetime) -> None:
        destination = self._settings.destination(asked[0].destination)
        assert destination is not None, "only configured destinations are asked"
        outcome = self._request(
            destination,
            transaction_uid,
            [(each.sop_class_uid, each.sop_instance_uid) for each in asked],
            self._desk.take,
            calling_ae_title=self._settings.dicom.ae_title,
            listen_s=self._rules.listen_s,
        )
        if outcome.kind is OutcomeKind.DELIVERED:
            log.info("commitment.requested", destination=destination.name, objects=len(asked))
            return
        requests = max(each.requests for each in asked)
        wait_s = min(self._rules.first_retry_s * 2**requests, self._rules.report_timeout_s)
        with self._records.write() as session:
            until = now + timedelta(seconds=wait_s)
            put_off(session, transaction_uid, until=until, error=outcome.error or "")
        log.warning(
            "commitment.not_requested",
            destination=destination.name,
            reason=outcome.error,
            again_in_s=round(wait_s, 1),
        )

    def _park(self, session: Session, each: Uncommitted, error: str, now: datetime) -> None:
        why = f"It was sent, and {each.destination} does not confirm that it keeps it: {error}"
        if park_uncommitted(session, each.delivery_id, error=why):
            detail = {"destination": each.destination, "reason": why}
            record_event(
                session,
                "delivery_parked",
                actor=_ACTOR,
                at=now,
                subject=each.delivery_id,
                alert=True,
                detail=detail,
            )
