"""The demo: a study over DICOM, its SEG back, volumes that make sense, and a picture."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_shows_a_hippocampus_where_it_belongs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.demo", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    volumes = {
        name: float(ml) for name, ml in re.findall(r"^  (\w+) hippocampus +([\d.]+) mL$", done.stdout, re.M)
    }
    assert set(volumes) == {"Anterior", "Posterior"}
    assert all(1.0 <= ml <= 3.0 for ml in volumes.values()), volumes
    picture = np.asarray(Image.open(tmp_path / "overlay.png")).astype(int)
    third = picture.shape[1] // 3
    sagittal = picture[34:434, 2 * third :]
    anterior = np.argwhere((sagittal == (230, 159, 0)).all(axis=-1))
    posterior = np.argwhere((sagittal == (0, 158, 115)).all(axis=-1))
    assert len(anterior) > 100
    assert len(posterior) > 100
    assert anterior[:, 1].mean() < posterior[:, 1].mean()  # anterior is on the left of a sagittal plane
    assert "SEGNODE-DEMO" not in (tmp_path / "node.log").read_text()
