"""How an operator is registered: its schema, its plain form, what it returns without data, and its Triton launch.

An operator runs compiled code from ``csrc/`` where the extension has it for the tensor's device, Triton where that is
installed and the tensor on a GPU, and its plain form in PyTorch elsewhere. A caller sees one operator either way,
``torch.ops.wgan_fast.<name>``.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

# Loading the extension registers what is compiled.
from .. import build as build

# What the dispatcher registers lasts as long as this object.
library = torch.library.Library("wgan_fast", "FRAGMENT")  # type: ignore[no-untyped-call]

_Form = TypeVar("_Form", bound=Callable[..., Any])
_LAUNCHES: dict[str, Callable[..., Any]] = {}

below_autograd: Any = torch._C._AutoDispatchBelowAutograd
"""Calls an operator past the Python function that records it, which costs as much as a small operator itself."""


def operator(
    schema: str,
    *,
    fake: Callable[..., Any],
    launch: Callable[..., Any] | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Callable[[_Form], _Form]:
    """Register the decorated function as an operator's plain form.

    Args:
        schema: As ``torch.library`` takes it.
        fake: Returns what the operator does, without data.
        launch: Runs the operator's Triton kernels.
        tags: What else PyTorch is to know of it.
    """

    def register(plain: _Form) -> _Form:
        name = library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))  # type: ignore[no-untyped-call]
        library.impl(name, plain, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"wgan_fast::{name}", fake, lib=library)
        if launch is not None:
            _LAUNCHES[name] = launch
            if importlib.util.find_spec("triton"):
                launch_on("CUDA", name)
        return plain

    return register


def launch_on(key: str, *names: str) -> None:
    """Have Triton run operators for the tensors of a dispatch key; the kernels are imported at the first call."""
    for name in names:
        library.impl(name, _LAUNCHES[name], key)  # type: ignore[no-untyped-call]


def kernels(module: str) -> Any:
    """Import a module of Triton kernels."""
    return importlib.import_module(f"..kernels.{module}", __package__)


def writes_only(*_: object) -> None:
    """Stand for an operator that writes in place and returns nothing."""


def differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative of what follows from the tensors may be asked for, by autograd or by torch.func."""
    recording = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])
    return recording or torch._C._are_functorch_transforms_active()
