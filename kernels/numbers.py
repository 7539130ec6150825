"""Numbers that a kernel takes exactly and without being compiled for each: Triton passes a float as float32."""

import struct

import triton
import triton.language as tl


def bits(number: float) -> int:
    """The bits of minus a float64 as an integer: of what is not negative never one that Triton takes for 32 bits."""
    (integer,) = struct.unpack("<q", struct.pack("<d", -number))
    return int(integer)


@triton.jit
def float_of(number, dtype: tl.constexpr):
    """The number that ``bits`` was given, in ``dtype``."""
    return -number.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)
