"""The operator's page: server-rendered, without a script and without the internet, over the HTTP interface.

Every page calls the same functions that the interface calls, under the same table of roles.
"""

from service.console.pages import build_console

__all__ = ["build_console"]
