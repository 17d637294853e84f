"""``model.json``: everything the engine and the node need to know about a model.

This is the only contract between the training wing and the service wing. Unknown keys are refused, so a
manifest that was written for a newer segnode never half-works on an older one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from models.volume import is_axis_code

SCHEMA_VERSION: Literal[1] = 1

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")]
"""A model's name: lower case letters, digits and hyphens; safe as a folder and in a URL."""

SemanticVersion = Annotated[
    str, Field(pattern=r"^(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})(-[0-9A-Za-z.-]{1,32})?$")
]
"""A version such as ``1.10.0`` or ``1.10.0-rc.1`` (Semantic Versioning 2.0.0, without build metadata)."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Triple = tuple[int, int, int]
TripleMm = tuple[float, float, float]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CodedConcept(_Model):
    """A code sequence item (PS3.3 section 8): value, coding scheme designator and meaning."""

    value: str = Field(min_length=1, max_length=64)
    scheme: str = Field(default="SCT", min_length=1, max_length=16)
    meaning: str = Field(min_length=1, max_length=64)


class Laterality(StrEnum):
    LEFT = "left"
    RIGHT = "right"
    BOTH = "both"


class Label(_Model):
    """One value of the labelmap that the model writes, and what it means.

    ``volume_range_ml`` is what the training cases span; outside it a result is doubtful.
    """

    value: int = Field(ge=1, le=65535)
    name: str = Field(min_length=1, max_length=64)
    category: CodedConcept
    type: CodedConcept
    laterality: Laterality | None = None
    color_rgb: tuple[int, int, int]
    volume_range_ml: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= c <= 255 for c in self.color_rgb):
            raise ValueError(f"color_rgb of {self.name!r} must be three numbers from 0 to 255")
        if self.volume_range_ml is not None and not 0 <= self.volume_range_ml[0] <= self.volume_range_ml[1]:
            raise ValueError(f"volume_range_ml of {self.name!r} must be (smallest, largest)")
        return self


class IntensityProperties(_Model):
    """Foreground intensity statistics of the training cases, as nnU-Net's fingerprint has them."""

    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float


class NormalizationScheme(StrEnum):
    """nnU-Net's normalisation classes, by their own names."""

    ZSCORE = "ZScoreNormalization"
    CT = "CTNormalization"
    NONE = "NoNormalization"
    RESCALE_0_1 = "RescaleTo01Normalization"
    RGB_0_1 = "RGBTo01Normalization"


class Channel(_Model):
    """One input channel. ``keywords`` help a route to find its series; they are matched by nobody else."""

    name: str = Field(min_length=1, max_length=64)
    modality: str | None = Field(default=None, pattern=r"^[A-Z]{2,16}$")
    keywords: tuple[str, ...] = ()
    normalization: NormalizationScheme
    use_mask_for_norm: bool = False
    intensity: IntensityProperties | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.normalization is NormalizationScheme.CT and self.intensity is None:
            raise ValueError(f"channel {self.name!r}: CTNormalization needs intensity properties")
        return self


class Resampling(_Model):
    """A resampling function of nnU-Net, by name, with its arguments."""

    function: Literal["resample_data_or_seg_to_shape"] = "resample_data_or_seg_to_shape"
    order: int = Field(ge=0, le=3)
    order_z: int = Field(default=0, ge=0, le=3)
    force_separate_z: bool | None = None


class Preprocessing(_Model):
    """What happens to an array between reading and the network; axes are those of the training array.

    ``transpose_forward`` permutes the (Z, Y, X) axes of the array as it was read; ``spacing_mm`` and
    ``patch_size`` are in the transposed order.
    """

    transpose_forward: Triple = (0, 1, 2)
    transpose_backward: Triple = (0, 1, 2)
    spacing_mm: TripleMm
    resampling_data: Resampling
    resampling_probabilities: Resampling

    @model_validator(mode="after")
    def _check(self) -> Self:
        forward, backward = self.transpose_forward, self.transpose_backward
        if sorted(forward) != [0, 1, 2] or tuple(forward[i] for i in backward) != (0, 1, 2):
            raise ValueError("transpose_backward must undo transpose_forward, both permutations of 0, 1, 2")
        if min(self.spacing_mm) <= 0:
            raise ValueError("spacing_mm must be positive")
        return self


class Head(StrEnum):
    """How the network's outputs become labels."""

    SOFTMAX = "softmax"  # channel i is label i, channel 0 background: argmax
    SIGMOID = "sigmoid"  # channel i is a region, painted in regions_class_order where sigmoid > 0.5


class Inference(_Model):
    """How the network is run: sliding window, mirroring, and the meaning of its outputs.

    ``mirror_axes`` count the spatial axes of the transposed array, 0 to 2; empty means no test-time
    mirroring. ``regions_class_order[i]`` is the label value that output channel i paints (sigmoid only).
    """

    head: Head = Head.SOFTMAX
    patch_size: Triple
    mirror_axes: tuple[int, ...] = ()
    tile_step_size: float = Field(default=0.5, gt=0, le=1)
    regions_class_order: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.patch_size) < 1 or max(self.patch_size) > 1024:
            raise ValueError("patch_size must be three sizes from 1 to 1024")
        if len(set(self.mirror_axes)) != len(self.mirror_axes) or not set(self.mirror_axes) <= {0, 1, 2}:
            raise ValueError("mirror_axes must be some of 0, 1, 2, each once")
        if (self.head is Head.SIGMOID) != bool(self.regions_class_order):
            raise ValueError("regions_class_order belongs to a sigmoid head, and to that alone")
        return self


