"""What would be planned for a GPU with tensor cores, on a CPU: for counts, and for a model of what they cost."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from ..engine import planned
from ..four_pass import optimize, plan
from ..four_pass.operators import base, linear, structure


@contextmanager
def as_on_gpu(*, gpu: bool = True, moved: bool = True) -> Iterator[None]:
    """Plan as for a GPU within the context, and have the CPU run what only a GPU has.

    Args:
        gpu: Whether to; else only the plans are apart from others.
        moved: Whether casts, and the assembling of a batch, are moved and joined, or stay where they were recorded.
    """
    with ExitStack() as stack:

        def patch(holder: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(holder, name, value))

        for module in (base, linear, optimize, structure):
            patch(module, "on_gpu", lambda x: gpu)
        if not moved:
            patch(optimize, "_cast_in_one_pass", lambda graph: None)
            for name in ("assemble", "leave_uncast", "cast_together"):
                patch(plan, name, lambda graph: None)
        # Plans are kept for all critics of a class: these are for here alone.
        key = planned.FourPassEngine._key
        patch(planned.FourPassEngine, "_key", lambda *args: (*key(*args), "as on a GPU", gpu, moved))
        patch(linear, "convolves_in_tensor_cores", lambda dtype, device: gpu and dtype == torch.bfloat16)
        library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        library.impl("mm.dtype", _product, "CPU")  # type: ignore[no-untyped-call]
        stack.callback(library._destroy)
        yield


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return a.to(dtype) @ b.to(dtype)
