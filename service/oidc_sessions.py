"""Logins under way and sessions of people, in the records, so that every process of the node knows them.

A session is a secret that the browser holds and a row with its hash. It ends when it was not used for a
while, when it is too old, when the person logs out, and when their access is revoked. A person is kept as a
key without a secret: what they upload has an owner, and ``segnode keys revoke`` ends their access.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.keys import hash_secret
from service.oidc import Beginning, OidcError, Person
from service.records.events import record_event
from service.records.login_tables import LoginAttempt, PersonSession
from service.records.tables import ApiKey
from service.security_rules import OidcRules

ATTEMPT_FOR = timedelta(minutes=10)
_SEEN_EVERY = timedelta(minutes=1)  # a row is not written at every request
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9 ._@-]")


def remember_attempt(session: Session, beginning: Beginning, next_path: str, *, now: datetime) -> None:
    """Keep what a login began with; what is left of old ones goes."""
    session.execute(delete(LoginAttempt).where(LoginAttempt.created_at <= now - ATTEMPT_FOR))
    session.add(
        LoginAttempt(
            state_hash=_hash(beginning.state),
            nonce=beginning.nonce,
            code_verifier=beginning.code_verifier,
            next_path=next_path,
            created_at=now,
        )
    )


def take_attempt(session: Session, state: str, *, now: datetime) -> LoginAttempt:
    """What a login began with; it is good once.

    Raises
    ------
    OidcError
        If there is none of this state, or it was begun too long ago.
    """
    attempt = session.get(LoginAttempt, _hash(state), with_for_update=True)
    if attempt is not None:
        session.delete(attempt)
        session.flush()
    if attempt is None or attempt.created_at <= now - ATTEMPT_FOR:
        raise OidcError(
            "LOGIN_EXPIRED", "This login was not begun here, or too long ago.", remedy="Log in again."
        )
    return attempt


def begin_session(session: Session, person: Person, rules: OidcRules, *, now: datetime) -> tuple[ApiKey, str]:
    """Let a person in: the key that stands for them, and the secret of their session.

    Raises
    ------
    OidcError
        If their access was revoked.
    """
    key_id = hashlib.sha256(f"{rules.issuer}\n{person.subject}".encode()).hexdigest()[:32]
    key = session.get(ApiKey, key_id)
    if key is None:
        key = ApiKey(
            key_id=key_id,
            name=_free_name(session, person.name, key_id),
            role=person.role,
            key_hash=hash_secret(secrets.token_urlsafe(32)),  # of a secret that nobody has
            created_at=now,
        )
        session.add(key)
        session.flush()
        detail = {"name": key.name, "role": key.role}
        record_event(session, "person.known", actor=key.name, at=now, subject=key_id, detail=detail)
    elif key.revoked_at is not None:
        raise OidcError("ACCESS_REVOKED", "This person's access was revoked.", remedy="Ask an administrator.")
    key.role = person.role  # as the provider says it today
    session.execute(delete(PersonSession).where(PersonSession.expires_at <= now))
    secret = secrets.token_urlsafe(32)
    session.add(
        PersonSession(
            session_hash=_hash(secret),
            key_id=key_id,
            created_at=now,
            last_seen_at=now,
            expires_at=now + timedelta(seconds=rules.longest_s),
            id_token=person.id_token,
        )
    )
    return key, secret


def find_session(
    session: Session, secret: str, rules: OidcRules, *, now: datetime
) -> tuple[ApiKey, PersonSession] | None:
    """Whose session a secret is; None if there is none, or it is over."""
    found = session.get(PersonSession, _hash(secret))
    if found is None or now >= found.expires_at:
        return None
    if now - found.last_seen_at >= timedelta(seconds=rules.idle_s):
        return None
    key = session.get(ApiKey, found.key_id)
    if key is None or key.revoked_at is not None:
        return None
    return key, found


def is_due(found: PersonSession, now: datetime) -> bool:
    """True if it is time to note that the session is in use."""
    return now - found.last_seen_at >= _SEEN_EVERY


def see_session(session: Session, secret: str, *, now: datetime) -> None:
    """Note that a session is in use."""
    found = session.get(PersonSession, _hash(secret))
    if found is not None:
        found.last_seen_at = now


def end_session(session: Session, secret: str) -> PersonSession | None:
    """End a session; what it was, or None if there was none."""
    found = session.get(PersonSession, _hash(secret))
    if found is not None:
        session.delete(found)
    return found


def csrf_token(secret: str) -> str:
    """What a request of a session that changes something must carry: a page elsewhere cannot know it."""
    return hmac.new(secret.encode(), b"segnode csrf", hashlib.sha256).hexdigest()


def is_csrf_token(secret: str, token: str) -> bool:
    """True if the token belongs to the session; takes the same time for every wrong one."""
    return hmac.compare_digest(csrf_token(secret).encode(), token.encode())


def _free_name(session: Session, name: str, key_id: str) -> str:
    """The person's name as it can stand in the audit trail, and is nobody else's."""
    usable = _NOT_IN_A_NAME.sub(".", name).lstrip(" ._@-")[:48].rstrip() or "person"
    taken = session.scalar(select(ApiKey.key_id).where(ApiKey.name == usable))
    return usable if taken is None else f"{usable} {key_id[:12]}"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
