"""Fixtures of the tests that run a whole node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_factory import make_threshold_bundle
from running_node import ROUTE, RunningNode
from storage_scp import StorageScp

from models.registry import Registry


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with the shipped models and the threshold model 1.0.0, checked once for all nodes."""
    root = tmp_path_factory.mktemp("models")
    registry = Registry(root / "registry", runtimes=("onnxruntime",))
    registry.seed()
    bundle = make_threshold_bundle(root / "threshold")
    registry.add(bundle.folder)
    registry.activate("threshold", "1.0.0")
    return registry.root


@pytest.fixture(scope="module")
def pacs() -> Iterator[StorageScp]:
    with StorageScp() as scp:
        yield scp


@pytest.fixture(scope="module")
def node(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, pacs: StorageScp
) -> Iterator[RunningNode]:
    """A node with one route, MR to the threshold model, that sends its results to ``pacs``."""
    folder = tmp_path_factory.mktemp("node")
    with RunningNode(folder, models=models_dir, destinations={"pacs": pacs.port}, routes=[ROUTE]) as running:
        yield running
