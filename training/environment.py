"""nnU-Net reads its settings from environment variables; this is the one place that sets them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch


def configure_nnunet(work_folder: Path | None = None, *, augmentation_processes: int = 0) -> None:
    """Set what nnU-Net reads from the environment.

    Compilation is off (it costs minutes and is of no use on a CPU), figures are drawn without a display,
    and the data augmentation runs in ``augmentation_processes`` processes; 0 means in the main process,
    the only way in which a run can be repeated exactly.

    Parameters
    ----------
    work_folder : Path or None
        Folder that holds ``raw``, ``preprocessed`` and ``results``; they are created. None leaves nnU-Net's
        three folders as the user has set them.
    augmentation_processes : int
        Number of worker processes of the data loader.
    """
    os.environ["nnUNet_compile"] = "f"  # noqa: SIM112 - nnU-Net's own spelling
    os.environ["nnUNet_n_proc_DA"] = str(augmentation_processes)  # noqa: SIM112
    os.environ.setdefault("nnUNet_def_n_proc", "2")
    os.environ.setdefault("MPLBACKEND", "agg")
    if work_folder is not None:
        for name in ("raw", "preprocessed", "results"):
            folder = work_folder.resolve() / name
            folder.mkdir(parents=True, exist_ok=True)
            os.environ[f"nnUNet_{name}"] = str(folder)


def seed_everything(seed: int, *, threads: int | None = None) -> None:
    """Seed Python, numpy and torch, ask torch for deterministic kernels, and fix the number of threads.

    Sums over several threads differ in their last bits from one number of threads to another, so a run can
    be repeated bit for bit only with the same ``threads``.
    """
    random.seed(seed)
    np.random.seed(seed)  # nnU-Net's loader and transforms draw from numpy's global generator
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    if threads is not None:
        torch.set_num_threads(threads)
