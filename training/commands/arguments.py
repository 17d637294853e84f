"""Arguments that several commands take, and how their text is read."""

from __future__ import annotations

from fractions import Fraction

import typer


def fraction(text: str) -> Fraction:
    """Read a width such as ``1/4`` or ``0.25``.

    Raises
    ------
    typer.BadParameter
        If it is not a number.
    """
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise typer.BadParameter(f"{text!r} is not a fraction such as 1/4") from error
