"""Whether a part of the node that should run on this host works: what a container's health check asks.

A worker is judged by the jobs that it looks for and runs, not by its process: a process may be there and
consume nothing.
"""

from __future__ import annotations

import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from pynetdicom import AE
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.dicom.contexts import verification_context
from service.records.database import Records
from service.records.fleet import DEAD_AFTER_S, live_workers
from service.settings import Settings

_TIMEOUT_S = 5.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Liveness:
    """Yes or no, and a sentence."""

    is_healthy: bool
    message: str


def check_worker(settings: Settings, host: str | None = None) -> Liveness:
    """Whether a worker on this host has looked for jobs a moment ago, or is at work on one."""
    records = Records(settings.records_url)
    try:
        records.compare_clocks()
        with records.read() as session:
            return judge_workers(
                session,
                host=host or socket.gethostname()[:64],
                has_broker=settings.broker_url is not None,
                now=records.now(),
            )
    except SQLAlchemyError as error:
        return Liveness(False, f"The records cannot be read ({type(error).__name__}).")
    finally:
        records.close()


def judge_workers(session: Session, *, host: str, has_broker: bool, now: datetime) -> Liveness:
    """As :func:`check_worker`, from what the records say. A silent broker is told, and harms nothing."""
    live = live_workers(session, now=now, host=host)
    if not live:
        return Liveness(False, f"No worker on {host} has looked for jobs in the last {DEAD_AFTER_S:g} s.")
    seen_s = min((now - worker.beat_at).total_seconds() for worker in live)
    message = f"{len(live)} worker(s) on {host}; jobs were looked for {max(seen_s, 0):.0f} s ago."
    if has_broker:
        heard = [worker.bell_heard_at for worker in live if worker.bell_heard_at is not None]
        silence_s = min(((now - at).total_seconds() for at in heard), default=None)
        if silence_s is None or silence_s > DEAD_AFTER_S:
            message += " The broker is silent: they poll."
    return Liveness(True, message)


def check_api(settings: Settings) -> Liveness:
    """Whether the HTTP interface answers on this host."""
    http = settings.http
    host = _ANY_ADDRESS.get(http.host, http.host)
    scheme = "https" if http.tls_certificate is not None else "http"
    context = ssl.create_default_context()
    context.check_hostname = False  # it is asked by its address, and only whether it answers
    context.verify_mode = ssl.CERT_NONE
    address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{http.port}/healthz"
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S, context=context) as answer:
            return Liveness(answer.status == 200, f"{address} answers {answer.status}.")
    except urllib.error.HTTPError as error:
        return Liveness(False, f"{address} answers {error.code}.")
    except OSError as error:
        return Liveness(False, f"{address} does not answer ({type(error).__name__}).")


def check_receive(settings: Settings) -> Liveness:
    """Whether the DICOM listener answers an association on this host, be it by turning it away."""
    dicom = settings.dicom
    host = _ANY_ADDRESS.get(dicom.host, dicom.host)
    entity = AE(ae_title=dicom.ae_title)
    entity.requested_contexts = [verification_context()]
    entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = _TIMEOUT_S
    association = entity.associate(host, dicom.port, ae_title=dicom.ae_title)
    answered = association.is_established or association.is_rejected
    if association.is_established:
        association.release()
    return Liveness(answered, f"{host}:{dicom.port} {'answers' if answered else 'does not answer'}.")


LIVENESS: dict[str, Callable[[Settings], Liveness]] = {
    "receive": check_receive,
    "api": check_api,
    "worker": check_worker,
}
