"""The interface as its process serves it: over TLS of its own, or behind a proxy whose word counts."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from certificates import Authority
from sqlalchemy import select
from waiting import wait_until

from service.audit_trail import HEAD_FILE, read_head_file
from service.components import run_api
from service.node import Node, open_node
from service.records.tables import Event
from service.settings import Settings
from service.tls import client_context


@contextmanager
def served(folder: Path, **http: Any) -> Iterator[tuple[Node, int]]:
    """A node's HTTP interface, run as its process runs it; the node, and the port."""
    settings = Settings(
        data_dir=folder,
        http={"port": 0, **http},
        storage={"low_watermark_bytes": 0, "reserve_bytes": 0},
    )
    ports: list[int | None] = []
    stop = threading.Event()
    with open_node(settings) as node:
        thread = threading.Thread(target=run_api, args=(node, stop, ports.append))
        thread.start()
        try:
            wait_until(lambda: bool(ports) or not thread.is_alive())
            assert ports[0] is not None
            yield node, ports[0]
        finally:
            stop.set()
            thread.join(30)
            assert not thread.is_alive()


def origins(node: Node) -> list[str]:
    with node.records.read() as session:
        return list(session.scalars(select(Event.origin).where(Event.kind == "access.refused")))


def test_https_with_the_nodes_own_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    pair = authority.issue("node")
    own = {"tls_certificate": pair.certificate, "tls_key": pair.key}
    with served(tmp_path / "data", **own) as (_node, port):
        with httpx.Client(verify=client_context(authority.trusted), trust_env=False) as client:
            response = client.get(f"https://localhost:{port}/healthz")
        assert response.status_code == 200
        assert "strict-transport-security" in response.headers
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{port}/healthz", trust_env=False)  # plain text is not answered
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(authority.trusted)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        old.set_ciphers("AES128-GCM-SHA256")  # no forward secrecy
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"https://localhost:{port}/healthz", verify=old, trust_env=False)
        kept = tmp_path / "data" / HEAD_FILE
        wait_until(kept.exists)  # the process keeps the head of the audit trail
        assert read_head_file(kept) is not None


@pytest.mark.parametrize(("trusted", "origin"), [(["127.0.0.0/8"], "10.9.8.7"), (["192.0.2.1"], "127.0.0.1")])
def test_only_a_trusted_proxy_says_where_a_request_came_from(
    tmp_path: Path, trusted: list[str], origin: str
) -> None:
    with served(tmp_path, behind_tls_proxy=True, trusted_proxies=trusted) as (node, port):
        # What the client itself has put before the proxy's own word is not believed.
        headers = {"X-Forwarded-For": "203.0.113.5, 10.9.8.7", "X-Forwarded-Proto": "https"}
        response = httpx.get(f"http://127.0.0.1:{port}/api/v1/jobs", headers=headers, trust_env=False)
        assert response.status_code == 401
        assert origins(node) == [origin]
