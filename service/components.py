"""The three processes of a node: receiver, HTTP interface and worker, each run until it is told to stop.

``listening`` is called once, when the part is ready, with the port it listens on (None for the worker).
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import ip_network

from sqlalchemy.exc import SQLAlchemyError

from models.errors import SegnodeError
from service.atna import POSITION_FILE, Forwarder
from service.audit_trail import HEAD_FILE, HeadKeeper
from service.lease import LeaseOwner
from service.logs import get_logger
from service.node import Node, seed_models, tasks
from service.records.database import utc_now
from service.tls import ReloadingContext

Listening = Callable[[int | None], None]
Component = Callable[[Node, threading.Event, Listening], None]

_POLL_S = 0.2
_HTTP_DRAIN_S = 10
_HEAD_INTERVAL_S = 60.0

log = get_logger(__name__)


class PortInUseError(SegnodeError):
    """Raised when a port cannot be listened on."""

    code = "PORT_UNAVAILABLE"


class StoppedByItselfError(SegnodeError):
    """Raised when a part of the node ends without having been told to."""

    code = "STOPPED_BY_ITSELF"


def run_receive(node: Node, stop: threading.Event, listening: Listening) -> None:
    """Receive objects over DICOM. Raises PortInUseError."""
    from service.dicom.receive import Receiver

    receiver = Receiver(node.settings, node.records, node.spool)
    try:
        receiver.start()
    except OSError as error:
        raise port_in_use("DICOM", node.settings.dicom.host, node.settings.dicom.port, error) from error
    try:
        listening(receiver.port)
        stop.wait()
    finally:
        receiver.stop()


def run_api(node: Node, stop: threading.Event, listening: Listening) -> None:
    """Serve the HTTP interface. Raises PortInUseError."""
    import uvicorn

    from service.api import create_app
    from service.api.protocol import GuardedProtocol
    from service.console import build_console

    seed_models(node.registry)
    http = node.settings.http
    with listen("HTTP", http.host, http.port) as listener:
        app = create_app(node.settings, node.records, node.spool, node.registry)
        build_console(app, app.state.api)
        tls = None
        if http.tls_certificate is not None and http.tls_key is not None:
            tls = ReloadingContext(http.tls_certificate, http.tls_key, None).following()
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=GuardedProtocol,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=http.behind_tls_proxy,
                forwarded_allow_ips=[str(ip_network(each, strict=False)) for each in http.trusted_proxies],
                ssl_context_factory=None if tls is None else lambda _config, _default: tls,
                timeout_graceful_shutdown=_HTTP_DRAIN_S,
            )
        )
        # Not in the main thread: there uvicorn would take the signals, which are ours to answer.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http")
        thread.start()
        ended = threading.Event()
        forwarder = None
        if node.settings.atna is not None:
            position = node.settings.data_dir / POSITION_FILE
            run = Forwarder(node.settings.atna, node.records, position).run
            forwarder = threading.Thread(target=run, args=(ended,), name="atna")
            forwarder.start()
        try:
            while thread.is_alive() and not server.started:
                stop.wait(_POLL_S / 10)
            if server.started:
                listening(listener.getsockname()[1])
            keeper = HeadKeeper(node.records, node.settings.data_dir / HEAD_FILE)
            due = 0.0
            while thread.is_alive() and not stop.wait(_POLL_S):
                if time.monotonic() >= due:
                    due = time.monotonic() + _HEAD_INTERVAL_S
                    _keep_head(keeper)
        finally:
            server.should_exit = True
            ended.set()
            thread.join()
            if forwarder is not None:
                forwarder.join()
    if not stop.is_set():
        raise StoppedByItselfError("The HTTP server ended.", remedy="The log above says why.")


def _keep_head(keeper: HeadKeeper) -> None:
    """Keep the head of the audit trail; what is wrong now may be right in a minute."""
    try:
        keeper.keep(utc_now())
    except (SegnodeError, SQLAlchemyError, OSError) as error:
        log.error("audit.head_not_kept", exc_info=error)


def run_worker(node: Node, stop: threading.Event, listening: Listening) -> None:
    """Run jobs and send results."""
    from service.worker import Worker

    seed_models(node.registry)
    with ExitStack() as ending:
        bell = None
        if (url := node.settings.wake_url) is not None:
            owner = str(LeaseOwner.of_this_process())
            bell = ending.enter_context(tasks().Listener(tasks().make_app(url), owner))
        worker = Worker(node.settings, node.records, node.spool, node.registry, bell=bell)
        listening(None)
        worker.run(stop)


COMPONENTS: dict[str, Component] = {"receive": run_receive, "api": run_api, "worker": run_worker}


def listen(what: str, host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any that is free. Raises PortInUseError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise port_in_use(what, host, port, error) from error


def port_in_use(what: str, host: str, port: int, error: OSError) -> PortInUseError:
    """The error of a port that cannot be listened on."""
    return PortInUseError(
        f"{what} cannot listen on {host}:{port}: {error.strerror}.",
        remedy="Stop whatever listens there, or configure another port or address; see segnode doctor.",
    )
