"""Numbers that a kernel takes exactly and without being compiled for each: Triton passes a float as float32."""

import struct

import triton
import triton.language as tl


def bits(number: float) -> int:
    """The bits of a float64 as an integer of 64."""
    (integer,) = struct.unpack("<q", struct.pack("<d", number))
    return int(integer)


@triton.jit
def float_of(number, dtype: tl.constexpr):
    """The number whose bits these are, in ``dtype``."""
    return number.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)
