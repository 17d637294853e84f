"""What processes on one or many hosts have promised of the spool's space, so that together they fit.

Each process keeps one row with the sum of its promises, rounded up, so that the row changes once for many
megabytes and not for every packet. The row of a process that is dead, or that said nothing for an hour, does
not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from sqlalchemy import delete, select

from service.lease import LeaseOwner, is_proven_dead
from service.records.database import Records
from service.records.fleet_tables import UploadPromise
from service.records.tables import new_identifier

STEP_BYTES = 64 << 20
_RENEW_EVERY_S = 60.0
_VOID_AFTER = timedelta(hours=1)


class SharedPromises:
    """The promises of this process among those of all."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._desk_id = new_identifier()
        self._owner = str(LeaseOwner.of_this_process())
        self._steps = 0
        self._written_at = float("-inf")

    def share(self, promised_bytes: int, check_space: Callable[[int], None]) -> None:
        """Say how much this process has promised in all.

        Parameters
        ----------
        check_space : callable
            Called with what everyone has promised, where this process promises more than before; what it
            raises is raised here, and nothing has changed then.
        """
        steps = -(-promised_bytes // STEP_BYTES)
        if steps == self._steps and (not steps or time.monotonic() - self._written_at < _RENEW_EVERY_S):
            return
        with self._records.write(alone=True) as session:
            now = self._records.now()
            others = session.scalars(
                select(UploadPromise).where(UploadPromise.desk_id != self._desk_id)
            ).all()
            void = [o for o in others if o.renewed_at < now - _VOID_AFTER or is_proven_dead(o.owner)]
            if steps > self._steps:
                check_space(promised_bytes + sum(o.size_bytes for o in others if o not in void))
            gone = [self._desk_id, *(each.desk_id for each in void)]
            session.execute(delete(UploadPromise).where(UploadPromise.desk_id.in_(gone)))
            if steps:
                session.add(
                    UploadPromise(
                        desk_id=self._desk_id,
                        owner=self._owner,
                        size_bytes=steps * STEP_BYTES,
                        renewed_at=now,
                    )
                )
        self._steps, self._written_at = steps, time.monotonic()
