"""Lists in pages, newest first, by key and not by number: a page stays true while rows are added."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Path, Query
from sqlalchemy import Select, SQLColumnExpression, tuple_
from sqlalchemy.orm import Session

from service.api.problem import ProblemError

Limit = Annotated[int, Query(ge=1, le=200, description="How many at most.")]
Identifier = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", examples=["0f8fad5bd9cb469fa16570867728950e"])]
AfterIdentifier = Annotated[
    str | None, Query(pattern=r"^[0-9a-f]{32}$", description="`next` of the page before.")
]
StudyUidAfter = Annotated[
    str | None, Query(pattern=r"^[0-9.]{1,64}$", description="`next` of the page before.")
]
ModelName = Annotated[str, Path(min_length=1, max_length=64, examples=["hippocampus"])]
Version = Annotated[str, Path(min_length=1, max_length=64, examples=["1.0.0"])]
StudyUid = Annotated[str, Path(pattern=r"^[0-9.]{1,64}$", examples=["1.2.826.0.1.3680043.8.498.1"])]


def page(
    session: Session,
    query: Select[Any],
    *,
    time: SQLColumnExpression[Any],
    key: SQLColumnExpression[Any],
    after: str | None,
    limit: int,
) -> list[Any]:
    """Up to ``limit + 1`` rows of a query, newest first, from the one behind ``after`` on.

    Parameters
    ----------
    time, key : column
        What the list is sorted by, and what tells its rows apart.

    Raises
    ------
    ProblemError
        If the row that ``after`` names is not in the list (any more).
    """
    rows = query.order_by(time.desc(), key.desc()).limit(limit + 1)
    if after is not None:
        position = session.execute(query.with_only_columns(time).where(key == after)).scalar()
        if position is None:
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "PAGE_GONE",
                "The list has no entry that `after` names; it may have been deleted.",
                remedy="Read the list from its beginning.",
            )
        rows = rows.where(tuple_(time, key) < (position, after))
    return list(session.execute(rows).all())
