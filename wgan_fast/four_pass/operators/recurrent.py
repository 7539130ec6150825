"""Recurrent layers, differentiated by autograd through PyTorch's plain form of them.

oneDNN's own layers, which PyTorch prefers for float32 on a CPU, keep a workspace that a recording cannot see, and have
no double backward; nor have cuDNN's.
"""

from typing import Any

import torch

from ...backends import switched_off
from .base import Rule, W, X, add


class Recurrent(Rule):
    """The generic rule without oneDNN and cuDNN."""

    def forward(self, *call: Any) -> Any:
        """Run the layer without oneDNN and cuDNN."""
        with _plainly():
            return super().forward(*call)

    def vjp(self, *call: Any) -> Any:
        """Return the VJP, computed without oneDNN and cuDNN."""
        with _plainly():
            return super().vjp(*call)

    def jvp(self, *call: Any) -> Any:
        """Return the JVP, computed without oneDNN and cuDNN."""
        with _plainly():
            return super().jvp(*call)

    def second(self, *call: Any) -> Any:
        """Return the derivative of ⟨δ, JVP⟩, computed without oneDNN and cuDNN."""
        with _plainly():
            return super().second(*call)


def _plainly() -> Any:
    return switched_off(torch.backends.mkldnn, torch.backends.cudnn)


for _name, _gates in {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}.items():
    _state = X((1, 3, 2))
    _weights = [W((2 * _gates, 5)), W((2 * _gates, 2)), W((2 * _gates,)), W((2 * _gates,))]
    _example = (X((3, 4, 5)), [_state] * 2 if _name == "lstm" else _state, _weights, True, 1, 0.0, False, False, True)
    add(f"{_name}.input", Recurrent(), None, _example)
