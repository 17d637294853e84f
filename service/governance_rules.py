"""The sections of the configuration that say how a model comes into use and how long studies stay."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

GIB = 1024**3
MIB = 1024**2


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GateRules(_Section):
    """What a version must show before it is activated; see :mod:`service.gate`.

    Dice is from 0 to 1, per label. ``minimum_cases`` counts the site's own golden cases. The limits of time
    and memory are ratios to the active version's, and count above a difference that anybody would notice.
    """

    minimum_cases: int = Field(default=0, ge=0)
    minimum_dice: float = Field(default=0.0, ge=0, le=1)  # of every label in every case
    maximum_mean_dice_loss: float = Field(default=0.01, ge=0, le=1)  # against the active version
    maximum_case_dice_loss: float = Field(default=0.05, ge=0, le=1)
    maximum_time_ratio: float = Field(default=2.0, ge=1)
    noticed_time_s: float = Field(default=10.0, ge=0)
    maximum_memory_ratio: float = Field(default=1.5, ge=1)
    noticed_memory_bytes: int = Field(default=512 * MIB, ge=0)
    longest_wait_s: float = Field(default=600.0, ge=0)  # for a moment without jobs


class ProbationRules(_Section):
    """When a version that was just activated is rolled back by itself; see :mod:`service.probation`."""

    jobs: int = Field(default=20, ge=1)  # after so many that went well it has stood the test
    minimum_jobs: int = Field(default=4, ge=1)  # fewer say nothing about a rate
    maximum_failure_fraction: float = Field(default=0.25, ge=0, lt=1)


class ShadowRules(_Section):
    """How a candidate runs beside the active version; see :mod:`service.shadow`."""

    maximum_age_hours: float = Field(default=24.0, gt=0)  # of a result that is still compared
    deadline_s: float = Field(default=3600.0, gt=0)


class RetentionRules(_Section):
    """How long studies stay after everything of them is done; see :mod:`service.retention`.

    Without ``maximum_age_days`` and ``purge_below_free_bytes`` everything stays until a person deletes it.
    Below ``purge_below_free_bytes`` the oldest go first, until ``purge_up_to_free_bytes`` are free; what is
    younger than ``keep_at_least_hours`` stays even then.
    """

    maximum_age_days: float | None = Field(default=None, gt=0)
    purge_below_free_bytes: int | None = Field(default=None, ge=1)
    purge_up_to_free_bytes: int | None = Field(default=None, ge=1)
    keep_at_least_hours: float = Field(default=24.0, ge=0)
    interval_s: float = Field(default=300.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.purge_up_to_free_bytes is not None and self.purge_below_free_bytes is None:
            raise ValueError("purge_up_to_free_bytes needs purge_below_free_bytes")
        if (self.purge_up_to_free_bytes or 0) < (self.purge_below_free_bytes or 0) and (
            self.purge_up_to_free_bytes is not None
        ):
            raise ValueError("purge_up_to_free_bytes cannot be less than purge_below_free_bytes")
        return self


class CommitmentRules(_Section):
    """How a destination is asked to confirm that it keeps what it got; see :mod:`service.commitment`."""

    listen_s: float = Field(default=2.0, ge=0)  # for a report on the association of the request
    report_timeout_s: float = Field(default=3600.0, gt=0)  # then it is asked again
    first_retry_s: float = Field(default=60.0, gt=0)  # after a request that did not get through
    maximum_requests: int = Field(default=8, ge=1)  # then the delivery is parked
