"""The one rule of this package about accumulation: float64 stays float64, everything else sums in float32."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which norms, means and penalties of ``dtype`` values are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32
