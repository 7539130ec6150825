"""A whole training iteration against the loop that people write, in one process and interleaved.

n_critic = 5 critic steps, one generator step, both optimizers and the moving average, on data that is at hand. "naive"
is the usual loop, kept free of waste: fake samples detached, one backward pass, PyTorch's own choice of Adam. "tuned"
is what a careful reader of PyTorch's documentation makes of it: no graph for the fake samples, no gradients for the
critic in the generator's step, fused Adam. What the loops compute is compared before they are timed.
"""

import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wgan_fast.training import TrainConfig, Trainer
from wgan_fast.training.data import batches
from wgan_fast.training.iteration import PLANNED_AFTER

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SECONDS = 25.0
"""Of rounds, per case."""

SETTINGS = {
    "toy-mlp": TrainConfig(data="8gaussians", model="toy-mlp"),
    "toy-mlp-16": TrainConfig(data="8gaussians", model="toy-mlp", batch_size=16),
    "mnist-dcgan": TrainConfig(data="mnist5k", model="mnist-dcgan"),
}
TARGETS = {"toy-mlp": 1.8, "toy-mlp-16": 2.0, "mnist-dcgan": 1.4}
"""Naive over ours in float32 on a CPU of two cores."""

Loop = Callable[[], object]


def our_loop(trainer: Trainer) -> Loop:
    """The trainer's iteration, from reading its data on."""
    iteration = trainer._iteration
    iteration.seed()
    reals, read = trainer._drawn(trainer.data.train)
    iteration.reads(read)
    return lambda: iteration(list(itertools.islice(reals, iteration.n_critic)))


def real_batches(trainer: Trainer):
    return batches(trainer.data.train, trainer.config.batch_size, seed=0, device=trainer.device)


def naive_loop(trainer: Trainer, *, tuned: bool, precision: str = "fp32") -> Loop:
    """WGAN-GP as in the papers' algorithm 1, on copies of the trainer's networks."""
    config, device = trainer.config, trainer.device
    G, D = trainer.generator, trainer.critic
    average = copy.deepcopy(G)
    optimizers = [
        torch.optim.Adam(
            network.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=True if tuned else None,
        )
        for network in (G, D)
    ]
    optimizer_G, optimizer_D = optimizers
    trainer._iteration.seed()
    reals = real_batches(trainer)
    N = config.batch_size
    step = itertools.count(1)

    def noise() -> Tensor:
        return torch.randn(N, trainer.latent_dim, device=device)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def iterate() -> None:
        for _ in range(config.n_critic):
            real, z = next(reals), noise()
            with torch.set_grad_enabled(not tuned), autocast():
                fake = G(z).detach().float()
            alpha = torch.rand(N, *[1] * (real.dim() - 1), device=device)
            points = (alpha * real + (1 - alpha) * fake).requires_grad_()
            with autocast():
                scores = D(points)
            (gradient,) = torch.autograd.grad(scores, points, torch.ones_like(scores), create_graph=True)
            penalty = config.penalty.weight * ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
            with autocast():
                loss = D(fake).mean() - D(real).mean() + penalty
            optimizer_D.zero_grad()
            loss.backward()
            optimizer_D.step()
        D.requires_grad_(not tuned)
        with autocast():
            loss = -D(G(noise())).mean()
        optimizer_G.zero_grad()
        loss.backward()
        optimizer_G.step()
        D.requires_grad_(True)
        taken = next(step)
        with torch.no_grad():
            for mean, value in zip(average.parameters(), G.parameters()):
                mean.lerp_(value, 1 - min(config.ema, taken / (taken + 10)))

    return iterate


def loops(name: str, device: str, folder: Path) -> tuple[dict[str, Trainer], dict[str, Loop]]:
    """Every variant with networks of its own, equal to begin with."""
    config = dataclasses.replace(SETTINGS[name], device=device)
    bf16 = {"precision": "bf16"}
    settings = {"naive": {}, "tuned": {}, "ours": {}, "naive bf16": bf16, "ours bf16": bf16}
    if device == "cuda":
        settings |= {"ours graph": {"cuda_graph": True}, "ours graph bf16": {"cuda_graph": True, **bf16}}
    trainers = {
        variant: Trainer.from_config(dataclasses.replace(config, out=folder / variant, **given))
        for variant, given in settings.items()
    }
    made = {}
    for variant, trainer in trainers.items():
        trainer.generator.train(), trainer.critic.train()
        if variant.startswith("ours"):
            made[variant] = our_loop(trainer)
        else:
            made[variant] = naive_loop(trainer, tuned=variant == "tuned", precision=trainer.config.precision)
    return trainers, made


def seconds(loop: Loop, device: str) -> float:
    start = time.perf_counter()
    loop()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_iteration(name: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainers, made = loops(name, device, tmp_path)
    moved = {}
    for variant, loop in made.items():
        before = torch.cat([p.detach().flatten() for p in trainers[variant].critic.parameters()]).clone()
        trainers[variant]._iteration.seed()
        loop()
        after = torch.cat([p.detach().flatten() for p in trainers[variant].critic.parameters()])
        moved[variant] = after - before
    # Adam moves a weight by about its learning rate at every step, whatever its gradient: where that is only
    # rounding, the direction is anyone's. Those are few, and the rest agrees.
    for variant in ("tuned", "ours"):
        assert (moved[variant] - moved["naive"]).norm() <= 0.02 * moved["naive"].norm(), variant

    for variant in made:
        if variant.startswith("ours"):
            trainers[variant]._iteration.step = PLANNED_AFTER
            made[variant]()
    rounds, begun = [], time.perf_counter()
    while time.perf_counter() - begun < SECONDS or len(rounds) < 3:
        rounds.append({variant: seconds(loop, device) for variant, loop in made.items()})
    with capsys.disabled():
        print(f"\niteration, {name} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for variant in made:
            ratios = [times["naive"] / times[variant] for times in rounds]
            low, median, high = statistics.quantiles(ratios, n=4)
            milliseconds = 1e3 * statistics.median(times[variant] for times in rounds)
            print(f"  {variant:16} {milliseconds:8.1f} ms  {median:5.2f} times naive  ({low:.2f} to {high:.2f})")
    median = statistics.median(times["naive"] / times["ours"] for times in rounds)
    # With room for a machine that others use too; the targets themselves are in what is printed.
    assert median > 1 + 0.5 * (TARGETS[name] - 1)
