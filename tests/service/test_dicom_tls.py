"""DICOM over TLS: with the right certificates it works both ways; everything else is shut out and told."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority, Pair
from dicom_peer import CALLING_AE_TITLE, associated, make_object
from programs import program
from pydicom import dcmwrite
from sqlalchemy import select
from storage_scp import StorageScp
from waiting import wait_until

from service.dicom import doorkeeper
from service.dicom.receive import Receiver
from service.dicom.send import OutcomeKind, echo, send_files
from service.records.database import Records
from service.records.tables import Event, Instance
from service.settings import Destination, Settings
from service.tls import TLS_1_2_SUITES, server_context

Start = Callable[..., Receiver]

# pynetdicom drops the socket of a connection that was never made without closing it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <s.*socket:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def peers_come_from_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails from this host may be the node's own health check, and alerts nobody."""
    monkeypatch.setattr(doorkeeper, "is_loopback", lambda _: False)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def node(authority: Authority) -> Pair:
    return authority.issue("node")


@pytest.fixture(scope="module")
def scanner(authority: Authority) -> Pair:
    return authority.issue("scanner")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Authority(tmp_path_factory.mktemp("elsewhere"), "elsewhere").issue("stranger")


def tls(node: Pair, authority: Authority, **more: Any) -> dict[str, Any]:
    return {"certificate": node.certificate, "key": node.key, "trusted": authority.trusted, **more}


def destination(port: int, authority: Authority, pair: Pair | None, **more: Any) -> Destination:
    own = {"certificate": pair.certificate, "key": pair.key} if pair else {}
    return Destination.model_validate(
        {
            "name": "peer",
            "ae_title": "SEGNODE",
            "host": "127.0.0.1",
            "port": port,
            "timeout_s": 10,
            "tls": {"trusted": authority.trusted, **own, **more},
        }
    )


def rejections(records: Records) -> list[Event]:
    with records.read() as session:
        return list(session.scalars(select(Event).where(Event.kind == "association_rejected")))


def instances(records: Records) -> int:
    with records.read() as session:
        return len(session.scalars(select(Instance)).all())


def nobody_is_left() -> bool:
    return not any("AcceptorThread" in each.name for each in threading.enumerate())


def write_object(folder: Path, number: int = 1, **attributes: Any) -> Path:
    path = folder / f"{number}.dcm"
    dcmwrite(path, make_object(number, **attributes), enforce_file_format=True)
    return path


def storescu(port: int, file: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [
            *(program("storescu", "dcmtk"), "-to", "10", "-ta", "10", *options),
            *("-aet", CALLING_AE_TITLE, "-aec", "SEGNODE", "127.0.0.1", str(port), str(file)),
        ],
        capture_output=True,
        timeout=60,
        check=False,
    )


# --- What works


def test_dcmtk_sends_over_tls(
    start_receiver: Start, records: Records, authority: Authority, node: Pair, scanner: Pair, tmp_path: Path
) -> None:
    receiver = start_receiver(dicom={"tls": tls(node, authority)})
    file = write_object(tmp_path, PixelData=bytes(32) * 20_000, Rows=800, Columns=400)
    sent = storescu(
        receiver.port, file, "+tls", str(scanner.key), str(scanner.certificate), "+cf", str(authority.trusted)
    )
    assert sent.returncode == 0, sent.stderr
    assert instances(records) == 1
    assert rejections(records) == []


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_nodes_own_sender_in_either_version(
    start_receiver: Start,
    records: Records,
    authority: Authority,
    node: Pair,
    scanner: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: ssl.TLSVersion,
) -> None:
    receiver = start_receiver(dicom={"tls": tls(node, authority)})
    receiver._server.ssl_context.current().maximum_version = version
    files = [write_object(tmp_path, number) for number in range(1, 6)]
    to = destination(receiver.port, authority, scanner)
    assert echo(to, calling_ae_title="X").kind is OutcomeKind.DELIVERED
    outcomes = [outcome.kind for _, outcome in send_files(files, to, calling_ae_title="X")]
    assert outcomes == [OutcomeKind.DELIVERED] * 5
    assert instances(records) == 5


