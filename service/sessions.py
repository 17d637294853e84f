"""Sessions of people at the page, in the records, so that every process of the node knows them.

A session is a secret that the browser holds and a row with its hash. It begins with a key, or with a login at
the identity provider, which stands for a key too. It ends when it was not used for a while, when it is too
old, when the person logs out, and when the key is revoked or expires.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import datetime, timedelta

from sqlalchemy import delete
from sqlalchemy.orm import Session

from service.keys import hash_secret, is_alive
from service.records.login_tables import PersonSession
from service.records.tables import ApiKey
from service.security_rules import SessionRules

_SEEN_EVERY = timedelta(minutes=1)  # a row is not written at every request


def begin_session(
    session: Session, key_id: str, rules: SessionRules, *, now: datetime, id_token: str = ""
) -> str:
    """Begin a session with a key; its secret. What is left of old ones goes.

    ``id_token`` is the provider's, where the person has logged in there.
    """
    session.execute(delete(PersonSession).where(PersonSession.expires_at <= now))
    secret = secrets.token_urlsafe(32)
    session.add(
        PersonSession(
            session_hash=hash_secret(secret),
            key_id=key_id,
            created_at=now,
            last_seen_at=now,
            expires_at=now + timedelta(seconds=rules.longest_s),
            id_token=id_token,
        )
    )
    return secret


def find_session(
    session: Session, secret: str, rules: SessionRules, *, now: datetime
) -> tuple[ApiKey, PersonSession] | None:
    """Whose session a secret is; None if there is none, or it is over."""
    found = session.get(PersonSession, hash_secret(secret))
    if found is None or now >= found.expires_at:
        return None
    if now - found.last_seen_at >= timedelta(seconds=rules.idle_s):
        return None
    key = session.get(ApiKey, found.key_id)
    if key is None or not is_alive(key, now):
        return None
    return key, found


def is_due(found: PersonSession, now: datetime) -> bool:
    """True if it is time to note that the session is in use."""
    return now - found.last_seen_at >= _SEEN_EVERY


def see_session(session: Session, secret: str, *, now: datetime) -> None:
    """Note that a session is in use."""
    found = session.get(PersonSession, hash_secret(secret))
    if found is not None:
        found.last_seen_at = now


def end_session(session: Session, secret: str) -> PersonSession | None:
    """End a session; what it was, or None if there was none."""
    found = session.get(PersonSession, hash_secret(secret))
    if found is not None:
        session.delete(found)
    return found


def csrf_token(secret: str) -> str:
    """What a request of a session that changes something must carry: a page elsewhere cannot know it."""
    return hmac.new(secret.encode(), b"segnode csrf", hashlib.sha256).hexdigest()


def is_csrf_token(secret: str, token: str) -> bool:
    """True if the token belongs to the session; takes the same time for every wrong one."""
    return hmac.compare_digest(csrf_token(secret).encode(), token.encode())
