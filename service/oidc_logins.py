"""Logins at the identity provider that are under way, and the people that it has let in.

A person is kept as a key without a secret: what they upload has an owner, and ``segnode keys revoke`` ends
their access. Their sessions are as everyone's: :mod:`service.sessions`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.keys import hash_secret
from service.oidc import Beginning, OidcError, Person
from service.records.events import record_event
from service.records.login_tables import LoginAttempt
from service.records.tables import ApiKey
from service.security_rules import OidcRules

ATTEMPT_FOR = timedelta(minutes=10)
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9 ._@-]")


def remember_attempt(session: Session, beginning: Beginning, next_path: str, *, now: datetime) -> None:
    """Keep what a login began with; what is left of old ones goes."""
    session.execute(delete(LoginAttempt).where(LoginAttempt.created_at <= now - ATTEMPT_FOR))
    session.add(
        LoginAttempt(
            state_hash=hash_secret(beginning.state),
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
    attempt = session.get(LoginAttempt, hash_secret(state), with_for_update=True)
    if attempt is not None:
        session.delete(attempt)
        session.flush()
    if attempt is None or attempt.created_at <= now - ATTEMPT_FOR:
        raise OidcError(
            "LOGIN_EXPIRED", "This login was not begun here, or too long ago.", remedy="Log in again."
        )
    return attempt


def let_in(session: Session, person: Person, rules: OidcRules, *, now: datetime) -> ApiKey:
    """The key that stands for a person, with the role that the provider says today.

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
    key.role = person.role
    return key


def _free_name(session: Session, name: str, key_id: str) -> str:
    """The person's name as it can stand in the audit trail, and is nobody else's."""
    usable = _NOT_IN_A_NAME.sub(".", name).lstrip(" ._@-")[:48].rstrip() or "person"
    taken = session.scalar(select(ApiKey.key_id).where(ApiKey.name == usable))
    return usable if taken is None else f"{usable} {key_id[:12]}"
