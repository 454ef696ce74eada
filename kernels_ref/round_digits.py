"""Fewer digits of a digit series: rounded to nearest, not cut off.

Digits run from -2**(bits-1) to 2**(bits-1) - 1, on average -1/2. What is cut off is therefore not 0
on average, and the outputs of a layer add it up: where thousands of weights lean one way by 1/32 of
a step, that is more than all their rounding errors together. Rounded half to even, nothing leans.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxq.kernels_ref.checks import check_bits
from onnxq.kernels_ref.quantize import half_range

Digits = npt.NDArray[np.int8]


def round_digits(digits: Sequence[Digits], bits: int, keep: int) -> tuple[Digits, ...]:
    """The `keep` digits of the number that is nearest to that of all digits.

    digits: int8 of one shape, each from -2**(bits-1) to 2**(bits-1) - 1, most significant first.
    With W = Σ digits[i] · 2**(bits·(n-1-i)) the result's number is W / 2**(bits·(n-keep)), rounded
    half to even, or the nearest that `keep` digits can say. Raises ValueError unless
    1 <= keep <= n and n·bits <= 64.
    """
    check_bits(bits)
    if not 1 <= keep <= len(digits) or len(digits) * bits > 64:
        raise ValueError(f"keep is {keep} of {len(digits)} digits of {bits} bits: give 1 or more")
    wide = np.zeros(digits[0].shape, np.int64)
    for digit in digits:
        wide <<= bits
        wide += digit
    dropped = bits * (len(digits) - keep)
    if dropped:
        half = 1 << (dropped - 1)
        low = wide & ((half << 1) - 1)
        wide >>= dropped
        wide += (low > half) | ((low == half) & (wide & 1 == 1))
    ones = sum(1 << (bits * i) for i in range(keep))
    h = half_range(bits)
    np.clip(wide, -(h + 1) * ones, h * ones, out=wide)
    kept = []
    for _ in range(keep):
        digit = ((wide + h + 1) & ((1 << bits) - 1)) - (h + 1)
        wide = (wide - digit) >> bits
        kept.append(digit.astype(np.int8))
    return tuple(reversed(kept))
