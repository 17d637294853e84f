"""The chain of the audit trail, where its actors acted from and with what outcome; logins of people."""

from __future__ import annotations

import hashlib
import json

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("event", schema=None) as batch_op:
        batch_op.add_column(sa.Column("origin", sa.String(length=64), nullable=False, server_default=""))
        batch_op.add_column(
            sa.Column("outcome", sa.String(length=16), nullable=False, server_default="success")
        )
        batch_op.add_column(sa.Column("chain_index", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("digest", sa.String(length=64), nullable=True))
        batch_op.create_index("ix_event_chain_index", ["chain_index"], unique=True)
    _seal()
    op.create_table(
        "login_attempt",
        sa.Column("state_hash", sa.String(length=64), nullable=False),
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("code_verifier", sa.String(length=128), nullable=False),
        sa.Column("next_path", sa.String(length=512), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("state_hash"),
    )
    op.create_table(
        "person_session",
        sa.Column("session_hash", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("last_seen_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
        sa.Column("id_token", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["api_key.key_id"]),
        sa.PrimaryKeyConstraint("session_hash"),
    )
    with op.batch_alter_table("person_session", schema=None) as batch_op:
        batch_op.create_index("ix_person_session_key_id", ["key_id"], unique=False)


def downgrade() -> None:
    op.drop_table("person_session")
    op.drop_table("login_attempt")
    with op.batch_alter_table("event", schema=None) as batch_op:
        batch_op.drop_index("ix_event_chain_index")
        batch_op.drop_column("digest")
        batch_op.drop_column("chain_index")
        batch_op.drop_column("outcome")
        batch_op.drop_column("origin")


def _seal() -> None:
    """Give the lines that are there their places, in the order in which they were added."""
    event = sa.table(
        "event",
        sa.column("event_id", sa.Integer()),
        sa.column("at", sa.DateTime()),
        sa.column("kind", sa.String()),
        sa.column("alert", sa.Boolean()),
        sa.column("actor", sa.String()),
        sa.column("subject", sa.String()),
        sa.column("detail", sa.JSON()),
        sa.column("chain_index", sa.BigInteger()),
        sa.column("digest", sa.String()),
    )
    connection = op.get_bind()
    digest = "0" * 64
    present = (column for column in event.c if column.name not in ("chain_index", "digest"))
    for index, row in enumerate(connection.execute(sa.select(*present).order_by(event.c.event_id)).all(), 1):
        line = {
            "index": index,
            "at": row.at.isoformat(timespec="microseconds"),
            "kind": row.kind,
            "alert": row.alert,
            "actor": row.actor,
            "origin": "",
            "outcome": "success",
            "subject": row.subject,
            "detail": row.detail,
        }
        written = json.dumps(line, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(f"{digest}\n{written}".encode()).hexdigest()
        connection.execute(
            sa.update(event).where(event.c.event_id == row.event_id).values(chain_index=index, digest=digest)
        )
