"""The values of samples that were compressed with loss.

Without loss, the bits of a sample are what they were: the highest of Bits Stored is the sign. With loss, a
sample is some way off, and two's complement is no distance: at the ends of the range a small loss turns the
sign over, and samples a little outside of Bits Stored must not wrap around. JPEG and JPEG-LS know no sign at
all; JPEG 2000 states one for itself (T.800 table A.11), which PS3.5 section 8.2.4 asks to be that of Pixel
Representation. Where it is not, or is unknown, the samples tell it or are refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.dicom.codestreams import FrameHeader

_LOSS = 64  # a sample may be off by this part of the largest value, and not know its sign near the ends
_OVERSHOOT = 2  # it may lie outside of its bits by this part of the largest value, beside sharp edges


class UncertainSignError(ValueError):
    """Raised where samples have more than one meaning; the message ends a sentence about their image."""


def values_after_loss(
    samples: NDArray[Any], header: FrameHeader, *, bits_stored: int, signed: bool
) -> NDArray[np.int64]:
    """The stored values of samples of a lossy codestream.

    Parameters
    ----------
    samples : (Y, X) array of integers
        As the codestream has them: negative only where its header says that they are signed.
    header : FrameHeader
        Of the codestream.
    bits_stored, signed : int and bool
        Bits Stored and Pixel Representation of the image.

    Returns
    -------
    (Y, X) array of int64
        They may lie a little outside of Bits Stored.

    Raises
    ------
    UncertainSignError
        If the sign of a value cannot be told.
    """
    samples = samples.astype(np.int64)
    half = 1 << (min(bits_stored, header.precision) - 1)
    if header.signed and signed:
        if header.precision > bits_stored and np.abs(samples).max() > half + half // _OVERSHOOT:
            raise UncertainSignError(
                f"its values from {samples.min()} to {samples.max()} do not fit in {bits_stored} bits "
                f"with sign ({-half} to {half - 1})"
            )
        return samples
    if header.signed:
        if samples.min() < -(half // _LOSS):
            raise UncertainSignError(
                f"its codestream has values down to {samples.min()}, where Pixel Representation knows no sign"
            )
        without_overshoot: NDArray[np.int64] = np.maximum(samples, 0)
        return without_overshoot
    if signed:
        return _with_sign(samples, header.precision, half, shallow=header.precision < bits_stored)
    return samples


def _with_sign(samples: NDArray[np.int64], precision: int, half: int, *, shallow: bool) -> NDArray[np.int64]:
    """Two's complement of samples without sign: in the bits that are stored, or in all of the codestream.

    Negative values lie right below ``2 * half`` in the one form and right below ``2 ** precision`` in the
    other, so that nearly every image shows which it is. A codestream that is shallower than Bits Stored may
    just as well hold positive values alone: its upper half is either.
    """
    beyond = half + half // _OVERSHOOT
    in_stored_bits = bool((samples < half + beyond).all())
    in_all_bits = bool(((samples < beyond) | (samples >= (1 << precision) - beyond)).all())
    if not in_stored_bits and not in_all_bits:
        raise UncertainSignError(
            f"its samples of {precision} bits without sign are no two's complement of "
            f"{half.bit_length()} bits"
        )
    sign = half if in_stored_bits else 1 << (precision - 1)
    uncertain = np.abs(samples - sign) < max(1, sign // _LOSS)
    if shallow or (in_all_bits and sign < 1 << (precision - 1)):  # what lies in the upper half is either
        uncertain |= samples >= sign
    if uncertain.any():
        raise UncertainSignError(
            f"its codestream knows no sign: {np.count_nonzero(uncertain)} of {samples.size} values may be "
            f"positive or negative (up to {sign - 1} or down to {-sign})"
        )
    return ((samples + sign) & (2 * sign - 1)) - sign
