"""How a batch of samples ``[N, *D]`` lies in memory, and which layouts compiled code takes."""

import torch
from torch import Tensor


def is_dense(batch: Tensor) -> bool:
    """Whether memory holds one sample after another, each without gaps, its elements in any order."""
    extent = 1
    dims = [(batch.stride(dim), batch.size(dim)) for dim in range(1, batch.dim()) if batch.size(dim) != 1]
    for stride, size in sorted(dims):
        if stride != extent:
            return False
        extent *= size
    return batch.size(0) == 1 or batch.stride(0) == extent


def empty(like: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """New memory for ``rows`` samples, dense: with the elements of a sample in the order of ``like`` if that is."""
    size = (rows, *like.shape[1:])
    if not is_dense(like):
        return torch.empty(size, dtype=dtype, device=like.device)
    strides = (like.shape[1:].numel(), *like.stride()[1:])
    return torch.empty_strided(size, strides, dtype=dtype, device=like.device)


def layout_reason(**batches: Tensor) -> str | None:
    """Why compiled code does not take these batches together, or None where it does."""
    (first, reference), *others = batches.items()
    for name, batch in batches.items():
        if not is_dense(batch):
            return f"{name} has gaps between or within its samples, strides {list(batch.stride())}"
    for name, batch in others:
        for dim in range(1, batch.dim()):
            if batch.size(dim) != 1 and batch.stride(dim) != reference.stride(dim):
                return f"{name} and {first} order the elements of a sample differently, strides " + (
                    f"{list(batch.stride())} and {list(reference.stride())}"
                )
    return None
