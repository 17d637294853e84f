"""``/audit``: who did what."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import select

from service.api.access import CallerDep
from service.api.paging import Limit
from service.api.schemas import EventDocument, Page, event_document
from service.api.state import State
from service.records.tables import Event

router = APIRouter(tags=["audit"])


@router.get("/audit")
def list_events(
    state: State,
    _caller: CallerDep,
    kind: Annotated[str | None, Query(pattern=r"^[a-z_.]{1,64}$")] = None,
    alert: Annotated[
        bool | None, Query(description="Only what someone should look at, or only the rest.")
    ] = None,
    limit: Limit = 50,
    after: Annotated[int | None, Query(ge=1, lt=2**63, description="`next` of the page before.")] = None,
) -> Page[EventDocument]:
    """The audit trail, newest first."""
    query = select(Event).order_by(Event.event_id.desc()).limit(limit + 1)
    if kind is not None:
        query = query.where(Event.kind == kind)
    if alert is not None:
        query = query.where(Event.alert.is_(alert))
    if after is not None:
        query = query.where(Event.event_id < after)
    with state.records.read() as session:
        events = session.scalars(query).all()
    items = [event_document(event) for event in events[:limit]]
    return Page(items=items, next=str(items[-1].event_id) if len(events) > limit else None)
