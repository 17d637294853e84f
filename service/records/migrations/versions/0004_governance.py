"""Gate, site cases, activations, shadow runs, storage commitment and purges."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "gate",
        sa.Column("gate_id", sa.String(length=32), nullable=False),
        sa.Column("model_name", sa.String(length=64), nullable=False),
        sa.Column("model_version", sa.String(length=64), nullable=False),
        sa.Column("model_digest", sa.String(length=64), nullable=False),
        sa.Column("against_version", sa.String(length=64), nullable=True),
        sa.Column("against_digest", sa.String(length=64), nullable=True),
        sa.Column(
            "state",
            sa.Enum("queued", "running", "passed", "failed", name="gatestate", native_enum=False, length=16),
            nullable=False,
        ),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(length=128), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(), nullable=True),
        sa.Column("requested_by", sa.String(length=128), nullable=False),
        sa.Column("requested_at", sa.DateTime(), nullable=False),
        sa.Column("finished_at", sa.DateTime(), nullable=True),
        sa.Column("report", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("gate_id"),
    )
    with op.batch_alter_table("gate", schema=None) as batch_op:
        batch_op.create_index("ix_gate_queue", ["state", "requested_at"], unique=False)
        batch_op.create_index(
            "ix_gate_version", ["model_name", "model_version", "requested_at"], unique=False
        )

    op.create_table(
        "shadow",
        sa.Column("shadow_id", sa.String(length=32), nullable=False),
        sa.Column("model_name", sa.String(length=64), nullable=False),
        sa.Column("model_version", sa.String(length=64), nullable=False),
        sa.Column("model_digest", sa.String(length=64), nullable=False),
        sa.Column("started_by", sa.String(length=128), nullable=False),
        sa.Column("started_at", sa.DateTime(), nullable=False),
        sa.Column("stopped_at", sa.DateTime(), nullable=True),
        sa.Column("stopped_by", sa.String(length=128), nullable=True),
        sa.PrimaryKeyConstraint("shadow_id"),
    )
    with op.batch_alter_table("shadow", schema=None) as batch_op:
        batch_op.create_index("ix_shadow_model", ["model_name", "stopped_at"], unique=False)

    op.create_table(
        "activation",
        sa.Column("activation_id", sa.String(length=32), nullable=False),
        sa.Column("model_name", sa.String(length=64), nullable=False),
        sa.Column("model_version", sa.String(length=64), nullable=False),
        sa.Column("model_digest", sa.String(length=64), nullable=False),
        sa.Column("previous_version", sa.String(length=64), nullable=True),
        sa.Column(
            "state",
            sa.Enum(
                "on_probation",
                "confirmed",
                "rolled_back",
                "replaced",
                "failed",
                name="activationstate",
                native_enum=False,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("gate_id", sa.String(length=32), nullable=True),
        sa.Column("override_reason", sa.String(), nullable=True),
        sa.Column("activated_by", sa.String(length=128), nullable=False),
        sa.Column("activated_at", sa.DateTime(), nullable=False),
        sa.Column("ended_at", sa.DateTime(), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(
            ["gate_id"],
            ["gate.gate_id"],
        ),
        sa.PrimaryKeyConstraint("activation_id"),
    )
    with op.batch_alter_table("activation", schema=None) as batch_op:
        batch_op.create_index("ix_activation_state", ["state", "model_name"], unique=False)

    op.create_table(
        "comparison",
        sa.Column("comparison_id", sa.String(length=32), nullable=False),
        sa.Column("shadow_id", sa.String(length=32), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("study_instance_uid", sa.String(length=64), nullable=True),
        sa.Column("active_version", sa.String(length=64), nullable=True),
        sa.Column(
            "state",
            sa.Enum("done", "failed", name="comparisonstate", native_enum=False, length=16),
            nullable=False,
        ),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=True),
        sa.Column("active_seconds", sa.Double(), nullable=True),
        sa.Column("peak_bytes", sa.BigInteger(), nullable=True),
        sa.Column("code", sa.String(length=64), nullable=True),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.job_id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["shadow_id"],
            ["shadow.shadow_id"],
        ),
        sa.PrimaryKeyConstraint("comparison_id"),
        sa.UniqueConstraint("shadow_id", "job_id"),
    )
    with op.batch_alter_table("comparison", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_comparison_job_id"), ["job_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_comparison_shadow_id"), ["shadow_id"], unique=False)

    op.create_table(
        "purge",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("purged_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.job_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id"),
    )
    with op.batch_alter_table("purge", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_purge_purged_at"), ["purged_at"], unique=False)

    op.create_table(
        "site_case",
        sa.Column("case_id", sa.String(length=32), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("model_name", sa.String(length=64), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("approved_by", sa.String(length=128), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["job.job_id"],
        ),
        sa.PrimaryKeyConstraint("case_id"),
        sa.UniqueConstraint("job_id"),
    )
    with op.batch_alter_table("site_case", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_site_case_model_name"), ["model_name"], unique=False)

    op.create_table(
        "commitment",
        sa.Column("delivery_id", sa.String(length=32), nullable=False),
        sa.Column("transaction_uid", sa.String(length=64), nullable=False),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.DateTime(), nullable=False),
        sa.Column("requested_at", sa.DateTime(), nullable=False),
        sa.Column("committed_at", sa.DateTime(), nullable=True),
        sa.Column("last_error", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["delivery_id"], ["delivery.delivery_id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("delivery_id"),
    )
    with op.batch_alter_table("commitment", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_commitment_transaction_uid"), ["transaction_uid"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("commitment", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_commitment_transaction_uid"))

    op.drop_table("commitment")
    with op.batch_alter_table("site_case", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_site_case_model_name"))

    op.drop_table("site_case")
    with op.batch_alter_table("purge", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_purge_purged_at"))

    op.drop_table("purge")
    with op.batch_alter_table("comparison", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_comparison_shadow_id"))
        batch_op.drop_index(batch_op.f("ix_comparison_job_id"))

    op.drop_table("comparison")
    with op.batch_alter_table("activation", schema=None) as batch_op:
        batch_op.drop_index("ix_activation_state")

    op.drop_table("activation")
    with op.batch_alter_table("shadow", schema=None) as batch_op:
        batch_op.drop_index("ix_shadow_model")

    op.drop_table("shadow")
    with op.batch_alter_table("gate", schema=None) as batch_op:
        batch_op.drop_index("ix_gate_version")
        batch_op.drop_index("ix_gate_queue")

    op.drop_table("gate")
