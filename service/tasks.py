"""The doorbell: a broker (Valkey or Redis) that wakes workers, by way of Celery. It is never the queue.

Whoever has put something into a queue of the records rings; every worker hears it, and the idle ones look at
the records, where one of them gets the job. So a message may be lost, arrive twice or much later, and the
broker may be flushed or gone: all that it costs is time, since workers look by themselves too. Messages are
JSON, say nothing but that there is work, and go to everyone who listens now (a fanout exchange): nothing is
stored in the broker, nothing waits for an acknowledgement, so nothing comes back after a visibility time-out.

A connection that seems to be open proves nothing. Every listener rings for itself now and then; when its own
message does not come back it connects anew, and until one does the worker looks as often as if it had no
broker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from kombu.common import Broadcast
from kombu.connection import Connection
from kombu.entity import Exchange
from kombu.messaging import Consumer

from service.logs import get_logger

RING = "segnode.ring"
CHECK_EVERY_S = 10.0
SILENT_AFTER_S = 3 * CHECK_EVERY_S
_BELL = Exchange(RING, type="fanout", durable=False)
_EXPIRES_S = 60
_SOCKET_TIMEOUT_S = 5.0
_LISTEN_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0

log = get_logger(__name__)


def make_app(url: str) -> Celery:
    """The Celery application of a broker; nothing is connected yet."""
    app = Celery("segnode", broker=url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        worker_hijack_root_logger=False,
        broker_connection_timeout=_SOCKET_TIMEOUT_S,
        broker_transport_options={
            "socket_connect_timeout": _SOCKET_TIMEOUT_S,
            "socket_timeout": _SOCKET_TIMEOUT_S,
            "socket_keepalive": True,
        },
    )
    return app


def ring_once(app: Celery, connection: Connection, **words: str) -> None:
    """Send one message to everyone who listens. Raises what the broker's client raises."""
    with app.amqp.Producer(connection, auto_declare=False) as producer:
        app.send_task(
            RING,
            kwargs=words,
            exchange=_BELL,
            routing_key=RING,
            declare=[_BELL],
            producer=producer,
            retry=False,
            expires=_EXPIRES_S,
            ignore_result=True,
        )


class Ringer:
    """Rings from a thread of its own, so that whoever has put a job into the queue never waits for a broker.

    Rings in quick succession become one. One that the broker does not take is dropped: workers look by
    themselves.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._wanted = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def ring(self) -> None:
        """Have the bell rung; returns at once."""
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ringer", daemon=True)
                self._thread.start()
        self._wanted.set()

    def close(self) -> None:
        """Ring what was asked for, if the broker is there, and end."""
        self._stop.set()
        self._wanted.set()
        if self._thread is not None:
            self._thread.join(2 * _SOCKET_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wanted.wait()
            self._wanted.clear()
            try:
                with self._app.connection_for_write() as connection:
                    ring_once(self._app, connection)
            except Exception as error:  # noqa: BLE001 - a client of a broker raises of every kind
                log.warning("bell.not_rung", error_type=type(error).__name__)


class Listener:
    """Hears the bell for one worker. Use it as a context manager.

    Parameters
    ----------
    app : Celery
    owner : str
        The worker, as it stands in its leases.
    """

    def __init__(
        self,
        app: Celery,
        owner: str,
        *,
        check_every_s: float = CHECK_EVERY_S,
        silent_after_s: float = SILENT_AFTER_S,
    ) -> None:
        self._app = app
        self._owner = owner
        self._check_every_s = check_every_s
        self._silent_after_s = silent_after_s
        self._changed = threading.Condition()
        self._rings = 0
        self._heard_at: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bell", daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join(2 * _SOCKET_TIMEOUT_S)

    @property
    def rings(self) -> int:
        """How often the bell was rung."""
        return self._rings

    @property
    def silence_s(self) -> float | None:
        """Seconds since the broker last proved that it carries messages; None before it did."""
        return None if self._heard_at is None else time.monotonic() - self._heard_at

    @property
    def is_proven(self) -> bool:
        """True while the listener's own messages come back: then a worker may rely on being woken."""
        silence_s = self.silence_s
        return silence_s is not None and silence_s < self._silent_after_s

    def wait(self, rings: int, timeout_s: float) -> bool:
        """Wait until the bell was rung more often than ``rings``; False if it was not in that time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._rings > rings, timeout_s)

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stop.is_set():
            try:
                with self._listening() as connection:
                    self._wake()  # what was rung while nobody listened
                    if self._hear(connection):
                        pause_s = _FIRST_PAUSE_S
            except Exception as error:  # noqa: BLE001 - a client of a broker raises of every kind
                log.warning("bell.lost", error_type=type(error).__name__, again_in_s=pause_s)
            self._stop.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    @contextmanager
    def _listening(self) -> Iterator[Connection]:
        with (
            self._app.connection_for_read() as connection,
            connection.channel() as channel,
            Consumer(
                channel,
                [Broadcast(exchange=_BELL, routing_key=RING)],
                callbacks=[self._on_ring],
                accept=["json"],
                no_ack=True,
            ),
        ):
            yield connection

    def _hear(self, connection: Connection) -> bool:
        """Listen until it is time to end, or nothing was heard for too long; True if anything was."""
        began = time.monotonic()
        asked = float("-inf")
        while not self._stop.is_set():
            now = time.monotonic()
            heard = max(began, self._heard_at or began)
            if now - heard > self._silent_after_s:
                log.warning("bell.silent", for_s=round(now - heard, 1))
                break
            if now - asked >= self._check_every_s:
                asked = now
                with self._app.connection_for_write() as own:
                    ring_once(self._app, own, check=self._owner)
            try:
                connection.drain_events(timeout=min(_LISTEN_S, self._check_every_s))
            except TimeoutError:
                continue
        return self._heard_at is not None and self._heard_at > began

    def _on_ring(self, body: Any, message: Any) -> None:
        check = _words_of(body).get("check")
        if check is None:
            self._wake()
        elif check == self._owner:
            self._heard_at = time.monotonic()

    def _wake(self) -> None:
        with self._changed:
            self._rings += 1
            self._changed.notify_all()


def _words_of(body: Any) -> dict[str, Any]:
    """The keyword arguments in a Celery message; none in what is no Celery message."""
    words = body[1] if isinstance(body, list | tuple) and len(body) == 3 else None
    return words if isinstance(words, dict) else {}
