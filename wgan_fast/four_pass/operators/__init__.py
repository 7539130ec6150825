"""One rule per operator: how it runs forward, backward, along a tangent, and how it curves.

Look an operator up with ``rule_for``. What has no rule of its own gets the generic one, which asks autograd about
that operator alone.
"""

from . import activations, linear, normalization, pooling, recurrent, structure
from .base import Call, Rule, Slot, rule_for

__all__ = [
    "Call",
    "Rule",
    "Slot",
    "activations",
    "linear",
    "normalization",
    "pooling",
    "recurrent",
    "rule_for",
    "structure",
]
