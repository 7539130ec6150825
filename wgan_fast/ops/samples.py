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
    """Return new memory for ``rows`` samples, dense: the elements of a sample in the order of ``like`` if that is."""
    size = (rows, *like.shape[1:])
    if not is_dense(like):
        return torch.empty(size, dtype=dtype, device=like.device)
    strides = (like.shape[1:].numel(), *like.stride()[1:])
    return torch.empty_strided(size, strides, dtype=dtype, device=like.device)


def layout_reason(batch: Tensor, like: Tensor) -> str | None:
    """Why compiled code takes a copy of ``batch`` beside ``like``, or None where it takes the batch itself."""
    if not is_dense(batch):
        return f"there are gaps between or within its samples, strides {list(batch.stride())}"
    if any(batch.size(d) != 1 and batch.stride(d) != like.stride(d) for d in range(1, batch.dim())):
        strides = f"strides {list(batch.stride())} and {list(like.stride())}"
        return f"it orders the elements of a sample differently, {strides}"
    return None


def arranged(batch: Tensor, like: Tensor, *, copy: bool = True) -> Tensor:
    """``batch`` where compiled code takes it, otherwise new memory in the layout of ``like``, filled if ``copy``."""
    if layout_reason(batch, like) is None:
        return batch
    new = empty(like, batch.shape[0], batch.dtype)
    return new.copy_(batch) if copy else new


def constant(tensor: Tensor) -> Tensor:
    """Return a tensor that is no part of a graph: itself, where it is none; any operator counts in a small step."""
    return tensor.detach() if tensor.requires_grad else tensor


def settled(batch: Tensor) -> Tensor:
    """Return a batch as a constant that autograd takes, in memory in which no two elements share a place."""
    if torch.compiler.is_compiling():
        return batch.detach() if batch.is_floating_point() else batch
    # An alias also where no gradient is asked for: what a critic does to its input is no matter of the caller's.
    batch = batch.detach()
    if batch.is_inference() or _overlaps(batch):
        return batch.contiguous().clone()
    return batch


def _overlaps(batch: Tensor) -> bool:
    if batch.is_contiguous():
        return False
    extent = 0
    for stride, size in sorted((stride, size) for stride, size in zip(batch.stride(), batch.shape) if size > 1):
        if stride <= extent:
            return True
        extent += stride * (size - 1)
    return False
