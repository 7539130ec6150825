"""``wgan_fast::run_program``: a flat graph of float32 matrices in one call; compiled code alone.

``four_pass/program.py`` writes programs, ``csrc/program.h`` says what their words mean.
"""

import torch

from ..build import extension
from .registry import library

library.define(  # type: ignore[no-untyped-call]
    "run_program(Tensor program, Tensor[] inputs, float weight, float target, int seed) -> Tensor[]"
)

AVAILABLE = torch._C._dispatch_has_kernel_for_dispatch_key("wgan_fast::run_program", "CPU")
"""Whether the extension is there to run them."""

BF16 = (
    AVAILABLE
    and extension is not None
    and extension.build_config()["bf16_products"]
    and not torch.cpu._is_amx_tile_supported()
)
"""Whether they have products of bfloat16: not where the processor has matrix units, which PyTorch uses."""
