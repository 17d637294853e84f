"""What a destination wants of a result: which objects, in which form.

A PACS, a viewer and a research archive take different things. Every distinct profile is rendered once for
each job, and each delivery sends the stored files of its destination's profile.
"""

from __future__ import annotations

import hashlib
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Profile(BaseModel):
    """The objects that are made of one result for one kind of destination.

    Parameters
    ----------
    segmentation : str
        BINARY is what viewers know; LABELMAP (Label Map Segmentation Storage) is smaller, and few know it.
    measurements : bool
        A structured report with the volumes (TID 1500). Where nothing was found there is no segmentation
        to send, and the report is sent in its place, asked for or not.
    secondary_capture : bool
        A colour picture of three planes, for viewers that show no segmentation.
    maximum_frames : int, optional
        What the destination's viewers can take in one object. A segmentation with more is split into one
        object for each label; a label that alone has more is parked, with a sentence.
    empty_frames : str
        Whether planes on which a segment is nowhere are left out, or kept for viewers that misplace the
        others without them.
    one_per_label : bool
        One segmentation object for each label, in one series.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    segmentation: Literal["binary", "labelmap", "none"] = "binary"
    measurements: bool = True
    secondary_capture: bool = False
    maximum_frames: int | None = Field(default=None, ge=1)
    empty_frames: Literal["omit", "keep"] = "omit"
    one_per_label: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.segmentation == "none" and not (self.measurements or self.secondary_capture):
            raise ValueError(
                "a destination needs at least one of segmentation, measurements and secondary_capture"
            )
        return self

    @property
    def key(self) -> str:
        """16 hexadecimal digits that stand for what differs from the default; part of every derived UID."""
        text = self.model_dump_json(exclude_defaults=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
