"""People log in at the identity provider; a login that is not whole in every part lets nobody in."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from api_harness import ApiHarness, assert_problem, nifti
from identity_provider import CLIENT_ID, CLIENT_SECRET, IdentityProvider
from joserfc import jwt
from joserfc.jwk import RSAKey
from sqlalchemy import select
from structlog.testing import capture_logs

from service.api.login import own_path
from service.console import build_console
from service.keys import revoke
from service.records.database import Records
from service.records.login_tables import LoginAttempt, PersonSession
from service.records.tables import ApiKey, Event, Role
from service.settings import Settings

COOKIE = "segnode_person"


@pytest.fixture(scope="module")
def provider() -> Iterator[IdentityProvider]:
    with IdentityProvider() as running:
        yield running


@pytest.fixture
def api(tmp_path: Path, records: Records, provider: IdentityProvider) -> ApiHarness:
    provider.changes.clear()
    secret = tmp_path / "client-secret"
    secret.write_text(f"{CLIENT_SECRET}\n")
    with capture_logs():
        return ApiHarness(
            tmp_path,
            records,
            storage={"low_watermark_bytes": 0, "reserve_bytes": 0},
            oidc={
                "issuer": provider.issuer,
                "client_id": CLIENT_ID,
                "client_secret_file": secret,
                "redirect_url": "http://localhost/auth/callback",
                "admins": ["pacs-admins"],
                "operators": ["pacs-operators"],
                "uploaders": ["researchers"],
                "allow_plain_http": True,
            },
        )


def begin(api: ApiHarness, path: str = "/console/queue") -> tuple[str, str]:
    """Go to the login: where it leads, and the state that the browser keeps."""
    response = api.get(f"/auth/login?next={path}", key=None)
    assert response.status_code == 303, response.text
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    return response.headers["location"], cookie.partition("segnode_login=")[2].partition(";")[0]


def come_back(api: ApiHarness, state: str, code: str, **query: str) -> httpx.Response:
    return api.get(
        "/auth/callback",
        key=None,
        params={"state": state, "code": code, **query},
        headers={"Cookie": f"segnode_login={state}"},
    )


def log_in(api: ApiHarness, provider: IdentityProvider, **claims: Any) -> str:
    """A whole login; the secret of the session."""
    url, state = begin(api)
    response = come_back(api, state, provider.let_in(url, seconds(api), **claims))
    assert response.status_code == 303, response.text
    cookies = [c for c in response.headers.get_list("set-cookie") if c.startswith(COOKIE)]
    assert len(cookies) == 1
    assert "HttpOnly" in cookies[0]
    return str(cookies[0].partition("=")[2].partition(";")[0])


def seconds(api: ApiHarness) -> float:
    return api.now.replace(tzinfo=UTC).timestamp()


def as_person(secret: str, **headers: str) -> dict[str, Any]:
    return {"key": None, "headers": {"Cookie": f"{COOKIE}={secret}", **headers}}


def events(api: ApiHarness, kind: str) -> list[Event]:
    with api.records.read() as session:
        return list(session.scalars(select(Event).where(Event.kind == kind).order_by(Event.chain_index)))


# --- The way that it should go


def test_a_person_logs_in_and_has_the_role_of_their_group(
    api: ApiHarness, provider: IdentityProvider
) -> None:
    url, state = begin(api)
    query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    assert query["state"] == state
    assert query["scope"] == "openid profile"
    assert len(query["nonce"]) >= 43
    response = come_back(api, state, provider.let_in(url, seconds(api)), iss=provider.issuer)
    assert response.status_code == 303
    assert response.headers["location"] == "/console/queue"
    secret = next(c for c in response.headers.get_list("set-cookie") if c.startswith(COOKIE))
    secret = secret.partition("=")[2].partition(";")[0]
    me = api.get("/auth/session", **as_person(secret)).json()
    assert (me["name"], me["role"]) == ("r.radiologist", "operator")
    assert api.get("/api/v1/jobs", **as_person(secret)).status_code == 200
    assert_problem(api.get("/api/v1/models", **as_person(secret)), 403, "ROLE_TOO_LOW")
    (event,) = events(api, "login")
    assert (event.actor, event.outcome, event.origin) == ("r.radiologist", "success", "127.0.0.1")
    with api.records.read() as session:
        kept = str([row.__dict__ for row in session.scalars(select(PersonSession))])
        assert session.scalars(select(LoginAttempt)).all() == []
    assert secret not in kept  # its hash alone


@pytest.mark.parametrize(
    ("groups", "role"),
    [
        (["pacs-admins", "researchers"], "admin"),
        ("researchers", "uploader"),
        (["researchers", "pacs-operators"], "operator"),
    ],
)
def test_the_highest_role_counts(api: ApiHarness, provider: IdentityProvider, groups: Any, role: str) -> None:
    secret = log_in(api, provider, groups=groups)
    assert api.get("/auth/session", **as_person(secret)).json()["role"] == role


def test_what_a_person_may_is_asked_anew_at_each_login(api: ApiHarness, provider: IdentityProvider) -> None:
    first = log_in(api, provider, groups=["pacs-admins"])
    assert api.get("/api/v1/models", **as_person(first)).status_code == 200
    second = log_in(api, provider, groups=["researchers"])
    for secret in (first, second):
        assert_problem(api.get("/api/v1/models", **as_person(secret)), 403, "ROLE_TOO_LOW")
    with api.records.read() as session:
        assert len(session.scalars(select(ApiKey).where(ApiKey.name == "r.radiologist")).all()) == 1


def test_two_people_of_one_name_are_two(api: ApiHarness, provider: IdentityProvider) -> None:
    first, second = log_in(api, provider, sub="1"), log_in(api, provider, sub="2")
    names = {api.get("/auth/session", **as_person(s)).json()["name"] for s in (first, second)}
    assert len(names) == 2
    assert all(name.startswith("r.radiologist") for name in names)


def test_a_name_that_would_spoil_the_audit_trail_is_written_otherwise(
    api: ApiHarness, provider: IdentityProvider
) -> None:
    secret = log_in(api, provider, preferred_username="-<b>Łukasz</b>\n" + "x" * 200)
    name = api.get("/auth/session", **as_person(secret)).json()["name"]
    assert name.startswith("b..ukasz..b..xxx")
    assert len(name) <= 64


def test_a_changed_key_of_the_provider_is_asked_for(api: ApiHarness, provider: IdentityProvider) -> None:
    log_in(api, provider)
    before, provider.key = provider.key, RSAKey.generate_key(2048, {"kid": "second", "use": "sig"})
    try:
        assert log_in(api, provider)
    finally:
        provider.key = before


# --- What lets nobody in


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://elsewhere.test"},
        {"aud": "another-client"},
        {"aud": [CLIENT_ID, "another-client"]},  # of several, one must be the party it was made for
        {"aud": [CLIENT_ID, "another-client"], "azp": "another-client"},
        {"azp": "another-client"},
        {"nonce": "another"},
        {"nonce": None},
        {"exp": 1},
        {"exp": None},
        {"sub": None},
        {"sub": ""},
        {"iat": 2**40},
    ],
    ids=str,
)
def test_a_token_that_is_not_for_this_login(
    api: ApiHarness, provider: IdentityProvider, claims: dict[str, Any]
) -> None:
    url, state = begin(api)
    response = come_back(api, state, provider.let_in(url, seconds(api), **claims))
    assert_problem(response, 401, "LOGIN_FAILED")
    assert COOKIE not in str(response.headers.get_list("set-cookie"))
    (event,) = events(api, "login")
    assert (event.outcome, event.detail) == ("refused", {"code": "LOGIN_FAILED"})


@pytest.mark.parametrize("groups", [None, [], ["everybody"], "everybody", {"a": 1}, 7])
def test_an_account_without_a_role(api: ApiHarness, provider: IdentityProvider, groups: Any) -> None:
    url, state = begin(api)
    response = come_back(api, state, provider.let_in(url, seconds(api), groups=groups))
    assert_problem(response, 401, "NO_ROLE")


@pytest.mark.parametrize("forged", ["none", "other key", "shared secret", "garbage"])
def test_a_token_that_the_provider_has_not_signed(
    api: ApiHarness, provider: IdentityProvider, forged: str
) -> None:
    url, state = begin(api)
    code = provider.let_in(url, seconds(api))
    claims = provider.hidden[code]["claims"]
    make = {
        "none": lambda: _by_hand(claims, "none", b""),
        "other key": lambda: jwt.encode(
            {"alg": "RS256", "kid": "first"}, claims, RSAKey.generate_key(2048, {"kid": "first"})
        ),
        # what a careless client takes for the key of HMAC is known to everybody
        "shared secret": lambda: _by_hand(claims, "HS256", provider.key.as_pem(private=False)),
        "garbage": lambda: "a.b.c",
    }
    provider.hidden[code]["id_token"] = make[forged]()
    assert_problem(come_back(api, state, code), 401, "LOGIN_FAILED")


def _by_hand(claims: dict[str, Any], algorithm: str, key: bytes) -> str:
    def part(content: bytes) -> str:
        return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

    head = part(json.dumps({"alg": algorithm, "kid": "first"}).encode())
    signed = f"{head}.{part(json.dumps(claims).encode())}"
    return f"{signed}.{part(hmac.digest(key, signed.encode(), hashlib.sha256)) if key else ''}"


def test_a_login_that_was_not_begun_in_this_browser(api: ApiHarness, provider: IdentityProvider) -> None:
    url, state = begin(api)
    code = provider.let_in(url, seconds(api))
    for cookie in ("", "segnode_login=", "segnode_login=another"):
        response = api.get(
            "/auth/callback", key=None, params={"state": state, "code": code}, headers={"Cookie": cookie}
        )
        assert_problem(response, 401, "LOGIN_EXPIRED")


def test_a_login_is_good_once_and_for_ten_minutes(api: ApiHarness, provider: IdentityProvider) -> None:
    url, state = begin(api)
    assert come_back(api, state, provider.let_in(url, seconds(api))).status_code == 303
    assert_problem(come_back(api, state, provider.let_in(url, seconds(api))), 401, "LOGIN_EXPIRED")
    url, state = begin(api)
    api.now += timedelta(minutes=10)
    assert_problem(come_back(api, state, provider.let_in(url, seconds(api))), 401, "LOGIN_EXPIRED")


def test_what_the_provider_refuses(api: ApiHarness, provider: IdentityProvider) -> None:
    url, state = begin(api)
    assert_problem(come_back(api, state, "", error="access_denied"), 401, "LOGIN_FAILED")
    url, state = begin(api)
    assert_problem(come_back(api, state, "code-of-nobody"), 401, "LOGIN_FAILED")
    url, state = begin(api)
    code = provider.let_in(url, seconds(api))
    provider.hidden[code]["challenge"] = "of another verifier"
    assert_problem(come_back(api, state, code), 401, "LOGIN_FAILED")
    url, state = begin(api)
    code = provider.let_in(url, seconds(api))
    assert_problem(come_back(api, state, code, iss="https://elsewhere.test"), 401, "LOGIN_FAILED")


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": "https://elsewhere.test"},
        {"authorization_endpoint": None},
        {"authorization_endpoint": "file:///etc/passwd"},
        {"jwks_uri": "ftp://127.0.0.1/keys"},
        {"jwks_uri": None},
    ],
    ids=str,
)
def test_a_provider_that_is_not_what_it_should_be(
    api: ApiHarness, provider: IdentityProvider, changes: dict[str, Any]
) -> None:
    provider.changes = changes
    response = api.get("/auth/login", key=None)
    assert assert_problem(response, 503, "PROVIDER_UNAVAILABLE")["retryable"]


def test_a_provider_that_is_away(tmp_path: Path, records: Records) -> None:
    rules = {
        "issuer": "http://127.0.0.1:9",
        "client_id": CLIENT_ID,
        "redirect_url": "http://localhost/auth/callback",
        "admins": ["a"],
        "allow_plain_http": True,
    }
    api = ApiHarness(tmp_path, records, oidc=rules)
    assert_problem(api.get("/auth/login", key=None), 503, "PROVIDER_UNAVAILABLE")
    assert api.get("/api/v1/jobs", key="operator").status_code == 200


def test_without_a_provider_there_is_no_login_and_a_cookie_opens_nothing(
    tmp_path: Path, records: Records
) -> None:
    api = ApiHarness(tmp_path, records)
    assert_problem(api.get("/auth/login", key=None), 404, "NO_SUCH_PATH")
    assert_problem(api.get("/api/v1/jobs", **as_person("x" * 43)), 401, "KEY_MISSING")


# --- Sessions


def test_a_session_ends_when_it_is_not_used(api: ApiHarness, provider: IdentityProvider) -> None:
    secret = log_in(api, provider)
    for _ in range(3):  # in use it goes on
        api.now += timedelta(minutes=29)
        assert api.get("/api/v1/jobs", **as_person(secret)).status_code == 200
    api.now += timedelta(minutes=30)
    assert_problem(api.get("/api/v1/jobs", **as_person(secret)), 401, "KEY_MISSING")


def test_a_session_ends_in_the_end(api: ApiHarness, provider: IdentityProvider) -> None:
    secret = log_in(api, provider)
    for _ in range(36):
        api.now += timedelta(minutes=19, seconds=59)
        assert api.get("/api/v1/jobs", **as_person(secret)).status_code == 200
    api.now += timedelta(minutes=1)
    assert_problem(api.get("/api/v1/jobs", **as_person(secret)), 401, "KEY_MISSING")


def test_logging_out_ends_it_at_once(api: ApiHarness, provider: IdentityProvider) -> None:
    secret = log_in(api, provider)
    token = api.get("/auth/session", **as_person(secret)).json()["csrf_token"]
    assert_problem(api.post("/auth/logout", **as_person(secret)), 403, "CSRF_TOKEN_MISSING")
    answer = api.post("/auth/logout", **as_person(secret, **{"X-CSRF-Token": token}))
    assert answer.json()["provider_url"].startswith(f"{provider.issuer}/logout?id_token_hint=")
    assert_problem(api.get("/api/v1/jobs", **as_person(secret)), 401, "KEY_MISSING")
    assert [event.actor for event in events(api, "logout")] == ["r.radiologist"]


def test_revoking_a_person_ends_their_sessions_and_lets_them_in_no_more(
    api: ApiHarness, provider: IdentityProvider
) -> None:
    secret = log_in(api, provider)
    with api.records.write() as session:
        person = session.scalars(select(ApiKey).where(ApiKey.name == "r.radiologist")).one()
        revoke(session, person.key_id, now=api.now)
    assert_problem(api.get("/api/v1/jobs", **as_person(secret)), 401, "KEY_MISSING")
    url, state = begin(api)
    response = come_back(api, state, provider.let_in(url, seconds(api)))
    assert_problem(response, 401, "ACCESS_REVOKED")


def test_a_request_that_changes_something_carries_the_sessions_token(
    api: ApiHarness, provider: IdentityProvider
) -> None:
    secret, other = log_in(api, provider), log_in(api, provider, sub="another")
    job = api.enqueue()
    path = f"/api/v1/jobs/{job}/retry"
    token = api.get("/auth/session", **as_person(secret)).json()["csrf_token"]
    anothers = api.get("/auth/session", **as_person(other)).json()["csrf_token"]
    for wrong in ({}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": anothers}, {"X-CSRF-Token": token[:-1]}):
        assert_problem(api.post(path, **as_person(secret, **wrong)), 403, "CSRF_TOKEN_MISSING")
    allowed = api.post(path, **as_person(secret, **{"X-CSRF-Token": token}))
    assert allowed.status_code == 409  # let through: a job that waits cannot be retried
    # A key needs none: no browser adds it by itself.
    assert api.post(path, key="operator").status_code == 409


def test_what_a_person_uploads_is_theirs(api: ApiHarness, provider: IdentityProvider) -> None:
    api.install()
    secret = log_in(api, provider, groups="researchers")
    token = api.get("/auth/session", **as_person(secret)).json()["csrf_token"]
    arguments = as_person(secret, **{"X-CSRF-Token": token})
    answer = api.upload(nifti(api.folder), **arguments)
    assert answer.status_code == 202
    where = answer.headers["location"]
    assert api.get(where, **as_person(secret)).status_code == 200
    assert api.get(where, key="uploader").status_code == 404


@pytest.mark.parametrize("path", ["/", "/console/queue?of=failed", "/a%20b"])
def test_paths_of_this_node_are_gone_back_to(path: str) -> None:
    assert own_path(path) == path


@pytest.mark.parametrize(
    "path",
    ["", "https://elsewhere.test", "//elsewhere.test", "/\\elsewhere", "/a\r\nb", "/" + "x" * 600, "x"],
)
def test_no_other_place_is_gone_to(path: str) -> None:
    assert own_path(path) == "/"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allow_plain_http": False}, "must be https"),
        ({"scopes": ["profile"]}, "openid"),
        ({"admins": []}, "make admins"),
        ({"redirect_url": "http://localhost/elsewhere"}, "redirect_url"),
    ],
)
def test_settings_that_would_let_anybody_in_are_refused(changes: dict[str, Any], message: str) -> None:
    rules = {
        "issuer": "http://127.0.0.1:9",
        "client_id": CLIENT_ID,
        "redirect_url": "http://localhost/auth/callback",
        "admins": ["a"],
        "allow_plain_http": True,
    }
    with pytest.raises(ValueError, match=message):
        Settings(oidc={**rules, **changes})


def test_roles_below_a_persons_are_not_listed_as_keys_with_a_secret(
    api: ApiHarness, provider: IdentityProvider
) -> None:
    log_in(api, provider)
    with api.records.read() as session:
        person = session.scalars(select(ApiKey).where(ApiKey.name == "r.radiologist")).one()
    assert person.role is Role.OPERATOR
    for guess in (person.key_id, person.key_hash, "sgn_" + "A" * 43):
        headers = {"Authorization": f"Bearer {guess}"}
        assert_problem(api.get("/api/v1/jobs", key=None, headers=headers), 401, "KEY_INVALID")


# --- The operator's page


def test_a_person_uses_the_operators_page_and_logs_out_of_it(
    api: ApiHarness, provider: IdentityProvider
) -> None:
    build_console(api.app, api.app.state.api)
    assert "/auth/login?next=/console/queue" in api.get("/console/login", key=None).text
    secret = log_in(api, provider)
    page = api.get("/console/queue", **as_person(secret))
    assert page.status_code == 200
    assert "r.radiologist (operator)" in page.text
    assert api.get("/console/models", **as_person(secret)).status_code == 403
    refused = api.post("/console/logout", data={"form_token": "0" * 64}, **as_person(secret))
    assert refused.status_code == 403
    token = page.text.partition('name="form_token" value="')[2].partition('"')[0]
    assert api.post("/console/logout", data={"form_token": token}, **as_person(secret)).status_code == 303
    assert api.get("/console/queue", **as_person(secret)).status_code == 303
    assert [event.actor for event in events(api, "logout")] == ["r.radiologist"]
