"""The engine: a critic's loss, penalty and every gradient in four passes, with no double backward.

The derivation and the papers it stands on: Gulrajani et al. 2017 (arXiv:1704.00028) for the penalty, Etmann 2019
(arXiv:1906.06637) for the pass that piecewise-linear critics do not need.
"""

from .capture import CaptureError
from .engine import ChangedError, FourPassEngine, Planned, Prepared, TooManyPlansError
from .plan import Objective, Plan, StepOutput

__all__ = [
    "CaptureError",
    "ChangedError",
    "FourPassEngine",
    "Objective",
    "Plan",
    "Planned",
    "Prepared",
    "StepOutput",
    "TooManyPlansError",
]
