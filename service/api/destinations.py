"""``/destinations``: where results are sent, and whether a destination answers."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func, select

from service.api.access import CallerDep
from service.api.problem import problem_responses
from service.api.state import State
from service.dicom.send import OutcomeKind, echo
from service.errors import NotFoundError
from service.records.events import record_event
from service.records.tables import Delivery, DeliveryState

router = APIRouter(tags=["destinations"])

DestinationName = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$", examples=["pacs"])]


class DestinationDocument(BaseModel):
    """A destination of the configuration, and what waits for it."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(examples=["pacs"])
    ae_title: str
    host: str
    port: int
    pending: int = Field(description="Deliveries that are to be made yet.")
    parked: int = Field(description="Deliveries that were set aside for a person.")


class EchoDocument(BaseModel):
    """What a destination answered to C-ECHO."""

    model_config = ConfigDict(extra="forbid")

    name: str
    answered: bool
    error: str | None = Field(description="Why it did not answer; null where it did.")


@router.get("/destinations")
def list_destinations(state: State, _caller: CallerDep) -> list[DestinationDocument]:
    """Every destination, in the order of the configuration."""
    with state.records.read() as session:
        rows = session.execute(
            select(Delivery.destination, Delivery.state, func.count())
            .where(Delivery.state.in_((DeliveryState.PENDING, DeliveryState.PARKED)))
            .group_by(Delivery.destination, Delivery.state)
        ).all()
    counts = {(destination, of): count for destination, of, count in rows}
    return [
        DestinationDocument(
            name=each.name,
            ae_title=each.ae_title,
            host=each.host,
            port=each.port,
            pending=counts.get((each.name, DeliveryState.PENDING), 0),
            parked=counts.get((each.name, DeliveryState.PARKED), 0),
        )
        for each in state.settings.destinations
    ]


@router.post("/destinations/{name}/echo", responses=problem_responses(404))
def echo_destination(name: DestinationName, state: State, caller: CallerDep) -> EchoDocument:
    """Ask a destination by C-ECHO whether it is there, as the node would when it sends."""
    destination = state.settings.destination(name)
    if destination is None:
        raise NotFoundError(
            f"There is no destination {name!r}.", remedy="List the destinations to see which are configured."
        )
    calling = destination.calling_ae_title or state.settings.dicom.ae_title
    outcome = echo(destination, calling_ae_title=calling)
    answered = outcome.kind is OutcomeKind.DELIVERED
    with state.records.write() as session:
        record_event(
            session,
            "destination.echoed",
            actor=caller.name,
            at=state.clock(),
            subject=name,
            detail={"answered": answered},
        )
    return EchoDocument(name=name, answered=answered, error=None if answered else outcome.error)
