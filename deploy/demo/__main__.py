"""``make demo``: send a study to a node over DICOM, and show the SEG that comes back.

Everything happens on this machine, over the loopback interface, in a folder of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread

from deploy.demo.node import DemoNode
from deploy.demo.study import icbm_brain, write_series
from deploy.demo.viewer import StorageScp, place, segments
from models.manifest import CodedConcept, Label
from service.dicom.series import read_series
from service.overlay import draw_overlay

ENDED = ("succeeded", "refused", "failed", "cancelled")


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--study", type=Path, help="a folder with a DICOM study; a real T1 unless given")
    parser.add_argument("--timeout-s", type=float, default=400.0)
    options = parser.parse_args()
    output: Path = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    folder: Path = options.study or output / "study"
    if options.study is None:
        paths = write_series(icbm_brain(), folder)
        say(f"Made a study of the ICBM152 T1, {len(paths)} MR images: {folder}")
    study_instance_uid, files = find_study(folder)
    scp = StorageScp("VIEWER", output / "received")
    say("Starting a node ...")
    with DemoNode(output, viewer_port=scp.port) as node:
        say(f"The node listens: DICOM SEGNODE@127.0.0.1:{node.dicom_port}, HTTP 127.0.0.1:{node.http_port}")
        node.send(folder)
        jobs = wait_for_jobs(node, study_instance_uid, options.timeout_s)
        for job in jobs:
            if job["reason"]:
                say(f"A series was {job['state']}: {job['reason']['code']}: {job['reason']['sentence']}")
                say(f"  {job['reason']['remedy']}")
            for warning in job["summary"].get("warnings", ()):
                say(f"The node remarks: {warning}")
        expected = sum("segmentation" in job["links"] for job in jobs)
        received = [scp.received.get(timeout=options.timeout_s) for _ in range(expected)]
    scp.close()
    if not received:
        raise SystemExit("No SEG came back. What the node says about the series stands above.")
    for number, path in enumerate(received, start=1):
        name = "overlay.png" if len(received) == 1 else f"overlay-{number}.png"
        show(dcmread(path), path, files, output / name)
    say(f"Done in {time.monotonic() - began:.0f} s. The node's log: {output / 'node.log'}")


def find_study(folder: Path) -> tuple[str, dict[str, list[Path]]]:
    """The Study Instance UID of a folder's DICOM files, and its files by Series Instance UID."""
    files: dict[str, list[Path]] = {}
    studies: set[str] = set()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.read_bytes()[128:132] != b"DICM":
            continue
        header = dcmread(
            path, specific_tags=["StudyInstanceUID", "SeriesInstanceUID"], stop_before_pixels=True
        )
        studies.add(str(header.StudyInstanceUID))
        files.setdefault(str(header.SeriesInstanceUID), []).append(path)
    if len(studies) != 1:
        raise SystemExit(f"{folder} holds {len(studies)} DICOM studies; the demo takes a folder with one.")
    return studies.pop(), files


def wait_for_jobs(node: DemoNode, study_instance_uid: str, timeout_s: float) -> list[dict[str, Any]]:
    """Every job that the node made of the study, when all have ended."""
    deadline = time.monotonic() + timeout_s
    stage = ""
    while time.monotonic() < deadline:
        study = node.study(study_instance_uid)
        jobs: list[dict[str, Any]] = study["jobs"] if study else []
        settled = study is not None and all(s["state"] == "complete" for s in study["series"])
        if settled and jobs and all(job["state"] in ENDED for job in jobs):
            return jobs
        now = ", ".join(job["state"] for job in jobs) or "waiting for the series to be complete"
        if now != stage:
            say(f"  {now}")
            stage = now
        time.sleep(0.2)
    raise SystemExit(f"Nothing came of the study within {timeout_s:.0f} s. The node's log: {node.log}")


def show(segmentation: Dataset, path: Path, files: dict[str, list[Path]], picture: Path) -> None:
    """Print the volumes of a SEG that came back, and draw it over the series that it refers to."""
    source = read_series(files[str(segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID)])
    labelmap = place(segmentation, source.volume)
    volumes_ml = labelmap.volumes_ml()
    say(f"The SEG came back over DICOM: {path}")
    labels = []
    for number, name, color in segments(segmentation):
        say(f"  {name:<24} {volumes_ml.get(number, 0.0):6.2f} mL")
        concept = CodedConcept(value=str(number), meaning=name)
        labels.append(Label(value=number, name=name, category=concept, type=concept, color_rgb=color))
    title = str(segmentation.SeriesDescription).removeprefix("AI, unverified: ")
    draw_overlay(source.volume, labelmap, labels, title=title).save(picture)
    say(f"The picture: {picture}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
