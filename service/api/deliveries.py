"""``/deliveries``: what is on its way to a destination, has arrived, or was set aside for a person."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import select

from service.api.access import CallerDep
from service.api.paging import AfterIdentifier, Identifier, Limit, page
from service.api.problem import problem_responses
from service.api.schemas import DeliveryDocument, Page, delivery_document
from service.api.state import State
from service.records.deliveries import retry_delivery as retry_delivery_now
from service.records.events import record_event
from service.records.tables import Delivery, DeliveryState

router = APIRouter(tags=["deliveries"])


@router.get("/deliveries")
def list_deliveries(
    state: State,
    _caller: CallerDep,
    delivery_state: Annotated[DeliveryState | None, Query(alias="state")] = None,
    destination: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = None,
    limit: Limit = 50,
    after: AfterIdentifier = None,
) -> Page[DeliveryDocument]:
    """Deliveries, newest first."""
    query = select(Delivery)
    if delivery_state is not None:
        query = query.where(Delivery.state == delivery_state)
    if destination is not None:
        query = query.where(Delivery.destination == destination)
    with state.records.read() as session:
        rows = page(
            session, query, time=Delivery.created_at, key=Delivery.delivery_id, after=after, limit=limit
        )
    items = [delivery_document(row.Delivery) for row in rows[:limit]]
    return Page(items=items, next=items[-1].delivery_id if len(rows) > limit else None)


@router.post("/deliveries/{delivery_id}/retry", responses=problem_responses(404, 409))
def retry_delivery(delivery_id: Identifier, state: State, caller: CallerDep) -> DeliveryDocument:
    """Put a parked delivery back into the queue."""
    now = state.clock()
    with state.records.write() as session:
        delivery = retry_delivery_now(session, delivery_id, now=now)
        record_event(session, "delivery.retried", actor=caller.name, at=now, subject=delivery_id)
        return delivery_document(delivery)
