"""The log of a run: one JSON object per epoch and line, and TensorBoard beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

LOG_FILE = "log.jsonl"


class RunLog:
    """Writes ``log.jsonl`` and TensorBoard events into a run's folder.

    A run that was killed after logging an epoch and before saving it does that epoch again: its old line,
    and any half-written one, is dropped when the log is opened.
    """

    def __init__(self, folder: Path, *, resumed_epoch: int) -> None:
        self.path = folder / LOG_FILE
        kept = [entry for entry in read_log(self.path) if entry["epoch"] < resumed_epoch]
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        self._board = SummaryWriter(folder / "tensorboard", purge_step=resumed_epoch)

    def write(self, *, epoch: int, losses: dict[str, float], dice: dict[str, float], **more: Any) -> None:
        """Add an epoch."""
        entry = {"epoch": epoch, "losses": losses, "dice": dice, **more}
        with self.path.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
        for group, values in (("loss", losses), ("dice", dice)):
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, epoch)
        self._board.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete entries of a log; none if there is no log. A line that was cut off ends it."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
