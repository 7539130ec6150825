"""Recurrent layers, differentiated by autograd through PyTorch's plain form of them.

oneDNN's own layers, which PyTorch prefers for float32 on a CPU, keep a workspace that a recording cannot see, and have
no double backward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .base import Call, Derivatives, Output, Rule, register


@register("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
class Recurrent(Rule):
    """The generic rule without oneDNN."""

    def forward(self, call: Call) -> Output:
        """As the generic rule."""
        with _without_fused_layers():
            return super().forward(call)

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """As the generic rule."""
        with _without_fused_layers():
            return super().vjp(call, cotangent, wanted)

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """As the generic rule."""
        with _without_fused_layers():
            return super().jvp(call, tangents)

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """As the generic rule."""
        with _without_fused_layers():
            return super().second(call, tangents, cotangent, wanted)


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Have PyTorch take its own layers: those of oneDNN and cuDNN cannot be differentiated twice."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.enabled = before
