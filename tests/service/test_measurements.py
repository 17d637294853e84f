"""The report says of every label the volume that it has, and its proof catches one that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from findings import (
    CREATED_AT,
    DIGEST,
    dciodvfy_errors,
    labelmap_of,
    make_finding,
    phantom_source,
    rendered,
)
from phantom import chiral_labels, phantom_manifest
from pydicom import Dataset, dcmread
from pydicom.uid import JPEGLSNearLossless

from service.dicom.report_proof import prove_measurements
from service.dicom.series import SourceSeries
from service.errors import ProofError

COMMENTS = ("2 of 4 structures were found.", "part 1 has 9 mL.", "This result supersedes 2.25.4.")
WITHOUT_3 = np.where(chiral_labels() == 3, 0, chiral_labels()).astype(np.uint8)
MANIFEST = phantom_manifest(4, laterality=["left", "right"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceSeries:
    return phantom_source(tmp_path_factory.mktemp("source"))


def report_of(
    folder: Path, source: SourceSeries, array: np.ndarray = WITHOUT_3, **profile: Any
) -> tuple[Path, list[Path]]:
    """The report of a result, and the segmentations that go with it."""
    finding = make_finding(source, array=array, manifest=MANIFEST, comments=COMMENTS)
    files = rendered(finding, folder, **profile)
    (report,) = [folder / f.name for f in files if f.kind == "report"]
    return report, [folder / f.name for f in files if f.kind == "segmentation"]


def read(path: Path) -> tuple[highdicom.sr.EnhancedSR, highdicom.sr.MeasurementReport]:
    document = highdicom.sr.srread(path)
    return document, highdicom.sr.MeasurementReport.from_sequence([document])


def volumes_of(report: highdicom.sr.MeasurementReport) -> dict[str, float]:
    groups = report.get_volumetric_roi_measurement_groups() + report.get_image_measurement_groups()
    found = {}
    for group in groups:
        (measurement,) = group.get_measurements(name=highdicom.sr.CodedConcept("118565006", "SCT", "Volume"))
        assert measurement.unit.value == "mL"
        found[group.tracking_identifier] = measurement.value
    return found


def test_highdicom_reads_volumes_segments_and_findings(tmp_path: Path, source: SourceSeries) -> None:
    path, (segmentation,) = report_of(tmp_path, source)
    _, report = read(path)
    voxel_ml = 0.9 * 1.1 * 2.0 / 1000
    counts = [int((value == WITHOUT_3).sum()) for value in (1, 2, 3, 4)]
    assert volumes_of(report) == pytest.approx(
        {f"part {value}": count * voxel_ml for value, count in enumerate(counts, 1)}, rel=1e-7
    )
    assert 0.0 in volumes_of(report).values()
    shown = report.get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in shown] == ["part 1", "part 2"]
    seg = dcmread(segmentation)
    for number, group in enumerate(shown, 1):
        reference = group.referenced_segment
        assert reference.referenced_sop_instance_uid == seg.SOPInstanceUID
        assert reference.referenced_sop_class_uid == seg.SOPClassUID
        assert reference[0].referenced_segment_numbers == [number]
        assert group.finding_type.value == f"9900000{number}"
        assert group.finding_category.value == "123037004"
    sides = [group.finding_sites[0].laterality.meaning for group in shown]
    assert sides == ["Left", "Right"]
    (device,) = report.get_observer_contexts()
    assert device.observer_type.meaning == "Device"
    assert DIGEST in device.observer_identifying_attributes.model_name
    assert "phantom 1.2.3" in device.observer_identifying_attributes.model_name


def test_the_document_is_unverified_and_filed_with_its_source(tmp_path: Path, source: SourceSeries) -> None:
    path, _ = report_of(tmp_path, source)
    dataset = dcmread(path)
    assert (dataset.CompletionFlag, dataset.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    assert dataset.PreliminaryFlag == "PRELIMINARY"
    assert dataset.SeriesDescription == "AI, unverified: Phantom parts"
    assert (dataset.PatientID, dataset.StudyInstanceUID) == ("PHANTOM-1", "2.25.101")
    assert (dataset.ContentDate, dataset.ContentTime) == ("20260304", "050607.000000")
    assert dataset.ContributingEquipmentSequence[0].SoftwareVersions == DIGEST
    assert dataset.Modality == "SR"
    said = [
        item.TextValue
        for item in dataset.ContentSequence
        if item.ValueType == "TEXT" and item.ConceptNameCodeSequence[0].CodeMeaning == "Comment"
    ]
    assert said == ["Not found: part 3, part 4.", *COMMENTS]
    referenced = {
        reference.ReferencedSOPInstanceUID
        for series in dataset.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        for reference in series.ReferencedSOPSequence
    }
    assert referenced > set(source.sop_instance_uids)


def test_two_builds_are_byte_identical(tmp_path: Path, source: SourceSeries) -> None:
    first, _ = report_of(tmp_path / "a", source)
    second, _ = report_of(tmp_path / "b", source)
    assert first.read_bytes() == second.read_bytes()
    assert CREATED_AT.strftime("%Y%m%d").encode() in first.read_bytes()


def test_nothing_found_is_a_report_alone(tmp_path: Path, source: SourceSeries) -> None:
    nothing = np.zeros_like(WITHOUT_3)
    for name, profile in (("a", {}), ("b", {"measurements": False})):
        finding = make_finding(source, array=nothing, manifest=MANIFEST)
        files = rendered(finding, tmp_path / name, **profile)
        assert [file.kind for file in files] == ["report"]
        path = tmp_path / name / files[0].name
        assert set(volumes_of(read(path)[1]).values()) == {0.0}
        assert dciodvfy_errors(path, "EnhancedSR") == []


def test_without_a_segmentation_the_report_names_none(tmp_path: Path, source: SourceSeries) -> None:
    path, segmentations = report_of(tmp_path, source, segmentation="none")
    assert segmentations == []
    _, report = read(path)
    assert report.get_volumetric_roi_measurement_groups() == []
    assert len(report.get_image_measurement_groups()) == 4
    assert dciodvfy_errors(path, "EnhancedSR") == []


def test_each_label_names_the_object_of_its_own(tmp_path: Path, source: SourceSeries) -> None:
    path, segmentations = report_of(tmp_path, source, one_per_label=True)
    _, report = read(path)
    groups = report.get_volumetric_roi_measurement_groups()
    named = [group.referenced_segment.referenced_sop_instance_uid for group in groups]
    assert named == [dcmread(each).SOPInstanceUID for each in segmentations]
    assert all(group.referenced_segment[0].referenced_segment_numbers == [1] for group in groups)


def test_dciodvfy_finds_no_error(tmp_path: Path, source: SourceSeries) -> None:
    path, _ = report_of(tmp_path, source)
    assert dciodvfy_errors(path, "EnhancedSR") == []


def test_dciodvfy_finds_nothing_but_that_it_knows_no_label_maps(tmp_path: Path, source: SourceSeries) -> None:
    path, _ = report_of(tmp_path, source, segmentation="labelmap")
    unknown = "Shall not be present for Referenced SOP Class that is not segmentation"
    assert [e for e in dciodvfy_errors(path, "EnhancedSR") if unknown not in e] == []


def test_loss_in_the_source_keeps_it_valid(tmp_path: Path) -> None:
    lossy = phantom_source(tmp_path / "source", transfer_syntax=JPEGLSNearLossless)
    path, _ = report_of(tmp_path / "out", lossy)
    assert dciodvfy_errors(path, "EnhancedSR") == []


# --- the proof ----------------------------------------------------------------------------------------


def _groups(dataset: Dataset) -> list[Dataset]:
    (container,) = [i for i in dataset.ContentSequence if i.ValueType == "CONTAINER"]
    return list(container.ContentSequence)


def _part(dataset: Dataset, meaning: str, group: int = 0) -> Dataset:
    (found,) = [
        i
        for i in _groups(dataset)[group].ContentSequence
        if i.ConceptNameCodeSequence[0].CodeMeaning == meaning
    ]
    return found


def _swap_volumes(dataset: Dataset) -> None:
    one, two = _part(dataset, "Volume", 0), _part(dataset, "Volume", 1)
    one.MeasuredValueSequence, two.MeasuredValueSequence = (
        two.MeasuredValueSequence,
        one.MeasuredValueSequence,
    )


def _set_volume(dataset: Dataset, text: str, group: int = 0) -> None:
    _part(dataset, "Volume", group).MeasuredValueSequence[0].NumericValue = text


def _set_unit(dataset: Dataset) -> None:
    unit = _part(dataset, "Volume").MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0]
    unit.CodeValue = "mm3"


def _drop_group(dataset: Dataset) -> None:
    (container,) = [i for i in dataset.ContentSequence if i.ValueType == "CONTAINER"]
    container.ContentSequence = container.ContentSequence[:-1]


def _drop_comments(dataset: Dataset) -> None:
    dataset.ContentSequence = [
        i for i in dataset.ContentSequence if i.ConceptNameCodeSequence[0].CodeMeaning != "Comment"
    ]


def _reference(dataset: Dataset) -> Dataset:
    return _part(dataset, "Referenced Segment").ReferencedSOPSequence[0]


def _drop_reference(dataset: Dataset) -> None:
    group = _groups(dataset)[0]
    group.ContentSequence = [
        i for i in group.ContentSequence if i.ConceptNameCodeSequence[0].CodeMeaning != "Referenced Segment"
    ]


FAULTS: dict[str, tuple[Callable[[Dataset], Any], str]] = {
    "volumes swapped": (_swap_volumes, "it gives part 1"),
    "a volume": (lambda d: _set_volume(d, "0.0633601"), "it gives part 1 0.06336"),
    "a volume of what is absent": (lambda d: _set_volume(d, "0.00198", 2), "it gives part 3 0.00198 mL"),
    "no volume": (lambda d: _set_volume(d, "0", 1), "it gives part 2 0 mL"),
    "the unit": (_set_unit, "not in mL"),
    "a label less": (_drop_group, "one measurement group for each label"),
    "a name": (lambda d: setattr(_part(d, "Tracking Identifier"), "TextValue", "part 9"), "one measurement"),
    "a finding": (
        lambda d: setattr(_part(d, "Finding").ConceptCodeSequence[0], "CodeValue", "99000002"),
        "coded as something else",
    ),
    "the segment": (lambda d: setattr(_reference(d), "ReferencedSegmentNumber", 2), "not the one that shows"),
    "the segmentation": (
        lambda d: setattr(_reference(d), "ReferencedSOPInstanceUID", "2.25.1"),
        "not the one that shows",
    ),
    "no segment": (_drop_reference, "not the one that shows"),
    "the patient": (lambda d: setattr(d, "PatientID", "SOMEBODY"), "its PatientID is not"),
    "the name": (lambda d: setattr(d, "PatientName", "Some^Body"), "its PatientName is not"),
    "the study": (lambda d: setattr(d, "StudyInstanceUID", "2.25.666"), "its StudyInstanceUID is not"),
    "verified": (lambda d: setattr(d, "VerificationFlag", "VERIFIED"), "that it is unverified"),
    "no evidence": (
        lambda d: delattr(d, "CurrentRequestedProcedureEvidenceSequence"),
        "every image that it is about",
    ),
    "no warning": (_drop_comments, "a sentence for the reader is missing"),
    "another class": (lambda d: setattr(d, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.88.33"), "no Enhanced SR"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(tmp_path: Path, source: SourceSeries, fault: str) -> None:
    path, segmentations = report_of(tmp_path, source)
    change, words = FAULTS[fault]
    dataset = dcmread(path)
    change(dataset)
    dataset.save_as(path)
    with pytest.raises(ProofError, match=words) as caught:
        prove_measurements(
            path,
            source,
            labelmap_of(source, WITHOUT_3),
            MANIFEST,
            segmentations=segmentations,
            comments=COMMENTS,
        )
    assert "SOMEBODY" not in str(caught.value)


def test_a_result_that_differs_in_one_voxel_is_caught(tmp_path: Path, source: SourceSeries) -> None:
    path, segmentations = report_of(tmp_path, source)
    array = WITHOUT_3.copy()
    array[tuple(np.argwhere(array == 1)[0])] = 0
    with pytest.raises(ProofError, match="it gives part 1"):
        prove_measurements(path, source, labelmap_of(source, array), MANIFEST, segmentations=segmentations)


def test_a_damaged_file_is_caught(tmp_path: Path, source: SourceSeries) -> None:
    path, segmentations = report_of(tmp_path, source)
    whole = path.read_bytes()
    for cut in (0, 100, 500, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(ProofError):
            prove_measurements(
                path, source, labelmap_of(source, WITHOUT_3), MANIFEST, segmentations=segmentations,
                comments=COMMENTS,
            )  # fmt: skip
