"""DCMTK sends, in every compression that it has and as the files are; each way gives the same labels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from bundle_factory import expected_labels
from phantom import test_uid as make_uid
from phantom import write_classic_series
from places import AFFINE, assert_same_places, image, places_in_seg, places_of_labels
from programs import program
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from running_node import CALLING_AE_TITLE, RunningNode
from waiting import wait_until

# storescu proposes one compressed transfer syntax, and says which by an option.
SYNTAXES = {
    "explicit": ("1.2.840.10008.1.2.1", ["-xe"]),
    "implicit": ("1.2.840.10008.1.2", ["-xi"]),
    "jpeg-lossless": (JPEGLosslessSV1, ["-xs"]),
    "jpeg-ls": (JPEGLSLossless, ["-xt"]),
    "jpeg-2000": (JPEG2000Lossless, ["-xv"]),
    "rle": (RLELossless, ["-xr"]),
}


@pytest.mark.parametrize("name", SYNTAXES)
def test_a_series_from_storescu(node: RunningNode, tmp_path: Path, name: str) -> None:
    syntax, options = SYNTAXES[name]
    study = make_uid("dcmtk", name)
    paths = write_classic_series(
        tmp_path,
        image(7),
        AFFINE,
        study_instance_uid=study,
        series_instance_uid=make_uid("dcmtk series", name),
        transfer_syntax=syntax,
    )
    peer = ["-aet", CALLING_AE_TITLE, "-aec", "SEGNODE", "127.0.0.1", str(node.dicom_port)]
    subprocess.run(
        [program("storescu", "dcmtk"), *options, *peer, *map(str, paths)], check=True, capture_output=True
    )

    def ended() -> list[dict[str, object]]:
        jobs = [j for j in node.jobs() if j["study_instance_uid"] == study]
        return [j for j in jobs if j["state"] not in ("queued", "running")]

    wait_until(lambda: bool(ended()), 60, node.log)
    (job,) = ended()
    assert job["state"] == "succeeded", job
    wanted = places_of_labels(expected_labels(image(7)[None], (100.5, 300.5)), AFFINE)
    assert_same_places(places_in_seg(node.fetch(job, "segmentation")), wanted)


def test_echoscu_is_answered_and_a_stranger_is_not(node: RunningNode) -> None:
    echoscu = program("echoscu", "dcmtk")
    known = ["-aet", CALLING_AE_TITLE, "-aec", "SEGNODE", "127.0.0.1", str(node.dicom_port)]
    assert subprocess.run([echoscu, *known], capture_output=True, check=False).returncode == 0
    stranger = ["-aet", "STRANGER", "-aec", "SEGNODE", "127.0.0.1", str(node.dicom_port)]
    refused = subprocess.run([echoscu, *stranger], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "Calling AE Title Not Recognized" in refused.stdout + refused.stderr
