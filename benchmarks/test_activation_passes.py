"""Whether the activation passes need kernels of their own, or Inductor's do: mask x cotangent with the bias's gradient
behind it, and mask x tangent, as operators of their own, compiled, and against a copy of the same bytes.

`make bench-kernels` runs it. docs/kernels.md draws the conclusion.
"""

import itertools
import re
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch._inductor.config as inductor
from test_kernel_speed import _freed_memory_stays, ratio  # noqa: F401
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

from wgan_fast import CriticStep
from wgan_fast.bench import workloads

aten = torch.ops.aten

SHAPES = {
    "toy MLP": (768, 512),
    "toy MLP, batch x 16": (16 * 768, 512),
    "DCGAN-28": (192, 64, 14, 14),
}
"""Real, fake and interpolates; the second is 24 MiB a tensor, more than any core has to itself."""
LARGE = "toy MLP, batch x 16"
ROUNDS, SECONDS = 200, 1.5


def mask(a: Tensor, vector: Tensor) -> Tensor:
    """What the flat graph runs: for ReLU in MLPs, for LeakyReLU in convolutional critics."""
    if a.dim() == 2:
        return aten.threshold_backward(vector, a, 0)
    return aten.leaky_relu_backward(vector, a, 0.2, True)


def with_bias(a: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """The bias's gradient is the sum over the rows that the loss sees, of which interpolates are none."""
    out = mask(a, cotangent)
    return out, out[: 2 * len(a) // 3].sum([0, *range(2, a.dim())])


def all_passes(a: Tensor, cotangent: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
    return *with_bias(a, cotangent), mask(a[2 * len(a) // 3 :], tangent)


def medians(variants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Every variant once in each round, after 5 rounds that are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + SECONDS
    while len(taken["copy"]) < 25 or (len(taken["copy"]) < ROUNDS and time.perf_counter() < end):
        for name, run in variants.items():
            start = time.perf_counter()
            result = run()
            taken[name].append(time.perf_counter() - start)
            del result
    return {name: times[5:] for name, times in taken.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_inductor_leaves_a_mask_nothing_to_gain(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    layout = torch.contiguous_format if len(SHAPES[name]) == 2 else torch.channels_last
    a, cotangent = (torch.randn(SHAPES[name]).contiguous(memory_format=layout) for _ in range(2))
    rows = slice(2 * len(a) // 3, None)
    points, tangent = a[rows], torch.randn_like(a[rows])
    found = {}
    for title, function, arguments, moved in (
        ("mask x cotangent", mask, (a, cotangent), 3 * a.numel()),
        ("mask x tangent", mask, (points, tangent), 3 * points.numel()),
        ("mask x cotangent, bias", with_bias, (a, cotangent), 3 * a.numel()),
        ("all as one", all_passes, (a, cotangent, tangent), 3 * a.numel() + 2 * points.numel()),
    ):
        compiled = torch.compile(function, dynamic=False, fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=1e-5, atol=1e-3)
        source = torch.randn(moved // 2)
        target = torch.empty_like(source)
        taken = medians({
            "eager": lambda f=function, x=arguments: f(*x),
            "compiled": lambda f=compiled, x=arguments: f(*x),
            "copy": lambda s=source, t=target: t.copy_(s),
        })  # fmt: skip
        found[title] = {form: ratio(taken, form, "copy") for form in ("eager", "compiled")}
        with capsys.disabled():
            times = ", ".join(f"{form} {statistics.median(t) * 1e6:.0f} µs" for form, t in taken.items())
            of_copy = ", ".join(f"{form} {r:.2f}" for form, r in found[title].items())
            print(f"\n{name}, {title}, {torch.get_num_threads()} threads: {times}; of a copy's time: {of_copy}")
    if name == LARGE:
        # A copy reads one stream for each that it writes, these read two.
        assert found["mask x cotangent"]["compiled"] <= 1.5
        assert found["mask x tangent"]["compiled"] <= 1.5


def compiled_step(model: str) -> tuple[CriticStep, tuple[Tensor, Tensor, Tensor]]:
    workload = workloads.build(model, device="cpu")
    return CriticStep(workload.critic, compile=True), (workload.real, workload.fake, torch.rand(len(workload.real)))


def test_one_kernel_stands_between_two_products_and_reads_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    step, batch = compiled_step("toy-mlp")
    _, (code,) = run_and_get_code(step, *batch)
    calls = re.findall(r"^ {8}(?:\w+ = )?(?:extern_kernels|torch\.ops)?\.?(\w[\w.]*)\(", code, re.MULTILINE)
    calls = [call for call in calls if re.match(r"mm|addmm|cpp_fused|wgan_fast", call)]
    with capsys.disabled():
        print(f"\ntoy MLP, compiled: {', '.join(calls)}")
    sources = dict(re.findall(r"^(cpp_fused_\w+) = async_compile\.cpp_pybinding\((.*?)^'''\)", code, re.M | re.S))
    kinds = ["mm" if call.endswith("mm") else call.split("_")[0] for call in calls]
    assert "cpp" in kinds
    assert not any(pair == ("cpp", "cpp") for pair in itertools.pairwise(kinds)), calls
    # 3 activations, each with a pass of cotangents and one of tangents.
    masks = [call for call in calls if "threshold_backward" in call]
    assert len(masks) == 6, calls
    for kernel in masks:
        loads = re.findall(r"loadu\((.*?), static_cast<int64_t>\(\d+\)\)", sources[kernel])
        assert loads, sources[kernel]
        assert len(set(loads)) == len(loads), sources[kernel]


@pytest.mark.parametrize("model", ["toy-mlp", "dcgan-28"])
def test_products_and_convolutions_take_most_of_a_compiled_step(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with inductor.patch({"cpp.enable_kernel_profile": True}):
        step, batch = compiled_step(model)
        step(*batch)
    for _ in range(3):
        step(*batch)
    taken = []
    for _ in range(15):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step(*batch)
        taken.append({event.key: event.self_cpu_time_total for event in profiled.key_averages()})

    def share(*parts: str) -> float:
        """Of a step's time, what kernels of Inductor take whose names have one of these parts."""
        named = [key for key in taken[0] if "cpp_fused" in key and any(part in key for part in parts)]
        return statistics.median(sum(times[key] for key in named) / sum(times.values()) for times in taken)

    kernels, masks, sums = share(""), share("relu", "threshold"), share("sum")
    with capsys.disabled():
        print(f"\n{model}, compiled: {kernels:.1%} of the step in kernels of Inductor,", end=" ")
        print(f"{masks:.1%} in those with activations, {sums:.1%} in those with sums")
    # What kernels that take no time at all could save; three times what was measured.
    assert 0 < kernels < 0.2
