"""What a route does about an input that its model was not made for, and about a result that is doubtful.

Nothing here looks at anything: these are the settings that the guard is given.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Action = Literal["warn", "refuse"]


class GuardRules(BaseModel):
    """For each thing that the guard looks at, whether it warns or refuses.

    A warning stands in the report, in the records, in the API and in the log, and the result goes out. The
    default is to refuse an input outside the bundle's limits, and to warn of a doubtful result.

    Parameters
    ----------
    modality, spacing, field_of_view, slices : str
        An input outside the limits of the bundle.
    volume_range : str
        A label whose volume no training case had.
    nothing_found : str
        A result without any label.
    border : str
        A label that reaches the edge of the field of view, where it may be cut off.
    removed : str
        A result that lost more to the model's post-processing than its manifest allows. What was taken
        away is warned of in any case.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    modality: Action = "refuse"
    spacing: Action = "refuse"
    field_of_view: Action = "refuse"
    slices: Action = "refuse"
    volume_range: Action = "warn"
    nothing_found: Action = "warn"
    border: Action = "warn"
    removed: Action = "warn"


USUAL_GUARD = GuardRules()
