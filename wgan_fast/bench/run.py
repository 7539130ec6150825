"""One benchmark: check every variant of a workload, count what it does, time all of them together."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..four_pass import CaptureError
from .check import PatientChecker, WrongGradientsError
from .measure import count, fastest_of, forward_flops, interleaved, peak_bytes
from .step import Skipped, Step
from .variants import VARIANTS
from .workloads import Workload

TOO_SLOW = 5.0
"""How many times naive's time a variant may take and still be timed in rounds, which it would fill."""

TOO_SLOW_REASON = "times as long as naive, in a single reading"
"""How the reason of a variant skipped for its time ends."""

Progress = Callable[[str, float], None]
"""Told what is being done, and the fraction of it that is."""


def run(
    workload: Workload,
    names: Iterable[str] = tuple(VARIANTS),
    *,
    budget: float,
    progress: Progress = lambda doing, fraction: None,
) -> dict[str, Any]:
    """Measure the named variants of a workload.

    Args:
        workload: The workload.
        names: Keys of ``VARIANTS``; "naive" is always measured.
        budget: Seconds for the timed rounds.
        progress: Told what is being done.

    Returns:
        What a results file has under the workload's key: how it was made, and for every variant either why it was
        "skipped" or "refused", or its "milliseconds" in each round, "error", and, where they can be counted, "units",
        "launches" and "peak_bytes".

    Raises:
        WrongGradientsError: The naive step itself loses its digits: there is nothing to hold the others against.
    """
    wanted = {"naive", *names}
    chosen = {name: v for name, v in VARIANTS.items() if name in wanted and v.applies(workload)}
    checker, device = PatientChecker(workload), workload.real.device
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    once: dict[str, float] = {}
    # Naive first: the others' times are held against its own.
    for index, name in enumerate(sorted(chosen, key=lambda name: name != "naive")):
        progress(f"checking {name}", index / len(chosen))
        variant = chosen[name]
        found[name] = {}
        try:
            step = variant.prepare(workload)
            if variant.computes != "nothing":
                found[name]["error"] = checker.check(name, variant, step)
            once[name] = fastest_of(step, device, repeats=1)
            slowness = once[name] / once["naive"]
            if slowness > TOO_SLOW:
                raise Skipped(f"{slowness:.0f} {TOO_SLOW_REASON}")
            if variant.computes != "nothing" and not variant.compiled:
                counted = count(step)
                found[name] |= {
                    "units": round(counted.flops / forward_flops(workload), 4),
                    "launches": counted.launches,
                    "peak_bytes": peak_bytes(step, device),
                }
            steps[name] = step
        except (Skipped, CaptureError) as reason:
            found[name] = {"skipped": str(reason)}
        except WrongGradientsError as reason:
            if name == "naive":
                raise
            found[name] = {"refused": str(reason)}
        except torch._dynamo.exc.TorchDynamoException as reason:
            found[name] = {"skipped": f"the compiler failed: {str(reason).strip().splitlines()[0]}"}
    times = interleaved(steps, once, device, budget=budget, progress=lambda fraction: progress("timing", fraction))
    for name, seconds in times.items():
        found[name]["milliseconds"] = [float(f"{1000 * second:.4g}") for second in seconds]
    return {
        "title": workload.title,
        "penalty": workload.penalty_name,
        "batch_size": workload.real.shape[0],
        "sample_shape": list(workload.real.shape[1:]),
        "parameters": sum(p.numel() for p in workload.critic.parameters()),
        "variants": {name: found[name] for name in VARIANTS if name in found},
    }
