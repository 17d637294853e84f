"""Which network a trainer class builds, told from its source without importing it.

nnU-Net finds a trainer by importing every file that might hold it, which needs libraries that nothing else
here needs, and runs whatever those files do. One question only matters here: does the class, or one that it
derives from, replace ``build_network_architecture``?
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nnunetv2

from training.errors import ResultsFolderError

STOCK_TRAINER = "nnUNetTrainer"
_BUILDER = "build_network_architecture"


@dataclass(frozen=True)
class _Class:
    bases: tuple[str, ...]
    builds_network: bool


def check_builds_planned_network(trainer_name: str) -> None:
    """Refuse a trainer whose network is not the one that the plans describe.

    Classes are looked for in nnU-Net and in the folders of ``nnUNet_extTrainer``.

    Raises
    ------
    ResultsFolderError
        If the class is not found, does not derive from nnUNetTrainer, or builds a network of its own.
    """
    if trainer_name == STOCK_TRAINER:
        return
    classes = dict(_classes())
    seen: set[str] = set()
    waiting = [trainer_name]
    while waiting:
        name = waiting.pop()
        if name == STOCK_TRAINER or name in seen:
            continue
        seen.add(name)
        if name not in classes:
            if name == trainer_name:
                raise ResultsFolderError(
                    f"The trainer {name!r} is not found, so nobody knows what network it builds.",
                    remedy="Set nnUNet_extTrainer to the folder that holds it.",
                )
            continue  # a mixin of another library
        if classes[name].builds_network:
            raise ResultsFolderError(
                f"The trainer {trainer_name!r} builds a network of its own, which the plans do not describe.",
                remedy="Train with nnUNetTrainer, or with a trainer that leaves the network as planned.",
            )
        waiting += classes[name].bases


def _classes() -> Iterator[tuple[str, _Class]]:
    """Every class where nnU-Net looks for trainers; of two with one name, its choice comes last."""
    external = os.environ.get("nnUNet_extTrainer", "")  # noqa: SIM112 - nnU-Net's own spelling
    folders = [Path(p) for p in reversed(external.split(os.pathsep)) if p]
    for folder in (*folders, Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer"):
        for path in sorted(folder.rglob("*.py")):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (OSError, SyntaxError, UnicodeDecodeError) as error:
                raise ResultsFolderError(f"The trainer file {path.name} cannot be read.") from error
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    bases = tuple(ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases)
                    yield node.name, _Class(bases, _defines(node, _BUILDER))


def _defines(node: ast.ClassDef, name: str) -> bool:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == name:
            return True
        if isinstance(item, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in item.targets
        ):
            return True
    return False
