"""What every endpoint works with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated

from fastapi import Depends, Request

from models.registry import Registry
from service.api.rates import Buckets
from service.oidc import Provider
from service.records.database import Records
from service.settings import Settings
from service.spool import Spool
from service.uploads import UploadDesk


@dataclass(frozen=True)
class ApiState:
    """The parts of the node that the HTTP interface is a face of."""

    settings: Settings
    records: Records
    spool: Spool
    registry: Registry
    clock: Callable[[], datetime]
    desk: UploadDesk
    provider: Provider | None = None  # where people log in
    key_rates: Buckets = field(default_factory=lambda: Buckets(None))
    adding_model: asyncio.Lock = field(default_factory=asyncio.Lock)  # golden cases one at a time


def get_state(request: Request) -> ApiState:
    """What the application was made with."""
    state = request.app.state.api
    assert isinstance(state, ApiState)
    return state


State = Annotated[ApiState, Depends(get_state)]
