"""Reading an nnU-Net checkpoint without running what may be hidden in it.

A checkpoint is a pickle, and a pickle can run any code. Only torch's restricted loader is used: it makes
tensors and plain values, and here numpy's numbers as well, which nnU-Net's log of losses is full of.
Anything else in the file is named and refused.
"""

from __future__ import annotations

import hashlib
import importlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from training.errors import ResultsFolderError

_KEYS = ("network_weights", "init_args", "trainer_name")

_MULTIARRAY: Any = importlib.import_module("numpy._core.multiarray")

# Under both names that numpy's module has had. They make numbers and arrays, and nothing else.
_NUMPY: list[Any] = [
    np.dtype,
    np.ndarray,
    *((_MULTIARRAY.scalar, f"numpy.{c}.multiarray.scalar") for c in ("_core", "core")),
    *((_MULTIARRAY._reconstruct, f"numpy.{c}.multiarray._reconstruct") for c in ("_core", "core")),
    *(type(np.dtype(t)) for t in ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")),
]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One trained network of a results folder.

    Parameters
    ----------
    path : Path
        The file.
    digest : str
        SHA-256 of the file, in hexadecimal.
    fold : str
        "0" to "4", or "all".
    weights : mapping
        Tensors by the names that the network has for them; wrappers' prefixes are taken off.
    trainer_name, configuration : str
        The trainer class that wrote the file, and the configuration of the plans that it trained.
    mirror_axes : tuple of int
        Spatial axes of the transposed array that training mirrored, allowed for mirroring at test time.
    init_args : mapping
        What the trainer was made with: plans, dataset_json, fold, configuration.
    plain : bool
        True if the file held tensors and plain values alone; False if numpy's numbers were let in too.
    """

    path: Path
    digest: str
    fold: str
    weights: Mapping[str, torch.Tensor]
    trainer_name: str
    configuration: str
    mirror_axes: tuple[int, ...]
    init_args: Mapping[str, Any]
    epoch: int | None
    plain: bool


def load_checkpoint(path: Path, fold: str) -> Checkpoint:
    """Load a checkpoint onto the CPU.

    Raises
    ------
    ResultsFolderError
        If the file is missing, damaged, not nnU-Net's, or holds objects that are not let in.
    """
    if not path.is_file():
        raise ResultsFolderError(
            f"{path.parent.name}/{path.name} is missing.",
            remedy="Let the training finish, or choose another checkpoint or fold.",
        )
    content, plain = _load(path)
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ResultsFolderError(
            f"{path.parent.name}/{path.name} lacks {', '.join(missing)}: not a checkpoint of nnU-Net v2."
        )
    init_args = content["init_args"]
    if "configuration" not in init_args:
        raise ResultsFolderError(
            f"{path.parent.name}/{path.name} does not say which configuration it trained."
        )
    axes = content.get("inference_allowed_mirroring_axes")
    return Checkpoint(
        path=path,
        digest=file_digest(path),
        fold=fold,
        weights={_strip(name): tensor for name, tensor in content["network_weights"].items()},
        trainer_name=str(content["trainer_name"]),
        configuration=str(init_args["configuration"]),
        mirror_axes=tuple(int(axis) for axis in axes or ()),
        init_args=init_args,
        epoch=content.get("current_epoch"),
        plain=plain,
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _load(path: Path) -> tuple[dict[str, Any], bool]:
    name = f"{path.parent.name}/{path.name}"
    damaged = ResultsFolderError(
        f"{name} is damaged, or is no checkpoint of torch.", remedy="Copy the file again; compare its size."
    )
    if not zipfile.is_zipfile(path):
        raise damaged
    content: Any
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        plain = True
    except pickle.UnpicklingError:
        plain = False
        try:
            with safe_globals(_NUMPY):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ResultsFolderError(
                f"{name} holds objects that could run code: {', '.join(_unsafe(path)) or 'of unknown type'}.",
                remedy="If you trust its source, load it there and save it again without them.",
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise damaged from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise damaged from error
    if not isinstance(content, dict):
        raise ResultsFolderError(f"{name} is not a checkpoint of nnU-Net v2.")
    return content, plain


def _unsafe(path: Path) -> list[str]:
    allowed = {"numpy.dtype", "numpy.ndarray"}
    allowed |= {entry[1] for entry in _NUMPY if isinstance(entry, tuple)}
    return sorted(set(get_unsafe_globals_in_checkpoint(path)) - allowed)


def _strip(name: str) -> str:
    """Take off what DistributedDataParallel and torch.compile put before a tensor's name."""
    for prefix in ("module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name
