"""The report of an acceptance as a PDF: what was tried on which node, each check, and a place to sign."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from io import BytesIO
from xml.sax.saxutils import escape

from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import getSampleStyleSheet
from reportlab.lib.units import mm
from reportlab.platypus import Flowable, Paragraph, SimpleDocTemplate, Spacer, Table, TableStyle

from service.acceptance import Check

_NOTICE = (
    "segnode is research software. It is not a medical device; its results are unverified and not for "
    "diagnosis or treatment. This report says how one installation behaved with one test study."
)


def render_report(facts: Sequence[tuple[str, str]], checks: Sequence[Check], *, at: datetime) -> bytes:
    """The PDF. ``facts`` are lines about node, model and study; ``at`` is UTC."""
    styles = getSampleStyleSheet()
    small = styles["BodyText"]

    def cell(text: str) -> Paragraph:
        return Paragraph(escape(text), small)

    passed = bool(checks) and all(check.passed for check in checks)
    rows = [[cell("Check"), cell("Result"), cell("Found")]]
    rows += [[cell(c.what), cell("passed" if c.passed else "FAILED"), cell(c.found)] for c in checks]
    story: list[Flowable] = [
        Paragraph("Acceptance of a segnode installation", styles["Title"]),
        Paragraph(
            f"{at:%Y-%m-%d %H:%M} UTC: {'every check passed' if passed else 'NOT accepted'}",
            styles["Heading2"],
        ),
        _table([[cell(name), cell(value)] for name, value in facts], (40 * mm, 130 * mm)),
        Spacer(1, 6 * mm),
        _table(rows, (65 * mm, 20 * mm, 85 * mm), head=True),
        Spacer(1, 6 * mm),
        Paragraph(_NOTICE, small),
        Spacer(1, 14 * mm),
        _table(
            [[cell("Site, date"), cell(""), cell("Name, signature"), cell("")]],
            (25 * mm, 55 * mm, 35 * mm, 55 * mm),
        ),
    ]
    output = BytesIO()
    document = SimpleDocTemplate(
        output, pagesize=A4, title="segnode acceptance", author="segnode", pageCompression=0, invariant=1
    )
    document.build(story)
    return output.getvalue()


def _table(rows: list[list[Paragraph]], widths: Sequence[float], *, head: bool = False) -> Table:
    style = [("GRID", (0, 0), (-1, -1), 0.4, colors.grey), ("VALIGN", (0, 0), (-1, -1), "TOP")]
    if head:
        style.append(("BACKGROUND", (0, 0), (-1, 0), colors.lightgrey))
    return Table(rows, colWidths=list(widths), style=TableStyle(style), repeatRows=1 if head else 0)
