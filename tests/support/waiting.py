"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable

# Only a test that fails waits for so much longer than it asked; a busy machine is some times slower.
_PATIENCE = 4.0


def wait_until(
    condition: Callable[[], object], within_s: float = 60.0, describe: Callable[[], str] = lambda: ""
) -> None:
    """Return as soon as the condition holds.

    Parameters
    ----------
    condition : callable
        Asked every 20 ms.
    within_s : float
        By when it holds on a machine that does nothing else, with much to spare.
    describe : callable
        What the error says of the state of things.
    """
    deadline = time.monotonic() + _PATIENCE * within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {_PATIENCE * within_s:g} s: {describe()}"
        time.sleep(0.02)
