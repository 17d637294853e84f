"""Bring results to their destinations: try, back off, and park what only a person can help.

    delivered, or with a warning      sent, with the status recorded
    no connection, abort, 0xA7xx      tried again with back-off, until given up: parked then, never dropped
    0xCxxx and what no table explains the same, but parked after ten answers of the kind
    0xA9xx, 0x0122, 0x0124, no context    parked at once
    no such destination, file missing or altered    parked at once

Whatever is parked raises an alert. The wait before the next try is as long as the delivery is old, within
bounds: that doubles it each time, and needs no counter.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from service.dicom.send import OutcomeKind, SendOutcome, send_file
from service.errors import LostClaimError, NotFoundError
from service.lease import LeaseOwner
from service.logs import get_logger
from service.records.database import Records
from service.records.deliveries import claim_delivery, extend_delivery_lease, mark_sent, park, retry_later
from service.records.events import record_event
from service.records.tables import Delivery
from service.settings import Destination, Settings
from service.spool import Spool

_ACTOR = "delivery"
_JITTER = 0.2  # of the wait, so that many deliveries do not come back at the same moment
_SLOWEST_BYTES_PER_S = 128 * 1024

_log = get_logger(__name__)


@dataclass(frozen=True)
class _Claim:
    delivery_id: str
    attempt: int
    destination: str
    failure_statuses: int
    created_at: datetime
    last_try: bool  # it is as old as deliveries get
    path: str
    size_bytes: int
    sha256: str


class Deliverer:
    """Sends what is due, one delivery at a time. Several of them may work on the same records.

    Parameters
    ----------
    settings : Settings
        Destinations, back-off, and the node's AE title.
    records : Records
        Where the deliveries stand.
    spool : Spool
        Where the results lie: what is stored there is what is sent.
    send : callable
        Sends a file; :func:`service.dicom.send.send_file` unless a test gives another.
    """

    def __init__(
        self,
        settings: Settings,
        records: Records,
        spool: Spool,
        *,
        send: Callable[..., SendOutcome] = send_file,
    ) -> None:
        self._settings = settings
        self._records = records
        self._spool = spool
        self._send = send
        self._owner = str(LeaseOwner.of_this_process())
        self._silent_until: dict[str, datetime] = {}  # destinations that did not answer just now
        self._jitter = random.Random()

    def run_once(self, now: datetime) -> bool:
        """Claim one delivery that is due, try it, and report; False if none was due."""
        started = time.monotonic()
        claim = self._claim(now)
        if claim is None:
            return False
        outcome = self._attempt(claim, now)
        now += timedelta(seconds=time.monotonic() - started)
        try:
            self._report(claim, outcome, now)
        except LostClaimError:
            self._report_lost(claim, outcome, now)
        return True

    def _claim(self, now: datetime) -> _Claim | None:
        lease_s = self._settings.delivery.lease_s
        with self._records.write() as session:
            delivery = claim_delivery(session, owner=self._owner, lease_s=lease_s, now=now)
            if delivery is None:
                return None
            result = delivery.result
            slow_s = 4 * self._timeout_s(delivery) + result.size_bytes / _SLOWEST_BYTES_PER_S
            if slow_s > lease_s:
                until = now + timedelta(seconds=slow_s)
                extend_delivery_lease(session, delivery.delivery_id, delivery.attempt, until=until)
            return _Claim(
                delivery_id=delivery.delivery_id,
                attempt=delivery.attempt,
                destination=delivery.destination,
                failure_statuses=delivery.failure_statuses,
                created_at=delivery.created_at,
                last_try=(now - delivery.created_at).total_seconds()
                >= self._settings.delivery.give_up_after_s,
                path=result.path,
                size_bytes=result.size_bytes,
                sha256=result.sha256,
            )

    def _timeout_s(self, delivery: Delivery) -> float:
        destination = self._settings.destination(delivery.destination)
        return destination.timeout_s if destination else 0.0

    def _attempt(self, claim: _Claim, now: datetime) -> SendOutcome:
        destination = self._settings.destination(claim.destination)
        if destination is None:
            return _park(f"There is no destination {claim.destination} in the configuration any more.")
        try:
            path = self._spool.absolute(claim.path)
            digest = _sha256(path)
        except (NotFoundError, FileNotFoundError):
            return _park("The stored file of the result is missing.")
        except OSError as error:
            return SendOutcome(OutcomeKind.RETRY, error=f"The file cannot be read: {error.strerror}.")
        if digest != claim.sha256:
            return _park("The stored file of the result is not the one that was made.")
        if self._is_silent(destination, claim, now):
            return SendOutcome(OutcomeKind.RETRY, error="The destination did not answer a moment ago.")
        outcome = self._send(path, destination, calling_ae_title=self._settings.dicom.ae_title)
        if outcome.kind is OutcomeKind.RETRY and outcome.status is None:
            pause = timedelta(seconds=self._settings.delivery.first_retry_s)
            self._silent_until[destination.name] = now + pause
        else:
            self._silent_until.pop(destination.name, None)
        return outcome

    def _is_silent(self, destination: Destination, claim: _Claim, now: datetime) -> bool:
        """True while nothing is tried on a destination that has just run into a time-out.

        One dead destination with many deliveries would otherwise hold up all the others. The last try
        of a delivery is always made.
        """
        until = self._silent_until.get(destination.name)
        return until is not None and now < until and not claim.last_try

    def _report(self, claim: _Claim, outcome: SendOutcome, now: datetime) -> None:
        if outcome.kind in (OutcomeKind.DELIVERED, OutcomeKind.WARNING):
            self._report_sent(claim, outcome, now)
        elif (parked_for := self._why_park(claim, outcome)) is not None:
            self._report_parked(claim, outcome, parked_for, now)
        else:
            self._report_retry(claim, outcome, now)

    def _why_park(self, claim: _Claim, outcome: SendOutcome) -> str | None:
        """Why no further try is made; None if one is."""
        error = outcome.error or ""
        if outcome.kind is OutcomeKind.PARK:
            return error
        limit = self._settings.delivery.maximum_failure_statuses
        if outcome.kind is OutcomeKind.RETRY_FAILURE_STATUS and claim.failure_statuses + 1 >= limit:
            return f"{error} So it did {limit} times."
        if claim.last_try:
            hours = self._settings.delivery.give_up_after_s / 3600
            return f"{error} Tried for {hours:g} hours."
        return None

    def _report_sent(self, claim: _Claim, outcome: SendOutcome, now: datetime) -> None:
        assert outcome.status is not None, "only an answer makes a delivery sent"
        with self._records.write() as session:
            mark_sent(
                session,
                claim.delivery_id,
                claim.attempt,
                status=outcome.status,
                note=outcome.error,
                now=now,
            )
            record_event(
                session,
                "delivery_sent",
                actor=_ACTOR,
                at=now,
                subject=claim.delivery_id,
                detail={"destination": claim.destination, "status": f"0x{outcome.status:04X}"},
            )
        _log.info("delivery.sent", delivery_id=claim.delivery_id, destination=claim.destination)

    def _report_parked(self, claim: _Claim, outcome: SendOutcome, why: str, now: datetime) -> None:
        with self._records.write() as session:
            park(session, claim.delivery_id, claim.attempt, status=outcome.status, error=why)
            record_event(
                session,
                "delivery_parked",
                actor=_ACTOR,
                at=now,
                subject=claim.delivery_id,
                alert=True,
                detail={"destination": claim.destination, "reason": why},
            )
        _log.error(
            "delivery.parked", delivery_id=claim.delivery_id, destination=claim.destination, reason=why
        )

    def _report_retry(self, claim: _Claim, outcome: SendOutcome, now: datetime) -> None:
        after_s = self._wait_s(claim, now)
        with self._records.write() as session:
            retry_later(
                session,
                claim.delivery_id,
                claim.attempt,
                after_s=after_s,
                status=outcome.status,
                error=outcome.error or "",
                failure_status=outcome.kind is OutcomeKind.RETRY_FAILURE_STATUS,
                now=now,
            )
        _log.warning(
            "delivery.retry",
            delivery_id=claim.delivery_id,
            destination=claim.destination,
            after_s=round(after_s, 1),
            reason=outcome.error,
        )

    def _wait_s(self, claim: _Claim, now: datetime) -> float:
        bounds = self._settings.delivery
        age_s = (now - claim.created_at).total_seconds()
        wait_s = min(max(age_s, bounds.first_retry_s), bounds.maximum_retry_s)
        return wait_s * self._jitter.uniform(1 - _JITTER, 1 + _JITTER)

    def _report_lost(self, claim: _Claim, outcome: SendOutcome, now: datetime) -> None:
        """The claim went meanwhile: the input was corrected, or the lease ran out. Say what has left."""
        left = outcome.kind in (OutcomeKind.DELIVERED, OutcomeKind.WARNING)
        _log.warning("delivery.claim_lost", delivery_id=claim.delivery_id, left_the_node=left)
        if left:
            with self._records.write() as session:
                record_event(
                    session,
                    "delivery_sent_without_claim",
                    actor=_ACTOR,
                    at=now,
                    subject=claim.delivery_id,
                    alert=True,
                    detail={"destination": claim.destination},
                )


def _park(error: str) -> SendOutcome:
    return SendOutcome(OutcomeKind.PARK, error=error)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
