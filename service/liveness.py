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
from typing import Any

from pynetdicom import AE, evt
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.dicom.contexts import verification_context
from service.dicom.incoming import close_connection
from service.dicom.secure_connection import secure
from service.records.database import Records
from service.records.fleet import DEAD_AFTER_S, live_workers
from service.settings import Settings
from service.tls import DeferredContext, load_certificate

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
    # Not over a proxy that the environment names for the way out.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_trusting_context())
    )
    address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{http.port}/healthz"
    try:
        with opener.open(address, timeout=_TIMEOUT_S) as answer:
            return Liveness(answer.status == 200, f"{address} answers {answer.status}.")
    except urllib.error.HTTPError as error:
        return Liveness(False, f"{address} answers {error.code}.")
    except OSError as error:
        return Liveness(False, f"{address} does not answer ({type(error).__name__}).")


def check_receive(settings: Settings) -> Liveness:
    """Whether the DICOM listener answers an association on this host, be it by turning it away.

    It calls by the node's own AE title, from this host: the receiver knows by that who asks. Where peers must
    show a certificate, the node shows its own; one that is not good for that is turned away, which is an
    answer too.
    """
    dicom = settings.dicom
    host = _ANY_ADDRESS.get(dicom.host, dicom.host)
    context = None
    if dicom.tls is not None:
        context = _trusting_context()
        load_certificate(context, dicom.tls.certificate, dicom.tls.key)
    entity = AE(ae_title=dicom.ae_title)
    entity.requested_contexts = [verification_context()]
    entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = _TIMEOUT_S
    association = entity.associate(
        host,
        dicom.port,
        ae_title=dicom.ae_title,
        tls_args=None if context is None else (DeferredContext(context), host),
        evt_handlers=[(evt.EVT_CONN_OPEN, _shake_hands), (evt.EVT_CONN_CLOSE, close_connection)],
    )
    answered = association.is_established or association.is_rejected
    if association.is_established:
        association.release()
    if not answered and context is not None:
        answered = _answers_tls(host, dicom.port, context)
    return Liveness(answered, f"{host}:{dicom.port} {'answers' if answered else 'does not answer'}.")


def _shake_hands(event: Any) -> None:
    if isinstance(event.assoc.dul.socket.socket, ssl.SSLSocket):
        secure(event.assoc, _TIMEOUT_S)


def _answers_tls(host: str, port: int, context: ssl.SSLContext) -> bool:
    """Whether somebody shakes hands, or says why not."""
    try:
        with (
            socket.create_connection((host, port), _TIMEOUT_S) as connection,
            context.wrap_socket(connection, do_handshake_on_connect=False) as secured,
        ):
            secured.do_handshake()
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return False
    except ssl.SSLError:
        return True  # about our certificate
    except OSError:
        return False
    return True


def _trusting_context() -> ssl.SSLContext:
    """For a listener of this host that is asked by its address, and only whether it answers."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


LIVENESS: dict[str, Callable[[Settings], Liveness]] = {
    "receive": check_receive,
    "api": check_api,
    "worker": check_worker,
}
