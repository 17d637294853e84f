"""A trial without a process: the threshold rule in NumPy, on the files that the real one would be given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from models.bundle import Bundle
from models.nifti import read_nifti
from models.volume import Labelmap
from service.protocol import RunJob
from service.trial import TrialRun
from service.watch import StoppingError

MIB = 1024**2


class TrialStandIn:
    """Takes the place of :class:`service.trial.Trial`; what it is told of a version it does.

    ``thresholds`` gives each digest its rule, ``refuses`` the versions that refuse every case,
    ``seconds`` and ``peak_bytes`` what each takes; ``before`` is called before every case.
    """

    thresholds: dict[str, tuple[float, ...]]
    refuses: set[str]
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    before: Callable[[], None]
    runs: list[tuple[str, str]]

    @classmethod
    def fresh(cls) -> type[TrialStandIn]:
        """A class of its own for one test."""
        members: dict[str, Any] = {
            "thresholds": {},
            "refuses": set(),
            "seconds": {},
            "peak_bytes": {},
            "before": staticmethod(lambda: None),
            "runs": [],
        }
        return type("FreshTrial", (cls,), members)

    def __init__(self, _settings: object, bundle: Bundle, stop: Any, **_options: object) -> None:
        self._bundle = bundle
        self._stop = stop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run_golden_case(self) -> TrialRun:
        return self._run("golden", self._bundle.golden_image_paths)

    def run(self, order: RunJob) -> TrialRun:
        return self._run(order.job_id, [path for (path,) in order.job.channels])

    def _run(self, name: str, paths: Any) -> TrialRun:
        version = self._bundle.manifest.version
        self.runs.append((version, name))
        type(self).before()
        if self._stop.is_set():
            raise StoppingError
        seconds = self.seconds.get(version, 1.0)
        peak = self.peak_bytes.get(version, 100 * MIB)
        if version in self.refuses and name != "golden":
            return TrialRun(seconds, peak, code="OUT_OF_LIMITS", sentence="It takes other images.")
        volume = read_nifti([_named(path) for path in paths])
        thresholds = self.thresholds.get(version, (100.5, 300.5))
        array = np.sum([volume.array[0] > each for each in thresholds], axis=0).astype(np.uint8)
        return TrialRun(seconds, peak, "onnxruntime", "float32", Labelmap(array, volume.affine))


def _named(path: Path) -> Path:
    assert path.is_file(), path
    return path
