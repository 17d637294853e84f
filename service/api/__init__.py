"""The HTTP interface: a thin adapter around the records, the spool and the registry."""
