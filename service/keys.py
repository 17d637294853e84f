"""Keys of the HTTP interface: made once, shown once, kept as a hash.

A secret is ``sgn_`` and 256 random bits. Such a secret cannot be guessed or looked up in a dictionary, so
one round of SHA-256 protects it at rest as well as a slow password hash would, and costs a request nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.errors import ConflictError, NotFoundError
from service.records.database import change
from service.records.events import record_event
from service.records.tables import ApiKey, Role

PREFIX = "sgn_"
_SECRET_BYTES = 32
_SECRET = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{43}}")  # 32 bytes in URL-safe base64 without padding
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}")


def hash_secret(secret: str) -> str:
    """SHA-256 of a secret, 64 hexadecimal digits: what the records keep of it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create_key(
    session: Session,
    name: str,
    role: Role,
    expires_at: datetime | None = None,
    *,
    now: datetime,
    actor: str = "cli",
) -> tuple[str, str]:
    """Make a key. The secret is returned here and never again.

    Parameters
    ----------
    name : str
        Who or what uses the key; it stands in the audit trail as the actor. Up to 64 letters, digits,
        spaces and ``._@-``, unique among all keys ever made.
    expires_at, now : datetime
        UTC, naive, as every time in the records.
    actor : str
        Who makes it, for the audit trail.

    Returns
    -------
    (key_id, secret)

    Raises
    ------
    ConflictError
        If the name is not usable or was used before, or the key would have expired already.
    """
    if not _NAME.fullmatch(name):
        raise ConflictError(
            f"A key's name cannot be {name!r}.",
            remedy="Use up to 64 letters, digits, spaces and . _ @ -, starting with a letter or a digit.",
        )
    if expires_at is not None and expires_at <= now:
        raise ConflictError(
            f"The key would have expired already, at {expires_at.isoformat()} UTC.",
            remedy="Give a time to come, in UTC.",
        )
    if session.scalar(select(ApiKey.key_id).where(ApiKey.name == name)) is not None:
        raise ConflictError(
            f"There is a key named {name!r} already.",
            remedy="Take another name: the audit trail tells keys apart by their names.",
        )
    secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    key = ApiKey(name=name, role=role, key_hash=hash_secret(secret), created_at=now, expires_at=expires_at)
    session.add(key)
    session.flush()
    record_event(
        session, "key.created", actor=actor, at=now, subject=key.key_id, detail={"name": name, "role": role}
    )
    return key.key_id, secret


def authenticate(session: Session, secret: str, now: datetime) -> ApiKey | None:
    """The key that a secret belongs to; None if it is unknown, revoked or expired.

    The row is found by the hash, which tells whoever measures the time nothing about the secret; the hash is
    compared once more in constant time, so that no index and no collation decides.
    """
    if not _SECRET.fullmatch(secret):
        return None
    key_hash = hash_secret(secret)
    key = session.scalar(select(ApiKey).where(ApiKey.key_hash == key_hash))
    if key is None or not hmac.compare_digest(key.key_hash, key_hash):
        return None
    return key if is_alive(key, now) else None


def is_alive(key: ApiKey, now: datetime) -> bool:
    """True if a key opens anything at this time: it is neither revoked nor expired."""
    return key.revoked_at is None and (key.expires_at is None or key.expires_at > now)


def revoke(session: Session, key_id: str, *, now: datetime, actor: str = "cli") -> None:
    """End a key's life; its jobs stay. Revoking it again changes nothing.

    Raises
    ------
    NotFoundError
        If there is no such key.
    """
    if session.get(ApiKey, key_id) is None:
        raise NotFoundError(f"There is no key {key_id}.", remedy="List the keys to see their identifiers.")
    revoked = change(
        session,
        update(ApiKey).where(ApiKey.key_id == key_id, ApiKey.revoked_at.is_(None)).values(revoked_at=now),
    )
    if revoked:
        record_event(session, "key.revoked", actor=actor, at=now, subject=key_id)


def list_keys(session: Session) -> list[ApiKey]:
    """Every key ever made, oldest first, the revoked and expired ones too."""
    return list(session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.name)))
