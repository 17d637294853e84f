"""The HTTP interface: a thin adapter around the records, the spool and the registry."""

from service.api.app import create_app

__all__ = ["create_app"]
