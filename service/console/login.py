"""Who is at the page: a session in a signed cookie, begun with a key and ended with it.

The cookie holds the key's identifier, never its secret, and when the session began and was last used.
It is signed with a secret that lies in the data folder, so every process of the node accepts it, and the key
is looked up at every request: a key that is revoked ends its sessions at once. A session that is not used for
half an hour, or is twelve hours old, is over.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

IDLE = timedelta(minutes=30)
LONGEST = timedelta(hours=12)
COOKIE = "segnode_session"
_SECRET_BYTES = 32


@dataclass(frozen=True)
class Login:
    """A session as its cookie tells it; times are UTC and naive, as in the records."""

    key_id: str
    begun_at: datetime
    used_at: datetime
    nonce: str

    @staticmethod
    def begin(key_id: str, now: datetime) -> Login:
        return Login(key_id, now, now, secrets.token_hex(8))

    def used(self, now: datetime) -> Login:
        return Login(self.key_id, self.begun_at, now, self.nonce)

    def is_over(self, now: datetime) -> bool:
        return now - self.used_at > IDLE or now - self.begun_at > LONGEST or self.used_at > now + IDLE


class LoginSealer:
    """Writes and reads the cookies of one node."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @staticmethod
    def of_node(data_dir: Path) -> LoginSealer:
        """With the node's own secret, which is made where there is none."""
        path = data_dir / "console.secret"
        data_dir.mkdir(parents=True, exist_ok=True)
        beside = data_dir / f".console.secret.{secrets.token_hex(4)}"
        if not path.is_file():
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(secrets.token_bytes(_SECRET_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(beside, path)  # of two processes that start at once, the first one's stays
            except FileExistsError:
                pass
            finally:
                beside.unlink()
        return LoginSealer(path.read_bytes())

    def seal(self, login: Login) -> str:
        """The cookie of a session."""
        content = [
            login.key_id,
            _seconds(login.begun_at),
            _seconds(login.used_at),
            login.nonce,
        ]
        body = base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")
        return f"{body}.{self._sign('session', body)}"

    def open(self, cookie: str, now: datetime) -> Login | None:
        """The session of a cookie; None if it was not made here, was changed, or is over."""
        body, _, signature = cookie.partition(".")
        if not hmac.compare_digest(self._sign("session", body).encode(), signature.encode()):
            return None
        try:
            key_id, begun, used, nonce = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        except (ValueError, binascii.Error):
            return None
        login = Login(key_id, _time(begun), _time(used), nonce)
        return None if login.is_over(now) else login

    def form_token(self, login: Login) -> str:
        """What every form of a session carries: a page of another origin cannot know it."""
        return self._sign("form", f"{login.key_id} {_seconds(login.begun_at)} {login.nonce}")

    def _sign(self, purpose: str, text: str) -> str:
        return hmac.new(self._secret, f"{purpose}:{text}".encode(), hashlib.sha256).hexdigest()


def _seconds(time: datetime) -> int:
    return int(time.replace(tzinfo=UTC).timestamp())


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(int(seconds), UTC).replace(tzinfo=None)
