"""The largest connected component is kept: what lies apart from it is taken away, and told."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.manifest import Postprocessing
from models.volume import Removed

BYTES_PER_VOXEL = 5
"""Memory held at most, in bytes for each voxel of the labelmap: a component's number and one flag."""

_TOUCHING = ndimage.generate_binary_structure(3, 3)


def keep_largest(labels: NDArray[Any], rules: Postprocessing) -> Removed:
    """Keep the largest connected component alone of what the rules name; all else of it becomes 0, in place.

    The rule is that of nnU-Net's ``remove_all_but_largest_component_from_segmentation``: voxels are
    connected where they share a face, an edge or a corner, whatever their spacing; the size of a component
    is its number of voxels; components that are equally large are all kept. All labels together come
    first, then each single label, in the order given. Only the bounding box is looked at.

    Parameters
    ----------
    labels : (Z, Y, X) array, uint8 or uint16
        Label values, 0 for background.
    rules : Postprocessing
        What the manifest asks for.

    Returns
    -------
    Removed
        How many islands there were, and how many voxels of each label they had.
    """
    foreground = int(np.count_nonzero(labels))
    islands, voxels = 0, np.zeros(int(labels.max(initial=0)) + 1, np.int64)
    boxes = ndimage.find_objects(labels)
    if rules.largest_component_of_foreground and foreground:
        found = [box for box in boxes if box is not None]
        box = tuple(slice(min(b[i].start for b in found), max(b[i].stop for b in found)) for i in range(3))
        islands += _drop_islands(labels[box], labels[box], voxels)
    for value in rules.largest_component_of_labels:
        if value <= len(boxes) and boxes[value - 1] is not None:
            part = labels[boxes[value - 1]]
            islands += _drop_islands(part, part == value, voxels)
    taken = {int(value): int(voxels[value]) for value in np.flatnonzero(voxels)}
    return Removed(islands, taken, sum(taken.values()) / foreground if foreground else 0.0)


def _drop_islands(labels: NDArray[Any], inside: NDArray[Any], voxels: NDArray[np.int64]) -> int:
    """Clear all but the largest components of what is not 0 in ``inside``; how many were cleared.

    ``voxels`` counts what was cleared, by label value. Planes are worked on one by one, because counting
    takes eight bytes for each voxel that it is given.
    """
    components, count = ndimage.label(inside, _TOUCHING)
    if count < 2:
        return 0
    sizes = np.zeros(count + 1, np.int64)
    for plane in components:
        sizes += np.bincount(plane.ravel(), minlength=count + 1)
    sizes[0] = sizes.max()  # what is outside of every component stays as it is
    island = sizes < sizes[1:].max()
    for plane, numbers in zip(labels, components, strict=True):
        gone = island[numbers]
        voxels += np.bincount(plane[gone], minlength=len(voxels))
        plane[gone] = 0
    return int(np.count_nonzero(island))
