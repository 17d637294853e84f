"""The files that a job has made, as the HTTP interface lists them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from pydicom import dcmread

from service.api.schemas import segmentation_path
from service.dicom.elements import PARSE_ERRORS, items, quiet, text
from service.records.tables import Result, ResultKind
from service.spool import Spool


class ResultDocument(BaseModel):
    """One file that a job has made."""

    model_config = ConfigDict(extra="forbid")

    result_id: str
    kind: ResultKind
    media_type: str = Field(examples=["application/dicom"])
    size_bytes: int
    sha256: str
    sop_class_uid: str | None = Field(description="Null for what is no DICOM object.")
    sop_instance_uid: str | None
    profile: str | None = Field(description="Of the destinations that get it; null for those of all.")
    withheld: str | None = Field(description="Why it is sent to nobody unless a person lets it go.")
    segments: list[str] = Field(description="What a segmentation shows, in the order of its segments.")
    link: str


def result_document(result: Result, spool: Spool, media_type: str) -> ResultDocument:
    """Describe a file of a job."""
    is_segmentation = result.kind is ResultKind.SEGMENTATION
    return ResultDocument(
        result_id=result.result_id,
        kind=result.kind,
        media_type=media_type,
        size_bytes=result.size_bytes,
        sha256=result.sha256,
        sop_class_uid=result.sop_class_uid,
        sop_instance_uid=result.sop_instance_uid,
        profile=result.profile,
        withheld=result.withheld,
        segments=_segments(spool.absolute(result.path)) if is_segmentation else [],
        link=f"{segmentation_path(result.job_id)}/results/{result.result_id}",
    )


def _segments(path: Path) -> list[str]:
    """The labels of a segmentation's segments; none where the file is gone."""
    try:
        with quiet():
            header = dcmread(path, stop_before_pixels=True, specific_tags=["SegmentSequence"])
            return [text(segment, "SegmentLabel")[0] for segment in items(header, "SegmentSequence")]
    except (FileNotFoundError, *PARSE_ERRORS):
        return []
