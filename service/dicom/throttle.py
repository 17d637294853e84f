"""Say a thing once: a peer that tries again for ever must not fill the audit trail with one sentence."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable


class Throttle:
    """Lets each key pass once an interval.

    Parameters
    ----------
    interval_s : float
        How long a key that has passed is held back.
    capacity : int
        How many keys are remembered; the oldest is forgotten first.
    clock : callable
        A monotonic clock in seconds.
    """

    def __init__(
        self, *, interval_s: float = 3600.0, capacity: int = 4096, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s = interval_s
        self._capacity = capacity
        self._clock = clock
        self._passed_at: OrderedDict[Hashable, float] = OrderedDict()
        self._lock = threading.Lock()

    def passes(self, key: Hashable) -> bool:
        """True if the key has not passed within the interval; it has passed now."""
        now = self._clock()
        with self._lock:
            if now - self._passed_at.get(key, float("-inf")) < self._interval_s:
                return False
            self._passed_at[key] = now
            self._passed_at.move_to_end(key)
            if len(self._passed_at) > self._capacity:
                self._passed_at.popitem(last=False)
            return True
