"""What the worker and its inference process say to each other: one JSON object a line.

The worker opens a model, then gives one job at a time. The process answers ``ready``, then ``progress`` as
it goes, and exactly one of ``succeeded``, ``refused`` and ``failed`` for every job. Each line about a job
names the job and its attempt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from service.errors import AttemptError
from service.pipeline_job import PipelineJob

MAXIMUM_LINE_BYTES = 16 * 1024**2  # the paths of 50,000 files fit


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_line(self) -> bytes:
        return self.model_dump_json().encode() + b"\n"


class OpenModel(_Line):
    """To the process, once: the bundle to load, and the digest it must have."""

    line: Literal["open"] = "open"
    bundle: Path
    digest: str
    runtime: str
    threads: int | None = None
    cache_dir: Path | None = None
    memory_bytes: int | None = None  # the most it may hold; what the machine allows if None
    log_level: str = "INFO"


class RunJob(_Line):
    """To the process: one attempt at one job."""

    line: Literal["run"] = "run"
    job_id: str
    attempt: int
    job: PipelineJob


class Ready(_Line):
    """From the process: the model is loaded."""

    line: Literal["ready"] = "ready"


class _OfAttempt(_Line):
    job_id: str
    attempt: int


class Advance(_OfAttempt):
    """From the process: the attempt is this far. ``fraction`` is of the whole job, from 0 to 1."""

    line: Literal["progress"] = "progress"
    stage: str
    fraction: float


class WrittenFile(BaseModel):
    """A result in the job's output folder. See :class:`service.rendering.OutputFile`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.-]{0,63}$")]
    size_bytes: int
    sha256: str
    sop_class_uid: str | None = None
    sop_instance_uid: str | None = None
    profile: str | None = None
    withheld: str | None = None


class Succeeded(_OfAttempt):
    """From the process: the results lie in the output folder."""

    line: Literal["succeeded"] = "succeeded"
    files: tuple[WrittenFile, ...]
    runtime: str
    precision: str
    summary: dict[str, Any]


class Refused(_OfAttempt):
    """From the process: this input cannot be segmented."""

    line: Literal["refused"] = "refused"
    code: str
    message: str
    remedy: str


class Failed(_Line):
    """From the process: the attempt failed, or (without a job) the model cannot be loaded."""

    line: Literal["failed"] = "failed"
    job_id: str | None = None
    attempt: int | None = None
    code: str
    message: str
    remedy: str
    retryable: bool


Answer = Annotated[Ready | Advance | Succeeded | Refused | Failed, Field(discriminator="line")]
_ANSWER: TypeAdapter[Ready | Advance | Succeeded | Refused | Failed] = TypeAdapter(Answer)


def parse_answer(line: bytes) -> Ready | Advance | Succeeded | Refused | Failed:
    """What the inference process said.

    Raises
    ------
    AttemptError
        PROTOCOL, if it is not one of its lines.
    """
    try:
        return _ANSWER.validate_json(line)
    except ValidationError as error:
        raise AttemptError(
            "PROTOCOL",
            f"The inference process wrote a line that is none of its own ({error.error_count()} error(s)).",
            remedy="Report this with the log of the worker.",
        ) from None
