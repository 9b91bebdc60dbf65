"""How the bits of a magnitude are searched: cut into digits, the upper ones first.

Magnitudes ascend as their bits without the sign do: 31 of fp32, 63 of fp64.
"""

from __future__ import annotations

from typing import NamedTuple

BINS = 2048  # values of the widest digit


class Digit(NamedTuple):
    """``width`` bits from bit ``shift`` on."""

    shift: int
    width: int


# By the width of the type; csrc/cpu/magnitude_rows.h has the same.
DIGITS: dict[int, tuple[Digit, ...]] = {
    32: (Digit(20, 11), Digit(10, 10), Digit(0, 10)),
    64: (
        *(Digit(52, 11), Digit(41, 11), Digit(30, 11)),
        *(Digit(20, 10), Digit(10, 10), Digit(0, 10)),
    ),
}
