"""Part 2: the critic step, every way to compute it, eagerly and as CUDA graphs, with profiles."""

import functools
import multiprocessing
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from right import distance, gradient
from session import Found, Session, arithmetic, graphed, medians, profile
from torch import Tensor

from wgan_fast.bench import variants, workloads
from wgan_fast.bench.jax_step import in_jax
from wgan_fast.bench.measure import fastest_of, interleaved, peak_bytes
from wgan_fast.four_pass.optimize import PAD_CHANNELS

Make = Callable[[workloads.Workload], Any]

FIRST = [
    ("dcgan-64", 256, "bf16"),
    ("toy-mlp", 256, "tf32"),
    ("amp", 128, "tf32"),
    ("resnet-32", 64, "bf16"),
    ("dcgan-28", 64, "tf32"),
    ("toy-mlp", 256, "bf16"),
    ("dcgan-64", 64, "bf16"),
    ("dcgan-64", 256, "tf32"),
    ("amp", 4096, "tf32"),
    ("toy-mlp", 64, "tf32"),
    ("tabular-mlp", 500, "tf32"),
    ("toy-mlp", 256, "fp32"),
    ("dcgan-28", 64, "fp32"),
    ("dcgan-64", 64, "fp32"),
    ("language", 64, "bf16"),
    ("resnet-32", 64, "tf32"),
    ("resnet-32", 64, "fp32"),
    ("amp", 128, "fp32"),
    ("tabular-mlp", 500, "fp32"),
]
"""Model, batch size and arithmetic, the most telling ones first: time on a GPU is short."""
COMPILED = FIRST[:5]
"""What is also compiled, which takes half a minute each."""
PROFILED = FIRST[:4]
SECONDS = 0.8
"""Of rounds, per workload."""


def workload(model: str, batch_size: int, session: Session) -> workloads.Workload:
    """A workload of the benchmark's."""
    return workloads.build(model, device=session.device, batch_size=batch_size if session.on_gpu else 10)


def run(session: Session) -> None:
    """Measure what is missing."""
    for case in FIRST if session.on_gpu else [("toy-mlp", 10, "bf16"), ("amp", 10, "fp32")]:
        session.item("target/" + "/".join(map(str, case)), functools.partial(target, case, session))


def ways(case: tuple[str, int, str], images: bool, on_gpu: bool) -> dict[str, Make]:
    """The ways to compute a case."""
    options: Any = {"precision": "bf16" if case[2] == "bf16" else "fp32"}
    naive = functools.partial(variants.naive, **options)
    ours = functools.partial(variants.ours, **options)
    made: dict[str, Make] = {"naive": naive, "ours": ours}
    if images:
        made["naive, channels last"] = lambda workload: naive(workload.channels_last())
    if images and case[2] == "bf16":
        made["ours, padded channels"] = padded(ours)
    if images and case in PROFILED:
        made["naive, channels last, tuned"] = tuned(made["naive, channels last"])
        made["ours, tuned"] = tuned(ours)
    if on_gpu and case in COMPILED:
        made["naive, compiled"] = functools.partial(variants.naive_compiled, **options)
        made["ours, compiled"] = functools.partial(variants.ours, compile=True, **options)
    return made


def padded(make: Make) -> Make:
    """With the first layer over eight channels, and a critic of a class of its own: plans are kept by class."""

    def made(workload: workloads.Workload) -> variants.Step:
        work = workload.channels_last()
        work.critic.__class__ = type("Padded", (type(work.critic),), {})
        step: variants.Step = make(work)
        with mock.patch.dict(os.environ, {PAD_CHANNELS: "1"}):
            step(None)  # plans
        return step

    return made


def tuned(make: Make) -> Make:
    """With ``torch.backends.cudnn.benchmark``: cuDNN tries its algorithms and keeps the fastest."""

    def made(workload: workloads.Workload) -> variants.Step:
        step = make(workload)

        def run(alpha: Tensor | None) -> None:
            torch.backends.cudnn.benchmark = True
            try:
                step(alpha)
            finally:
                torch.backends.cudnn.benchmark = False

        return variants.Step(run, step.critic)

    return made


def compile_all(session: Session) -> None:
    """Fill the compiler's cache from a process for each case, so that measuring waits for nothing."""
    cases = [(case, session) for case in COMPILED]
    with multiprocessing.get_context("spawn").Pool(len(cases)) as pool:
        pool.starmap(_compile, cases)


def _compile(case: tuple[str, int, str], session: Session) -> None:
    for name, make in ways(case, False, session.on_gpu).items():
        if "compiled" in name:
            try:
                with arithmetic(case[2]):
                    make(workload(case[0], case[1], session))(None)
            except Exception as error:  # measuring will tell
                print(f"{case}, {name}: {error}")


def target(case: tuple[str, int, str], session: Session) -> Found:
    """Errors against float64, milliseconds in interleaved rounds, peak bytes and profiles of a case."""
    model, batch_size, precision = case
    work = workload(model, batch_size, session)
    images = work.real.dim() == 4
    device = work.real.device
    # In float64 a large one takes as long as everything else together.
    truth = gradient(variants.naive, work.double()) if batch_size <= 64 or not images else None
    found: Found = {"errors": {}, "peak_bytes": {}, "skipped": {}, "profiles": {}}
    steps: dict[str, Any] = {}
    with arithmetic(precision), jax_arithmetic(precision):
        for name, make in ways(case, images, session.on_gpu).items():
            try:
                step = steps[name] = make(work)
                if truth is not None:
                    found["errors"][name] = distance(gradient(lambda w, step=step: step, work), truth)
                found["peak_bytes"][name] = peak_bytes(step, device)
                if session.on_gpu:
                    graph = graphed(functools.partial(step, None))
                    steps[f"{name}, graph"] = variants.Step(lambda alpha, graph=graph: graph(), step.critic)
            except Exception as error:  # the others are of use without it
                found["skipped"][name] = f"{type(error).__name__}: {error}"[:1000]
        try:
            if session.on_gpu and case not in COMPILED:
                raise variants.Skipped("compiled with the first cases only")
            steps["jax"] = in_jax(work)
            if truth is not None:
                found["errors"]["jax"] = distance(gradient(lambda w: steps["jax"], work), truth)
        except Exception as error:
            steps.pop("jax", None)
            found["skipped"]["jax"] = f"{type(error).__name__}: {error}"[:1000]
        once = {name: fastest_of(step, device) for name, step in steps.items()}
        times = interleaved(steps, once, device, budget=SECONDS if session.on_gpu else 0.1)
        found["milliseconds"] = {
            name: [float(f"{1e3 * second:.4g}") for second in taken] for name, taken in times.items()
        }
        if case in PROFILED or not session.on_gpu:
            text = ""
            for name in ("naive", "naive, graph", "ours", "ours, graph", "ours, compiled, graph"):
                if name in steps:
                    found["profiles"][name], table = profile(steps[name], session.device)
                    text += f"{'/'.join(map(str, case))}, {name}: {found['profiles'][name]}\n{table}\n\n"
            with (session.folder / "profiles.txt").open("a") as file:
                file.write(text)
    middle = medians(found["milliseconds"])
    found["told"] = ", ".join(f"{name} {value:.3f}" for name, value in middle.items()) + " ms"
    return found


def jax_arithmetic(precision: str) -> AbstractContextManager[Any]:
    """JAX's products in the same arithmetic; it has no autocast, and is compared with bf16 in TF32."""
    try:
        import jax
    except ImportError:
        return nullcontext()
    return jax.default_matmul_precision("highest" if precision == "fp32" else "tensorfloat32")
