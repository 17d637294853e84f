"""The interface behind a real server, against clients that do not play by the rules."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from api_harness import ApiHarness, nifti
from waiting import wait_until

from service.api import middleware
from service.api.protocol import GuardedProtocol


class QuickProtocol(GuardedProtocol):
    head_timeout_s = 0.3


@pytest.fixture
def port(api: ApiHarness) -> Iterator[int]:
    """The interface, listening on a free port of loopback."""
    api.install()
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        api.app, http=QuickProtocol, log_config=None, access_log=False, timeout_keep_alive=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def read_to_end(client: socket.socket) -> bytes:
    client.settimeout(20)
    received = b""
    while chunk := client.recv(65536):
        received += chunk
    return received


def head(api: ApiHarness, port: int, length: int) -> bytes:
    return (
        f"POST /api/v1/segmentations HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length}\r\n"
        f"Authorization: Bearer {api.secrets['uploader']}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    ).encode()


PART = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'


def test_an_upload_goes_through_a_real_server(api: ApiHarness, port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        response = client.post(
            "/api/v1/segmentations",
            headers=api.headers("uploader"),
            data={"model": "threshold"},
            files={"files": ("image.nii.gz", nifti(api.folder))},
        )
        assert response.status_code == 202
        followed = client.get(response.headers["location"], headers=api.headers("uploader"))
        assert followed.json()["state"] == "queued"


def test_a_client_that_goes_away_leaves_nothing_behind(api: ApiHarness, port: int) -> None:
    desk = api.app.state.api.desk
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head(api, port, 1_000_000) + PART + b"x" * 3000)
        wait_until(lambda: any(api.spool.uploads_dir.iterdir()))
        assert desk.promised_bytes > 0
    wait_until(lambda: not any(api.spool.uploads_dir.iterdir()))
    wait_until(lambda: desk.promised_bytes == 0)
    assert api.get("/api/v1/jobs").json()["items"] == []


def test_a_body_that_stops_coming_is_given_up(
    api: ApiHarness, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.3)
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head(api, port, 1_000_000) + PART)
        answer = read_to_end(client)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "REQUEST_TIMEOUT"
    assert list(api.spool.uploads_dir.iterdir()) == []


def test_a_head_that_drips_is_cut_off(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        client.settimeout(0.05)
        # a header every so often, for ever: uvicorn's own time-outs never end this
        wait_until(lambda: not drips(client))


def drips(client: socket.socket) -> bool:
    """Send a further header; False once the server has closed the connection."""
    try:
        client.sendall(b"X: y\r\n")
        return client.recv(1) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def test_a_drip_on_a_connection_that_was_good_before_is_cut_off_too(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        client.settimeout(20)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"GET /hea")
        assert read_to_end(client) in (b"", b'{"status":"ok"}')


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS to a port without
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: x\r\n\r\n",
    ],
)
def test_what_is_not_http_is_a_bad_request_and_the_server_lives(port: int, request_bytes: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        try:
            client.sendall(request_bytes)
            client.shutdown(socket.SHUT_WR)
            answer = read_to_end(client)
        except OSError:
            answer = b""  # closed before everything was read, or even sent
        assert answer[:10] in (b"", b"HTTP/1.1 4"), answer
    assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
