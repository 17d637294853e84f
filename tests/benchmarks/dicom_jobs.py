"""What one process of the DICOM part of the benchmark does: write a phantom, then time both sides on it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_AFFINE = np.diag([0.8, 0.8, 1.0, 1.0])
_WHEN = datetime(2026, 1, 1)  # noqa: DTZ001  # times in the records are naive
SIZES: dict[str, dict[str, Any]] = {
    "full": {"read": (170, 512, 512), "objects": (256, 256, 256), "labels": 100, "runs": 3},
    "small": {"read": (20, 64, 64), "objects": (16, 64, 64), "labels": 9, "runs": 1},
}


def measure_dicom(job: dict[str, Any]) -> dict[str, Any]:
    """One part (``read``, ``segmentation`` or ``report``), each side in turn, the least processor time of it.

    Both sides run in one process and alternate, so what else the machine does falls on both.
    """
    size = SIZES[job["size"]]
    with tempfile.TemporaryDirectory() as folder:
        sides = {"read": _read, "segmentation": _segmentation, "report": _report}[job["part"]](
            Path(folder), size
        )
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            side()  # imports, page cache
        for _ in range(size["runs"]):
            for name, side in sides.items():
                start, used = time.perf_counter(), time.process_time()
                side()
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
    return {
        "part": job["part"],
        "seconds": {name: min(values) for name, values in seconds.items()},
        "cpu_seconds": {name: min(values) for name, values in cpu.items()},
    }


def _read(folder: Path, size: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """A series into a volume, over the decoding of its pixels alone."""
    import pydicom
    from phantom import write_classic_series

    from service.dicom.series import read_series

    stored = np.random.default_rng(0).integers(0, 4000, size["read"]).astype(np.int16)
    paths = write_classic_series(folder, stored, _AFFINE)

    def decode() -> NDArray[Any]:
        return np.stack([pydicom.dcmread(path).pixel_array for path in paths])

    assert np.array_equal(read_series(paths).volume.array[0], decode().astype(np.float32))
    return {"pydicom": decode, "segnode": lambda: read_series(paths)}


def _segmentation(folder: Path, size: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """A BINARY Segmentation of many labels, over highdicom's own; what is read back is the same."""
    import highdicom as hd

    source, labelmap, manifest = _result(folder, size)

    def ours() -> Path:
        from service.dicom.segmentation import build_segmentation, write_segmentation

        dataset = build_segmentation(
            source, labelmap, manifest, model_digest="0" * 64, sop_instance_uid="2.25.1",
            series_instance_uid="2.25.2", content_datetime=_WHEN,
        )  # fmt: skip
        return write_segmentation(dataset, folder / "ours.dcm")

    images = [hd.imread(path) for path in sorted(folder.glob("0*.dcm"))]
    descriptions = [
        hd.seg.SegmentDescription(
            label.value, label.name, hd.sr.CodedConcept("123037004", "SCT", "Anatomical Structure"),
            hd.sr.CodedConcept(label.type.value, "99SEGNODE", label.type.meaning),
            hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            hd.AlgorithmIdentificationSequence(
                "student", hd.sr.CodedConcept("123109", "DCM", "Artificial Intelligence"), "1"
            ),
        )
        for label in manifest.labels
    ]  # fmt: skip

    def theirs() -> Path:
        dataset = hd.seg.Segmentation(
            images, labelmap.array, hd.seg.SegmentationTypeValues.BINARY, descriptions, "2.25.2", 1,
            "2.25.1", 1, "maker", "model", "1", "1",
        )  # fmt: skip
        dataset.save_as(folder / "theirs.dcm")
        return folder / "theirs.dcm"

    read = [
        hd.seg.segread(side()).get_volume(combine_segments=True, skip_overlap_checks=True).array
        for side in (theirs, ours)
    ]
    assert np.array_equal(*read)
    return {"highdicom": theirs, "segnode": ours}


def _report(folder: Path, size: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """All that leaves for one result (SEG, SR, proofs), over the Segmentation alone by highdicom."""
    from findings import make_finding, rendered

    source, labelmap, manifest = _result(folder, size)
    finding = make_finding(source, array=labelmap.array, manifest=manifest)
    theirs = _segmentation(folder, size)["highdicom"]
    return {"highdicom": theirs, "segnode": lambda: rendered(finding, folder / "out")}


def _result(folder: Path, size: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A series and its labelmap: boxes side by side, all labels of the manifest."""
    from phantom import phantom_manifest, write_classic_series

    from models.volume import Labelmap
    from service.dicom.series import read_series

    shape, count = size["objects"], size["labels"]
    stored = np.random.default_rng(0).integers(0, 4000, shape).astype(np.int16)
    source = read_series(write_classic_series(folder, stored, _AFFINE))
    side = int(np.ceil(np.sqrt(count)))
    height, width = shape[1] // side, shape[2] // side
    labels = np.zeros(shape, np.uint8)
    for value in range(1, count + 1):
        y, x = divmod(value - 1, side)
        labels[:, y * height : (y + 1) * height - 1, x * width : (x + 1) * width - 1] = value
    where = source.volume
    return source, Labelmap(labels, where.affine, where.frame_of_reference_uid), phantom_manifest(count)
