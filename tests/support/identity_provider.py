"""An OpenID provider for tests: people are let in as the test says, and tokens may be wrong in any way."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT_ID = "segnode"
CLIENT_SECRET = "a secret: with & signs"


class IdentityProvider:
    """Listens on a free port of loopback, from ``with`` to its end."""

    def __init__(self) -> None:
        self.key = RSAKey.generate_key(2048, {"kid": "first", "use": "sig"})
        self.changes: dict[str, Any] = {}  # of the metadata
        self.requests: list[str] = []
        self.hidden: dict[str, dict[str, Any]] = {}  # by code: what the token will say, and the challenge
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Self:
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.requests.append(self.path)
                documents = {
                    "/.well-known/openid-configuration": provider.metadata,
                    "/keys": {"keys": [provider.key.as_dict(private=False)]},
                }
                found = documents.get(self.path)
                self.answer(200 if found else 404, found or {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                status, answer = provider.exchange(parse_qs(body), self.headers.get("Authorization", ""))
                self.answer(status, answer)

            def answer(self, status: int, document: dict[str, Any]) -> None:
                content = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def issuer(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def metadata(self) -> dict[str, Any]:
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
            "end_session_endpoint": f"{self.issuer}/logout",
            **self.changes,
        }

    def let_in(self, url: str, now: float | None = None, **claims: Any) -> str:
        """What a browser does with the address it was sent to; the code that it brings back.

        ``claims`` change the ID token; None leaves one out.
        """
        query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        assert query["response_type"] == "code"
        assert query["client_id"] == CLIENT_ID
        assert query["code_challenge_method"] == "S256"
        now = time.time() if now is None else now
        token = {
            "iss": self.issuer,
            "sub": "4711",
            "aud": CLIENT_ID,
            "exp": int(now) + 300,
            "iat": int(now),
            "nonce": query["nonce"],
            "preferred_username": "r.radiologist",
            "groups": ["everybody", "pacs-operators"],
            **claims,
        }
        code = f"code-{len(self.hidden)}"
        self.hidden[code] = {
            "claims": {name: value for name, value in token.items() if value is not None},
            "challenge": query["code_challenge"],
            "redirect_uri": query["redirect_uri"],
        }
        return code

    def exchange(self, form: dict[str, list[str]], authorization: str) -> tuple[int, dict[str, Any]]:
        """The token endpoint."""
        given = base64.b64decode(authorization.removeprefix("Basic ")).decode()
        if given != f"{CLIENT_ID}:a%20secret%3A%20with%20%26%20signs":
            return 401, {"error": "invalid_client"}
        kept = self.hidden.pop(form["code"][0], None)
        verifier = form["code_verifier"][0]
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=")
        if kept is None or kept["challenge"] != challenge.decode():
            return 400, {"error": "invalid_grant"}
        if kept["redirect_uri"] != form["redirect_uri"][0]:
            return 400, {"error": "invalid_grant"}
        header = {"alg": "RS256", "kid": self.key.kid}
        id_token = kept.get("id_token") or jwt.encode(header, kept["claims"], self.key)
        return 200, {"access_token": "x", "token_type": "Bearer", "id_token": id_token}
