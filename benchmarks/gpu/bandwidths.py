"""Part 4: every kernel against eager PyTorch, torch.compile and the bandwidth of a copy; the fused MLP step."""

import copy
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from session import Found, Session, arithmetic, device_milliseconds, graphed, medians
from test_kernel_speed import differentiated, expression
from torch import Tensor, nn

from wgan_fast import CriticStep, clip_weights_, explain, interpolate, reference
from wgan_fast.engine import fused_mlp
from wgan_fast.ops import normalization
from wgan_fast.optim import ClippedRMSprop

ROUNDS = 30
CACHES = 4
"""How many times the GPU's last cache one operand is, so that nothing is read from there."""
CPU_BYTES = 1 << 18
WIDTHS, PRECISIONS = ("64", "128", "256", "512", "512-256", "1024-512"), ("fp32", "tf32", "bf16")
"""Of the hidden layers of an MLP; two of one width, or as they are told."""
MLP_SECONDS = 0.5
MLP_TARGET = 3.0
"""How many times as fast as the compiled four-pass graph the fused step is to be, both as CUDA graphs, at width 128."""

BOUND = 0.01
PENALTY = {"weight": 10.0, "target": 1.0, "one_sided": False}
Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel on its operands.

    Attributes:
        moved: Bytes that any implementation must move: each input read once, each output written once.
        variants: Ways to compute the same; "ours" is the kernel.
        output: What the last call left, for the comparison.
        prepare: Restores the operands before every call, untimed.
        target: What fraction of the copy bandwidth ours is to reach on a GPU.
        atol: How far apart two results may be where they cancel.
    """

    moved: int
    variants: dict[str, Call]
    output: Callable[[], list[Tensor]]
    prepare: Call
    target: float
    atol: float = 1e-6


def compiled(function: Callable[..., object], device: str) -> dict[str, Callable[..., object]]:
    """torch.compile's own kernels, where they are made in seconds."""
    return {"compiled": torch.compile(function, fullgraph=True)} if device == "cuda" else {}


