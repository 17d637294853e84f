"""Programs of others that tests talk to. Where one is missing a test skips; with CI set it fails."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

_PLACES = (
    Path(sys.executable).parent,
    Path("/usr/sbin"),
    Path("/usr/local/sbin"),
    *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True),  # Debian keeps every version apart
)


def program(name: str, package: str) -> str:
    """Path of a program; ``package`` is what installs it."""
    found = shutil.which(name) or next(
        (str(place / name) for place in _PLACES if os.access(place / name, os.X_OK)), None
    )
    if found is not None:
        return found
    message = f"{name} is not installed here (package {package})"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
