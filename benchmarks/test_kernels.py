"""Interpolation and the penalty with its tangent seed against the expressions that users and the engine would write.

`make bench` runs it. A fresh output of some MiB costs page faults that differ from allocator to allocator, so that
interpolation is measured both ways: into new memory, and into `out=`, which shows the operator itself.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from wgan_fast import interpolate, reference
from wgan_fast.double_backprop.passes import penalty_seed

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SHAPES = [(64, 3, 64, 64), (64, 1, 28, 28)]
ROUNDS = 200
Variants = dict[str, Callable[[], object]]


def interpolation(shape: tuple[int, ...], device: str) -> Variants:
    real, fake, alpha = (torch.randn(size, device=device) for size in (shape, shape, shape[:1]))
    alpha, out = alpha.sigmoid(), torch.empty_like(real)
    column = reference.per_sample(alpha, real)
    variants: Variants = {
        "formula": lambda: column * real + (1 - column) * fake,
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


def seeds(shape: tuple[int, ...], device: str) -> Variants:
    gradient = torch.randn(shape, device=device) / 100
    settings = {"weight": 10.0, "target": 1.0, "one_sided": False, "group_size": 1}
    variants: Variants = {
        "expression": lambda: penalty_seed(gradient, **settings),
        "wgan_fast": lambda: torch.ops.wgan_fast.gradient_norm_penalty.default(gradient, 10.0, 1.0, False),
    }
    v, penalty, norm = penalty_seed(gradient.double(), **settings)
    value, mean_norm, _, seed = variants["wgan_fast"]()
    for actual, exact in ((seed, v), (value, penalty), (mean_norm, norm)):
        # Sums of up to 12,288 squares.
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())
    return variants


def call(run: Callable[[], object], device: str) -> object:
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return result


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
@pytest.mark.parametrize("variant", ["formula", "lerp", "lerp, out", "wgan_fast", "wgan_fast, out", "operator, out"])
def test_interpolate(benchmark: Callable, variant: str, shape: tuple[int, ...], device: str) -> None:
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(call, args=(interpolation(shape, device)[variant], device), rounds=ROUNDS, warmup_rounds=10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", ["expression", "wgan_fast"])
def test_penalty_and_seed(benchmark: Callable, variant: str, shape: tuple[int, ...], device: str) -> None:
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(call, args=(seeds(shape, device)[variant], device), rounds=ROUNDS, warmup_rounds=10)


compiled = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("wgan_fast::interpolate", "CPU"), reason="no extension"
)


@compiled
def test_interpolation_is_faster_than_the_formula_and_no_slower_than_lerp(capsys: pytest.CaptureFixture[str]) -> None:
    taken = seconds(interpolation(SHAPES[0], "cpu"), "cpu")
    report(f"interpolate {SHAPES[0]}", taken, capsys)
    assert ratio(taken, "formula", "operator, out") >= 2.5
    # 5% for the noise of a median of 200 ratios where both are bound by memory.
    assert ratio(taken, "lerp, out", "operator, out") >= 0.95


@compiled
def test_penalty_and_seed_are_faster_than_the_expression(capsys: pytest.CaptureFixture[str]) -> None:
    taken = seconds(seeds(SHAPES[0], "cpu"), "cpu")
    report(f"penalty and seed {SHAPES[0]}", taken, capsys)
    assert ratio(taken, "expression", "wgan_fast") > 1
