"""What an object replaces: Predecessor Documents Sequence (0040,A360), PS3.3 C.17.2.

It is part of the SR Document General Module. A segmentation has no attribute of its own for this: there the
same sequence makes a Standard Extended SOP Class (PS3.2), and viewers that know revisions look for it there.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from service.dicom.elements import items, string

_SEGMENTATIONS = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})
_REPORTS = frozenset({"1.2.840.10008.5.1.4.1.1.88.22", "1.2.840.10008.5.1.4.1.1.88.33"})


class Predecessor(BaseModel):
    """An object of this node that a newer one replaces.

    ``profile`` is the key of the profile whose destinations got it; None where all did.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    profile: str | None = None


def segmentations_of(predecessors: Sequence[Predecessor], profile: str) -> tuple[Predecessor, ...]:
    """The segmentations among them that a destination of this profile has got."""
    return _of(predecessors, profile, _SEGMENTATIONS)


def reports_of(predecessors: Sequence[Predecessor], profile: str) -> tuple[Predecessor, ...]:
    """The reports among them, refusals too, that a destination of this profile has got."""
    return _of(predecessors, profile, _REPORTS)


def set_predecessors(dataset: Dataset, predecessors: Sequence[Predecessor]) -> None:
    """Name what an object replaces, by study and series (PS3.3 table C.17-3); nothing where there is none."""
    if not predecessors:
        return
    studies: dict[str, dict[str, list[Dataset]]] = {}
    for each in predecessors:
        reference = Dataset()
        reference.ReferencedSOPClassUID = each.sop_class_uid
        reference.ReferencedSOPInstanceUID = each.sop_instance_uid
        studies.setdefault(each.study_instance_uid, {}).setdefault(each.series_instance_uid, []).append(
            reference
        )
    dataset.PredecessorDocumentsSequence = DicomSequence(
        _study(study_instance_uid, series) for study_instance_uid, series in studies.items()
    )


def stated_predecessors(dataset: Dataset) -> list[tuple[str | None, ...]]:
    """Study, series, class and instance of everything that an object says it replaces, sorted."""
    return sorted(
        (
            string(study, "StudyInstanceUID"),
            string(series, "SeriesInstanceUID"),
            string(reference, "ReferencedSOPClassUID"),
            string(reference, "ReferencedSOPInstanceUID"),
        )
        for study in items(dataset, "PredecessorDocumentsSequence")
        for series in items(study, "ReferencedSeriesSequence")
        for reference in items(series, "ReferencedSOPSequence")
    )


def _study(study_instance_uid: str, references: dict[str, list[Dataset]]) -> Dataset:
    study = Dataset()
    study.StudyInstanceUID = study_instance_uid
    study.ReferencedSeriesSequence = DicomSequence()
    for series_instance_uid, of_series in references.items():
        series = Dataset()
        series.SeriesInstanceUID = series_instance_uid
        series.ReferencedSOPSequence = DicomSequence(of_series)
        study.ReferencedSeriesSequence.append(series)
    return study


def _of(
    predecessors: Sequence[Predecessor], profile: str, classes: frozenset[str]
) -> tuple[Predecessor, ...]:
    return tuple(
        each for each in predecessors if each.sop_class_uid in classes and each.profile in (None, profile)
    )
