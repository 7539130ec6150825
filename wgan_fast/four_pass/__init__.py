"""A critic's loss, penalty and every gradient in four passes, with no double backward.

The reader's path: ``capture`` (the critic as a graph) -> ``independence`` (may its batches be joined?) -> ``passes``
over ``operators`` (one entry an ATen operator) -> ``record`` and ``optimize`` (the flat graph) -> ``plan``.

The derivation and the papers it stands on: Gulrajani et al. 2017 (arXiv:1704.00028) for the penalty, Etmann 2019
(arXiv:1906.06637) for the pass that piecewise-linear critics do not need.
"""

from .capture import CaptureError
from .plan import Objective, Plan, StepOutput

__all__ = ["CaptureError", "Objective", "Plan", "StepOutput"]
