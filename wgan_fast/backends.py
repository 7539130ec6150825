"""PyTorch's libraries: what they compute in, and how their layers are switched off."""

from collections.abc import Callable, Iterator
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
    The settings are the process's: threads that ask for different ones disturb each other.
    """
    backends: Any = torch.backends
    parts = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    newer = [part.fp32_precision for part in parts]
    # PyTorch refuses to read an older switch that the newer ones contradict, so both are set.
    products, convolutions = _read(torch.get_float32_matmul_precision), _read(lambda: backends.cudnn.allow_tf32)
    if products is not None:
        torch.set_float32_matmul_precision("high" if in_tf32 else "highest")
    if convolutions is not None:
        backends.cudnn.allow_tf32 = in_tf32
    for part in parts[:3]:
        part.fp32_precision = "tf32" if in_tf32 else "ieee"  # not left to be inherited
    try:
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            backends.cudnn.allow_tf32 = convolutions
        for part, precision in zip(parts, newer):
            part.fp32_precision = precision


def _read(switch: Callable[[], Any]) -> Any:
    """Read one of PyTorch's older switches; None where it refuses."""
    try:
        return switch()
    except RuntimeError:
        return None


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
