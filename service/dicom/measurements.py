"""The volumes of a result as a structured report: TID 1500 (PS3.16), an Enhanced SR document.

One measurement group for each label: with the segment that shows it (TID 1411) where the label was found and
a segmentation goes with the report, without (TID 1501) otherwise. A label that was not found has 0 mL, and
is named in a comment. The report is unverified and preliminary; whose it is and when come from the source
and from the job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import highdicom as hd
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from models.manifest import Label, Manifest
from models.volume import Labelmap
from service.dicom.coding import LONGEST_TEXT
from service.dicom.derived import (
    ARTIFICIAL_INTELLIGENCE,
    LATERALITY,
    Making,
    Reference,
    category_code,
    evidence,
    references_of,
    set_dates,
    set_equipment,
    set_implementation,
    type_code,
    unverified,
)
from service.dicom.elements import quiet
from service.dicom.identifiers import derived_uid
from service.dicom.identity import Identity
from service.dicom.series import SourceSeries

SERIES_NUMBER = 901

MILLILITER = Code("mL", "UCUM", "mL")
_COMMENT = Code("121106", "DCM", "Comment")


@dataclass(frozen=True)
class Segment:
    """A segment that a label is shown by: its object and its Segment Number there."""

    segmentation: Reference
    number: int


def build_measurements(
    source: SourceSeries,
    labelmap: Labelmap,
    manifest: Manifest,
    making: Making,
    *,
    segments: Mapping[int, Segment],
    further_sources: Sequence[SourceSeries] = (),
    comments: Sequence[str] = (),
    parameters: Sequence[str] = (),
) -> Dataset:
    """The report of one result.

    Parameters
    ----------
    source : SourceSeries
        The series that was segmented.
    labelmap : Labelmap
        Labels on the grid of ``source.volume``: the volumes are counted in it.
    manifest : Manifest
        The labels, all of which are reported.
    making : Making
        UIDs, time and model digest.
    segments : mapping of int to Segment
        By label value, the segment that shows it; without those whose segmentation does not go along.
    further_sources : sequence of SourceSeries
        The series of the model's other channels: their images are evidence too.
    comments : sequence of str
        Sentences for the reader: warnings, and what the result supersedes.
    parameters : sequence of str
        How the algorithm was run.

    Returns
    -------
    Dataset
        With ``file_meta``, in explicit VR little endian.
    """
    source.identity.require_whole()
    volumes_ml = labelmap.volumes_ml()
    shown = {segment.segmentation.sop_instance_uid: segment.segmentation for segment in segments.values()}
    algorithm = sr.AlgorithmIdentification(
        name=manifest.title,
        version=manifest.version,
        parameters=[f"model sha256:{making.model_digest}", *parameters],
        family=ARTIFICIAL_INTELLIGENCE,
        manufacturer="segnode",
    )
    groups = [
        _group(label, volumes_ml.get(label.value, 0.0), segments.get(label.value), source, making, algorithm)
        for label in manifest.labels
    ]
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer(making, manifest)),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=groups,
    )
    absent = [label.name for label in manifest.labels if not volumes_ml.get(label.value)]
    said = [*comments]
    if absent:
        said.insert(0, f"Not found: {', '.join(absent)}.")
    report[0].ContentSequence.extend(_comment(sentence) for sentence in said)
    return make_document(
        source.identity,
        [*(r for each in (source, *further_sources) for r in references_of(each)), *shown.values()],
        report,
        making,
        manifest,
        description=unverified(manifest.title),
        series_number=SERIES_NUMBER,
    )


def make_document(
    identity: Identity,
    references: Sequence[Reference],
    content: hd.sr.ContentSequence,
    making: Making,
    manifest: Manifest | None,
    *,
    description: str,
    series_number: int,
) -> Dataset:
    """An unverified, preliminary Enhanced SR document with this content tree."""
    with quiet():  # identifiers that break their VR are passed on as they are
        made = sr.EnhancedSR(
            evidence=evidence(identity, references),
            content=content,
            series_instance_uid=making.series_instance_uid,
            series_number=series_number,
            sop_instance_uid=making.sop_instance_uid,
            instance_number=1,
            manufacturer="segnode",
            manufacturer_model_name="segnode",
            software_versions=making.software_version,
            device_serial_number=making.device_serial_number[:LONGEST_TEXT],
            series_description=description[:LONGEST_TEXT],
            is_complete=True,
            is_final=False,
            is_verified=False,
        )
        dataset = Dataset()
        dataset.update(made)
        dataset.file_meta = made.file_meta
        identity.write(dataset)
        set_dates(dataset, making.content_datetime)
        set_implementation(dataset, making)
        set_equipment(dataset, making, manifest)
    return dataset


def observer(making: Making, manifest: Manifest | None) -> sr.ObserverContext:
    """The device that observed (TID 1004): this node, with the model that it ran."""
    model = f"{manifest.name} {manifest.version} sha256:{making.model_digest}" if manifest else None
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=derived_uid("device", name=making.device_serial_number),
        name=f"segnode {making.software_version}",
        manufacturer_name="segnode",
        model_name=model,
        serial_number=making.device_serial_number,
    )
    return sr.ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)


def _group(
    label: Label,
    volume_ml: float,
    segment: Segment | None,
    source: SourceSeries,
    making: Making,
    algorithm: sr.AlgorithmIdentification,
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations | sr.MeasurementsAndQualitativeEvaluations:
    tracking_uid = derived_uid("tracking", sop_instance_uid=making.sop_instance_uid, label=label.value)
    value_ml = float(f"{volume_ml:.9g}")  # what a product of spacings rounds to is no digit of the volume
    common: dict[str, Any] = {
        "tracking_identifier": sr.TrackingIdentifier(uid=tracking_uid, identifier=label.name),
        "finding_type": type_code(label),
        "finding_category": category_code(label),
        "algorithm_id": algorithm,
        "measurements": [sr.Measurement(name=codes.SCT.Volume, value=value_ml, unit=MILLILITER)],
    }
    if label.laterality is not None:
        side = LATERALITY[label.laterality]
        common["finding_sites"] = [sr.FindingSite(anatomic_location=type_code(label), laterality=side)]
    if segment is None:
        return sr.MeasurementsAndQualitativeEvaluations(**common)
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=segment.segmentation.sop_class_uid,
            sop_instance_uid=segment.segmentation.sop_instance_uid,
            segment_number=segment.number,
            source_series=sr.SourceSeriesForSegmentation(source.series_instance_uid),
        ),
        **common,
    )


def _comment(sentence: str) -> sr.TextContentItem:
    return sr.TextContentItem(
        name=_COMMENT, value=sentence, relationship_type=sr.RelationshipTypeValues.CONTAINS
    )
