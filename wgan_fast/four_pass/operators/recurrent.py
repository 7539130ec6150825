"""Recurrent layers, differentiated by autograd through PyTorch's plain form of them.

oneDNN's own layers, which PyTorch prefers for float32 on a CPU, keep a workspace that a recording cannot see, and have
no double backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backends import switched_off
from .base import Call, Derivatives, Output, Rule, register


@register("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
class Recurrent(Rule):
    """The generic rule without oneDNN."""

    def forward(self, call: Call) -> Output:
        """As the generic rule."""
        with switched_off(torch.backends.mkldnn, torch.backends.cudnn):
            return super().forward(call)

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """As the generic rule."""
        with switched_off(torch.backends.mkldnn, torch.backends.cudnn):
            return super().vjp(call, cotangent, wanted)

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """As the generic rule."""
        with switched_off(torch.backends.mkldnn, torch.backends.cudnn):
            return super().jvp(call, tangents)

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """As the generic rule."""
        with switched_off(torch.backends.mkldnn, torch.backends.cudnn):
            return super().second(call, tangents, cotangent, wanted)
