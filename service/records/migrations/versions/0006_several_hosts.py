"""Workers, promised space and the needs of jobs; sizes past 2 GiB on engines whose integers are short."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_SIZES = ("instance", "result")


def upgrade() -> None:
    for table in _SIZES:
        with op.batch_alter_table(table, schema=None) as batch_op:
            batch_op.alter_column("size_bytes", type_=sa.BigInteger(), existing_type=sa.Integer())
    op.create_table(
        "worker",
        sa.Column("owner", sa.String(length=128), nullable=False),
        sa.Column("host", sa.String(length=64), nullable=False),
        sa.Column("started_at", sa.DateTime(), nullable=False),
        sa.Column("beat_at", sa.DateTime(), nullable=False),
        sa.Column("bell_heard_at", sa.DateTime(), nullable=True),
        sa.Column("models", sa.JSON(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("owner"),
    )
    with op.batch_alter_table("worker", schema=None) as batch_op:
        batch_op.create_index("ix_worker_host", ["host"], unique=False)
    op.create_table(
        "upload_promise",
        sa.Column("desk_id", sa.String(length=32), nullable=False),
        sa.Column("owner", sa.String(length=128), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("renewed_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("desk_id"),
    )
    op.create_table(
        "job_need",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("more_than_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id"),
    )


def downgrade() -> None:
    op.drop_table("job_need")
    op.drop_table("upload_promise")
    with op.batch_alter_table("worker", schema=None) as batch_op:
        batch_op.drop_index("ix_worker_host")
    op.drop_table("worker")
    # size_bytes stays as wide as it is: sizes past 2 GiB would not fit, and the older release reads both.
