"""Which channel of its model an input of a job was taken for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("job_input", schema=None) as batch_op:
        batch_op.add_column(sa.Column("channel_name", sa.String(length=64), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("job_input", schema=None) as batch_op:
        batch_op.drop_column("channel_name")