class Postprocessing(_Model):
    """What is taken away once every voxel has its label: all but the largest connected component.

    ``largest_component_of_foreground`` takes all labels together, ``largest_component_of_labels`` each of
    these values alone, after it; `models.postprocessing` has the rule. A result that loses more than
    ``maximum_removed_share`` of what was found, 0 to 1, is doubtful; what was taken away is told in any case.
    """

    largest_component_of_foreground: bool = False
    largest_component_of_labels: tuple[int, ...] = ()
    maximum_removed_share: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        values = self.largest_component_of_labels
        if not (self.largest_component_of_foreground or values):
            raise ValueError("postprocessing must name the foreground or labels; leave it out for none")
        if len(set(values)) != len(values):
            raise ValueError("largest_component_of_labels must name each label once")
        return self


class Precision(StrEnum):
    FLOAT32 = "float32"
    INT8 = "int8"


class Weights(_Model):
    """One ONNX file. Several folds are several files of the same precision; their logits are averaged."""

    file: FileName
    sha256: Sha256
    precision: Precision = Precision.FLOAT32
    fold: int = Field(default=0, ge=0)


class GoldenCase(_Model):
    """A small input and the labelmap that the training framework gave for it."""

    images: tuple[FileName, ...]  # one NIfTI file per channel, inside golden/
    labelmap: FileName


class InputLimits(_Model):
    """What the model was made for. Outside it a study is refused or warned about, by route."""

    modalities: tuple[str, ...] = ()
    spacing_mm: tuple[float, float] | None = None  # smallest and largest, any axis
    field_of_view_mm: tuple[float, float] | None = None  # smallest and largest extent, any axis
    minimum_slices: int = Field(default=1, ge=1)


class Provenance(_Model):
    """Where the weights come from."""

    teacher_digest: Sha256 | None = None
    width: str | None = None
    method: str
    recipe: str | None = None
    data: str
    data_licence: str | None = None
    library_versions: dict[str, str] = {}
    source_commit: str | None = None


class Metrics(_Model):
    """Figures per label name, as measured; ``evaluated_on`` names the cases."""

    evaluated_on: str
    cases: int = Field(ge=1)
    dice: dict[str, dict[str, float]]  # model ("teacher", "float32", "int8") -> label name -> mean Dice


class Manifest(_Model):
    """The whole of ``model.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Name
    version: SemanticVersion
    title: str = Field(min_length=1, max_length=64)  # a DICOM LO: 64 characters
    intended_use: str = Field(min_length=1)
    licence: str = Field(min_length=1)
    channels: tuple[Channel, ...] = Field(min_length=1)
    labels: tuple[Label, ...] = Field(min_length=1)
    orientation: str
    preprocessing: Preprocessing
    inference: Inference
    postprocessing: Postprocessing | None = None
    weights: tuple[Weights, ...] = Field(min_length=1)
    precision: Precision = Precision.FLOAT32  # what the node runs unless told otherwise
    golden: GoldenCase
    input_limits: InputLimits = InputLimits()
    provenance: Provenance
    metrics: Metrics | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.orientation != "any" and not is_axis_code(self.orientation):
            raise ValueError("orientation must be an axis code such as 'RAS', or 'any'")
        values = [label.value for label in self.labels]
        names = [label.name for label in self.labels]
        if len(set(values)) != len(values) or len(set(names)) != len(names):
            raise ValueError("label values and names must each be unique")
        if self.inference.head is Head.SIGMOID:
            if not set(self.inference.regions_class_order) <= set(values):
                raise ValueError("every value of regions_class_order must be a label")
        elif sorted(values) != list(range(1, len(values) + 1)):
            raise ValueError("the labels of a softmax head must be 1, 2, 3, ... without a gap")
        if self.postprocessing and not set(self.postprocessing.largest_component_of_labels) <= set(values):
            raise ValueError("every value of largest_component_of_labels must be a label")
        if len(self.golden.images) != len(self.channels):
            raise ValueError("the golden case needs one image per channel")
        if not self.weights_of(Precision.FLOAT32):
            raise ValueError("float32 weights are required; other precisions are extra")
        if not self.weights_of(self.precision):
            raise ValueError(f"precision says {self.precision}, but no weights of it are listed")
        return self

    def changed(self, **update: object) -> Self:
        """A copy with other values of some fields, checked as a manifest that is read.

        Raises
        ------
        pydantic.ValidationError
            If it would not be valid; `model_copy` alone checks nothing.
        """
        return type(self).model_validate_json(self.model_copy(update=update).model_dump_json())

    def weights_of(self, precision: Precision) -> tuple[Weights, ...]:
        """The files of one precision, in the order of their folds."""
        return tuple(sorted((w for w in self.weights if w.precision is precision), key=lambda w: w.fold))

    @property
    def n_outputs(self) -> int:
        """Number of channels that the network puts out."""
        if self.inference.head is Head.SIGMOID:
            return len(self.inference.regions_class_order)
        return len(self.labels) + 1


_NAME = TypeAdapter[str](Name)


def is_name(value: str) -> bool:
    """True for what may be a model's name; anything else must not become part of a path or a URL.

    >>> is_name("hippocampus-t1"), is_name("../etc"), is_name("Hippocampus")
    (True, False, False)
    """
    try:
        _NAME.validate_python(value)
    except ValidationError:
        return False
    return True