def as_layers(flat: Tensor) -> list[Tensor]:
    """The sizes of a critic: few large layers and many small ones."""
    sizes = [flat.numel() // 2, flat.numel() // 4, 1000, 63, 1]
    sizes.append(flat.numel() - sum(sizes))
    return [part.clone() for part in flat.split(sizes)]


def keeping(made: list[Tensor], function: Callable[..., Any], *arguments: Any) -> Call:
    """A call that leaves its results in ``made``."""

    def call() -> None:
        out = function(*arguments)
        made[:] = [out] if isinstance(out, Tensor) else [tensor for tensor in out if tensor is not None]

    return call


def clipping(numel: int, device: str) -> Case:
    originals = as_layers(torch.empty(numel, device=device).uniform_(-2 * BOUND, 2 * BOUND))
    weights = [weight.clone() for weight in originals]

    def foreach() -> None:
        torch._foreach_clamp_min_(weights, -BOUND)
        torch._foreach_clamp_max_(weights, BOUND)

    def eager(weights: list[Tensor]) -> None:
        for weight in weights:
            weight.clamp_(-BOUND, BOUND)

    variants: dict[str, Call] = {
        "eager": lambda: eager(weights),
        "foreach": foreach,
        **{name: lambda f=function: f(weights) for name, function in compiled(eager, device).items()},
        "ours": lambda: clip_weights_(weights, BOUND),
    }
    prepare = lambda: torch._foreach_copy_(weights, originals)  # noqa: E731
    return Case(2 * 4 * numel, variants, lambda: weights, prepare, 0.90)


def clipped_rmsprop(numel: int, device: str) -> Case:
    originals = as_layers(torch.empty(numel, device=device).uniform_(-BOUND, BOUND))
    weights = [weight.clone() for weight in originals]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizers = {
        "eager": torch.optim.RMSprop(weights, lr=5e-5, foreach=False),
        "foreach": torch.optim.RMSprop(weights, lr=5e-5, foreach=True),
        "ours": ClippedRMSprop(weights, lr=5e-5, clip=BOUND),
    }
    averages = [torch.zeros_like(weight) for weight in weights]

    def formula(weights: list[Tensor], grads: list[Tensor], averages: list[Tensor]) -> None:
        for weight, grad, average in zip(weights, grads, averages):
            average.mul_(0.99).addcmul_(grad, grad, value=0.01)
            weight.addcdiv_(grad, average.sqrt().add_(1e-8), value=-5e-5).clamp_(-BOUND, BOUND)

    def plain(name: str) -> None:
        optimizers[name].step()
        torch._foreach_clamp_min_(weights, -BOUND)
        torch._foreach_clamp_max_(weights, BOUND)

    def prepare() -> None:
        torch._foreach_copy_(weights, originals)
        for state in [average for owner in optimizers.values() for average in owner.state.values()]:
            state["square_avg"].zero_()
        torch._foreach_zero_(averages)

    grads = [weight.grad for weight in weights]
    variants: dict[str, Call] = {
        "eager": lambda: plain("eager"),
        "foreach": lambda: plain("foreach"),
        **{
            name: lambda f=function: f(weights, grads, averages) for name, function in compiled(formula, device).items()
        },
        "ours": optimizers["ours"].step,
    }
    return Case(5 * 4 * numel, variants, lambda: weights, prepare, 0.85)


def interpolation(numel: int, device: str) -> Case:
    shape = (numel // 12288, 3, 64, 64)
    real, fake = torch.randn(2, *shape, device=device)
    alpha, out = torch.rand(shape[0], device=device), torch.empty(shape, device=device)
    column = reference.per_sample(alpha, real)

    def formula(real: Tensor, fake: Tensor, column: Tensor) -> Tensor:
        return column * real + (1 - column) * fake

    variants: dict[str, Call] = {
        "eager": lambda: out.copy_(formula(real, fake, column)),
        "lerp": lambda: torch.lerp(fake, real, column, out=out),
        **{
            name: lambda f=function: out.set_(f(real, fake, column).detach())
            for name, function in compiled(formula, device).items()
        },
        "ours": lambda: interpolate(real, fake, alpha, out=out),
    }
    return Case(3 * real.numel() * 4, variants, lambda: [out], lambda: out.fill_(torch.nan), 0.90)


def norm_penalty(numel: int, device: str) -> Case:
    gradient = torch.randn(numel // 12288, 12288, device=device) / 100
    weight, target = PENALTY["weight"], PENALTY["target"]
    made: list[Tensor] = []

    def autograd(gradient: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return differentiated(gradient)

    def ours(gradient: Tensor) -> tuple[Tensor, ...]:
        penalty, mean_norm, _, seed = torch.ops.wgan_fast.gradient_norm_penalty(gradient, *PENALTY.values())
        return penalty, mean_norm, seed

    variants: dict[str, Call] = {
        "autograd": keeping(made, autograd, gradient),
        "expression": keeping(made, expression, gradient, weight, target),
        **{
            name: keeping(made, function, gradient, weight, target)
            for name, function in compiled(expression, device).items()
        },
        "ours": keeping(made, ours, gradient),
    }
    return Case(2 * gradient.numel() * 4, variants, lambda: made, made.clear, 0.85)


def norm(name: str, numel: int, device: str) -> Case:
    """An operator of group norm in 8 groups, as the four passes call it."""
    x, delta, tangent = torch.randn(3, numel // 65536, 64, 32, 32, device=device).unbind()
    weight, bias = torch.randn(2, 64, device=device).unbind()
    statistics = x, *normalization.forward(x, weight, bias, 8, 1e-5)[1:]
    arguments, tensors = {
        "forward": ((x, weight, bias, 8, 1e-5), 2),
        "vjp": ((delta, *statistics, weight, 8), 3),
        "jvp": ((tangent, *statistics, weight, 8), 3),
        "second_order": ((tangent, delta, None, *statistics, weight, 8), 4),
    }[name]
    plain, made = getattr(normalization, name), []
    variants: dict[str, Call] = {
        "eager": keeping(made, plain, *arguments),
        **{form: keeping(made, f, *arguments) for form, f in compiled(plain, device).items()},
        "ours": keeping(made, getattr(torch.ops.wgan_fast, f"norm_{name}"), *arguments),
    }
    # An element is of order 1 and a difference of sums; parameters' gradients are sums of millions, and not compared.
    return Case(tensors * 4 * x.numel(), variants, lambda: made[:1], made.clear, 0.85, atol=1e-4)


def activation(reduced: bool, numel: int, device: str) -> Case:
    """A mask times a cotangent or tangent, and the bias's gradient with it: no kernel of ours, but Inductor's."""
    a = torch.randn(numel // 256, 256, device=device)
    vector = torch.rand_like(a)  # of one sign, so that its sums do not cancel

    def passed(a: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        out = torch.where(a > 0, vector, 0.2 * vector)
        return (out, out.sum(0)) if reduced else (out,)

    made: list[Tensor] = []
    variants: dict[str, Call] = {
        "eager": keeping(made, passed, a, vector),
        "ours": keeping(made, compiled(passed, device).get("compiled", passed), a, vector),
    }
    return Case(3 * 4 * a.numel(), variants, lambda: made, made.clear, 0.85)


KERNELS: dict[str, Callable[[int, str], Case]] = {
    "clip_weights": clipping,
    "clipped_rmsprop": clipped_rmsprop,
    "interpolate": interpolation,
    "gradient_norm_penalty": norm_penalty,
    **{f"norm_{name}": functools.partial(norm, name) for name in ("forward", "vjp", "jvp", "second_order")},
    "activation": functools.partial(activation, False),
    "activation_and_bias": functools.partial(activation, True),
}


class Unfused(nn.Sequential):
    """A chain that the operator for MLPs does not take: it adds 0 to the scores."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out + 0.0


def taken_at_any_width(device: str) -> AbstractContextManager[Any]:
    """Have the step take the fused operator wherever it can, for a measurement of where it should."""
    if device == "cpu":
        return nullcontext()
    return mock.patch.dict(fused_mlp.MEASURED, {torch.cuda.get_device_capability(): fused_mlp.MOST_WIDTH})


def mlp_pair(widths: str, device: str) -> tuple[dict[str, nn.Module], tuple[Tensor, Tensor, Tensor]]:
    """An MLP that runs in four passes, its copy that the fused step takes, and real, fake and α."""
    N, D = (4096, 32) if device == "cuda" else (64, 3)
    first, second = map(int, (widths.split("-") * 2)[:2])
    layers = [nn.Linear(D, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 1)]
    critics = {"four_pass": Unfused(*layers).to(device), "ours": nn.Sequential(*copy.deepcopy(layers)).to(device)}
    real, fake = torch.randn(2, N, D, device=device).unbind()
    return critics, (real, fake, torch.rand(N, device=device))


def mlp_step(widths: str, precision: str, session: Session) -> Found:
    """The fused step of an MLP against the four-pass graph, compiled and each also as a CUDA graph."""
    critics, batches = mlp_pair(widths, session.device)
    with arithmetic(precision), taken_at_any_width(session.device):
        steps: dict[str, Call] = {}
        for name, critic in critics.items():
            step = CriticStep(critic, compile=session.on_gpu, precision="bf16" if precision == "bf16" else "fp32")
            steps[name] = functools.partial(step, *batches)
            steps[name]()
        if session.on_gpu:
            steps |= {f"{name}-graph": graphed(step) for name, step in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        end = time.perf_counter() + (MLP_SECONDS if session.on_gpu else 0.1)
        while len(times["ours"]) < 3 or time.perf_counter() < end:
            for name, step in steps.items():
                times[name].append(round(device_milliseconds(step, session.device), 5))
        taken = {name: explain(critic, batches[0]).unfused for name, critic in critics.items()}
    told = ", ".join(f"{name} {1e3 * value:.0f} us" for name, value in medians(times).items())
    return {"milliseconds": times, "unfused": taken, "target": MLP_TARGET, "told": told}


def kernel_numel(device: str) -> int:
    """Elements of one operand of a kernel."""
    if device == "cpu":
        return CPU_BYTES // 4
    return int(CACHES * torch.cuda.get_device_properties(0).L2_cache_size // 4 // 12288 * 12288)


def copy_bandwidth(numel: int, device: str) -> float:
    """GB/s of a copy, bytes read plus bytes written: what memory-bound code can reach."""
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    times = [device_milliseconds(lambda: target.copy_(source), device) for _ in range(3 + ROUNDS)][3:]
    return 2 * 4 * numel / statistics.median(times) / 1e6


@torch.no_grad()
def measure(name: str, session: Session) -> Found:
    """Compare every variant's result with the first one's, then time them interleaved."""
    device = session.device
    case = KERNELS[name](kernel_numel(device), device)
    copied = copy_bandwidth(kernel_numel(device), device)
    expected: list[Tensor] | None = None
    for _ in range(3):
        for call in case.variants.values():
            case.prepare()
            call()
            expected = expected or [tensor.clone() for tensor in case.output()]
            torch.testing.assert_close(case.output(), expected, rtol=1e-4, atol=case.atol)
    del expected
    times: dict[str, list[float]] = {name: [] for name in case.variants}
    for _ in range(ROUNDS):
        for name, call in case.variants.items():
            case.prepare()
            times[name].append(round(device_milliseconds(call, device), 5))
    rate = case.moved / statistics.median(times["ours"]) / 1e6
    return {
        "bytes": case.moved,
        "milliseconds": times,
        "gb_per_s": round(rate, 1),
        "of_copy_bandwidth": round(rate / copied, 3),
        "target": case.target,
        "copy_gb_per_s": round(copied, 1),
        "told": f"{rate / copied:.2f} of copy bandwidth (target {case.target:.2f}); {medians(times)} ms",
    }


def run(session: Session) -> None:
    """Measure what is missing."""
    from right import sanitizer

    for name in KERNELS:
        session.item(f"bandwidth/{name}", functools.partial(measure, name, session))
    for widths, precision in itertools.product(WIDTHS, PRECISIONS) if session.on_gpu else [("16", "fp32")]:
        session.item(f"fused-mlp/{widths}/{precision}", functools.partial(mlp_step, widths, precision, session))
    session.item("sanitizer", functools.partial(sanitizer, session))
