"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}

A table that may be live is changed online: indexes CONCURRENTLY in `op.get_context().autocommit_block()`, other locks
by `db.migration_locks.lock_in_stints`, every statement safe to run again after a crash. No import of `db.models`: a revision never changes.
"""

from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}

# Tables whose rows `downgrade` drops.
drops: tuple[str, ...] = ()


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
