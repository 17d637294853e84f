"""nnU-Net's own predictor with float32 sums: what a bundle's golden case is made with.

The stock predictor adds up overlapping tiles in float16, which alone moves some labels. Everything else
here is stock: reading, preprocessing, tiles, the Gaussian with its float16-rounded values, mirroring,
folds, resampling and the way back.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.postprocessing.remove_connected_components import (
    remove_all_but_largest_component_from_segmentation,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from models.manifest import Postprocessing
from training.teacher import ResultsFolder


class Float32Predictor(nnUNetPredictor):  # type: ignore[misc]
    """nnU-Net's predictor that sums tiles and weights in float32 instead of float16."""

    def _internal_predict_sliding_window_return_logits(
        self, data: torch.Tensor, slicers: list[Any], do_on_device: bool = True
    ) -> torch.Tensor:
        """Logits (K, Z, Y, X), float32, of preprocessed and padded data (C, Z, Y, X)."""
        with torch.inference_mode():
            n_outputs = self.label_manager.num_segmentation_heads
            total = torch.zeros((n_outputs, *data.shape[1:]), dtype=torch.float32)
            weight = torch.zeros(data.shape[1:], dtype=torch.float32)
            gaussian = compute_gaussian(
                tuple(self.configuration_manager.patch_size),
                sigma_scale=1.0 / 8,
                value_scaling_factor=10,
                dtype=torch.float16,
                device=torch.device("cpu"),
            ).float()
            for tile in slicers:
                patch = torch.clone(data[tile][None], memory_format=torch.contiguous_format).to(self.device)
                logits = self._internal_maybe_mirror_and_predict(patch)[0].float().cpu()
                total[tile] += logits * gaussian
                weight[tile[1:]] += gaussian
            return total / weight


def make_predictor(
    results: ResultsFolder, *, mirroring: bool, stock: bool = False, device: str = "cpu"
) -> nnUNetPredictor:
    """A predictor for all folds of a results folder that were opened.

    Parameters
    ----------
    mirroring : bool
        Mirror along the axes that training allowed.
    stock : bool
        nnU-Net's own class with its float16 sums, instead of `Float32Predictor`.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = (nnUNetPredictor if stock else Float32Predictor)(
            use_mirroring=mirroring, device=torch.device(device), allow_tqdm=False
        )
    manager = PlansManager(results.plans)
    predictor.manual_initialization(
        results.network(),
        manager,
        manager.get_configuration(results.configuration),
        [dict(one.weights) for one in results.checkpoints],
        results.dataset_json,
        results.checkpoints[0].trainer_name,
        results.checkpoints[0].mirror_axes or None,
    )
    return predictor


def predict_labelmap(predictor: nnUNetPredictor, images: list[Path]) -> NDArray[np.uint8 | np.uint16]:
    """The labelmap of one case, one file per channel, on the grid of the array as nnU-Net's reader gives it.

    Returns
    -------
    (Z, Y, X) array of uint8, or uint16 where a label is over 255
        In the reader's orientation: the file's own, or RAS for a reader that reorients.
    """
    reader = predictor.plans_manager.image_reader_writer_class()
    array, properties = reader.read_images([str(p) for p in images])
    with contextlib.redirect_stdout(io.StringIO()):
        labelmap = predictor.predict_single_npy_array(array, properties)
    return np.asarray(labelmap).astype(np.uint8 if labelmap.max() < 256 else np.uint16)


def postprocess(
    labelmap: NDArray[np.uint8 | np.uint16], rules: Postprocessing
) -> NDArray[np.uint8 | np.uint16]:
    """What nnU-Net's own post-processing leaves of a labelmap (Z, Y, X), in the order of the rules."""
    steps: list[Any] = [[int(value)] for value in rules.largest_component_of_labels]
    if rules.largest_component_of_foreground:
        steps.insert(0, [int(value) for value in np.unique(labelmap) if value])
    for labels in steps:
        labelmap = remove_all_but_largest_component_from_segmentation(labelmap, labels)
    return labelmap


def preprocess(predictor: nnUNetPredictor, images: list[Path]) -> NDArray[np.float32]:
    """One case as the network sees it: (C, Z, Y, X), transposed, cropped, normalised and resampled."""
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, _, _ = preprocessor.run_case(
        [str(p) for p in images],
        None,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.dataset_json,
    )
    return np.asarray(data, dtype=np.float32)
