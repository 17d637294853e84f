"""Login at an OpenID provider: authorization code with PKCE, and an ID token that is checked whole.

OpenID Connect Core 1.0 sections 3.1.2 and 3.1.3.7, RFC 7636 (S256), RFC 9207. What a person may do here is
said by a claim of the ID token; who has none of the values that the configuration names is not let in.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import (
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    build_opener,
)

from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet

from models.errors import SegnodeError
from service.records.tables import Role
from service.security_rules import OidcRules
from service.tls import client_context

# No "none", and no algorithm whose key is a secret that the client knows too.
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"]
_CLOCK_LEEWAY_S = 60
_METADATA_FOR_S = 3600.0
_MAXIMUM_ANSWER_BYTES = 1 << 20


class OidcError(SegnodeError):
    """Raised when a login cannot be brought to an end; ``code`` says of which kind."""

    def __init__(self, code: str, message: str, *, remedy: str = "", retryable: bool = False) -> None:
        super().__init__(message, remedy=remedy)
        self.code = code
        self.retryable = retryable


@dataclass(frozen=True)
class Beginning:
    """A login that begins: where the person goes, and what must come back or be known at the end."""

    url: str
    state: str
    nonce: str
    code_verifier: str


@dataclass(frozen=True)
class Person:
    """Who has logged in. ``subject`` is the provider's own name of them, which never changes."""

    subject: str
    name: str
    role: Role
    id_token: str


