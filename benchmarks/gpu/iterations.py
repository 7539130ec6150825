"""Part 3: a whole iteration of training, the usual loop against ours, eagerly and as one CUDA graph."""

import dataclasses
import functools
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from session import Found, Session, arithmetic, profile

from wgan_fast.training import TrainConfig, Trainer, models

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_iteration import naive_loop, our_loop

SECONDS = 2.0
CASES = ["dcgan64 64 bf16", "toy-mlp 256 tf32", "dcgan64 256 bf16", "mnist-dcgan 64 tf32", "toy-mlp 256 fp32"]
SHAPES = {"toy-mlp": (2,), "mnist-dcgan": (1, 28, 28), "dcgan64": (3, 64, 64)}


def run(session: Session) -> None:
    """Measure what is missing."""
    for case in CASES if session.on_gpu else ["toy-mlp 16 fp32"]:
        session.item(f"iteration/{case.replace(' ', '/')}", functools.partial(iteration, case, session))


def trainer(model: str, batch_size: int, session: Session, **options: Any) -> Trainer:
    """A trainer with networks of its own, equal at every call, on random data."""
    shape = SHAPES[model]
    draw = np.random.default_rng(0)
    data = draw.standard_normal((4096, 2), np.float32)
    if len(shape) == 3:
        data = draw.integers(0, 256, (2048, *shape), dtype=np.uint8)
    torch.manual_seed(0)
    networks = models.build(model, shape, **({"width": 64} if len(shape) == 3 and session.on_gpu else {}))
    out = session.folder / "runs" / str(len(list((session.folder / "runs").glob("*"))))
    config = TrainConfig(batch_size=batch_size, device=session.device, out=out)
    return Trainer(*networks, data, dataclasses.replace(config, **options))


def iteration(case: str, session: Session) -> Found:
    """Milliseconds of each loop in interleaved rounds, and profiles."""
    model, size, precision = case.split()
    options: dict[str, Any] = {"precision": "bf16"} if precision == "bf16" else {}
    images = len(SHAPES[model]) == 3
    plain = {"cuda_graph": False, "channels_last": False}
    settings = {"naive": plain, "tuned": plain, "ours": plain, "ours, graph": {**plain, "cuda_graph": True}}
    if images:
        settings["ours, channels last, graph"] = {"cuda_graph": True, "channels_last": True}
    if case == CASES[0]:
        settings["ours, channels last, compiled, graph"] = {"cuda_graph": True, "channels_last": True, "compile": True}
    (session.folder / "runs").mkdir(exist_ok=True)
    loops = {}
    found: Found = {"skipped": {}, "profiles": {}}
    with arithmetic(precision):
        for name, given in settings.items():
            try:
                made = trainer(model, int(size), session, **options, **given)
                made.generator.train(), made.critic.train()
                loop = our_loop(made)
                if not name.startswith("ours"):
                    loop = naive_loop(made, tuned=name == "tuned", precision=made.config.precision)
                for _ in range(6):
                    loop()
                loops[name] = loop
            except Exception as error:
                found["skipped"][name] = f"{type(error).__name__}: {error}"[:1000]
        times: dict[str, list[float]] = {name: [] for name in loops}
        begun = time.perf_counter()
        while time.perf_counter() - begun < (SECONDS if session.on_gpu else 0.2) or len(times["ours"]) < 3:
            for name, loop in loops.items():
                times[name].append(milliseconds(loop, session.device))
        text = ""
        for name, loop in loops.items():
            found["profiles"][name], table = profile(loop, session.device)
            text += f"iteration {case}, {name}: {found['profiles'][name]}\n{table}\n\n"
        with (session.folder / "profiles.txt").open("a") as file:
            file.write(text)
    shutil.rmtree(session.folder / "runs")
    found["milliseconds"] = times
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    return found | {"told": ", ".join(f"{name} {value:.2f}" for name, value in middle.items()) + " ms"}


def milliseconds(loop: Any, device: str, calls: int = 4) -> float:
    """Of one iteration, over a few that the device may work off behind the host."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        loop()
    wait()
    return float(f"{1e3 * (time.perf_counter() - start) / calls:.5g}")
