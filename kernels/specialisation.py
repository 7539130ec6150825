"""How the kernels are compiled, as data: what ``tests/kernel_resources.py`` compiles for every architecture."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Specialisation:
    """One compiled form of a kernel, as its launch function would ask for it on a GPU.

    Attributes:
        name: What tells it from the kernel's other forms, such as "bfloat16".
        kernel: The ``@triton.jit`` function.
        arguments: The type of every argument that is not a constant, as Triton spells it: "*fp32", "i32". Pointers are
            taken to be aligned to 16 bytes, as those of a tensor are; an integer that 16 divides is "i32:16".
        constants: The value of every ``tl.constexpr``, and of every integer argument that is 1, which the JIT folds.
        num_warps: Warps of one program.
        options: Further options of the compiler, such as ``num_stages``; a target ignores what it does not know.
        amd: What takes their place, and that of ``num_warps``, on AMD's GPUs, whose warps are twice as wide.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    options: Mapping[str, int] = field(default_factory=dict)
    amd: Mapping[str, int] = field(default_factory=dict)
