"""What the HTTP interface says of gates, shadow mode, activations, golden cases and recalls."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from service.api.schemas import RecalledDelivery, Time
from service.records.governance_tables import ActivationState, ComparisonState, GateState


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True)


class GateRequest(BaseModel):
    """How the gate is to be run."""

    model_config = ConfigDict(extra="forbid")

    accept_changed_labels: bool = Field(
        default=False, description="Confirms that labels, channels or orientation may change."
    )


class CheckDocument(_Document):
    """One thing that a version must show."""

    name: str = Field(examples=["dice"])
    passed: bool
    sentence: str = Field(examples=["On no label of 4 case(s) is it worse than 1.0.0."])


class GateDocument(_Document):
    """A run of the gate for a version."""

    gate_id: str
    model: str = Field(examples=["hippocampus"])
    version: str = Field(examples=["1.1.0"])
    digest: str
    against_version: str | None = Field(description="The active version that it was compared with.")
    state: GateState
    requested_by: str
    requested_at: Time
    finished_at: Time | None
    checks: list[CheckDocument]
    report: dict[str, Any] = Field(description="The whole report: each case with Dice, time and memory.")


class ShadowRequest(BaseModel):
    """Which version is to run in shadow mode."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"version": "1.1.0"}]})

    version: str = Field(min_length=1, max_length=64)


class LabelComparison(_Document):
    """One label, over all studies that were compared."""

    studies: int
    mean_dice: float
    lowest_dice: float
    mean_difference_ml: float
    largest_difference_ml: float = Field(description="The largest by amount, with its sign.")


class ComparisonDocument(_Document):
    """One study under the candidate."""

    job_id: str
    study_instance_uid: str | None
    active_version: str | None
    state: ComparisonState
    labels: dict[str, dict[str, float]] = Field(description="Dice and volumes in mL of each label.")
    seconds: float | None = Field(description="Of the candidate, from the files to the labelmap.")
    active_seconds: float | None = Field(description="Of the active version's attempt, as it was run.")
    peak_bytes: int | None
    code: str | None
    reason: str | None
    created_at: Time


class ShadowDocument(_Document):
    """A candidate beside the active version, and the table of what it did."""

    model: str
    version: str
    digest: str
    running: bool
    started_by: str
    started_at: Time
    stopped_by: str | None
    stopped_at: Time | None
    compared: int
    failed: int
    mean_seconds: float | None
    mean_active_seconds: float | None
    peak_bytes: int | None
    labels: dict[str, LabelComparison]
    comparisons: list[ComparisonDocument] = Field(description="The newest first.")


class ActivationDocument(_Document):
    """A version that was made the active one."""

    version: str
    digest: str
    previous_version: str | None
    state: ActivationState
    gate_id: str | None
    override_reason: str | None
    activated_by: str
    activated_at: Time
    ended_at: Time | None
    reason: str | None = Field(description="Why the node has rolled it back.")


class CaseDocument(_Document):
    """A golden case of the site."""

    case_id: str
    job_id: str
    model: str
    study_instance_uid: str | None
    source: str = Field(examples=["as_produced", "nifti", "segmentation"])
    labels: list[str] = Field(description="That occur in the approved labelmap.")
    approved_by: str
    created_at: Time


class RecalledObject(RecalledDelivery):
    """Where an object of a recalled version went."""

    job_id: str
    study_instance_uid: str | None


class RecallDocument(_Document):
    """What a recall has found and done."""

    model: str
    version: str
    studies: int
    jobs: int
    jobs_taken_back: int = Field(description="Were running on it, and are queued again.")
    deliveries_held_back: int = Field(description="Had not left, and are parked.")
    deliveries_that_left: int
    deliveries: list[RecalledObject]
