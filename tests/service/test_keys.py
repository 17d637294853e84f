"""Keys: shown once, kept as a hash, and worth nothing once they are revoked or expired."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, text

from service.errors import ConflictError, NotFoundError
from service.keys import authenticate, create_key, list_keys, revoke
from service.records.database import Records
from service.records.tables import ApiKey, Event, Role

pytestmark = pytest.mark.both_engines

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC).replace(tzinfo=None)


def test_a_secret_is_kept_as_its_hash_alone(records: Records) -> None:
    with records.write() as session:
        key_id, secret = create_key(session, "ward 7", Role.UPLOADER, now=NOW)
    with records.read() as session:
        row = session.get_one(ApiKey, key_id)
        assert row.key_hash == hashlib.sha256(secret.encode()).hexdigest()
        for table in ("api_key", "event"):
            everything = str(session.execute(text(f"SELECT * FROM {table}")).all())
            assert secret not in everything
            assert secret.removeprefix("sgn_") not in everything


def test_secrets_are_long_random_and_different(records: Records) -> None:
    with records.write() as session:
        secrets = [create_key(session, f"key {i}", Role.ADMIN, now=NOW)[1] for i in range(20)]
    assert len(set(secrets)) == 20
    assert all(secret.startswith("sgn_") and len(secret) == 47 for secret in secrets)  # 4 + 256 bits


def test_the_right_secret_is_the_only_one_that_works(records: Records) -> None:
    with records.write() as session:
        key_id, secret = create_key(session, "a", Role.OPERATOR, now=NOW)
        _, other = create_key(session, "b", Role.ADMIN, now=NOW)
    with records.read() as session:
        found = authenticate(session, secret, NOW)
        assert found is not None
        assert (found.key_id, found.role) == (key_id, Role.OPERATOR)
        wrong = [
            "",
            "sgn_",
            secret[:-1],
            secret + "A",
            secret.upper(),
            secret.removeprefix("sgn_"),
            found.key_hash,
            f"{secret}\n",
            secret[:4] + other[4:20] + secret[20:],
            "sgn_" + "é" * 43,
        ]
        assert [authenticate(session, each, NOW) for each in wrong] == [None] * len(wrong)


def test_a_key_ends_at_its_expiry(records: Records) -> None:
    expiry = NOW + timedelta(days=1)
    with records.write() as session:
        _, secret = create_key(session, "a", Role.UPLOADER, expiry, now=NOW)
    with records.read() as session:
        assert authenticate(session, secret, expiry - timedelta(microseconds=1)) is not None
        assert authenticate(session, secret, expiry) is None


def test_a_revoked_key_is_worth_nothing_and_stays_listed(records: Records) -> None:
    with records.write() as session:
        key_id, secret = create_key(session, "a", Role.UPLOADER, now=NOW)
        revoke(session, key_id, now=NOW, actor="cli")
    with records.write() as session:
        revoke(session, key_id, now=NOW + timedelta(days=1))  # again: the first time stands
    with records.read() as session:
        assert authenticate(session, secret, NOW) is None
        assert [(k.key_id, k.revoked_at) for k in list_keys(session)] == [(key_id, NOW)]
        kinds = session.scalars(select(Event.kind).order_by(Event.event_id)).all()
        assert kinds == ["key.created", "key.revoked"]


def test_revoking_an_unknown_key_says_so(records: Records) -> None:
    with records.write() as session, pytest.raises(NotFoundError, match="no key"):
        revoke(session, "0" * 32, now=NOW)


@pytest.mark.parametrize("name", ["", " ", "a" * 65, "a\nb", "-a", "a/b", "é"])
def test_a_name_that_would_spoil_the_audit_trail_is_refused(records: Records, name: str) -> None:
    with records.write() as session, pytest.raises(ConflictError, match="name"):
        create_key(session, name, Role.UPLOADER, now=NOW)


def test_a_name_is_never_used_twice_even_after_revocation(records: Records) -> None:
    with records.write() as session:
        key_id, _ = create_key(session, "a", Role.UPLOADER, now=NOW)
        revoke(session, key_id, now=NOW)
    with records.write() as session, pytest.raises(ConflictError, match="already"):
        create_key(session, "a", Role.ADMIN, now=NOW)


def test_a_key_that_would_have_expired_is_not_made(records: Records) -> None:
    with records.write() as session, pytest.raises(ConflictError, match="expired already"):
        create_key(session, "a", Role.ADMIN, NOW, now=NOW)
