"""How the channels of a route's model are brought together: settings, for those who do it.

Nothing here reads or moves anything.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.reading import VolumeRule


class AlignmentRules(BaseModel):
    """How the channels of a route's model are brought together.

    Parameters
    ----------
    reference : str, optional
        The channel whose grid the others are brought to, and whose series the segmentation refers to; the
        model's first unless given.
    registration : str
        Whether the other channels are moved rigidly onto the reference first. Without it all must lie in
        one frame of reference.
    registration_limit_mm : float
        How far a registration may move a corner of the reference; one that moves it further is refused.
    volumes : mapping of str to VolumeRule
        For a channel whose series holds several volumes, which of them is taken.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reference: str | None = None
    registration: Literal["none", "rigid"] = "none"
    registration_limit_mm: float = Field(default=30.0, gt=0)
    volumes: dict[str, VolumeRule] = {}

    def mixed_into(self, settings_digest: str) -> str:
        """The digest of all settings that can change a result: these and the others; the others' alone
        where these are the defaults."""
        if self == IN_ORDER:
            return settings_digest
        text = f"{settings_digest}\0alignment\0{self.model_dump_json(exclude_defaults=True)}"
        return hashlib.sha256(text.encode()).hexdigest()


IN_ORDER = AlignmentRules()
