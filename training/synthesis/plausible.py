"""What adults' brain structures measure: volumes that others published, and how far left and right differ.

A range stands here only where its source was read. Definitions differ between methods: a structure that lies
a little outside is no error, one that lies far outside is.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRange:
    """Smallest and largest volume in mL, of both sides together or of one, and where it is from."""

    low_ml: float
    high_ml: float
    both_sides: bool
    source: str


_PEERS = (
    "PLoS ONE 11(1): e0147332, table 4: extremes of 40 older adults without Parkinson's disease, FreeSurfer"
)
_HIPPOCAMPUS = (
    "Hippocampal Volume Measurements Using Magnetic Resonance Imaging in Normal Young Adults, abstract: what "
    "earlier studies by MR and histology had found"
)
_AMYGDALA = (
    "J. Pers. Med. 2021, 11(2), 121, table 2: mean and two standard deviations of the healthy subjects"
)

PUBLISHED: dict[str, PublishedRange] = {
    "thalamus": PublishedRange(10.286, 16.222, True, _PEERS),
    "caudate": PublishedRange(5.452, 10.455, True, _PEERS),
    "putamen": PublishedRange(8.359, 12.570, True, _PEERS),
    "hippocampus": PublishedRange(1.73, 5.68, False, _HIPPOCAMPUS),
    "amygdala": PublishedRange(0.85, 1.65, False, _AMYGDALA),
}
"""By the structure's name without its side."""

SYMMETRIC_WITHIN: dict[str, float] = {
    "cerebral white matter": 0.07,
    "cerebral cortex": 0.11,
    "lateral ventricle": 0.72,
    "thalamus": 0.20,
    "caudate": 0.18,
    "putamen": 0.23,
    "pallidum": 0.58,
    "hippocampus": 0.77,
    "amygdala": 0.44,
    "accumbens": 0.55,
    "ventral diencephalon": 0.17,
    "cerebellar white matter": 0.28,
    "cerebellar cortex": 0.10,
}
"""Three standard deviations of 2 (L - R) / (L + R) in the 20 label maps; some show one-sided atrophy."""


def is_published(name: str, left_ml: float, right_ml: float) -> bool | None:
    """Whether the volumes of a pair lie in the published range; None where none is known here."""
    known = PUBLISHED.get(name)
    if known is None:
        return None
    volumes = (left_ml + right_ml,) if known.both_sides else (left_ml, right_ml)
    return all(known.low_ml <= volume <= known.high_ml for volume in volumes)
