"""What a container's health check asks: a part that works is well, one that only exists is not."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority
from command_line import Segnode
from dicom_peer import make_object, node_settings
from pydicom import dcmwrite
from pynetdicom import AE
from small_node import SmallNode, make_node
from sqlalchemy import select, text
from structlog.testing import capture_logs

from service import liveness
from service.dicom.contexts import verification_context
from service.dicom.receive import Receiver
from service.dicom.send import OutcomeKind, send_file
from service.liveness import check_api, check_receive, check_worker
from service.records import database
from service.records.database import Records
from service.records.fleet import DEAD_AFTER_S, beat
from service.records.fleet_tables import WorkerRow
from service.records.jobs import claim_job, enqueue
from service.records.tables import Event, Instance, Job, JobOrigin, JobState
from service.records.work import NewInput, NewJob
from service.settings import Destination, Settings
from service.tls import server_context

Start = Callable[..., Receiver]
NEVER = threading.Event()

# pynetdicom drops the socket of a connection that was never made without closing it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <s.*socket:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """For those that never answer."""
    monkeypatch.setattr(liveness, "_TIMEOUT_S", 1.0)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@contextmanager
def mute() -> Iterator[int]:
    """A port on which connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@contextmanager
def free() -> Iterator[int]:
    """A port that nobody listens on, and nobody can meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def rejections(records: Records) -> list[tuple[str, bool]]:
    with records.read() as session:
        rows = session.scalars(select(Event).where(Event.kind == "association_rejected"))
        return [(str(row.detail["reason"]), row.alert) for row in rows]


# --- The receiver


@pytest.mark.parametrize("anybody", [True, False])
def test_a_receiver_that_answers_is_well_and_its_check_is_no_event(
    start_receiver: Start, records: Records, tmp_path: Path, anybody: bool
) -> None:
    with capture_logs():
        receiver = start_receiver(dicom={"allow_unknown_peers": anybody})
        health = check_receive(node_settings(tmp_path, dicom={"port": receiver.port, "host": "0.0.0.0"}))
    assert (health.is_healthy, health.message) == (True, f"127.0.0.1:{receiver.port} answers.")
    assert rejections(records) == []


def test_somebody_else_on_this_host_is_no_check(start_receiver: Start, records: Records) -> None:
    with capture_logs():
        receiver = start_receiver(dicom={"allow_unknown_peers": False})
        entity = AE(ae_title="SOMEBODY")
        entity.requested_contexts = [verification_context()]
        assert entity.associate("127.0.0.1", receiver.port, ae_title="SEGNODE").is_rejected
    assert rejections(records) == [("calling-ae-title-not-recognized", True)]


def test_a_receiver_whose_disk_is_full_or_whose_places_are_taken_lives(
    start_receiver: Start, tmp_path: Path
) -> None:
    with capture_logs():
        full = start_receiver(storage={"low_watermark_bytes": 1 << 60})
        assert check_receive(node_settings(tmp_path, dicom={"port": full.port})).is_healthy
        busy = start_receiver(dicom={"maximum_associations": 1})
        entity = AE(ae_title="SOMEBODY")
        entity.requested_contexts = [verification_context()]
        association = entity.associate("127.0.0.1", busy.port, ae_title="SEGNODE")
        assert association.is_established
        assert check_receive(node_settings(tmp_path, dicom={"port": busy.port})).is_healthy
        association.release()


@pytest.mark.parametrize("listener", [mute, free])
@pytest.mark.parametrize("secured", [False, True])
def test_a_port_that_says_nothing_is_not_well(
    tmp_path: Path, authority: Authority, listener: Callable[[], Iterator[int]], secured: bool
) -> None:
    pair = authority.issue("node")
    tls = {"certificate": pair.certificate, "key": pair.key, "client_certificates": "none"}
    with listener() as port:  # type: ignore[attr-defined]
        settings = node_settings(tmp_path, dicom={"port": port, **({"tls": tls} if secured else {})})
        health = check_receive(settings)
    assert (health.is_healthy, health.message) == (False, f"127.0.0.1:{port} does not answer.")


def test_a_receiver_over_tls_is_asked_with_the_nodes_own_certificate(
    start_receiver: Start, records: Records, tmp_path: Path, authority: Authority
) -> None:
    pair = authority.issue("node")
    tls = {"certificate": pair.certificate, "key": pair.key, "trusted": authority.trusted}
    with capture_logs():
        receiver = start_receiver(dicom={"tls": tls, "allow_unknown_peers": False})
        assert check_receive(node_settings(tmp_path, dicom={"port": receiver.port, "tls": tls})).is_healthy
    assert rejections(records) == []


def test_a_receiver_that_does_not_take_the_nodes_own_certificate_lives_and_alerts_nobody(
    start_receiver: Start, records: Records, tmp_path: Path, authority: Authority
) -> None:
    node = Authority(tmp_path / "elsewhere", "elsewhere").issue("node")
    tls = {"certificate": node.certificate, "key": node.key, "trusted": authority.trusted}
    with capture_logs():
        receiver = start_receiver(dicom={"tls": tls})
        assert check_receive(node_settings(tmp_path, dicom={"port": receiver.port, "tls": tls})).is_healthy
        receiver.stop()  # what it had to say is written
    assert {(reason, alert) for reason, alert in rejections(records)} <= {("tls-failed", False)}


# --- The HTTP interface


class _Answer(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(status: int, pair: object = None) -> Iterator[int]:
    handler = type("Handler", (_Answer,), {"status": status})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if pair is not None:
        context = server_context(pair.certificate, pair.key, None)  # type: ignore[attr-defined]
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def settings_of(port: int, **http: object) -> Settings:
    return Settings(http={"port": port, **http})


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False), (404, False), (204, False)])
def test_an_interface_is_well_if_it_says_so(status: int, is_healthy: bool) -> None:
    with answering(status) as port:
        health = check_api(settings_of(port, host="0.0.0.0", behind_tls_proxy=True))
    assert health.is_healthy is is_healthy
    assert f"answers {status}" in health.message


def test_an_interface_over_tls(authority: Authority) -> None:
    pair = authority.issue("node")
    with answering(200, pair) as port:
        health = check_api(settings_of(port, tls_certificate=pair.certificate, tls_key=pair.key))
    assert health.is_healthy, health.message


@pytest.mark.parametrize("listener", [mute, free])
def test_an_interface_that_does_not_answer(listener: Callable[[], Iterator[int]]) -> None:
    with listener() as port:  # type: ignore[attr-defined]
        health = check_api(settings_of(port))
    assert not health.is_healthy
    assert "does not answer" in health.message


def test_a_proxy_for_the_way_out_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with free() as nobody, answering(200) as port:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{nobody}")
        assert check_api(settings_of(port)).is_healthy


# --- The worker, whose host's clock may be wrong


def beaten(records: Records, *, host: str, owner: str = "w", now: datetime) -> None:
    with records.write() as session:
        beat(session, owner=owner, host=host, models=[], memory_bytes=1, bell_heard_at=None, now=now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set by how many minutes the clock of the host under test is wrong."""

    def set_wrong(minutes: float) -> None:
        class Wrong(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
                return datetime.now(tz) + timedelta(minutes=minutes)

        monkeypatch.setattr(database, "datetime", Wrong)

    return set_wrong


@pytest.mark.parametrize("minutes", [-10.0, 0.0, 10.0])
@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_host_whose_clock_is_wrong_judges_workers_rightly(
    records: Records, records_url: str, clock: Callable[[float], None], minutes: float
) -> None:
    settings = Settings(database_url=records_url)
    alive_at = records.now()
    beaten(records, host="alive", owner="a", now=alive_at)
    beaten(records, host="dead", owner="d", now=alive_at - timedelta(seconds=DEAD_AFTER_S + 5))
    clock(minutes)
    assert check_worker(settings, host="alive").is_healthy
    dead = check_worker(settings, host="dead")
    assert (dead.is_healthy, "No worker on dead" in dead.message) == (False, True)


@pytest.mark.parametrize("minutes", [-10.0, 10.0])
@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_worker_whose_clock_is_wrong_looks_neither_dead_nor_alive_for_long(
    records: Records, records_url: str, tmp_path: Path, clock: Callable[[float], None], minutes: float
) -> None:
    settings = Settings(database_url=records_url)
    clock(minutes)
    node = make_node(tmp_path / "node", database_url=records_url)
    job_id = queued(node)
    node.add_model(tmp_path / "bundle")
    worker = node.worker()
    stop = threading.Event()
    stop.set()  # the job is claimed, and given back
    assert worker.run_one(stop)
    with node.records.write() as session:
        assert claim_job(session, owner=worker.owner, lease_s=60, now=node.records.now())
    with records.read() as session:
        job, row = session.get_one(Job, job_id), session.scalars(select(WorkerRow)).one()
    now = records.now()  # of a host whose clock was right all along, or the server's own
    assert abs(row.beat_at - now) < timedelta(seconds=30)
    assert job.state is JobState.RUNNING
    assert job.lease_expires_at is not None
    assert timedelta(0) < job.lease_expires_at - now < timedelta(seconds=90)
    assert check_worker(settings).is_healthy
    worker.runner.close()
    node.records.close()


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_worker_that_is_ahead_closes_no_series_that_still_comes(
    records: Records, records_url: str, tmp_path: Path, clock: Callable[[float], None]
) -> None:
    route = {"name": "mr", "model": "threshold", "match": {"Modality": "MR"}, "quiet_time_s": 300}
    node = make_node(tmp_path / "node", database_url=records_url, routes=[route])
    node.add_model(tmp_path / "bundle")
    node.receive_phantom(tmp_path / "series", ago_s=100.0)
    clock(10)
    node.worker()._keep_house()
    assert node.jobs() == []
    clock(0)
    with node.records.write() as session:
        session.execute(text("UPDATE series SET last_instance_at = last_instance_at - interval '5 minutes'"))
    node.worker()._keep_house()
    assert len(node.jobs()) == 1
    node.records.close()


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_receiver_whose_clock_is_wrong_dates_objects_by_the_servers(
    start_receiver: Start, records: Records, clock: Callable[[float], None], tmp_path: Path
) -> None:
    right = records.now()
    clock(-10)
    records.compare_clocks()  # as a receiver that starts on such a host
    with capture_logs():
        receiver = start_receiver()
        store(receiver.port, tmp_path)
    with records.read() as session:
        received_at = session.scalars(select(Instance.received_at)).one()
    assert abs(received_at - right) < timedelta(seconds=60)


def store(port: int, folder: Path) -> None:
    path = folder / "object.dcm"
    dcmwrite(path, make_object(), enforce_file_format=True)
    to = Destination(name="node", ae_title="SEGNODE", host="127.0.0.1", port=port)
    assert send_file(path, to, calling_ae_title="X").kind is OutcomeKind.DELIVERED


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_server_that_is_away_for_a_moment_goes_on_as_it_went(
    records: Records, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(10)
    known = records.now()
    monkeypatch.setattr(database, "_COMPARE_CLOCKS_EVERY_S", -1.0)
    monkeypatch.setattr(records, "_reader", Records("postgresql+psycopg://x@127.0.0.1:1/x").engine)
    assert timedelta(0) <= records.now() - known < timedelta(seconds=30)


def queued(node: SmallNode) -> str:
    with node.records.write() as session:
        new = NewJob(JobOrigin.UPLOAD, "threshold", "k", [NewInput("uploads/x.nii")])
        return enqueue(session, new, at=node.records.now())[0].job_id


def test_records_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    health = check_worker(Settings(database_url="postgresql+psycopg://x@127.0.0.1:1/x"))
    assert (health.is_healthy, health.message) == (False, "The records cannot be read (OperationalError).")


# --- The command


def test_the_exit_status_says_how_it_is(
    segnode: Segnode, monkeypatch: pytest.MonkeyPatch, start_receiver: Start
) -> None:
    with capture_logs(), answering(200) as port, free() as nobody:
        monkeypatch.setenv("SEGNODE_HTTP__PORT", str(port))
        monkeypatch.setenv("SEGNODE_DICOM__PORT", str(start_receiver().port))
        assert segnode("api", "--check").status == 0
        assert segnode("receive", "--check").status == 0
        monkeypatch.setenv("SEGNODE_HTTP__PORT", str(nobody))
        monkeypatch.setenv("SEGNODE_DICOM__PORT", str(nobody))
        ended = segnode("api", "--check")
        assert (ended.status, "does not answer" in ended.out) == (1, True)
        assert segnode("receive", "--check").status == 1
