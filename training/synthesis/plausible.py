"""What adults' brain structures measure: volumes that others published, and how far left and right differ.

A range stands here only where its source was read. Definitions differ between methods: a structure that lies
a little outside is no error, one that lies far outside is.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRange:
    """Smallest and largest volume in mL, of one side or of a structure in the middle, and its source."""

    low_ml: float
    high_ml: float
    source: str


_VOLUNTEERS = (
    "github.com/predictive-clinical-neuroscience/PCNtoolkit-demo, data/fcon1000_icbm_tr.csv and "
    "data/fcon1000_icbm_te.csv at commit 4a8c71f: extremes, over both sides, of FreeSurfer's volumes of 84 "
    "volunteers aged 19 to 85 (1000 Functional Connectomes Project, site ICBM; one row that repeats another "
    "left out)"
)

# A lateral ventricle is the sum with its inferior horn, as this project's label is. Cortex and cerebral white
# matter are what FreeSurfer's surfaces enclose. How much of the brain stem there is to measure depends on the
# field of view. Ventricles grow with age: the largest lateral and third ventricles are a person's of 69.
PUBLISHED: dict[str, PublishedRange] = {
    "cerebral white matter": PublishedRange(167.711, 307.009, _VOLUNTEERS),
    "cerebral cortex": PublishedRange(174.088, 340.626, _VOLUNTEERS),
    "lateral ventricle": PublishedRange(2.752, 36.295, _VOLUNTEERS),
    "thalamus": PublishedRange(6.045, 10.644, _VOLUNTEERS),
    "caudate": PublishedRange(2.284, 4.892, _VOLUNTEERS),
    "putamen": PublishedRange(3.471, 6.328, _VOLUNTEERS),
    "pallidum": PublishedRange(1.520, 2.551, _VOLUNTEERS),
    "hippocampus": PublishedRange(3.320, 5.686, _VOLUNTEERS),
    "amygdala": PublishedRange(1.095, 2.650, _VOLUNTEERS),
    "accumbens": PublishedRange(0.240, 0.678, _VOLUNTEERS),
    "ventral diencephalon": PublishedRange(3.225, 5.237, _VOLUNTEERS),
    "cerebellar white matter": PublishedRange(8.490, 19.578, _VOLUNTEERS),
    "cerebellar cortex": PublishedRange(38.086, 77.128, _VOLUNTEERS),
    "Third ventricle": PublishedRange(0.574, 3.068, _VOLUNTEERS),
    "Fourth ventricle": PublishedRange(1.139, 3.561, _VOLUNTEERS),
    "Brain stem": PublishedRange(16.340, 27.754, _VOLUNTEERS),
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


def is_published(name: str, *volumes_ml: float) -> bool | None:
    """Whether the volume of each side, or of a structure in the middle, lies in the published range.

    None where no range is known here.
    """
    known = PUBLISHED.get(name)
    if known is None:
        return None
    return all(known.low_ml <= volume <= known.high_ml for volume in volumes_ml)
