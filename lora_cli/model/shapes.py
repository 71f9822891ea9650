"""Sizes of matrix products on a processor, of which there are to be few.

oneDNN writes machine code for each shape that it has not met: it takes 1 to 10 ms and up to half a megabyte.
"""

from __future__ import annotations


def rounded(size: int) -> int:
    """The next of eight sizes between two powers of 2, or of 64: at most an eighth more."""
    step = min(64, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
