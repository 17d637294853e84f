"""Compiled kernels: kept where there is a place, compiled anew where there is none; work shared out whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from models import kernels

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_place_for_a_cache_kernels_are_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = numba.njit

    def read_only(*arguments: Any, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError(
                "cannot cache function 'twice': no locator available for file '/app/kernels.py'"
            )
        return original(*arguments, **options)

    def twice(x: float) -> float:
        return 2 * x

    monkeypatch.setattr(numba, "njit", read_only)
    assert kernels.compiled(twice)(3.0) == 6.0


def test_the_cache_folder_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    code = (
        "import sys, numpy, pathlib\nfrom models import kernels\n"
        "kernels.keep_compiled_code_in(pathlib.Path(sys.argv[1]))\nkernels.warm_up(numpy.dtype('u1'))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "new" / "folder")], cwd=ROOT, check=True)
    assert len(list(tmp_path.rglob("*.nbc"))) == 3  # one of them for both orders of a tile


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_every_piece_is_done_once_and_in_order(threads: int, length: int) -> None:
    workers = kernels.Workers(threads)
    pieces = workers.share(length, lambda first, last: list(range(first, last)))
    workers.close()
    assert [i for piece in pieces for i in piece] == list(range(length))
    assert len(pieces) <= threads


def test_an_error_in_a_piece_is_raised_to_the_caller() -> None:
    workers = kernels.Workers(2)
    with pytest.raises(ZeroDivisionError):
        workers.share(4, lambda first, last: 1 // (2 - last))
    workers.close()


def test_a_tile_is_added_at_its_place_with_its_weights() -> None:
    rng = np.random.default_rng(0)
    total = rng.normal(size=(3, 6, 7, 8)).astype(np.float32)
    tile = rng.normal(size=(2, 3, 2, 4)).astype(np.float32)
    weights = rng.random((3, 2, 4)).astype(np.float32)
    expected = total.copy()
    expected[:2, 2:4, 5:7, 1:5] += (tile * weights)[:, 1:]
    expected[2, 2:4, 5:7, 1:5] += weights[1:]
    kernels.compiled(kernels.accumulate)(total, tile, weights, 1, 5, 1, 1, 3)
    np.testing.assert_allclose(total, expected, atol=1e-6)
