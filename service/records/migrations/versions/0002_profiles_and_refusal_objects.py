"""What a result was made for, and which refusals are to leave."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("result", schema=None) as batch_op:
        batch_op.add_column(sa.Column("profile", sa.String(length=16), nullable=True))
        batch_op.add_column(sa.Column("withheld", sa.String(), nullable=True))
    state = sa.Enum("none", "wanted", "made", "withheld", name="refusalobject", native_enum=False, length=16)
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("refusal_destinations", sa.JSON(), nullable=False, server_default=sa.text("'[]'"))
        )
        batch_op.add_column(sa.Column("refusal_object", state, nullable=False, server_default="none"))
        batch_op.create_index("ix_job_refusal_object", ["refusal_object", "state"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_index("ix_job_refusal_object")
        batch_op.drop_column("refusal_object")
        batch_op.drop_column("refusal_destinations")
    with op.batch_alter_table("result", schema=None) as batch_op:
        batch_op.drop_column("withheld")
        batch_op.drop_column("profile")