def test_a_server_that_sends_session_tickets_holds_nothing_up(
    authority: Authority, node: Pair, scanner: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = server_context(node.certificate, node.key, authority.trusted)
    context.num_tickets = 4  # records that come before the peer has said anything
    with StorageScp(ae_title="SEGNODE", ssl_context=context) as pacs:
        to = destination(pacs.port, authority, scanner)
        ((_, outcome),) = send_files([write_object(tmp_path)], to, calling_ae_title="X")
        assert outcome.kind is OutcomeKind.DELIVERED
        assert len(pacs.objects) == 1


def test_without_client_certificates_a_server_certificate_will_do(
    start_receiver: Start, authority: Authority, node: Pair
) -> None:
    receiver = start_receiver(
        dicom={"tls": {"certificate": node.certificate, "key": node.key, "client_certificates": "none"}}
    )
    assert (
        echo(destination(receiver.port, authority, None), calling_ae_title="X").kind is OutcomeKind.DELIVERED
    )


# --- Who is shut out


def test_no_certificate_and_a_strangers_are_shut_out(
    start_receiver: Start,
    records: Records,
    authority: Authority,
    node: Pair,
    stranger: Pair,
    tmp_path: Path,
) -> None:
    receiver = start_receiver(dicom={"tls": tls(node, authority)})
    file = write_object(tmp_path)
    anonymous = storescu(receiver.port, file, "+tla", "+cf", str(authority.trusted))
    wrong = storescu(
        receiver.port,
        file,
        "+tls",
        str(stranger.key),
        str(stranger.certificate),
        "+cf",
        str(authority.trusted),
    )
    assert anonymous.returncode != 0
    assert wrong.returncode != 0
    assert instances(records) == 0
    wait_until(lambda: len(rejections(records)) == 2)
    assert {event.detail["tls"] for event in rejections(records)} == {
        "peer did not return a certificate",
        "certificate not accepted: unable to get local issuer certificate",
    }
    assert all(e.alert and e.detail["peer_address"] == "127.0.0.1" for e in rejections(records))
    wait_until(nobody_is_left)


@pytest.mark.parametrize(("days", "why"), [((-30, -1), "has expired"), ((2, 30), "is not yet valid")])
def test_a_certificate_out_of_its_time_is_shut_out(
    start_receiver: Start,
    records: Records,
    authority: Authority,
    node: Pair,
    days: tuple[int, int],
    why: str,
) -> None:
    receiver = start_receiver(dicom={"tls": tls(node, authority)})
    late = authority.issue(f"late{days[1]}", days=days)
    outcome = echo(destination(receiver.port, authority, late), calling_ae_title="X")
    assert outcome.kind is OutcomeKind.RETRY
    assert "TLS failed" in str(outcome.error)
    wait_until(lambda: len(rejections(records)) == 1)
    assert why in rejections(records)[0].detail["tls"]


def test_plain_text_to_a_tls_port_is_shut_out(
    start_receiver: Start, records: Records, authority: Authority, node: Pair, tmp_path: Path
) -> None:
    receiver = start_receiver(dicom={"tls": tls(node, authority)})
    with associated(receiver.port) as sender:
        assert not sender.association.is_established
    assert storescu(receiver.port, write_object(tmp_path)).returncode != 0
    assert instances(records) == 0
    wait_until(lambda: len(rejections(records)) == 1)  # said once, not at every try
    wait_until(nobody_is_left)


def test_who_never_shakes_hands_holds_up_nobody(
    start_receiver: Start, records: Records, authority: Authority, node: Pair, scanner: Pair
) -> None:
    receiver = start_receiver(
        dicom={"tls": tls(node, authority), "maximum_associations": 4, "network_timeout_s": 1}
    )
    silent = [socket.create_connection(("127.0.0.1", receiver.port)) for _ in range(3)]
    to = destination(receiver.port, authority, scanner)
    assert echo(to, calling_ae_title="X").kind is OutcomeKind.DELIVERED
    for each in silent:  # the node gives each up by itself
        each.settimeout(20)
        assert each.recv(1) == b""
        each.close()
    wait_until(lambda: [e.detail["tls"] for e in rejections(records)] == ["no handshake in time"])
    wait_until(nobody_is_left)


def test_handshakes_have_a_bound(
    start_receiver: Start, records: Records, authority: Authority, node: Pair, scanner: Pair
) -> None:
    receiver = start_receiver(dicom={"tls": tls(node, authority), "maximum_associations": 1})
    with socket.create_connection(("127.0.0.1", receiver.port)):
        wait_until(lambda: receiver._door._handshakes._value == 0)
        with socket.create_connection(("127.0.0.1", receiver.port)) as second:
            second.settimeout(20)
            assert second.recv(1) == b""
    wait_until(lambda: {e.detail["tls"] for e in rejections(records)} > {"too many handshakes at once"})
    to = destination(receiver.port, authority, scanner)
    wait_until(lambda: echo(to, calling_ae_title="X").kind is OutcomeKind.DELIVERED)


@pytest.mark.parametrize("suite", ["ECDHE-RSA-AES128-SHA256", "AES128-GCM-SHA256", "ECDHE-RSA-AES256-SHA"])
def test_weaker_suites_and_versions_are_not_negotiated(
    start_receiver: Start, authority: Authority, node: Pair, scanner: Pair, suite: str
) -> None:
    receiver = start_receiver(dicom={"tls": tls(node, authority)})
    assert suite not in TLS_1_2_SUITES
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.trusted)
    context.load_cert_chain(scanner.certificate, scanner.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(suite)
    with (
        socket.create_connection(("127.0.0.1", receiver.port)) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
        context.wrap_socket(plain, server_hostname="127.0.0.1"),
    ):
        pass


# --- Which certificate belongs to which AE title


@pytest.mark.parametrize("by", ["name", "digest", "dns"])
def test_a_peer_must_show_its_own_certificate(
    start_receiver: Start,
    records: Records,
    authority: Authority,
    node: Pair,
    scanner: Pair,
    by: str,
) -> None:
    wanted = {"name": "scanner", "digest": f"SHA256:{scanner.sha256.upper()}", "dns": "Scanner.test"}[by]
    peers = [{"ae_title": "SCANNER", "certificates": [wanted]}]
    receiver = start_receiver(
        dicom={"tls": tls(node, authority), "peers": peers, "allow_unknown_peers": False}
    )
    other = authority.issue("workstation")
    right = destination(receiver.port, authority, scanner)
    wrong = destination(receiver.port, authority, other)
    assert echo(right, calling_ae_title="SCANNER").kind is OutcomeKind.DELIVERED
    refused = echo(wrong, calling_ae_title="SCANNER")
    assert refused.kind is OutcomeKind.RETRY
    assert "rejects the association" in str(refused.error)
    (event,) = rejections(records)
    assert (event.actor, event.detail["reason"]) == ("SCANNER", "certificate-not-of-this-ae-title")
    assert event.alert


# --- The node as a client


def test_a_server_that_is_not_the_one_is_not_talked_to(
    authority: Authority, node: Pair, stranger: Pair, scanner: Pair, tmp_path: Path
) -> None:
    file = write_object(tmp_path)
    with StorageScp(ae_title="SEGNODE", ssl_context=_plain_server(stranger)) as pacs:
        ((_, outcome),) = send_files([file], destination(pacs.port, authority, scanner), calling_ae_title="X")
        assert outcome.kind is OutcomeKind.RETRY
        assert "unable to get local issuer certificate" in str(outcome.error)
        assert pacs.objects == []
    with StorageScp(ae_title="SEGNODE", ssl_context=_plain_server(node)) as pacs:
        to = destination(pacs.port, authority, scanner, server_name="pacs.hospital.test")
        ((_, outcome),) = send_files([file], to, calling_ae_title="X")
        assert outcome.kind is OutcomeKind.RETRY
        assert "Hostname mismatch" in str(outcome.error)
        assert pacs.objects == []


@pytest.mark.filterwarnings(  # of pynetdicom's server, which may be told to abort what it is closing
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
def test_a_server_without_tls_is_not_talked_to(authority: Authority, scanner: Pair, tmp_path: Path) -> None:
    with StorageScp(ae_title="SEGNODE") as pacs:
        to = destination(pacs.port, authority, scanner).model_copy(update={"timeout_s": 2.0})
        ((_, outcome),) = send_files([write_object(tmp_path)], to, calling_ae_title="X")
        assert outcome.kind is OutcomeKind.RETRY
        assert "TLS failed" in str(outcome.error)
        assert pacs.objects == []


def test_files_that_are_gone_are_told_and_the_delivery_waits(
    authority: Authority, scanner: Pair, tmp_path: Path
) -> None:
    to = destination(9, authority, Pair(tmp_path / "gone.crt", scanner.key))
    outcome = echo(to, calling_ae_title="X")
    assert outcome.kind is OutcomeKind.RETRY
    assert "gone.crt cannot be read: No such file or directory" in str(outcome.error)


def _plain_server(pair: Pair) -> ssl.SSLContext:
    return server_context(pair.certificate, pair.key, None)


# --- Renewal, and the configuration


def test_a_renewed_certificate_is_taken_without_a_restart(
    start_receiver: Start, authority: Authority, scanner: Pair, tmp_path: Path
) -> None:
    own = Pair(tmp_path / "node.crt", tmp_path / "node.key")
    authority.issue("node", days=(-30, -1), into=own)
    receiver = start_receiver(dicom={"tls": tls(own, authority)})
    to = destination(receiver.port, authority, scanner)
    assert "certificate has expired" in str(echo(to, calling_ae_title="X").error)
    authority.issue("node", into=own)
    assert echo(to, calling_ae_title="X").kind is OutcomeKind.DELIVERED
    own.key.write_text("half a file")  # a renewal that went wrong keeps what worked
    assert echo(to, calling_ae_title="X").kind is OutcomeKind.DELIVERED


@pytest.mark.parametrize(
    ("dicom", "message"),
    [
        ({"tls": {"certificate": "a", "key": "b"}}, "client certificates are required"),
        ({"peers": [{"ae_title": "A", "certificates": ["a"]}]}, "the peer A has certificates"),
    ],
)
def test_settings_that_promise_what_is_not_checked_are_refused(dicom: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(dicom=dicom)
