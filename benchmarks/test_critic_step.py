"""The critic step in every variant of `wgan_fast.bench`, for pytest-benchmark; and the gate on its speed.

`make bench-kernels` runs it. `wgan-fast bench` times the same variants interleaved and gives ratios, which hold on a
machine that is not quiet.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wgan_fast.bench import results, workloads
from wgan_fast.bench.check import PatientChecker
from wgan_fast.bench.measure import count, forward_flops, peak_bytes
from wgan_fast.bench.run import run
from wgan_fast.bench.step import Skipped
from wgan_fast.bench.variants import VARIANTS

RESULTS = Path(__file__).parent / "results"
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
MODELS = ["toy-mlp", "dcgan-28", "resnet-32"]
TIMED = ["naive", "no-penalty", "drop-in", "ours", "naive-bf16", "ours-bf16", "naive-penalty", "drop-in-penalty"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", TIMED)
def test_critic_step(benchmark: Callable, name: str, model: str, device: str) -> None:
    workload, variant = workloads.build(model, device=device), VARIANTS[name]
    try:
        step = variant.prepare(workload)
    except Skipped as reason:
        pytest.skip(str(reason))
    error = PatientChecker(workload).check(name, variant, step)
    step()  # plans, where dropout is on
    counted = count(step)
    benchmark.group = f"{variant.computes}, {model} on {device}"
    benchmark.extra_info.update(
        results.environment(workload.real.device),
        error=error,
        units=counted.flops / forward_flops(workload),
        launches=counted.launches,
        peak_bytes=peak_bytes(step, workload.real.device),
    )
    benchmark.pedantic(_finish, args=(step, workload.real.device), rounds=10, warmup_rounds=1)


def _finish(step: Callable[[], None], device: torch.device) -> None:
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_speed_is_that_of_the_committed_results(model: str, device: str) -> None:
    """As a ratio within one run, with a margin for noise; a step that became much faster is to be committed."""
    workload = workloads.build(model, device=device)
    path = RESULTS / f"{results.slug(results.environment(workload.real.device))}.json"
    if not path.exists():
        pytest.skip("no results of this device are committed")
    committed = results.ratio(results.read(path)["workloads"][workload.key], "naive", "ours")
    measured = results.ratio(run(workload, ["ours"], budget=10), "naive", "ours")
    assert committed is not None
    assert measured is not None
    assert 0.85 <= measured.median / committed.median <= 1.25
