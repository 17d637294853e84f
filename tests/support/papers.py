"""The commands of a paper in deploy, so that a test runs what is written there and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def commands(paper: str, heading: str) -> list[list[str]]:
    """The blocks of commands below a heading, up to the next heading, each as its lines.

    Parameters
    ----------
    paper : str
        Its name in deploy.
    heading : str
        A whole line, with its number signs.
    """
    lines = (DEPLOY / paper).read_text(encoding="utf-8").splitlines()
    start = lines.index(heading) + 1
    end = next((i for i in range(start, len(lines)) if lines[i].startswith("#")), len(lines))
    text = "\n".join(lines[start:end])
    blocks = re.findall(r"(?:^    .+\n?)+", text, flags=re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in blocks]
