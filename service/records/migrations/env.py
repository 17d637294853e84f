"""Runs migrations on the connection that ``service.records.migrate`` hands over."""

from alembic import context

from service.records import fleet_tables, governance_tables, login_tables  # noqa: F401 - their tables belong to the metadata
from service.records.tables import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=connection.dialect.name == "sqlite",  # SQLite alters a table by copying it
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
