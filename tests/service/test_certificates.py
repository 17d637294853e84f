"""The doctor looks at every certificate; HTTPS takes a renewed one without a restart."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from certificates import Authority, Pair

from service.diagnosis import Finding, Health
from service.doctor import check_certificates
from service.settings import Settings
from service.tls import ReloadingContext, TlsError, client_context, server_context

NOW = datetime.now(UTC).replace(tzinfo=None)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("node")


def settings(pair: Pair, authority: Authority, **http: Any) -> Settings:
    own = {"certificate": pair.certificate, "key": pair.key, "trusted": authority.trusted}
    return Settings(
        dicom={"tls": own},
        http={"tls_certificate": pair.certificate, "tls_key": pair.key, **http},
        destinations=[{"name": "pacs", "ae_title": "PACS", "host": "localhost", "port": 104, "tls": own}],
    )


def found(settings: Settings, days_from_now: float = 0) -> dict[str, Finding]:
    return {f.what: f for f in check_certificates(settings, NOW + timedelta(days=days_from_now))}


def test_every_certificate_is_looked_at(pair: Pair, authority: Authority) -> None:
    good = found(settings(pair, authority))
    assert set(good) == {
        "HTTPS",
        "DICOM TLS",
        "DICOM TLS, trusted",
        "TLS to pacs",
        "TLS to pacs, trusted",
    }
    assert {f.health for f in good.values()} == {Health.OK}
    assert "CN=node" in good["HTTPS"].message


@pytest.mark.parametrize(
    ("days", "health", "words"),
    [
        (59, Health.OK, "until"),
        (61, Health.WARNING, "expires in 28 days"),
        (91, Health.PROBLEM, "has expired"),
        (-2, Health.PROBLEM, "not yet"),
    ],
)
def test_the_end_of_a_certificate_is_seen_coming(
    pair: Pair, authority: Authority, days: float, health: Health, words: str
) -> None:
    finding = found(settings(pair, authority), days)["HTTPS"]
    assert finding.health is health
    assert words in finding.message
    assert finding.remedy.startswith("Renew it") is (health is not Health.OK)


def test_an_authority_that_is_over_may_stand_beside_its_heir(pair: Pair, authority: Authority) -> None:
    assert found(settings(pair, authority), 360)["DICOM TLS, trusted"].health is Health.WARNING


def test_files_that_cannot_be_used_are_named(pair: Pair, authority: Authority, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("no PEM")
    other = authority.issue("other")
    for certificate, key, message in (
        (tmp_path / "gone.pem", pair.key, "gone.pem cannot be read: No such file"),
        (nonsense, pair.key, "nonsense.pem holds no certificate"),
        (pair.certificate, nonsense, "holds no private key"),
        (pair.certificate, other.key, "is not the key of the certificate"),
    ):
        finding = found(settings(Pair(certificate, key), authority))["HTTPS"]
        assert finding.health is Health.PROBLEM
        assert message in finding.message
        with pytest.raises(TlsError, match=message):
            server_context(certificate, key, None)


def test_https_takes_a_renewed_certificate_without_a_restart(authority: Authority, tmp_path: Path) -> None:
    own = Pair(tmp_path / "node.crt", tmp_path / "node.key")
    authority.issue("node", days=(-30, -1), into=own)

    async def connect(port: int) -> str:
        try:
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=client_context(authority.trusted), server_hostname="localhost"
            )
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        writer.close()
        await writer.wait_closed()
        return "connected"

    async def run() -> list[str]:
        def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        context = ReloadingContext(own.certificate, own.key, None).following()
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            before = await connect(port)
            authority.issue("node", into=own)
            return [before, await connect(port)]

    assert asyncio.run(run()) == ["certificate has expired", "connected"]
