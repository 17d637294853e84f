"""Audit messages reach the repository in order and over TLS, and wait while it is away."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from certificates import Authority, Pair
from sqlalchemy import select
from waiting import wait_until

from service.atna import Forwarder, RepositoryError
from service.atna_messages import audit_message, syslog_frame
from service.records.database import Records
from service.records.events import record_event
from service.records.tables import Event
from service.security_rules import AtnaRules
from service.tls import server_context

NOW = datetime(2026, 3, 1, 12, 0, 0, 250000, tzinfo=UTC).replace(tzinfo=None)
STUDY = "1.2.826.0.1.3680043.8.498.1"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("repository")


class Repository:
    """A syslog receiver. ``rude_after`` makes it cut its first connection off after so many bytes."""

    def __init__(
        self, context: ssl.SSLContext | None, *, port: int = 0, rude_after: int | None = None
    ) -> None:
        self.frames: list[bytes] = []
        self.connections = 0
        self.cut_off = 0
        self._context = context
        self._rude_after = rude_after
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)):
            self._listener.close()
        self._thread.join(20)

    @property
    def messages(self) -> list[Xml.Element]:
        return [Xml.fromstring(frame.partition(b"\xef\xbb\xbf")[2]) for frame in self.frames]

    def _serve(self) -> None:
        while self._listener.fileno() >= 0:
            try:
                plain, _ = self._listener.accept()
                connection = self._context.wrap_socket(plain, server_side=True) if self._context else plain
            except OSError:
                continue
            with connection:
                self.connections += 1
                if self._rude_after is not None:
                    connection.recv(self._rude_after)
                    self._rude_after = None
                    self.cut_off += 1
                    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # a reset, as of a process that was killed
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    continue
                received = b""
                try:
                    while chunk := connection.recv(65536):
                        received += chunk
                    if isinstance(connection, ssl.SSLSocket):
                        connection.unwrap()
                except OSError:
                    continue
                self._take(received)

    def _take(self, received: bytes) -> None:
        while received:
            length, _, rest = received.partition(b" ")
            self.frames.append(rest[: int(length)])
            received = rest[int(length) :]


@contextmanager
def repository(pair: Pair | None = None, **options: int) -> Iterator[Repository]:
    context = None if pair is None else server_context(pair.certificate, pair.key, None)
    running = Repository(context, **options)
    try:
        yield running
    finally:
        running.close()


def rules(port: int, authority: Authority | None = None, **more: object) -> AtnaRules:
    tls = None if authority is None else {"trusted": authority.trusted}
    return AtnaRules.model_validate(
        {"host": "127.0.0.1", "port": port, "tls": tls, "timeout_s": 10, "site_id": "Hospital", **more}
    )


def write(records: Records, kind: str = "login", **more: object) -> None:
    given = {"actor": "r.radiologist", "at": NOW, "origin": "10.1.2.3", **more}
    with records.write() as session:
        record_event(session, kind, **given)  # type: ignore[arg-type]


def row_of(records: Records) -> Event:
    with records.read() as session:
        return session.scalars(select(Event).order_by(Event.chain_index.desc()).limit(1)).one()


def message_of(records: Records) -> Xml.Element:
    message = audit_message(row_of(records), source_id="node", site_id="Hospital", node_address="node.test")
    assert message is not None
    return Xml.fromstring(message)


# --- What a message says


def test_a_login_as_dicom_says_it(records: Records) -> None:
    write(records)
    message = message_of(records)
    assert message.tag == "AuditMessage"
    assert [child.tag for child in message] == [
        "EventIdentification",
        "ActiveParticipant",
        "ActiveParticipant",
        "AuditSourceIdentification",
    ]
    event, node, person, source = message
    assert event.attrib == {
        "EventActionCode": "E",
        "EventDateTime": "2026-03-01T12:00:00.250Z",
        "EventOutcomeIndicator": "0",
    }
    assert [(code.tag, code.get("csd-code"), code.get("codeSystemName")) for code in event] == [
        ("EventID", "110114", "DCM"),
        ("EventTypeCode", "110122", "DCM"),
    ]
    assert node.attrib == {
        "UserID": "node",
        "UserIsRequestor": "false",
        "NetworkAccessPointID": "node.test",
        "NetworkAccessPointTypeCode": "1",
    }
    assert [role.get("csd-code") for role in node] == ["110150"]
    assert person.attrib == {
        "UserID": "r.radiologist",
        "UserIsRequestor": "true",
        "NetworkAccessPointID": "10.1.2.3",
        "NetworkAccessPointTypeCode": "2",
    }
    assert source.attrib == {"AuditSourceID": "node", "AuditEnterpriseSiteID": "Hospital"}


@pytest.mark.parametrize(
    ("kind", "event", "type_code", "action"),
    [
        ("logout", "110114", "110123", "E"),
        ("key.created", "110113", "110137", "E"),
        ("key.revoked", "110113", "110137", "E"),
        ("access.refused", "110113", "110132", "E"),
        ("association_rejected", "110113", "110126", "E"),
        ("study.read", "110103", None, "R"),
        ("job.read", "110103", None, "R"),
        ("result.read", "110103", None, "R"),
        ("segmentation.uploaded", "110107", None, "C"),
        ("delivery_sent", "110104", None, "R"),
        ("study.deleted", "110105", None, "D"),
        ("audit.read", "110101", None, "R"),
        ("audit.broken", "110113", "110135", "E"),
        ("model.activated", "110113", "110131", "E"),
    ],
)
def test_each_kind_has_its_codes(
    records: Records, kind: str, event: str, type_code: str | None, action: str
) -> None:
    write(records, kind, subject=STUDY)
    message = message_of(records)
    identification = message[0]
    codes = {code.tag: code.get("csd-code") for code in identification}
    assert codes == {"EventID": event} | ({"EventTypeCode": type_code} if type_code else {})
    assert identification.get("EventActionCode") == action
    study = message[-1]
    assert study.tag == "ParticipantObjectIdentification"
    assert study.get("ParticipantObjectID") == STUDY
    assert [code.get("csd-code") for code in study] == ["110180"]


def test_what_nobody_did_makes_no_message(records: Records) -> None:
    write(records, "job.failed", actor="worker", alert=True)
    assert audit_message(row_of(records), source_id="n", site_id="", node_address="n") is None


@pytest.mark.parametrize(("alert", "indicator"), [(False, "4"), (True, "8")])
def test_a_refusal_says_so(records: Records, alert: bool, indicator: str) -> None:
    write(records, "association_rejected", outcome="refused", alert=alert, actor="\x07EVIL<&>", origin="::1")
    message = message_of(records)
    assert message[0].get("EventOutcomeIndicator") == indicator
    assert message[2].get("UserID") == "EVIL<&>"
    assert message[2].get("NetworkAccessPointTypeCode") == "2"


def test_a_frame_is_that_of_syslog_over_tls() -> None:
    frame = syslog_frame("<AuditMessage/>é".encode(), at=NOW, host="node 1", process=7)
    length, _, content = frame.partition(b" ")
    assert int(length) == len(content)
    head, mark, message = content.partition(b"\xef\xbb\xbf")
    assert head == b"<85>1 2026-03-01T12:00:00.250Z node-1 segnode 7 DICOM+RFC3881 - "
    assert mark
    assert message.decode() == "<AuditMessage/>é"


# --- Its way


def test_what_is_new_goes_in_order_and_once(
    records: Records, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    write(records, actor="before")
    with repository(pair) as there:
        forwarder = Forwarder(rules(there.port, authority), records, tmp_path / "position.json")
        assert forwarder.send_batch() == 0  # what was there before is not told
        for number in range(3):
            write(records, actor=f"person {number}")
        write(records, "job.failed", actor="worker")
        assert forwarder.send_batch() == 4
        assert forwarder.send_batch() == 0
        wait_until(lambda: len(there.frames) == 3)
        assert [message[2].get("UserID") for message in there.messages] == [f"person {n}" for n in range(3)]
    assert json.loads((tmp_path / "position.json").read_text()) == {"chain_index": 5}


def test_messages_wait_while_the_repository_is_away(
    records: Records, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    with repository(pair) as there:
        port = there.port
    position = tmp_path / "position.json"
    forwarder = Forwarder(rules(port, authority), records, position)
    forwarder.send_batch()
    for number in range(250):  # more than goes at once
        write(records, actor=f"person {number}")
    for _ in range(2):
        with pytest.raises(RepositoryError, match="has not taken"):
            forwarder.send_batch()
    with repository(pair, port=port) as there:
        again = Forwarder(rules(port, authority), records, position)  # after a restart
        assert [again.send_batch() for _ in range(3)] == [200, 50, 0]
        wait_until(lambda: len(there.frames) == 250)
        assert [m[2].get("UserID") for m in there.messages] == [f"person {n}" for n in range(250)]


@pytest.mark.parametrize("over_tls", [True, False])
def test_what_was_cut_off_is_sent_again(
    records: Records, authority: Authority, pair: Pair, tmp_path: Path, over_tls: bool
) -> None:
    with repository(pair if over_tls else None, rude_after=100) as there:
        forwarder = Forwarder(
            rules(there.port, authority if over_tls else None), records, tmp_path / "position.json"
        )
        forwarder.send_batch()
        for number in range(20):
            write(records, actor=f"person {number}")
        with pytest.raises(RepositoryError, match="has not taken"):
            forwarder.send_batch()
        wait_until(lambda: there.cut_off == 1)
        assert forwarder.send_batch() == 20
        wait_until(lambda: len(there.frames) == 20)


def test_a_repository_that_is_not_the_one_is_told_nothing(
    records: Records, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "elsewhere", "elsewhere").issue("repository")
    with repository(stranger) as there:
        forwarder = Forwarder(rules(there.port, authority), records, tmp_path / "position.json")
        forwarder.send_batch()
        write(records)
        with pytest.raises(RepositoryError, match="unable to get local issuer certificate"):
            forwarder.send_batch()
        assert there.frames == []


def test_one_process_at_a_time_sends(
    records: Records, authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    with repository(pair) as there:
        mine = rules(there.port, authority, interval_s=0.01)
        forwarders = [Forwarder(mine, records, tmp_path / "position.json") for _ in range(3)]
        forwarders[0].send_batch()
        stop = threading.Event()
        threads = [threading.Thread(target=each.run, args=(stop,)) for each in forwarders]
        for thread in threads:
            thread.start()
        for number in range(20):
            write(records, actor=f"person {number}")
        wait_until(lambda: len(there.frames) >= 20)
        stop.set()
        for thread in threads:
            thread.join()
        assert [m[2].get("UserID") for m in there.messages] == [f"person {n}" for n in range(20)]


def test_messages_leave_the_machine_over_tls_alone() -> None:
    with pytest.raises(ValueError, match="over TLS alone"):
        AtnaRules(host="10.1.2.3", tls=None)


def test_a_position_that_somebody_spoiled_is_named(
    records: Records, authority: Authority, tmp_path: Path
) -> None:
    position = tmp_path / "position.json"
    position.write_text("{}")
    with pytest.raises(RepositoryError, match="does not say how far"):
        Forwarder(rules(9, authority), records, position).send_batch()
