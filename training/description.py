"""The labels file: what a results folder does not know about its own model.

nnU-Net knows labels by number and name. A DICOM-SEG needs codes, and a hospital needs to be told what a
model is for. One YAML file, written by a person, says it; `template` gives that person a start.
"""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.manifest import CodedConcept, InputLimits, Label, Laterality, Postprocessing
from training.errors import LabelsFileError
from training.plans import channel_names_of
from training.teacher import ResultsFolder

ANATOMICAL_STRUCTURE = CodedConcept(value="91723000", meaning="Anatomical Structure")
"""Category for anatomy, of DICOM's CID 7150."""

BODY_STRUCTURE = CodedConcept(value="123037004", meaning="Body structure")
"""The most general type that SNOMED CT has for anatomy; a stopgap that identifies nothing."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LabelDescription(_Model):
    """One value of the labelmap. Fields as in the manifest's `Label`."""

    value: int
    name: str
    category: CodedConcept = ANATOMICAL_STRUCTURE
    type: CodedConcept
    laterality: Laterality | None = None
    color_rgb: tuple[int, int, int] | None = None
    volume_range_ml: tuple[float, float] | None = None


class ChannelDescription(_Model):
    """One input channel, in the order of dataset.json. ``modality`` is DICOM's, for example MR."""

    name: str
    modality: str | None = None
    keywords: tuple[str, ...] = ()


class Description(_Model):
    """The whole labels file.

    ``data`` and ``data_licence`` say what the model was trained on; ``notes`` is Markdown that goes to the
    end of the model card.
    """

    title: str
    intended_use: str
    licence: str
    data: str
    data_licence: str | None = None
    channels: tuple[ChannelDescription, ...]
    labels: tuple[LabelDescription, ...] = Field(min_length=1)
    input_limits: InputLimits = InputLimits()
    postprocessing: Postprocessing | None = None
    notes: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        values = [label.value for label in self.labels]
        if len(set(values)) != len(values):
            raise ValueError("a label value stands there twice")
        return self

    def manifest_labels(self) -> tuple[Label, ...]:
        """The labels by rising value; those without a colour get one."""
        ordered = sorted(self.labels, key=lambda label: label.value)
        return tuple(
            Label(**label.model_dump(exclude={"color_rgb"}), color_rgb=label.color_rgb or distinct_color(i))
            for i, label in enumerate(ordered)
        )


def read_description(path: Path | None, results: ResultsFolder, *, template_path: Path) -> Description:
    """Read a labels file and check that it speaks of the labels and channels of a results folder.

    Parameters
    ----------
    path : Path or None
        The file; None writes a template to ``template_path`` (unless a file is there) and stops.

    Raises
    ------
    LabelsFileError
        If there is no file, it is not understood, or its labels are not the model's.
    """
    if path is None:
        if not template_path.exists():
            template_path.parent.mkdir(parents=True, exist_ok=True)
            template_path.write_text(template(results), encoding="utf-8")
        raise LabelsFileError(
            "A results folder holds no codes for its labels, and a DICOM-SEG needs them.",
            remedy=f"Fill in {template_path.name} (written for you beside the output folder) and give it as "
            "--labels-file; or take --generic-codes for a model that stays in research.",
        )
    description = parse_description(path)
    wanted, given = set(results.classes.names), {label.value for label in description.labels}
    if wanted != given:
        raise LabelsFileError(
            f"{path.name} describes the labels {sorted(given)}, the model writes {sorted(wanted)}.",
            remedy="Describe each label of dataset.json once.",
        )
    if len(description.channels) != results.n_channels:
        raise LabelsFileError(
            f"{path.name} has {len(description.channels)} channels, the model has {results.n_channels}.",
            remedy="Describe each channel of dataset.json once, in its order.",
        )
    return description


def parse_description(path: Path) -> Description:
    """Read a labels file by itself. Raises LabelsFileError if it is not understood."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Description.model_validate(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LabelsFileError(f"{path.name} cannot be read as YAML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        )
        raise LabelsFileError(f"{path.name} is not understood: {problems}.") from error


def generic_description(results: ResultsFolder, name: str) -> Description:
    """A description that only repeats what nnU-Net knows; every label has the type "Body structure"."""
    return Description(
        title=name,
        intended_use="Research only. Its segments carry no codes that identify what they are.",
        licence="not stated",
        data=str(results.plans["dataset_name"]),
        channels=tuple(ChannelDescription(name=n) for n in channel_names_of(results.dataset_json)),
        labels=tuple(
            LabelDescription(value=value, name=label, type=BODY_STRUCTURE)
            for value, label in results.classes.names.items()
        ),
    )


def template(results: ResultsFolder) -> str:
    """A labels file for a results folder with every field that a person has to fill in.

    The codes are left empty, so the file is refused until somebody has looked each one up.
    """
    content: dict[str, Any] = {
        "title": "",
        "intended_use": "",
        "licence": "",
        "data": results.plans["dataset_name"],
        "data_licence": "",
        "channels": [
            {"name": name, "modality": "MR", "keywords": []}
            for name in channel_names_of(results.dataset_json)
        ],
        "labels": [
            {
                "value": value,
                "name": name,
                "type": {"value": "", "scheme": "SCT", "meaning": ""},
                "laterality": None,
                "color_rgb": list(distinct_color(i)),
                "volume_range_ml": None,
            }
            for i, (value, name) in enumerate(results.classes.names.items())
        ],
        "input_limits": {
            "modalities": ["MR"],
            "spacing_mm": [0.5, 1.5],
            "field_of_view_mm": None,
            "minimum_slices": 1,
        },
        "postprocessing": None,
        "notes": "",
    }
    head = (
        "# What nnU-Net does not know about this model. Fill in every empty field.\n"
        "# type: the SNOMED CT code of the structure (CID 7151 of DICOM PS3.16 and the lists it names).\n"
        "# laterality: left, right, both, or null. volume_range_ml: [smallest, largest] that is plausible.\n"
        "# input_limits: what the model was made for; remove what you cannot say.\n"
        "# postprocessing: null, or {largest_component_of_foreground: true} for a body part in one piece.\n"
    )
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def distinct_color(index: int) -> tuple[int, int, int]:
    """The colour of the index-th label: hues a golden angle apart, so that neighbours always differ."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.61803398875 % 1.0, 0.75, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)
