"""A critic's loss, penalty and every gradient in four passes, with no double backward.

The reader's path: ``objective`` (what to compute) -> ``capture`` (the critic as a graph) -> ``independence`` (may its
batches be joined?) -> ``blocks`` and ``passes`` over ``operators`` (one entry an ATen operator) -> ``record`` and
``optimize`` (the flat graph) -> ``plan`` (all of that, once) -> ``flat`` (what runs at every step).

The derivation and the papers it stands on: Gulrajani et al. 2017 (arXiv:1704.00028) for the penalty, Etmann 2019
(arXiv:1906.06637) for the pass that piecewise-linear critics do not need.
"""

from .capture import CaptureError
from .objective import Objective, StepOutput
from .plan import Plan

__all__ = ["CaptureError", "Objective", "Plan", "StepOutput"]
