"""From finished planes of features to labels: interpolation, linear head and decision in one pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import kernels
from models.errors import NonFiniteLogitsError
from models.linear_head import LinearHead
from models.manifest import Head, Manifest
from models.preprocessing import Placement
from models.resampling import logits_taps
from models.sliding_window import Planes, Tiling


class Painter:
    """Turns finished planes into labels of the cropped image, resampling them on the way."""

    def __init__(
        self,
        manifest: Manifest,
        placement: Placement,
        tiling: Tiling,
        head: LinearHead | None,
        workers: kernels.Workers,
    ) -> None:
        how = manifest.preprocessing
        taps = logits_taps(
            placement.shape_network,
            placement.shape_cropped,
            how.spacing_mm,
            placement.spacing_mm,
            how.resampling_probabilities,
        )
        self._taps = [tap.moved(before) for tap, before in zip(taps, tiling.before, strict=True)]
        self._axis = tiling.axis
        self._painted = 0
        self._workers = workers
        self._matrix = np.empty((0, 0), np.float32) if head is None else head.matrix
        self._bias = np.empty(0, np.float32) if head is None else head.bias
        order = manifest.inference.regions_class_order
        self._regions = np.array(order if manifest.inference.head is Head.SIGMOID else (), np.int32)
        self.labels: NDArray[Any] = np.zeros(placement.shape_cropped, label_type(manifest))

    def paint(self, planes: Planes) -> None:
        """Paint every output plane whose sources are final now and were not before."""
        along = self._taps[self._axis]
        last = int(np.searchsorted(along.high, planes.last))
        new = slice(self._painted, last)
        self._painted = last
        if new.stop <= new.start:
            return
        taps = [*self._taps]
        taps[self._axis] = along[new].moved(-planes.origin)
        where = tuple(new if axis == self._axis else slice(None) for axis in range(3))
        part: NDArray[Any] = np.empty(self.labels[where].shape, self.labels.dtype)
        paint = kernels.compiled(kernels.paint)
        arguments: list[NDArray[Any]] = [array for tap in taps for array in (tap.low, tap.high, tap.part)]

        def rows(first: int, last: int) -> bool:
            return bool(
                paint(planes.features, *arguments, self._matrix, self._bias, self._regions, part, first, last)
            )

        if not all(self._workers.share(math.prod(part.shape[:2]), rows)):
            raise NonFiniteLogitsError(
                "The network gave infinite values or values that are not numbers.",
                remedy="Check the model with its golden case on this machine; do not use it until it agrees.",
            )
        self.labels[where] = part


def label_type(manifest: Manifest) -> np.dtype[Any]:
    """The smallest type that holds every label: uint8 or uint16."""
    return np.dtype(np.uint8 if max(label.value for label in manifest.labels) < 256 else np.uint16)
