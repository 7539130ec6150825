"""One entry an ATen operator: how it runs, its derivatives, where the rows of samples lie, and examples of it.

Look an operator up by its name: every entry is one call of ``register``, ``add`` or ``elementwise``. What has no entry
gets the generic rule, which asks autograd about that operator alone. Beside the entries stand the forms that overwrite
(``overwrites``, ``fills``) and what PyTorch's table of FLOPs leaves out.
"""

import torch

from . import activations, functions, linear, normalization, pooling, recurrent, structure
from .base import FLOPS, IN_PLACE, OPERATORS, OUT, ROWS, Call, Rule, Slot, on_gpu, rule_for
from .functions import Applied
from .structure import SIZED

WITH_RULES = torch._ops.OpOverload | Applied
"""What a rule may be asked for; what else a graph calls computes with numbers, or takes apart."""

__all__ = [
    "FLOPS",
    "IN_PLACE",
    "OPERATORS",
    "OUT",
    "ROWS",
    "SIZED",
    "WITH_RULES",
    "Applied",
    "Call",
    "Rule",
    "Slot",
    "activations",
    "functions",
    "linear",
    "normalization",
    "on_gpu",
    "pooling",
    "recurrent",
    "rule_for",
    "structure",
]
