"""Rounded sizes, so that matrix products on a CPU have few shapes.

oneDNN generates machine code for each new shape, which takes 1 to 10 ms and up to half a megabyte.
"""

from __future__ import annotations


def rounded_size(size: int) -> int:
    """Round up to one of eight sizes per power of 2 or, from 512 on, to a multiple of 64: at most an eighth more."""
    step = min(64, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
