"""PyTorch's libraries: what they compute in, and how their layers are switched off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def convolves_in_tensor_cores(dtype: torch.dtype, device: torch.device) -> bool:
    """Say whether cuDNN convolves ``dtype`` in tensor cores on a device: float32 where TF32 is allowed and known."""
    if device.type != "cuda":
        return False
    if dtype == torch.float16:
        return True
    if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":  # type: ignore[attr-defined]
        return False
    # TF32 and bfloat16 came with Ampere.
    return dtype in (torch.float32, torch.bfloat16) and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def float32_products(in_tf32: bool) -> Iterator[None]:
    """Have a GPU multiply and convolve float32 in TF32, or exactly, whatever PyTorch was told.

    TF32 keeps 10 bits of an operand's mantissa and sums in float32; PyTorch's default takes it for convolutions alone.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    newer = [(part, part.fp32_precision) for part in (matmul, cudnn.conv, cudnn.rnn)]
    # The older switches set the newer ones, too; alone, the newer ones leave what the older ones refuse to read.
    matmul.allow_tf32 = cudnn.allow_tf32 = in_tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = newer[0][1] == "tf32"
        cudnn.allow_tf32 = newer[1][1] == "tf32"
        for part, precision in newer:
            if part.fp32_precision != precision:
                part.fp32_precision = precision


@contextmanager
def switched_off(*backends: Any) -> Iterator[None]:
    """Have PyTorch take its own layers in place of those of ``torch.backends.cudnn`` or ``torch.backends.mkldnn``.

    Unlike the backends' own ``flags``, this reads no other setting: those refuse to be read under some settings of
    ``fp32_precision``.
    """
    before = [backend.enabled for backend in backends]
    for backend in backends:
        backend.enabled = False
    try:
        yield
    finally:
        for backend, enabled in zip(backends, before):
            backend.enabled = enabled
