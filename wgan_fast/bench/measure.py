"""What a step costs: seconds in interleaved rounds, FLOPs, operators and bytes alive."""

import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .step import Step
from .workloads import Workload

LEAST_SECONDS = 0.05
"""What one reading of the clock spans at least; a slower step is read once."""
LEAST_ROUNDS, MOST_ROUNDS = 5, 50


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds per call, over ``calls`` calls."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def fastest_of(call: Callable[[], object], device: torch.device, repeats: int = 2) -> float:
    """Return the least seconds of a call after a first one that warms up: for choosing, not for reporting."""
    call()
    return min(seconds(call, device) for _ in range(repeats))


def interleaved(
    steps: Mapping[str, Step],
    once: Mapping[str, float],
    device: torch.device,
    *,
    budget: float,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, list[float]]:
    """Time steps in rounds, each step once a round, the order turned by one from round to round.

    Whatever slows the machine down for a while slows all of a round: only ratios within a round are compared.

    Args:
        steps: What to time, by name.
        once: About how many seconds one call of each takes.
        device: Where it runs.
        budget: Seconds to spend; at least ``LEAST_ROUNDS`` rounds are timed all the same.
        progress: Told the fraction that is done.

    Returns:
        Seconds per call, of every round in order.
    """
    calls = {name: max(1, round(LEAST_SECONDS / once[name])) for name in steps}
    names, rounds, start = list(steps), 0, time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in names}
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() - start < budget):
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(steps[name].scale * seconds(steps[name], device, calls[name]))
        rounds += 1
        spent = (time.perf_counter() - start) / budget if budget > 0 else 1.0
        progress(min(1.0, max(rounds / MOST_ROUNDS, min(rounds / LEAST_ROUNDS, spent))))
    return times


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched while it is active.

    PyTorch's FlopCounterMode also attributes FLOPs to modules, with hooks that ``torch.autograd.grad`` does not bear.

    Attributes:
        flops: Floating-point operations of matrix products and convolutions.
        launches: Operators whose result is not a view of an argument.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.launches = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.launches += not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        formula = _FLOPS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _addmm_activation_flops(bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _onednn_flops(x: Tensor, weight: Tensor, *_: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


_FLOPS = flop_registry | {torch.ops.aten._addmm_activation: _addmm_activation_flops}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _FLOPS[torch.ops.mkldnn._linear_pointwise] = _onednn_flops


def count(call: Callable[[], object]) -> Counter:
    """Count what a call dispatches; compiled code dispatches nothing."""
    counter = Counter()
    with counter:
        call()
    return counter


def forward_flops(workload: Workload) -> int:
    """FLOPs of one forward over one batch: the unit in which steps are counted."""
    with torch.no_grad():
        return count(lambda: workload.critic(workload.real)).flops


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of every storage that an operator made, from then until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._known:
                storage = leaf.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, nbytes: int) -> None:
        self.now -= nbytes
        self._known.remove(key)


def peak_bytes(step: Step, device: torch.device) -> int:
    """Measure the most bytes alive during a step beyond the critic and its samples; gradients that it leaves count.

    On a CUDA device this is what the allocator counted. On a CPU it is what PyTorch's operators returned, without
    what they allocate and free inside: the same on every machine, where the allocator's count is not.
    """
    step.critic.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    mode = _LiveBytes()
    with mode:
        step()
    return mode.peak
