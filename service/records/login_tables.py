"""The tables of people who are at the operator's page: logins under way, and sessions."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from service.records.tables import Base


class LoginAttempt(Base):
    """A login that was begun at the identity provider. It is used once, soon, or never."""

    __tablename__ = "login_attempt"

    state_hash: Mapped[str] = mapped_column(String(64), primary_key=True)  # SHA-256 of what the browser holds
    nonce: Mapped[str] = mapped_column(String(64))
    code_verifier: Mapped[str] = mapped_column(String(128))
    next_path: Mapped[str] = mapped_column(String(512), default="")
    created_at: Mapped[datetime]


class PersonSession(Base):
    """Somebody at the page. The browser holds a secret; only its hash is kept."""

    __tablename__ = "person_session"

    session_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_key.key_id"), index=True)
    created_at: Mapped[datetime]
    last_seen_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    id_token: Mapped[str] = mapped_column(default="")  # a hint for the provider when the person logs out
