"""The demo: a study over DICOM, its SEG back, volumes that make sense, and a picture."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_shows_a_brain_whose_structures_lie_where_they_belong(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.demo", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    volumes = {name: float(ml) for name, ml in re.findall(r"^  (\w[\w ]+?) +([\d.]+) mL$", done.stdout, re.M)}
    assert len(volumes) == 29
    assert 1200 < sum(volumes.values()) < 2100  # the template is an average brain, blown up by averaging
    for name in ("thalamus", "caudate", "putamen", "hippocampus", "cerebellar cortex"):
        left, right = volumes[f"Left {name}"], volumes[f"Right {name}"]
        assert 0.75 < left / right < 1.33, (name, left, right)
    picture = np.asarray(Image.open(tmp_path / "overlay.png")).astype(int)
    third = picture.shape[1] // 3
    coronal = picture[34:434, third : 2 * third]
    left = np.argwhere((coronal == (0, 118, 14)).all(axis=-1))  # outlines of the thalami
    right = np.argwhere((coronal == (0, 94, 11)).all(axis=-1))
    assert len(left) > 50
    assert len(right) > 50
    assert right[:, 1].mean() < left[:, 1].mean()  # a person's right is on the left of a coronal plane
    assert "SEGNODE-DEMO" not in (tmp_path / "node.log").read_text()
