"""Tensors without data, of which most operators are asked without a kernel.

``FakeTensorMode`` takes 0.2 to 1.2 ms for an operator that it has not seen on these shapes, and planning asks hundreds.
Views need no more than their base, and elementwise operators on tensors that lie alike give one that lies as they do.
"""

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import make_channels_last_strides_for, make_contiguous_strides_for
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten

_UNTAGGED = {aten.leaky_relu.default, aten.leaky_relu_.default, aten.leaky_relu_backward.default}
"""Elementwise, without the tag that says so in every version of PyTorch."""

_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default}
"""Operators that, like views, are asked on the meta device: what they give lies in memory alike on every device."""

_DTYPES: dict[Hashable, torch.dtype] = {}
"""What an elementwise operator gives, by operator, dtype, layout, default dtype and the kinds of its arguments."""


def evaluate(mode: FakeTensorMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Call an ATen operator on stand-ins of ``mode``; returns the stand-ins that ``mode`` itself would."""
    if func is torch.ops.prim.device.default:
        return args[0].fake_device
    if (is_view(func) or func in _PRODUCTS) and func.overloadpacket is not aten.to and isinstance(args[0], FakeTensor):
        device = args[0].fake_device
        with in_kernel_invocation_manager(mode):
            out = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda made: FakeTensor(mode, made, device), out)
    if is_elementwise(func) and not func._schema.is_mutable:
        return _elementwise(mode, func, args, kwargs)
    return func(*args, **kwargs)


def _elementwise(mode: FakeTensorMode, func: Any, args: Any, kwargs: Any) -> Any:
    leaves = tree_leaves((args, kwargs))
    if any(isinstance(leaf, torch.memory_format) for leaf in leaves):
        return func(*args, **kwargs)
    operands = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    like = max(operands, key=Tensor.numel, default=None)
    if not (isinstance(like, FakeTensor) and _is_dense(like) and all(_lies_alike(other, like) for other in operands)):
        return func(*args, **kwargs)
    kinds = [type(leaf) if isinstance(leaf, Tensor | int | float) else leaf for leaf in leaves]
    key = (func, like.dtype, like.is_contiguous(), torch.get_default_dtype(), *kinds)
    dtype = _DTYPES.get(key)
    if dtype is None:
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and _lies_alike(out, like, dtype=out.dtype):
            _DTYPES[key] = out.dtype
        return out
    with in_kernel_invocation_manager(mode):
        made = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="meta")
    return FakeTensor(mode, made, like.fake_device)


def _is_dense(tensor: Tensor) -> bool:
    """Whether memory is filled in the order of one of PyTorch's formats, dimensions of size 1 included."""
    if tensor.is_contiguous():
        return tensor.stride() == make_contiguous_strides_for(tensor.shape)
    return tensor.dim() in (4, 5) and tensor.stride() == make_channels_last_strides_for(tensor.shape)


def _lies_alike(tensor: Tensor, like: FakeTensor, dtype: torch.dtype | None = None) -> bool:
    if not isinstance(tensor, FakeTensor) or tensor.fake_device != like.fake_device:
        return False
    if tensor.dtype != (dtype or like.dtype):
        return False
    if tensor.shape == like.shape:
        return tensor.stride() == like.stride()
    # Broadcast: whatever its shape, a contiguous operand agrees with a contiguous result on the order of dimensions.
    sizes = zip(reversed(tensor.shape), reversed(like.shape))
    narrower = tensor.dim() <= like.dim() and all(size in (1, full) for size, full in sizes)
    return narrower and tensor.is_contiguous() and like.is_contiguous()


def is_elementwise(target: Any) -> bool:
    """Whether an element of what an operator returns depends on one element of each argument."""
    return torch.Tag.pointwise in target.tags or target in _UNTAGGED


def gives_view(target: Any) -> bool:
    """Whether what an operator returns may share memory with an argument."""
    return any(result.alias_info is not None for result in target._schema.returns) or target in (
        aten.reshape.default, aten._reshape_alias.default, aten._unsafe_view.default,
    )  # fmt: skip


def is_view(target: Any) -> bool:
    """Whether an operator only looks at memory differently."""
    if target is operator.getitem:
        return True
    schema = getattr(target, "_schema", None)
    return schema is not None and not schema.is_mutable and gives_view(target)
