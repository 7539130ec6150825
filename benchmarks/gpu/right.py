"""Part 1: is it right? Every model's step against float64, replays, training, the fused step, the tests."""

import copy
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bandwidths import KERNELS, WIDTHS, mlp_pair, taken_at_any_width
from session import PRECISIONS, Found, Session, arithmetic, graphed
from torch import Tensor

from wgan_fast import CriticStep, build_info, explain
from wgan_fast.bench import variants, workloads
from wgan_fast.training import TrainConfig, Trainer

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = ["clipping", "optim", "kernel_operators", "norm_ops", "mlp_step", "speed_options", "faults", "operators"]
"""Files of tests that have a case for a GPU."""
ENGINE_TESTS = ["tests/four_pass", "tests/engine", "tests/face"]
"""Folders whose tests run on any device."""
TEST_SECONDS, ENGINE_SECONDS, SANITIZER_SECONDS = 150, 200, 60
SANITIZED = ["clipping", "optim", "mlp_step"]
EPSILON = {"fp64": 2.0**-52, "fp32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7}


def run(session: Session) -> None:
    """Measure what is missing."""
    session.item("machine", functools.partial(machine, session))
    files = [str(path) for name in KERNEL_TESTS for path in (ROOT / "tests").rglob(f"test_{name}.py")]
    begun = start_tests("tests", ["-k", "cuda or gpu", *files], session)
    session.item("ceilings", functools.partial(ceilings, session))
    for name in KERNELS:
        session.item(f"right/operator/{name}", functools.partial(operator, name, session))
    models = list(workloads.CRITICS) if session.on_gpu else ["toy-mlp", "dcgan-28"]
    for model, penalty in itertools.product(models, ["wgan-gp", "r1-r2"]):
        session.item(f"right/step/{model}/{penalty}", functools.partial(steps, model, penalty, session))
    session.item("right/training", functools.partial(training, session))
    for widths, precision in itertools.product(WIDTHS if session.on_gpu else ["16"], PRECISIONS):
        key = f"right/fused-mlp/{widths}/{precision}"
        session.item(key, functools.partial(fused_mlp, widths, precision, session))
    session.item("right/tests", functools.partial(tests, "tests", begun, TEST_SECONDS, session))
    begun = start_tests("engine", [f"--device={session.device}", *(str(ROOT / name) for name in ENGINE_TESTS)], session)
    session.item("right/engine", functools.partial(tests, "engine", begun, ENGINE_SECONDS, session))


def machine(session: Session) -> Found:
    """What ran: the build, and the clocks as they were found."""
    build = build_info()
    build["compiler"].pop("path", None)
    found: Found = {"build": build}
    if session.on_gpu:
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found | {"told": str(found["build"])}


def ceilings(session: Session) -> Found:
    """GB/s of a copy, and TFLOP/s of products in each arithmetic: what anything here is held against."""
    from bandwidths import copy_bandwidth, kernel_numel
    from session import device_milliseconds

    found: Found = {"copy_gb_per_s": round(copy_bandwidth(kernel_numel(session.device), session.device), 1)}
    size = 8192 if session.on_gpu else 256
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = torch.randn(2, size, size, device=session.device).to(dtype)
        with arithmetic(precision):
            times = sorted(device_milliseconds(lambda: a @ b, session.device) for _ in range(7))  # noqa: B023
        found[f"{precision}_tflop_per_s"] = round(2 * size**3 / times[3] / 1e9, 1)
    return found | {"told": str(found)}


def operator(name: str, session: Session) -> Found:
    """A small call of each operator against the other ways to compute it."""
    case = KERNELS[name](1 << 18, session.device)
    expected: list[Tensor] | None = None
    for call in case.variants.values():
        case.prepare()
        with torch.no_grad():
            call()
        expected = expected or [tensor.clone() for tensor in case.output()]
        torch.testing.assert_close(case.output(), expected, rtol=1e-4, atol=case.atol)
    return {}


def steps(model: str, penalty: str, session: Session) -> Found:
    """One step's gradients against naive's in float64: ours in float64 to 1e-10, then every precision and a replay.

    An activation within rounding of its kink may fall on either side of it, and moves the gradient by far more than
    rounding: what is measured is kept, and only float64 decides.
    """
    size = {"tabular-mlp": 20}.get(model, 16)
    workload = workloads.build(model, penalty=penalty, batch_size=size, device=session.device)
    truth = gradient(variants.naive, workload.double())
    found: Found = {"errors": {}}
    exact = distance(gradient(variants.ours, workload.double()), truth)
    found["errors"]["ours fp64"] = exact
    for precision in PRECISIONS:
        with arithmetic(precision):
            options: Any = {"precision": "bf16" if precision == "bf16" else "fp32"}
            for name, variant in (("naive", variants.naive), ("ours", variants.ours)):
                made = gradient(functools.partial(variant, **options), workload)
                found["errors"][f"{name} {precision}"] = distance(made, truth)
    if session.on_gpu:
        with workloads.repeatable(workload.critic), arithmetic("fp32"):
            step = variants.ours(workload)
            replay = graphed(lambda: step(workload.alpha))
            eager = gradient(variants.ours, workload)
            step(workload.alpha)
            replay()
            found["errors"]["replay"] = distance(joined(step.gradients()), eager)
    errors = found["errors"]
    limits = {name: 4 * max(errors[f"naive {name}"], 4 * EPSILON[name]) for name in PRECISIONS}
    found["wrong"] = exact > 1e-10 or errors.get("replay", 0.0) > limits["fp32"]
    found["suspect"] = [name for name in PRECISIONS if not errors[f"ours {name}"] <= limits[name]]
    return found | {"told": ", ".join(f"{name} {error:.1e}" for name, error in errors.items())}


def gradient(variant: Any, workload: workloads.Workload) -> Tensor:
    """Of all parameters, joined, in float64."""
    step = variant(workload)
    with workloads.repeatable(step.critic):
        step(workload.alpha)
    return joined(step.gradients())


def joined(gradients: list[Tensor]) -> Tensor:
    """One vector in float64."""
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def distance(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖."""
    return float((one.to(other.device) - other).norm() / other.norm())


def training(session: Session) -> Found:
    """Twenty iterations from the same start: one by one, as CUDA graphs, in bf16."""
    images = np.random.default_rng(0).integers(0, 256, (256, 1, 28, 28), dtype=np.uint8)
    plain = {"cuda_graph": False, "channels_last": False}
    graph = {"cuda_graph": True}
    ways: dict[str, dict[str, Any]] = {
        "eager": {}, "graph": graph, "every 4": {"penalty_every": 4}, "every 4, graph": {"penalty_every": 4, **graph},
        "bf16": {"precision": "bf16"},
        "bf16, channels last": {"precision": "bf16", "channels_last": True},
        "bf16, channels last, graph": {"precision": "bf16", "channels_last": True, **graph},
    }  # fmt: skip
    found: Found = {"wasserstein": {}}
    weights: dict[str, Tensor] = {}
    with arithmetic("fp32"):
        for name, options in ways.items():
            from wgan_fast.training import models

            torch.manual_seed(0)
            networks = models.build("mnist-dcgan", (1, 28, 28), width=16)
            out = session.folder / "runs" / name.replace(" ", "-").replace(",", "")
            shutil.rmtree(out, ignore_errors=True)
            settings = {"steps": 20, "batch_size": 32, "device": session.device, "log_every": 20, "out": out}
            summary = Trainer(*networks, images, TrainConfig(**{**settings, **plain, **options})).fit()
            found["wasserstein"][name] = summary.wasserstein
            weights[name] = torch.cat([p.detach().flatten().double() for p in networks[1].parameters()])
    found["distance"] = {
        name: distance(weights[name], weights[name.removesuffix(", graph")])
        for name in ways
        if name.endswith(", graph")
    } | {"graph": distance(weights["graph"], weights["eager"])}
    shutil.rmtree(session.folder / "runs", ignore_errors=True)
    # Adam moves a weight by its learning rate whatever its gradient: roundings are amplified in the first steps.
    found["wrong"] = not all(np.isfinite(v) for v in found["wasserstein"].values()) or any(
        d > 0.01 for d in found["distance"].values()
    )
    return found | {"told": f"{found['wasserstein']}, apart {found['distance']}"}


def fused_mlp(widths: str, precision: str, session: Session) -> Found:
    """The fused step and the four passes against float64."""
    with arithmetic(precision), taken_at_any_width(session.device):
        critics, (real, fake, alpha) = mlp_pair(widths, session.device)
        truth = CriticStep(copy.deepcopy(critics["four_pass"]).double())
        truth(real.double(), fake.double(), alpha.double())
        exact = joined([p.grad for p in truth.critic.parameters()])
        found: Found = {"errors": {}}
        for name, critic in critics.items():
            step = CriticStep(critic, precision="bf16" if precision == "bf16" else "fp32")
            step(real, fake, alpha)
            found["errors"][name] = distance(joined([p.grad for p in critic.parameters()]), exact)
        fused = explain(critics["ours"], real).unfused is None
    errors, found["fused"] = found["errors"], fused
    found["wrong"] = (
        explain(critics["four_pass"], real).unfused is None
        or fused is not session.on_gpu
        or not errors["ours"] <= max(2 * errors["four_pass"], 4 * EPSILON[precision])
    )
    return found | {"told": ", ".join(f"{name} {error:.1e}" for name, error in errors.items())}


def start_tests(name: str, arguments: list[str], session: Session) -> "subprocess.Popen[bytes] | None":
    """Begin tests on the GPU, on processes of their own where xdist is installed."""
    if not session.on_gpu or not session.wants(f"right/{name}"):
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--tb=short", "--show-capture=no"]
    command += [f"--junitxml={session.folder / name}.xml", *arguments]
    if subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True, check=False).returncode == 0:
        command += ["-n", str(max(1, (os.cpu_count() or 1) - 2))]
    with (session.folder / f"{name}.txt").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def tests(name: str, begun: "subprocess.Popen[bytes] | None", seconds: float, session: Session) -> Found:
    """Wait for the tests."""
    if begun is None:
        return {"told": "not run: no GPU", "exit_code": 0}
    return finished(begun, session.folder / f"{name}.txt", seconds)


def sanitizer(session: Session) -> Found:
    """memcheck over the compiled kernels and the fused MLP step."""
    if not session.on_gpu or shutil.which("compute-sanitizer") is None:
        return {"told": "not run: no GPU, or no compute-sanitizer"}
    files = [str(ROOT / "tests" / "ops" / f"test_{name}.py") for name in SANITIZED]
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "86", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-k", "cuda and not compile", *files]
    log = session.folder / "sanitizer.txt"
    with log.open("wb") as output:
        begun = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        return finished(begun, log, SANITIZER_SECONDS)


def finished(begun: "subprocess.Popen[bytes]", log: Path, seconds: float) -> Found:
    """Wait for a process, its output in a file; wrong where it fails, and where it is not done in time."""
    try:
        code: int | None = begun.wait(seconds)
    except subprocess.TimeoutExpired:
        begun.send_signal(signal.SIGINT)  # pytest then tells what it has found
        try:
            begun.wait(20)
        except subprocess.TimeoutExpired:
            begun.kill()
        code = None
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    told = lines[-1] if code is not None else f"not done after {seconds:.0f} s: {lines[-1]}"
    return {"exit_code": code, "wrong": code != 0, "told": told}
