"""One training sample from a label map, from top to bottom.

The idea, images of random contrast and resolution drawn from label maps, is that of SynthSeg (Billot et al.,
arXiv 2107.09559).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from training.synthesis.acquisition import acquire, random_bias, random_slices, tone
from training.synthesis.deformation import Deformation, deform, random_coefficients_mm, random_matrix
from training.synthesis.intensities import draw_intensities, paint
from training.synthesis.label_maps import ClassTable, LabelMap
from training.synthesis.recipe import CONTRASTS, KEEPS, Contrast, Keep, SynthesisRecipe
from training.synthesis.stripping import kept
from training.synthesis.structures import CSF


@dataclass(frozen=True)
class Sample:
    """One drawn patch.

    Parameters
    ----------
    image : (Z, Y, X) tensor of float32
        Z-score over what is inside of the field of view, 0 outside of it.
    labels : (Z, Y, X) tensor of int16
        Values of ``structures.STRUCTURES``; 0 elsewhere.
    map_name, contrast, keep : str
        What it was made of.
    """

    image: Tensor
    labels: Tensor
    map_name: str
    contrast: Contrast
    keep: Keep


class Generator:
    """Draws samples of one shape and spacing; the same seed and index give the same sample.

    Parameters are drawn on the host, so they are the same on every device; noise is drawn on ``device`` and
    differs from one kind of device to another.

    Parameters
    ----------
    maps : sequence of LabelMap
        Drawn from with equal probability.
    table : ClassTable
        Of the maps' labels.
    shape : tuple
        Voxels (Z, Y, X) of a sample.
    """

    def __init__(
        self,
        maps: Sequence[LabelMap],
        table: ClassTable,
        recipe: SynthesisRecipe,
        *,
        shape: tuple[int, int, int],
        spacing_mm: float,
        device: torch.device,
    ) -> None:
        assert maps, "there is no label map to draw from"
        self.maps, self.table, self.recipe = tuple(maps), table, recipe
        self.shape, self.spacing_mm, self.device = shape, spacing_mm, device
        self._places = [torch.as_tensor(m.places, device=device) for m in maps]
        self._swapped = torch.as_tensor(table.swapped, device=device)
        self._structure = torch.as_tensor(table.structure, dtype=torch.int16, device=device)
        self._brain = torch.as_tensor(table.brain, device=device)
        self._csf = torch.as_tensor(table.numbers == CSF, device=device)

    def sample(self, *key: int) -> Sample:
        """The sample of a key, for example (seed, index)."""
        recipe, shape = self.recipe, self.shape
        rng = np.random.default_rng(list(key))
        gen = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        which = int(rng.integers(len(self.maps)))
        contrast = CONTRASTS[int(rng.choice(len(CONTRASTS), p=recipe.contrasts))]
        keep = KEEPS[int(rng.choice(len(KEEPS), p=recipe.keeps))]

        places = deform(
            self._places[which],
            self.maps[which].spacing_mm,
            self.maps[which].middle,
            self._swapped,
            shape,
            self.spacing_mm,
            self._deformation(rng),
        )
        means, stds = (self._tensor(a) for a in draw_intensities(rng, self.table, contrast))
        image = paint(places, means, stds, gen)
        image *= random_bias(
            rng,
            shape,
            self.spacing_mm,
            knot_mm=recipe.bias_knot_mm,
            log_sd=rng.uniform(0, recipe.bias_log_sd),
            device=self.device,
        )
        slices = random_slices(
            rng,
            thick_probability=recipe.thick_probability,
            thickest_mm=recipe.thickest_mm,
            in_plane_mm=(0.7, 1.5 * self.spacing_mm),
            isotropic_mm=(0.5 * self.spacing_mm, 2.0 * self.spacing_mm),
        )
        image = acquire(image, self.spacing_mm, slices, rng.uniform(0, recipe.noise_sd), gen)
        image = tone(image, rng.normal(0, recipe.log_gamma_sd))
        mask = kept(places, self._brain, self._csf, keep, int(rng.integers(1, 4)))
        if mask is not None:
            image = image * mask
        labels = self._structure[places.long()]
        image, labels = _cut(image, labels, rng, recipe.cut_probability)
        return Sample(image, labels, self.maps[which].name, contrast, keep)

    def _deformation(self, rng: np.random.Generator) -> Deformation:
        recipe = self.recipe
        reach = recipe.far_mm if rng.random() < recipe.far_probability else recipe.near_mm
        return Deformation(
            matrix=random_matrix(
                rng,
                rotation_degrees=recipe.rotation_degrees,
                scaling=recipe.scaling,
                shearing=recipe.shearing,
            ),
            offset_mm=rng.uniform(-reach, reach, 3),
            coefficients_mm=random_coefficients_mm(
                rng,
                self.shape,
                self.spacing_mm,
                knot_mm=recipe.knot_mm,
                sd_mm=rng.uniform(0, recipe.displacement_sd_mm),
            ),
            knot_mm=recipe.knot_mm,
            flipped=bool(rng.random() < recipe.flip_probability),
        )

    def _tensor(self, array: Any) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=self.device)


def _cut(
    image: Tensor, labels: Tensor, rng: np.random.Generator, probability: float
) -> tuple[Tensor, Tensor]:
    """Z-score of the part inside of the field of view; zeros, and no label, outside of it."""
    box = [slice(None)] * 3
    if rng.random() < probability:
        axis, share, from_end = int(rng.integers(3)), rng.uniform(0.05, 0.35), bool(rng.random() < 0.5)
        n = image.shape[axis]
        missing = round(share * n)
        box[axis] = slice(0, n - missing) if from_end else slice(missing, n)
    place = cast(Any, tuple(box))
    inside = image[place]
    new_image, new_labels = torch.zeros_like(image), torch.zeros_like(labels)
    # nnU-Net divides by at least 1e-8.
    new_image[place] = (inside - inside.mean()) / inside.std(correction=0).clamp(min=1e-8)
    new_labels[place] = labels[place]
    return new_image, new_labels
