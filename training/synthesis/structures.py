"""The structures that the brain student finds, and how FreeSurfer's label numbers become them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# Left number -> right number of every paired label in the maps, FreeSurfer's colour table. 136, 137, 163 and
# 164 are parts of the ventricles that the maps keep apart; 25 and 57 are lesions of the white matter.
LEFT_TO_RIGHT = {
    2: 41, 3: 42, 4: 43, 5: 44, 7: 46, 8: 47, 10: 49, 11: 50, 12: 51, 13: 52, 17: 53, 18: 54,
    25: 57, 26: 58, 28: 60, 30: 62, 136: 163, 137: 164,
}  # fmt: skip

CSF = 24
_EXTRACEREBRAL = frozenset({0, CSF, 85})  # 85: optic chiasm; numbers from 500 on lie outside of the brain too


@dataclass(frozen=True)
class Structure:
    """One output label.

    Parameters
    ----------
    value : int
        In the labelmaps that the network is trained on and writes.
    name : str
        For people, with the side in front: "Left hippocampus".
    numbers : tuple of int
        FreeSurfer's label numbers that are merged into it.
    """

    value: int
    name: str
    numbers: tuple[int, ...]
    side: Literal["left", "right"] | None = None


# Lateral ventricle: with its inferior horn, which is a label of its own in FreeSurfer.
_PAIRED: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("cerebral white matter", (2, 25)),
    ("cerebral cortex", (3,)),
    ("lateral ventricle", (4, 5, 136, 137)),
    ("thalamus", (10,)),
    ("caudate", (11,)),
    ("putamen", (12,)),
    ("pallidum", (13,)),
    ("hippocampus", (17,)),
    ("amygdala", (18,)),
    ("accumbens", (26,)),
    ("ventral diencephalon", (28,)),
    ("cerebellar white matter", (7,)),
    ("cerebellar cortex", (8,)),
)
_SINGLE: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("Third ventricle", (14,)),
    ("Fourth ventricle", (15,)),
    ("Brain stem", (16,)),
)


def _structures() -> tuple[Structure, ...]:
    found: list[Structure] = []
    for name, numbers in _PAIRED:
        found.append(Structure(len(found) + 1, f"Left {name}", numbers, "left"))
        mirrored = tuple(LEFT_TO_RIGHT[n] for n in numbers)
        found.append(Structure(len(found) + 1, f"Right {name}", mirrored, "right"))
    for name, numbers in _SINGLE:
        found.append(Structure(len(found) + 1, name, numbers))
    return tuple(found)


STRUCTURES = _structures()
"""Every output label by rising value: 13 pairs, left before right, then the three in the middle."""


def merged(numbers: NDArray[np.integer]) -> NDArray[np.uint8]:
    """FreeSurfer's numbers, of any shape, as the values of `STRUCTURES`; 0 for what is none of them."""
    table = np.zeros(int(numbers.max(initial=0)) + 1, np.uint8)
    for structure in STRUCTURES:
        for number in structure.numbers:
            if number < len(table):
                table[number] = structure.value
    found: NDArray[np.uint8] = table[numbers]
    return found


def is_brain(number: int) -> bool:
    """Whether a label number is tissue or ventricle of the brain, as skull stripping would keep it."""
    return number not in _EXTRACEREBRAL and number < 500
