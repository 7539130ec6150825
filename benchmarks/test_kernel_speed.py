"""Interpolation and the penalty with its tangent seed against the expressions that users and the engine would write.

`make bench-kernels` runs it. A fresh output of some MiB costs page faults that differ from allocator to allocator, so
that interpolation is measured both ways: into new memory, and into `out=`, which shows the operator itself.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from wgan_fast import interpolate, reference

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SHAPES = [(64, 3, 64, 64), (64, 1, 28, 28)]
ROUNDS = 200
MIXED = ["formula", "compiled", "lerp", "lerp, out", "wgan_fast", "wgan_fast, out", "operator, out"]
PENALISED = ["autograd", "expression", "compiled", "wgan_fast", "wgan_fast, below autograd", "copy"]
Variants = dict[str, Callable[[], object]]


def mixed(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    return alpha * real + (1 - alpha) * fake


def interpolation(shape: tuple[int, ...], device: str) -> Variants:
    real, fake, alpha = (torch.randn(size, device=device) for size in (shape, shape, shape[:1]))
    alpha, out = alpha.sigmoid(), torch.empty_like(real)
    column = reference.per_sample(alpha, real)
    variants: Variants = {
        "formula": lambda: mixed(real, fake, column),
        "compiled": partial(torch.compile(mixed, dynamic=False), real, fake, column),
        "lerp": lambda: torch.lerp(fake, real, column),
        "lerp, out": lambda: torch.lerp(fake, real, column, out=out),
        "wgan_fast": lambda: interpolate(real, fake, alpha),
        "wgan_fast, out": lambda: interpolate(real, fake, alpha, out=out),
        "operator, out": lambda: torch.ops.wgan_fast.interpolate_into(out, real, fake, alpha),
    }
    exact = reference.interpolate(real.double(), fake.double(), alpha)
    for run in variants.values():
        out.fill_(torch.nan)
        result = run()
        # 4 roundings of values of order 4.
        torch.testing.assert_close((out if result is None else result).double(), exact, rtol=0, atol=1e-6)
    return variants


def expression(gradient: Tensor, weight: float = 10.0, target: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Penalty, mean norm and v in closed form, as short as PyTorch can have them with v = 0 where g = 0."""
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    excess = norm - target
    slope = excess / torch.threshold(norm, 0, torch.inf) * (2 * weight / len(norm))
    return excess.square().mean() * weight, norm.mean(), gradient * reference.per_sample(slope, gradient)


def differentiated(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same as training code has them: v is what autograd sends back to g."""
    gradient = gradient.detach().requires_grad_()
    norm = gradient.flatten(1).norm(2, dim=1)
    penalty = 10.0 * ((norm - 1) ** 2).mean()
    return penalty.detach(), norm.detach().mean(), *torch.autograd.grad(penalty, gradient)


def seeds(shape: tuple[int, ...], device: str) -> Variants:
    gradient = torch.randn(shape, device=device) / 100
    out = torch.empty_like(gradient)
    operator = torch.ops.wgan_fast.gradient_norm_penalty.default

    def below_autograd() -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(gradient, 10.0, 1.0, False)

    variants: Variants = {
        "autograd": lambda: differentiated(gradient),
        "expression": lambda: expression(gradient),
        "compiled": partial(torch.compile(expression, dynamic=False), gradient),
        "wgan_fast": lambda: operator(gradient, 10.0, 1.0, False),
        # Without the Python function that records an operator of a library.
        "wgan_fast, below autograd": below_autograd,
    }
    penalty, mean_norm, v = expression(gradient.double())
    for run in variants.values():
        value, mean, *_, seed = run()
        for actual, exact in ((value, penalty), (mean, mean_norm), (seed, v)):
            # Sums of up to 12,288 squares.
            torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())
    return variants | {"copy": lambda: out.copy_(gradient)}


def call(run: Callable[[], object], device: str) -> object:
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return result


@pytest.fixture(autouse=True, scope="module")
def _freed_memory_stays() -> None:
    """Let no variant pay for the page faults of memory that another has given back, which is a matter of luck."""
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**25)  # the most that it takes
        ctypes.CDLL(None).mallopt(trim_threshold, 2**30)


def seconds(variants: Variants, device: str) -> dict[str, list[float]]:
    """Every variant once in each round, after 10 rounds that are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(10 + ROUNDS):
        for name, run in variants.items():
            start = time.perf_counter()
            result = call(run, device)
            taken[name].append(time.perf_counter() - start)
            del result
    return {name: times[10:] for name, times in taken.items()}


def ratio(taken: dict[str, list[float]], slower: str, faster: str) -> float:
    return statistics.median(a / b for a, b in zip(taken[slower], taken[faster]))


def report(title: str, taken: dict[str, list[float]], capsys: pytest.CaptureFixture[str]) -> None:
    medians = ", ".join(f"{name} {statistics.median(times) * 1e6:.0f} µs" for name, times in taken.items())
    with capsys.disabled():
        print(f"\n{title}, {torch.get_num_threads()} threads: {medians}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "variant", ["formula", "compiled", "lerp", "lerp, out", "wgan_fast", "wgan_fast, out", "operator, out"]
)
def test_interpolate(benchmark: Callable, variant: str, shape: tuple[int, ...], device: str) -> None:
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(call, args=(interpolation(shape, device)[variant], device), rounds=ROUNDS, warmup_rounds=10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "variant", ["autograd", "expression", "compiled", "wgan_fast", "wgan_fast, below autograd", "copy"]
)
def test_penalty_and_seed(benchmark: Callable, variant: str, shape: tuple[int, ...], device: str) -> None:
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(call, args=(seeds(shape, device)[variant], device), rounds=ROUNDS, warmup_rounds=10)


compiled = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("wgan_fast::interpolate", "CPU"), reason="no extension"
)


@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpolation_is_faster_than_the_formula_and_no_slower_than_lerp(
    shape: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    taken = seconds(interpolation(shape, "cpu"), "cpu")
    report(f"interpolate {shape}", taken, capsys)
    if shape == SHAPES[0]:
        assert ratio(taken, "formula", "operator, out") >= 2.5
        # 5% for the noise of a median of 200 ratios where both are bound by memory.
        assert ratio(taken, "lerp, out", "operator, out") >= 0.95
    else:
        # Small batches are bound by the way into an operator, which is longer for one outside of PyTorch.
        assert ratio(taken, "formula", "wgan_fast") > 1


@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_penalty_and_seed_are_faster_than_autograd_and_the_expression(
    shape: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    taken = seconds(seeds(shape, "cpu"), "cpu")
    report(f"penalty and seed {shape}", taken, capsys)
    assert ratio(taken, "autograd", "wgan_fast") >= 2
    assert ratio(taken, "expression", "wgan_fast") > 1
    if shape == SHAPES[0]:
        # What any such operator must take: 2 is out of reach of those that the copy holds to less.
        limit = ratio(taken, "expression", "copy")
        assert ratio(taken, "expression", "wgan_fast, below autograd") >= min(2, 0.7 * limit)
    else:
        assert ratio(taken, "expression", "wgan_fast, below autograd") >= 2
