"""Volume in, labelmap on the same grid out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from models import kernels, postprocessing, preprocessing, runtimes
from models.errors import OutOfMemoryError, ReasonCode, Refusal, UnsupportedModelError
from models.linear_head import LinearHead, find_head, remove_head
from models.manifest import Manifest, Precision
from models.memory import activation_bytes
from models.painting import Painter, label_type
from models.preprocessing import Placement
from models.resampling import Triple, check_logits_resampling
from models.resources import (
    available_memory_bytes,
    give_back_freed_memory,
    memory_limit_bytes,
    resident_bytes,
    usable_cores,
)
from models.sliding_window import Tiling, pad, stream_features
from models.volume import Labelmap, Volume

if TYPE_CHECKING:
    from models.bundle import Bundle

PREPROCESS, FORWARD, EXPORT = "preprocess", "forward", "export"

_ESTIMATE_MARGIN = 1.2
"""The estimate of memory is right within a fifth; so much is kept, that the kernel never has to kill."""


@dataclass(frozen=True)
class Progress:
    """How far a segmentation is: ``done`` of ``total`` steps of ``stage`` (preprocess, forward, export)."""

    stage: str
    done: int
    total: int


def _ignore(_: Progress) -> None:
    """The progress callback of who asked for none."""


class Segmenter:
    """A model, loaded, that turns volumes into labelmaps exactly as nnU-Net v2 would.

    Parameters
    ----------
    bundle : Bundle
        What to run; it was verified when it was opened.
    runtime : str
        ``"auto"``, or one of `models.runtimes.available_runtimes`.
    precision : Precision, optional
        The manifest's choice if None.
    threads : int, optional
        Cores to keep busy; all that the control group allows if None.
    cache_dir : Path, optional
        Where compiled models and kernels are kept between starts.
    memory_limit : int, optional
        Bytes that this process may hold; what the control group and the machine allow if None.

    Raises
    ------
    UnsupportedModelError, RuntimeUnavailableError
        If this machine or this engine cannot run the model.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        runtime: str = runtimes.AUTO,
        precision: Precision | None = None,
        threads: int | None = None,
        cache_dir: Path | None = None,
        memory_limit: int | None = None,
    ) -> None:
        manifest = bundle.manifest
        self._memory_limit = memory_limit
        self.manifest = manifest
        self.precision = manifest.precision if precision is None else precision
        self.runtime_name = runtimes.choose_runtime(runtime)
        threads = usable_cores() if threads is None else threads
        paths = bundle.weight_paths(self.precision)
        if not paths:
            raise UnsupportedModelError(
                f"{manifest.name} {manifest.version} has no {self.precision} weights.",
                remedy=f"Run it in {Precision.FLOAT32}, or quantize it and make a new version.",
            )
        # Refused here rather than after the first volume was read and run.
        check_logits_resampling(manifest.preprocessing.resampling_probabilities)
        if cache_dir is not None:
            kernels.keep_compiled_code_in(cache_dir / "kernels")
        kernels.warm_up(label_type(manifest))
        models = [onnx.load(path, load_external_data=False) for path in paths]
        self._head, self._channels = _take_heads(models, manifest)
        shape = (1, len(manifest.channels), *manifest.inference.patch_size)
        self._activation_bytes = 0
        self._networks = []
        while models:  # each graph is dropped once its runtime has it: a large one is not held twice
            model = runtimes.prepare(models.pop(0), runtime=self.runtime_name, patch_shape=shape)
            self._activation_bytes += activation_bytes(model, self.runtime_name)
            self._networks.append(
                runtimes.open_model(
                    model,
                    runtime=self.runtime_name,
                    patch_shape=shape,
                    threads=threads,
                    cache_dir=cache_dir,
                )
            )
        self._workers = kernels.Workers(threads)
        give_back_freed_memory()  # compiling leaves much of it
        self._base_bytes = resident_bytes()

    def close(self) -> None:
        """Free the networks and end the threads."""
        for network in self._networks:
            network.close()
        self._networks = []
        self._workers.close()

    def segment(self, volume: Volume, *, progress: Callable[[Progress], None] | None = None) -> Labelmap:
        """Segment one volume.

        Parameters
        ----------
        volume : Volume
            (C, Z, Y, X) float32 with the manifest's channels in its order, on any grid.
        progress : callable, optional
            Called with a `Progress` as the work goes on, in this thread.

        Returns
        -------
        Labelmap
            (Z, Y, X) on the grid, with the affine and the frame of reference, of the volume given; uint8
            where the labels fit, else uint16. Where the manifest asks for post-processing, ``removed`` says
            what was taken away.

        Raises
        ------
        Refusal
            INVALID_VALUES, MISSING_CHANNEL or OUT_OF_LIMITS; see `models.preprocessing`. TOO_LARGE for a
            volume that would not fit if this process had the machine to itself.
        OutOfMemoryError
            If the volume would fit, but not in the memory that is free now.
        NonFiniteLogitsError
            If the network gives infinity or not a number.
        """
        report = progress or _ignore
        report(Progress(PREPROCESS, 0, 1))
        check_values(volume, self.manifest)
        array, placement, change = preprocessing.locate(volume, self.manifest)
        self._check_memory(placement)
        image = preprocessing.preprocess(array, placement, self.manifest)
        report(Progress(PREPROCESS, 1, 1))
        labels = self._predict(image, placement, report)
        rules = self.manifest.postprocessing
        removed = None if rules is None else postprocessing.keep_largest(labels, rules)
        labels = preprocessing.restore(labels, placement, self.manifest.preprocessing)
        if change is not None:
            labels = change.inverse().apply(labels)
        report(Progress(EXPORT, 1, 1))
        return Labelmap(np.ascontiguousarray(labels), volume.affine, volume.frame_of_reference_uid, removed)

    def _predict(
        self, image: NDArray[np.float32], placement: Placement, report: Callable[[Progress], None]
    ) -> NDArray[Any]:
        """From the preprocessed image to the labels of the crop, (Z, Y, X) in transposed order."""
        inference = self.manifest.inference
        tiling = Tiling.of(placement.shape_network, inference.patch_size, inference.tile_step_size)
        report(Progress(FORWARD, 0, tiling.count))
        painter = Painter(self.manifest, placement, tiling, self._head, self._workers)
        for planes in stream_features(
            pad(image, tiling),
            tiling,
            self._run_tile,
            self._channels,
            self._workers,
            lambda done: report(Progress(FORWARD, done, tiling.count)),
        ):
            painter.paint(planes)
        report(Progress(EXPORT, 0, 1))
        return painter.labels

    def _run_tile(self, tile: NDArray[np.float32]) -> NDArray[np.float32]:
        """(C, Z, Y, X) to the features or mean logits of all folds, each the mean over the mirrored tiles."""
        axes = [axis + 2 for axis in self.manifest.inference.mirror_axes]
        flips = [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
        outputs: list[NDArray[np.float32]] = []
        for network in self._networks:
            output = network(tile[None])
            if len(flips) > 1:
                output = output.copy()
                for flip in flips[1:]:
                    output += np.flip(network(np.ascontiguousarray(np.flip(tile[None], flip))), flip)
                output /= len(flips)
            elif len(self._networks) > 1:
                output = output.copy()  # the next network may write to the same memory
            outputs.append(output[0])
        if len(outputs) == 1:
            return outputs[0]
        if self._head is not None:
            return np.concatenate(outputs)
        return np.asarray(np.add.reduce(outputs) / np.float32(len(outputs)))

    def estimate_peak_bytes(self, shape_zyx: Triple, spacing_xyz_mm: tuple[float, float, float]) -> int:
        """The most memory in bytes that this process will hold while it segments such a volume.

        Parameters
        ----------
        shape_zyx : three ints
            Shape of the volume as it is given to `segment`, or of the part of it that is not zero.
        spacing_xyz_mm : three floats
            Its spacing along x, y, z.
        """
        how, spacing = self.manifest.preprocessing, spacing_xyz_mm[::-1]
        fixed = self.manifest.orientation == "any"
        # Elsewhere the orientation decides which axis is which, and so the tiles: the worst counts.
        orders = ((0, 1, 2),) if fixed else itertools.permutations(range(3))
        return max(
            self._peak_bytes(
                preprocessing.place_all(
                    (shape_zyx[a], shape_zyx[b], shape_zyx[c]), (spacing[a], spacing[b], spacing[c]), how
                )
            )
            for a, b, c in orders
        )

    def _check_memory(self, placement: Placement) -> None:
        """Refuse now what would be killed later."""
        peak = round(_ESTIMATE_MARGIN * self._peak_bytes(placement))
        limit = min(memory_limit_bytes(), self._memory_limit or 2**63)
        if peak > limit:
            raise Refusal(
                ReasonCode.TOO_LARGE,
                f"This volume takes up to {peak / 1e9:.1f} GB of memory, but the limit is"
                f" {limit / 1e9:.1f} GB.",
                remedy="Run it on a node with more memory, or crop the volume.",
            )
        needed = peak - resident_bytes()
        available = available_memory_bytes()
        if needed > available:
            raise OutOfMemoryError(
                f"This volume needs about {needed / 1e9:.1f} GB, but {available / 1e9:.1f} GB are free.",
                remedy="Wait until other work is done, give the node more memory, or crop the volume.",
            )

    def _peak_bytes(self, placement: Placement) -> int:
        """Memory of the process at its fullest: resampling the image, running tiles, or looking for islands.

        ``base`` is what was there before any volume: interpreter, libraries, weights.
        """
        voxels, network_voxels = math.prod(placement.shape_cropped), math.prod(placement.shape_network)
        inference = self.manifest.inference
        tiling = Tiling.of(placement.shape_network, inference.patch_size, inference.tile_step_size)
        image = 4 * len(self.manifest.channels)
        given = image * math.prod(placement.shape_before)
        resampling = image * voxels + (image + 12) * max(voxels, network_voxels)
        padded = image * math.prod(tiling.shape)
        sums = 4 * (self._channels + 1) * math.prod(tiling.held_shape)
        labels = label_type(self.manifest).itemsize * (math.prod(placement.shape_before) + voxels)
        copies = 4 * self._channels * math.prod(tiling.patch) * (len(inference.mirror_axes) > 0)
        forward = padded + sums + labels + copies + self._activation_bytes
        islands = padded + labels + self._activation_bytes
        islands += postprocessing.BYTES_PER_VOXEL * voxels * (self.manifest.postprocessing is not None)
        return self._base_bytes + given + max(resampling, forward, islands)


def _take_heads(models: list[onnx.ModelProto], manifest: Manifest) -> tuple[LinearHead | None, int]:
    """Take the linear heads off the networks where that saves channels; the joint head and channel count.

    The mean of several folds' logits is one linear map of all their features side by side.
    """
    heads = [head for head in map(find_head, models) if head is not None]
    channels = sum(head.matrix.shape[1] for head in heads)
    if len(heads) < len(models) or channels >= manifest.n_outputs:
        return None, manifest.n_outputs
    for model in models:
        remove_head(model)
    matrix = np.concatenate([head.matrix for head in heads], axis=1) / np.float32(len(heads))
    bias = np.mean([head.bias for head in heads], axis=0, dtype=np.float32)
    return LinearHead(np.ascontiguousarray(matrix), np.asarray(bias)), channels


def check_values(volume: Volume, manifest: Manifest) -> None:
    """Refuse what no network should see.

    Raises
    ------
    Refusal
        MISSING_CHANNEL for another number of channels than the model's; INVALID_VALUES for voxels that are
        not finite, or a channel that has one value everywhere.
    """
    given, wanted = volume.array.shape[0], len(manifest.channels)
    if given != wanted:
        names = ", ".join(channel.name for channel in manifest.channels)
        raise Refusal(
            ReasonCode.MISSING_CHANNEL,
            f"The model takes {wanted} channels ({names}), but {given} came.",
            remedy="Give one image for each channel, in this order.",
        )
    for image, channel in zip(volume.array, manifest.channels, strict=True):
        lowest, highest = float(image.min()), float(image.max())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            count = image.size - int(np.isfinite(image).sum())
            raise Refusal(
                ReasonCode.INVALID_VALUES,
                f"Channel {channel.name!r} has {count} voxels that are infinite or not a number.",
                remedy="Check how the image was made; replace such voxels by a background value.",
            )
        if lowest == highest:
            raise Refusal(
                ReasonCode.INVALID_VALUES,
                f"Channel {channel.name!r} is {lowest:g} in every voxel.",
                remedy="Send a series that has an image.",
            )