class Provider:
    """The identity provider; what it says of itself is asked when it is needed, and kept for an hour."""

    def __init__(self, rules: OidcRules) -> None:
        self._rules = rules
        self._lock = threading.Lock()
        self._metadata: dict[str, Any] = {}
        self._keys: KeySet | None = None
        self._known_until = 0.0

    def begin(self) -> Beginning:
        """Make what a login begins with. Raises OidcError if the provider cannot be reached."""
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=")
        query = {
            "response_type": "code",
            "client_id": self._rules.client_id,
            "redirect_uri": self._rules.redirect_url,
            "scope": " ".join(self._rules.scopes),
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge.decode(),
            "code_challenge_method": "S256",
        }
        endpoint = self._endpoint("authorization_endpoint")
        mark = "&" if "?" in endpoint else "?"
        return Beginning(f"{endpoint}{mark}{urlencode(query)}", state, nonce, verifier)

    def finish(self, code: str, *, nonce: str, code_verifier: str, now: float) -> Person:
        """Exchange the code for an ID token and check it.

        Parameters
        ----------
        now : float
            Seconds since 1970.

        Raises
        ------
        OidcError
            If the provider refuses the code, the token is not for this login, or gives no role.
        """
        answer = self._exchange(code, code_verifier)
        id_token = answer.get("id_token")
        if not isinstance(id_token, str):
            raise OidcError("LOGIN_FAILED", "The identity provider gave no ID token.")
        claims = self._check(id_token, nonce, now)
        role = self._role(claims)
        if role is None:
            raise OidcError(
                "NO_ROLE",
                "This account has no role here.",
                remedy=f"Ask an administrator for a group that the node knows ({self._rules.role_claim}).",
            )
        name = next((claims[k] for k in ("preferred_username", "name", "email") if claims.get(k)), "person")
        return Person(str(claims["sub"]), str(name), role, id_token)

    def check_issuer(self, issuer: str | None) -> None:
        """Raises OidcError if an answer names another issuer than the provider (RFC 9207)."""
        if issuer is not None and issuer != self._rules.issuer:
            raise OidcError("LOGIN_FAILED", "The answer comes from another identity provider.")

    def logout_url(self, id_token: str) -> str | None:
        """Where a person goes to be logged out at the provider too; None if it has no such place."""
        self._learn()
        endpoint = self._metadata.get("end_session_endpoint")
        if not isinstance(endpoint, str) or not self._may_ask(endpoint):
            return None
        query = urlencode({"id_token_hint": id_token, "client_id": self._rules.client_id})
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{query}"

    def _exchange(self, code: str, code_verifier: str) -> dict[str, Any]:
        rules = self._rules
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": rules.redirect_url,
            "code_verifier": code_verifier,
        }
        headers = {}
        if rules.client_secret_file is None:
            form["client_id"] = rules.client_id
        else:
            try:
                secret = rules.client_secret_file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise OidcError(
                    "LOGIN_FAILED", "The client secret cannot be read.", remedy="Check client_secret_file."
                ) from error
            endpoint = self._endpoint("token_endpoint")
            methods = self._metadata.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
            if "client_secret_basic" in methods:
                pair = f"{quote(rules.client_id, safe='')}:{quote(secret, safe='')}"  # RFC 6749 section 2.3.1
                headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
            else:
                form |= {"client_id": rules.client_id, "client_secret": secret}
        endpoint = self._endpoint("token_endpoint")
        return self._fetch(endpoint, data=urlencode(form).encode(), headers=headers)

    def _check(self, id_token: str, nonce: str, now: float) -> dict[str, Any]:
        rules = self._rules
        checks = jwt.JWTClaimsRegistry(
            now=int(now),
            leeway=_CLOCK_LEEWAY_S,
            iss={"essential": True, "value": rules.issuer},
            sub={"essential": True},
            aud={"essential": True, "value": rules.client_id},
            exp={"essential": True},
            iat={"essential": True},
            nonce={"essential": True, "value": nonce},
        )
        try:
            claims = self._decode(id_token).claims
            checks.validate(claims)
        except JoseError as error:
            raise OidcError(
                "LOGIN_FAILED", f"The ID token is not good for this login: {error.error}."
            ) from error
        except ValueError as error:  # not a token at all, or no key that fits
            raise OidcError("LOGIN_FAILED", "The ID token cannot be read.") from error
        audience = claims["aud"]
        several = isinstance(audience, list) and len(audience) > 1
        if (several or "azp" in claims) and claims.get("azp") != rules.client_id:
            raise OidcError("LOGIN_FAILED", "The ID token was made for another client.")
        return dict(claims)

    def _decode(self, id_token: str) -> jwt.Token:
        try:
            return jwt.decode(id_token, self._key_set(), algorithms=_ALGORITHMS)
        except InvalidKeyIdError:
            self._known_until = 0.0  # the provider has changed its keys
            return jwt.decode(id_token, self._key_set(), algorithms=_ALGORITHMS)

    def _role(self, claims: Mapping[str, Any]) -> Role | None:
        found: Any = claims
        for name in self._rules.role_claim.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        values = {found} if isinstance(found, str) else set(found) if isinstance(found, list) else set()
        for role, wanted in (
            (Role.ADMIN, self._rules.admins),
            (Role.OPERATOR, self._rules.operators),
            (Role.UPLOADER, self._rules.uploaders),
        ):
            if values.intersection(wanted):
                return role
        return None

    def _endpoint(self, name: str) -> str:
        self._learn()
        endpoint = self._metadata.get(name)
        if not isinstance(endpoint, str) or not self._may_ask(endpoint):
            raise _unavailable(f"It names no {name} that can be used.")
        return endpoint

    def _key_set(self) -> KeySet:
        self._learn()
        assert self._keys is not None
        return self._keys

    def _learn(self) -> None:
        """Ask the provider what it says of itself, and for its keys."""
        with self._lock:
            if time.monotonic() < self._known_until:
                return
            address = f"{self._rules.issuer.rstrip('/')}/.well-known/openid-configuration"
            metadata = self._fetch(address)
            if metadata.get("issuer") != self._rules.issuer:
                raise _unavailable("It calls itself by another name than the configuration.")
            keys_at = metadata.get("jwks_uri")
            if not isinstance(keys_at, str) or not self._may_ask(keys_at):
                raise _unavailable("It names no place of its keys that can be used.")
            try:
                self._keys = KeySet.import_key_set(self._fetch(keys_at))  # type: ignore[arg-type]
            except (JoseError, ValueError, KeyError, TypeError) as error:
                raise _unavailable("Its keys cannot be read.") from error
            self._metadata = metadata
            self._known_until = time.monotonic() + _METADATA_FOR_S

    def _may_ask(self, url: str) -> bool:
        return url.startswith("https://") or (self._rules.allow_plain_http and url.startswith("http://"))

    def _fetch(
        self, url: str, *, data: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        request = Request(url, data=data, headers={"Accept": "application/json", **(headers or {})})
        try:
            with self._opener().open(request, timeout=self._rules.timeout_s) as answer:
                content = answer.read(_MAXIMUM_ANSWER_BYTES)
            document = json.loads(content)
        except HTTPError as error:
            with error:
                if data is not None and 400 <= error.code < 500:
                    raise OidcError(
                        "LOGIN_FAILED", f"The identity provider refuses the login (HTTP {error.code})."
                    ) from error
            raise _unavailable(f"It answers with HTTP {error.code}.") from error
        except (URLError, OSError) as error:
            raise _unavailable("It cannot be reached.") from error
        except ValueError as error:
            raise _unavailable("It answers with something that is no JSON.") from error
        if not isinstance(document, dict):
            raise _unavailable("It answers with something that is no JSON object.")
        return document

    def _opener(self) -> OpenerDirector:
        trusted = self._rules.trusted
        context = ssl.create_default_context() if trusted is None else client_context(trusted)
        return build_opener(ProxyHandler({}), HTTPSHandler(context=context), _NoRedirect())


class _NoRedirect(HTTPRedirectHandler):
    """A provider that sends the node elsewhere is not followed: the secret goes with the request."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _unavailable(why: str) -> OidcError:
    return OidcError(
        "PROVIDER_UNAVAILABLE",
        f"The identity provider cannot be used now. {why}",
        remedy="Try again later, or use a key; an administrator checks the section oidc.",
        retryable=True,
    )
