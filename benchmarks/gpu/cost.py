"""What steps and iterations should take on a GPU: from what is planned for one, counted on a CPU.

``python cost.py PAGE RESULTS`` writes the page, with what was measured beside it. Plans of two small batches tell each
operator's bytes and FLOPs at any size: both grow by the sample.
"""

import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from iterations import CASES as ITERATIONS
from iterations import our_loop, trainer
from session import Found, Session, medians
from targets import FIRST
from torch.utils._python_dispatch import TorchDispatchMode

from wgan_fast.bench import report, variants, workloads
from wgan_fast.bench.as_on_gpu import as_on_gpu
from wgan_fast.four_pass.counting import flops_of, tensor_bytes
from wgan_fast.four_pass.stand_ins import is_view


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU, as the model sees it.

    Attributes:
        name: As its results call it.
        bytes_per_s: Of a copy.
        flops_per_s: Of large products, by arithmetic.
        least_s: Of any operator in a graph: a launch, and the gap to the next.
        least_product_s: Of a matrix product or a convolution, however small.
        convolved: What share of the products' rate convolutions reach.
    """

    name: str
    bytes_per_s: float
    flops_per_s: dict[str, float]
    least_s: float = 2e-6
    least_product_s: float = 6e-6
    convolved: float = 0.5

    def seconds(self, work: "list[Work]", precision: str) -> float:
        """What operators should take one after the other, each bound by one thing alone."""
        return sum(self._one(each, self.flops_per_s[precision]) for each in work)

    def _one(self, work: "Work", flops_per_s: float) -> float:
        rate = flops_per_s * (self.convolved if "convolution" in work.name else 1)
        least = self.least_product_s if work.flops else self.least_s
        return max(least, work.nbytes / self.bytes_per_s, work.flops / rate)


H100 = Machine("H100", 2.96e12, {"fp32": 52e12, "tf32": 407e12, "bf16": 786e12})
H200 = Machine("H200", 4.2e12, {"fp32": 51e12, "tf32": 410e12, "bf16": 787e12})
"""Copies' bandwidths and products' rates are those that docs/gpu.md gives; the rest is assumed."""
MACHINES = {machine.name: machine for machine in (H100, H200)}


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one operator: its name, and what it computes, reads and writes."""

    name: str
    flops: float
    nbytes: float

    def at(self, size: int, other: "Work", sizes: tuple[int, int]) -> "Work":
        """The same operator at another batch size, on the line through two."""
        share = (size - sizes[0]) / (sizes[1] - sizes[0])
        flops, nbytes = (
            here + share * (there - here) for here, there in ((self.flops, other.flops), (self.nbytes, other.nbytes))
        )
        return Work(self.name, flops, nbytes)


class _Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "prim" and not is_view(func) and func is not torch.ops.aten.detach.default:
            named = {a.name: value for a, value in zip(func._schema.arguments, args)} | kwargs
            # What is only written to is what comes back.
            written = {
                a.name for a in func._schema.arguments if a.is_out or (func._opname == "copy_" and a.name == "self")
            }
            read = [value for name, value in named.items() if name not in written]
            self.work.append(Work(func._opname, flops_of(func, args, kwargs, out), tensor_bytes((read, out))))
        return out


def recorded(call: Callable[[], object]) -> list[Work]:
    """What a call runs, after two that plan."""
    call(), call()
    with _Recorded() as found:
        call()
    return found.work


def at_size(size: int, sizes: tuple[int, int], make: Callable[[int], list[Work]]) -> list[Work]:
    """What a batch of a size asks for, from two small ones."""
    small, large = map(make, sizes)
    if [work.name for work in small] != [work.name for work in large]:
        raise ValueError(f"batches of {sizes} are planned in two ways")
    return [one.at(size, other, sizes) for one, other in zip(small, large)]


@functools.cache
def step(model: str, size: int, precision: str) -> list[Work]:
    """The critic step, as it trains on a GPU: images channels-last in bfloat16."""

    def make(batch: int) -> list[Work]:
        work = workloads.build(model, batch_size=batch)
        work = work.channels_last() if work.real.dim() == 4 and precision == "bf16" else work
        with as_on_gpu():
            return recorded(functools.partial(variants.ours(work, precision=_ours(precision)), None))

    return at_size(size, (20, 40) if model == "tabular-mlp" else (4, 8), make)


@functools.cache
def iteration(model: str, size: int, precision: str) -> list[Work]:
    """The critic's steps and the generator's, optimizers and moving average, of the trainer."""
    images = precision == "bf16" and model != "toy-mlp"

    def make(batch: int) -> list[Work]:
        with tempfile.TemporaryDirectory() as folder, as_on_gpu():
            session = Session(Path(folder), {}, "cpu")
            options = {"precision": _ours(precision), "channels_last": images, "cuda_graph": False}
            made = trainer(model, batch, session, **options)
            made.generator.train(), made.critic.train()
            return recorded(our_loop(made))

    return at_size(size, (4, 8), make)


def _ours(precision: str) -> Any:
    return "bf16" if precision == "bf16" else "fp32"


def planned(key: str) -> list[Work]:
    """What an item of the results asks for, such as "target/dcgan-64/256/bf16"."""
    kind, model, size, precision = key.split("/")
    return {"target": step, "iteration": iteration}[kind](model, int(size), precision)


def measured(found: Found) -> float | None:
    """The least median of ours as a graph that no compiler has fused."""
    times = medians(found.get("milliseconds", {}))
    return min((time for name, time in times.items() if _is_graph_of_ours(name)), default=None)


def _is_graph_of_ours(name: str) -> bool:
    words = name.split(", ")
    return words[0] == "ours" and "graph" in words and "compiled" not in words


def rows(files: list[Found], *, measured_alone: bool = False) -> list[list[str]]:
    """A row for every case: what is planned, what it should take on an H100, and the least that it took.

    There if anywhere; where that was on another GPU, so is what it is held against.
    """
    took: dict[str, tuple[bool, float, str]] = {}
    for found in files:
        device = found["environment"]["device"].removeprefix("NVIDIA ").split()[0]
        for key, item in found["items"].items():
            if (time := measured(item)) is not None:
                one = (device != H100.name, time, device)
                took[key] = min(took.get(key, one), one)
    made = [["case", "operators", "GFLOP", "MB", "on an H100", "measured", "on", "measured / predicted there"]]
    cases = [f"target/{'/'.join(map(str, case))}" for case in FIRST]
    cases += [f"iteration/{case.replace(' ', '/')}" for case in ITERATIONS]
    for key in cases:
        if measured_alone and key not in took:
            continue
        kind, model, size, precision = key.split("/")
        work = planned(key)
        name = f"{model}, {size}, {precision}" + (", whole iteration" if kind == "iteration" else "")
        totals = [f"{sum(w.flops for w in work) / 1e9:.3g}", f"{sum(w.nbytes for w in work) / 1e6:.3g}"]
        row = [name, str(len(work)), *totals, f"{1e3 * H100.seconds(work, precision):.3g} ms"]
        _, time, device = took.get(key, (True, None, ""))
        if time is not None:
            there = MACHINES.get(device)
            ratio = "" if there is None else f"{time / (1e3 * there.seconds(work, precision)):.2f}"
            row += [f"{time:.3g} ms", device, ratio]
        made.append([*row, *[""] * (len(made[0]) - len(row))])
    return made


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    page, folder = map(Path, sys.argv[1:])
    report.update(page, report.table(rows([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))])))
