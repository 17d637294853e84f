"""What stands for the PACS and its viewer: a storage SCP, and a SEG put back over its source."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from pydicom import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import EnhancedSRStorage, SegmentationStorage, Verification

from models.volume import Labelmap, Volume


class StorageScp:
    """A storage SCP on a free port of this machine. What it gets lies in ``folder``; ``received``: SEGs."""

    def __init__(self, ae_title: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.received: queue.SimpleQueue[Path] = queue.SimpleQueue()
        entity = AE(ae_title=ae_title)
        entity.add_supported_context(Verification)
        entity.add_supported_context(SegmentationStorage)
        entity.add_supported_context(EnhancedSRStorage)
        self._server = entity.start_server(
            ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
        )
        self.port = int(self._server.server_address[1])

    def _store(self, event: Any) -> int:
        path = self.folder / f"{event.request.AffectedSOPInstanceUID}.dcm"
        path.write_bytes(event.encoded_dataset())
        if event.request.AffectedSOPClassUID == SegmentationStorage:  # the report lies beside it
            self.received.put(path)
        return 0x0000

    def close(self) -> None:
        self._server.shutdown()


def place(segmentation: Dataset, volume: Volume) -> Labelmap:
    """Put every frame of a SEG where its own position says, on the grid of the image that it was made from.

    Decoded by highdicom from the file alone, as a viewer would; nothing of the node is used. Values are
    segment numbers.
    """
    decoded = highdicom.seg.Segmentation.from_dataset(segmentation).get_volume(combine_segments=True)
    indices = np.argwhere(decoded.array)  # (n, 3): frame, row, column
    places_mm = decoded.affine @ np.c_[indices, np.ones(len(indices))].T
    x, y, z = np.rint(np.linalg.inv(volume.affine) @ places_mm)[:3].astype(int)
    labels = np.zeros(volume.shape_zyx, np.uint8)
    labels[z, y, x] = decoded.array[tuple(indices.T)]
    return Labelmap(labels, volume.affine)


def segments(segmentation: Dataset) -> Sequence[tuple[int, str, tuple[int, int, int]]]:
    """Number, label and colour of every segment."""
    found = []
    for segment in segmentation.SegmentSequence:
        lab = segment.get("RecommendedDisplayCIELabValue", [40000, 50000, 50000])
        color = highdicom.color.CIELabColor.from_dicom_value(tuple(lab)).to_rgb()
        found.append((int(segment.SegmentNumber), str(segment.SegmentLabel), color))
    return found
