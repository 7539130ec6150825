"""Every method trains as its paper says; schedules, averages and gradients go where they should."""

import copy
import dataclasses
import json
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import textbook
import torch
from runs import EXAMPLES, TINY, assert_same_checkpoint, config_of, metrics_of, newest_checkpoint, same_bits, tensors_of
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Dataset

from wgan_fast import PenaltyConfig
from wgan_fast.errors import InputError
from wgan_fast.training import RECIPES, Run, TrainConfig, Trainer, quality
from wgan_fast.training.cli import main
from wgan_fast.training.data import batches, load_data, load_labels
from wgan_fast.training.metrics import sliced_wasserstein
from wgan_fast.training.randomness import TRAINING, seed_everything
from wgan_fast.training.run import draw_noise

pytestmark = pytest.mark.usefixtures("no_curves")


@dataclass(frozen=True)
class Paper:
    """Settings as published; a penalty is (weight, target, one-sided, where)."""

    loss: str
    optimizer: str
    learning_rate: float
    betas: tuple[float, float]
    n_critic: int
    penalty: tuple[float, float, bool, str] | None = None
    clip: float | None = None
    spectral_norm: bool = False
    batch_size: int = 64


PAPERS = {
    # Gulrajani et al. 2017, algorithm 1: λ = 10, n_critic = 5, α = 1e-4, m = 64; the moments are those of their code.
    "wgan-gp": Paper("wasserstein", "adam", 1e-4, (0.5, 0.9), 5, penalty=(10, 1, False, "interpolates")),
    # Petzka et al. 2018: as WGAN-GP with the one-sided penalty, equation 8.
    "wgan-lp": Paper("wasserstein", "adam", 1e-4, (0.5, 0.9), 5, penalty=(10, 1, True, "interpolates")),
    # Arjovsky et al. 2017, algorithm 1: α = 5e-5, c = 0.01, m = 64, n_critic = 5, RMSProp.
    "wgan-clip": Paper("wasserstein", "rmsprop", 5e-5, (0.0, 0.99), 5, clip=0.01),
    # Mescheder et al. 2018, section 6.2: RMSProp with α = 0.99 and 1e-4, γ = 10, so that γ/2 weighs the square.
    "r1": Paper("non_saturating", "rmsprop", 1e-4, (0.0, 0.99), 1, penalty=(5, 0, False, "real")),
    # Kodali et al. 2017: λ = 10 around the data; the optimizer is that of DCGAN.
    "dragan": Paper("non_saturating", "adam", 2e-4, (0.5, 0.999), 1, penalty=(10, 1, False, "perturbed")),
    # Radford et al. 2016, section 4: Adam with 2e-4 and β1 = 0.5.
    "gan": Paper("non_saturating", "adam", 2e-4, (0.5, 0.999), 1),
    # Mao et al. 2017, section 4: Adam with β1 = 0.5 and the 0-1 coding of equation 9.
    "lsgan": Paper("least_squares", "adam", 2e-4, (0.5, 0.999), 1),
    # Miyato et al. 2018, table 1, setting C of Adam with n_dis = 5: 2e-4, β = (0, 0.9).
    "hinge": Paper("hinge", "adam", 2e-4, (0.0, 0.9), 5, spectral_norm=True),
}


def test_every_method_is_known():
    assert PAPERS.keys() == RECIPES.keys()


@pytest.mark.parametrize("method", PAPERS)
def test_defaults_are_the_papers(method):
    paper, config = PAPERS[method], TrainConfig(method=method).resolved((1, 28, 28))
    assert config.recipe.loss == paper.loss
    assert config.optimizer == paper.optimizer
    assert (config.learning_rate, config.generator_learning_rate) == (paper.learning_rate, None)
    # RMSprop takes the second as its smoothing constant, and has no use for the first.
    beta1 = paper.betas[0] if paper.optimizer == "adam" else None
    assert (config.beta1, config.beta2) == (beta1, paper.betas[1])
    assert (config.n_critic, config.batch_size) == (paper.n_critic, paper.batch_size)
    assert (config.clip, config.spectral_norm) == (paper.clip, paper.spectral_norm)
    assert config.penalty == (PenaltyConfig(*paper.penalty) if paper.penalty else None)
    assert config.schedule == "constant"


@pytest.mark.parametrize("method", ["wgan-gp", "wgan-lp"])
def test_points_in_the_plane_take_the_settings_of_the_papers_toy_code(method):
    # gan_toy.py of Gulrajani et al.: LAMBDA = .1, BATCH_SIZE = 256, CRITIC_ITERS = 5, Adam 1e-4 (0.5, 0.9).
    config = TrainConfig(method=method).resolved((2,))
    assert (config.penalty.weight, config.batch_size, config.n_critic) == (0.1, 256, 5)
    assert (config.optimizer, config.learning_rate, config.beta1, config.beta2) == ("adam", 1e-4, 0.5, 0.9)


def test_given_settings_win_over_the_papers():
    given = {"batch_size": 7, "n_critic": 3, "optimizer": "adam", "learning_rate": 0.5, "beta1": 0.1, "beta2": 0.2}
    config = TrainConfig(method="r1", penalty_weight=3.0, spectral_norm=True, **given).resolved((2,))
    assert {name: getattr(config, name) for name in given} == given
    assert (config.penalty.weight, config.spectral_norm) == (3.0, True)
    assert TrainConfig(penalty_weight=0.0).resolved((3,)).penalty is None


# 200 steps of every method


def assert_trained(out: Path, method: str, steps: int) -> None:
    assert newest_checkpoint(out).name == f"step-{steps:08d}.safetensors"
    records = metrics_of(out)
    assert [record["step"] for record in records] == list(range(10, steps + 1, 10))
    for record in records:
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in record.values())
        assert ("penalty" in record) == ("gradient_norm" in record) == (PAPERS[method].penalty is not None)
    assert records[0]["critic_loss"] != records[-1]["critic_loss"]
    assert (out / "samples" / f"step-{steps:08d}.png").stat().st_size > 1000
    assert (out / "curves.png").stat().st_size > 1000
    assert config_of(out)["method"] == method
    clip = PAPERS[method].clip
    if clip is not None:
        weights = tensors_of(out, "critic.")
        for name, weight in weights.items():
            assert weight.abs().max() <= clip, name
        assert any((weight.abs() == weight.new_tensor(clip)).any() for weight in weights.values())


@pytest.mark.usefixtures("real_curves")
@pytest.mark.parametrize("method", PAPERS)
def test_method_trains_200_steps_from_the_command_line(method, tmp_path):
    main(["train", "--method", method, "--data", "mnist5k", "--model", "mlp", "--width", "32", "--batch-size", "16",
          "--steps", "200", "--out", str(tmp_path / "run")])  # fmt: skip
    assert_trained(tmp_path / "run", method, 200)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("real_curves")
@pytest.mark.parametrize("method", PAPERS)
def test_method_trains_200_steps_with_nothing_but_defaults(method, tmp_path):
    main(["train", "--method", method, "--steps", "200", "--out", str(tmp_path / "run")])
    assert_trained(tmp_path / "run", method, 200)


# The loop against one written out


def networks(latent_dim: int = 3, features: int = 4) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(5)
    # No bias before batch norm: its gradient is rounding alone, which Adam would magnify to steps of full length.
    generator = nn.Sequential(
        nn.Linear(latent_dim, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, features)
    )
    generator.latent_dim = latent_dim
    # Nor one after the critic's last layer, where the Wasserstein loss cancels it out.
    critic = nn.Sequential(
        nn.Linear(features, 6), nn.Tanh(), nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 1, bias=False)
    )
    return generator, critic


def points(n: int = 40, features: int = 4) -> Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(1)) * 0.5 + 1


def textbook_optimizer(paper: Paper, network: nn.Module) -> torch.optim.Optimizer:
    if paper.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), lr=paper.learning_rate, betas=paper.betas)
    return torch.optim.RMSprop(network.parameters(), lr=paper.learning_rate, alpha=paper.betas[1])


def textbook_run(paper: Paper, generator: nn.Module, critic: nn.Module, reals: Iterator[Tensor], steps: int) -> None:
    """The papers' algorithms, line by line: noise before α, α before the critic."""
    optimizer_g, optimizer_d = textbook_optimizer(paper, generator), textbook_optimizer(paper, critic)
    seed_everything(0, TRAINING)
    for _ in range(steps):
        for _ in range(paper.n_critic):
            real = next(reals)
            fake = generator(torch.randn(len(real), generator.latent_dim)).detach()
            loss = textbook.CRITIC_LOSSES[paper.loss](critic(real), critic(fake))
            if paper.penalty:
                weight, target, one_sided, at = paper.penalty
                alpha = torch.rand(len(real)) if at in ("interpolates", "perturbed") else None
                noise = torch.rand_like(real) if at == "perturbed" else None
                where = textbook.points_at(at, real, fake, alpha, noise)
                loss = loss + textbook.penalty(critic, where, weight=weight, target=target, one_sided=one_sided)
            optimizer_d.zero_grad()
            loss.backward()
            optimizer_d.step()
            if paper.clip:
                for parameter in critic.parameters():
                    parameter.data.clamp_(-paper.clip, paper.clip)
        loss = textbook.GENERATOR_LOSSES[paper.loss](critic(generator(torch.randn(len(real), generator.latent_dim))))
        optimizer_g.zero_grad()
        loss.backward()
        optimizer_g.step()


@pytest.mark.parametrize("method", PAPERS)
def test_training_equals_the_algorithm_written_out(method, tmp_path):
    generator, critic = networks()
    expected_generator, expected_critic = copy.deepcopy(generator), copy.deepcopy(critic)
    data = load_data(points(), holdout=0.0)
    # Spectral norm is left out: how often it iterates depends on how often the critic runs, which is the engine's.
    config = TrainConfig(method=method, steps=4, batch_size=7, holdout=0.0, spectral_norm=False, out=tmp_path / "run")
    Trainer(generator, critic, data, config).fit()
    textbook_run(PAPERS[method], expected_generator, expected_critic, batches(data.train, 7, seed=0), steps=4)
    for actual, expected in ((generator, expected_generator), (critic, expected_critic)):
        for (name, a), b in zip(actual.state_dict().items(), expected.state_dict().values()):
            # A step of Adam or RMSprop moves a weight by about its learning rate; float32 rounding in a gradient of
            # ordinary size moves it by less than a hundredth of that.
            assert (a - b).abs().max() <= 0.01 * PAPERS[method].learning_rate, name
    # The comparison means something: training moved the weights by many times that tolerance.
    start = networks()
    for network, before in ((generator, start[0]), (critic, start[1])):
        moved = max((a - b).abs().max() for a, b in zip(network.parameters(), before.parameters()))
        assert moved > PAPERS[method].learning_rate


def test_trying_the_engine_leaves_no_trace_in_the_run(tmp_path):
    for engine in ("auto", "four_pass"):
        out = str(tmp_path / engine)
        main(["train", *TINY, "--steps", "3", "--engine", engine, "--out", out])
    assert_same_checkpoint(*(newest_checkpoint(tmp_path / engine) for engine in ("auto", "four_pass")))


def test_spectral_norm_holds_for_networks_given_as_objects(tmp_path):
    generator, critic = networks()
    Trainer(generator, critic, points(), TrainConfig(method="hinge", steps=1, batch_size=7, out=tmp_path / "run"))
    with torch.no_grad():
        for _ in range(50):  # let the power iteration converge
            critic(points())
    for layer in critic:
        if isinstance(layer, nn.Linear):
            assert torch.linalg.matrix_norm(layer.weight.detach(), 2).item() == pytest.approx(1, abs=1e-3)


# What steps when


class Recorder:
    """Calls a function after every optimizer step, with whose step it was."""

    def __init__(self, trainer: Trainer) -> None:
        self.critic = {id(parameter) for parameter in trainer.critic.parameters()}
        self.steps: list[str] = []
        self.rates: dict[str, list[float]] = {"critic": [], "generator": []}
        self.after: Callable[[str], None] = lambda whose: None

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        whose = "critic" if id(optimizer.param_groups[0]["params"][0]) in self.critic else "generator"
        self.steps.append(whose)
        self.rates[whose].append(optimizer.param_groups[0]["lr"])
        self.after(whose)


@pytest.fixture
def recorded() -> Iterator[Callable[[Trainer], Recorder]]:
    handles = []

    def record(trainer: Trainer) -> Recorder:
        recorder = Recorder(trainer)
        handles.append(register_optimizer_step_post_hook(recorder))
        return recorder

    yield record
    for handle in handles:
        handle.remove()


def trainer_of(tmp_path: Path, **settings: Any) -> Trainer:
    generator, critic = networks()
    settings = {"batch_size": 5, "steps": 4, "out": tmp_path / "run", **settings}
    return Trainer(generator, critic, points(), TrainConfig(**settings))


@pytest.mark.parametrize("n_critic", [1, 2, 5])
def test_critic_takes_n_critic_steps_before_every_step_of_the_generator(tmp_path, recorded, n_critic):
    trainer = trainer_of(tmp_path, n_critic=n_critic, steps=3)
    recorder = recorded(trainer)
    trainer.fit()
    assert recorder.steps == ([*["critic"] * n_critic, "generator"]) * 3


class Counting(Dataset[Tensor]):
    def __init__(self, data: Tensor) -> None:
        self.data, self.reads = data, Counter()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        self.reads[index] += 1
        return self.data[index]


def test_every_critic_step_sees_fresh_data_and_every_epoch_all_of_it(tmp_path):
    dataset = Counting(points(20))
    config = TrainConfig(steps=6, n_critic=2, batch_size=5, holdout=0.0, out=tmp_path / "run")
    trainer = Trainer(*networks(), dataset, config)
    dataset.reads.clear()
    trainer.fit()
    # 6 x 2 batches of 5 are three epochs of 20.
    assert dataset.reads == {index: 3 for index in range(20)}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_follow_the_schedule(tmp_path, recorded, schedule):
    steps, rate, generator_rate = 7, 0.01, 0.003
    settings = {"learning_rate": rate, "generator_learning_rate": generator_rate, "log_every": 1}
    trainer = trainer_of(tmp_path, steps=steps, n_critic=2, schedule=schedule, **settings)
    recorder = recorded(trainer)
    trainer.fit()
    factors = {
        "constant": [1.0] * steps,
        "linear": [1 - k / steps for k in range(steps)],
        "cosine": [math.cos(math.pi * k / (2 * steps)) ** 2 for k in range(steps)],
    }[schedule]
    assert recorder.rates["generator"] == pytest.approx([generator_rate * factor for factor in factors], rel=1e-12)
    assert recorder.rates["critic"] == pytest.approx([rate * f for f in factors for _ in range(2)], rel=1e-12)
    logged = [record["learning_rate"] for record in metrics_of(tmp_path / "run")]
    assert logged == pytest.approx([rate * factor for factor in factors], rel=1e-12)


@pytest.mark.parametrize("decay", [0.9, 0.05])
def test_average_is_the_weighted_sum_of_the_generators(tmp_path, recorded, decay):
    trainer = trainer_of(tmp_path, steps=6, n_critic=1, ema=decay, learning_rate=0.05)
    recorder = recorded(trainer)
    history = [[parameter.detach().double() for parameter in copy.deepcopy(trainer.generator).parameters()]]
    recorder.after = lambda whose: (
        whose == "generator"
        and history.append([parameter.detach().double().clone() for parameter in trainer.generator.parameters()])
    )
    trainer.fit()
    # θ̄_K = Π d_k θ_0 + Σ_k (1 − d_k) Π_{j>k} d_j θ_k, with the decay warmed up: d_k = min(decay, k / (k + 10)).
    decays = [min(decay, k / (k + 10)) for k in range(1, 7)]
    weights = [math.prod(decays)] + [(1 - decays[k]) * math.prod(decays[k + 1 :]) for k in range(6)]
    assert sum(weights) == pytest.approx(1)
    state = tensors_of(tmp_path / "run", "ema.")
    for index, (name, parameter) in enumerate(trainer.generator.named_parameters()):
        expected = sum(weight * parameters[index] for weight, parameters in zip(weights, history))
        # Six roundings to float32.
        assert (state[name].double() - expected).abs().max() <= 6 * 2**-24 * expected.abs().max().clamp(min=1)
        assert not same_bits(state[name], parameter.detach())
    for name, buffer in trainer.generator.named_buffers():
        assert same_bits(state[name], buffer)


def test_average_is_what_is_sampled(tmp_path):
    out = tmp_path / "run"
    main(["train", *TINY, "--steps", "3", "--learning-rate", "0.05", "--out", str(out)])
    run = Run.load(out)
    loaded = run.generator.state_dict()
    assert all(same_bits(loaded[name], value) for name, value in tensors_of(out, "ema.").items())
    trained = tensors_of(out, "generator.")
    assert any(not same_bits(loaded[name], value) for name, value in trained.items())


def test_without_an_average_the_generator_itself_is_sampled(tmp_path):
    out = tmp_path / "run"
    main(["train", *TINY, "--steps", "1", "--ema", "0", "--out", str(out)])
    assert not tensors_of(out, "ema.")
    loaded = Run.load(out).generator.state_dict()
    assert all(same_bits(loaded[name], value) for name, value in tensors_of(out, "generator.").items())


# Where gradients go


def gradients_of(network: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in network.parameters()]


def same_gradients(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(x is y if x is None or y is None else same_bits(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("method", PAPERS)
def test_each_step_leaves_the_other_networks_gradients_alone(tmp_path, recorded, method):
    trainer = trainer_of(tmp_path, method=method, steps=3, n_critic=2)
    recorder = recorded(trainer)
    before = {"critic": gradients_of(trainer.critic), "generator": gradients_of(trainer.generator)}

    def after(whose: str) -> None:
        other = "generator" if whose == "critic" else "critic"
        now = {"critic": gradients_of(trainer.critic), "generator": gradients_of(trainer.generator)}
        assert same_gradients(now[other], before[other])
        assert not same_gradients(now[whose], before[whose])
        before.update(now)

    recorder.after = after
    trainer.fit()
    assert recorder.steps.count("generator") == 3
    assert all(parameter.requires_grad for parameter in trainer.critic.parameters())


@pytest.mark.parametrize("method", ["wgan-gp", "wgan-clip", "r1"])
def test_frozen_parameters_stay_frozen(tmp_path, method):
    generator, critic = networks()
    frozen = [*generator[0].parameters(), critic[0].weight, critic[2].bias]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [parameter.clone() for parameter in frozen]
    free = [
        parameter for network in (generator, critic) for parameter in network.parameters() if parameter.requires_grad
    ]
    free_before = [parameter.detach().clone() for parameter in free]
    config = TrainConfig(method=method, steps=3, batch_size=5, out=tmp_path / "run")
    Trainer(generator, critic, points(), config).fit()
    assert all(same_bits(a, b) for a, b in zip(frozen, before))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    assert all(parameter.requires_grad for parameter in free)
    assert not any(same_bits(a.detach(), b) for a, b in zip(free, free_before))


@pytest.mark.parametrize("which", ["generator", "critic"])
def test_network_with_nothing_to_train_is_refused(tmp_path, which):
    generator, critic = networks()
    {"generator": generator, "critic": critic}[which].requires_grad_(False)
    with pytest.raises(InputError, match=f"{which} has no trainable parameters"):
        Trainer(generator, critic, points(), TrainConfig(batch_size=5, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# What a run leaves behind


def test_training_brings_the_generator_towards_the_data(tmp_path):
    distances = []
    for steps in (1, 300):
        config = TrainConfig(
            steps=steps, learning_rate=3e-3, batch_size=64, penalty_weight=1.0, ema=0.0, out=tmp_path / str(steps)
        )
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
        critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        generator.latent_dim = 2
        trainer = Trainer(generator, critic, points(1000, 2), config)
        trainer.fit()
        with torch.no_grad():
            distances.append(sliced_wasserstein(generator(torch.randn(500, 2)), points(500, 2)))
    # Measured: 1.08 and 0.21.
    assert distances[1] < 0.5 * distances[0]


def test_bfloat16_training_keeps_parameters_in_float32(tmp_path):
    trainer = trainer_of(tmp_path, precision="bf16", steps=3)
    trainer.fit()
    for network in (trainer.generator, trainer.critic):
        for parameter in network.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.isfinite().all()
    rounded = trainer_of(tmp_path / "fp32", steps=3)
    rounded.fit()
    assert not same_bits(trainer.critic[0].weight.detach(), rounded.critic[0].weight.detach())


@pytest.mark.usefixtures("real_curves")
def test_summary_says_what_is_there(tmp_path):
    trainer = trainer_of(tmp_path, steps=3)
    summary = trainer.fit()
    assert (summary.out, summary.steps) == (tmp_path / "run", 3)
    assert summary.seconds > 0
    assert summary.images_per_second == pytest.approx(3 * 5 * 5 / summary.seconds, rel=0.5)
    assert summary.wasserstein == metrics_of(tmp_path / "run")[-1]["wasserstein"]
    for path in (summary.checkpoint, summary.grid, summary.curves):
        assert path.is_file()
        assert str(path) in str(summary)
    assert (tmp_path / "run" / "summary.txt").read_text() == f"{summary}\n"


def test_held_out_estimate_is_of_data_that_was_not_trained_on(tmp_path):
    trainer = trainer_of(tmp_path, steps=2, sample_every=2)
    trainer.fit()
    real = trainer.data.held_out.take(len(trainer.data.held_out), seed=0)
    noise = draw_noise(len(real), 3, seed=0)
    with torch.no_grad():
        fake = trainer.generator.eval()(noise)
        expected = trainer.critic(real).mean() - trainer.critic(fake).mean()
    assert metrics_of(tmp_path / "run")[-1]["held_out_wasserstein"] == pytest.approx(expected.item(), abs=1e-6)


# Tracking


@pytest.fixture
def quick_ratings(tmp_path, monkeypatch):
    """By few samples and a classifier of few steps, kept in a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quality, "_STEPS", 10)
    monkeypatch.setattr(quality, "_TRACKED", 100)


class Drawing(nn.Sequential):
    """A generator that draws from every default generator at each forward, as noise layers do."""

    latent_dim = 3

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z * (1 + 0.1 * random.random()) + np.random.rand() + torch.randn_like(z))  # noqa: NPY002


TRACKED = {
    "digits": ["frechet_distance", "coverage", "classes_covered"],
    "8gaussians": ["sliced_wasserstein", "modes_covered", "high_quality"],
    "a tensor": ["sliced_wasserstein"],
}


@pytest.mark.usefixtures("quick_ratings")
@pytest.mark.parametrize("source", TRACKED)
def test_tracking_changes_no_bit_of_what_is_trained(tmp_path, source):
    data = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) if source == "a tensor" else source
    shape = load_data(data).sample_shape
    for track in (0, 2):
        torch.manual_seed(0)
        units = math.prod(shape)
        generator = Drawing(nn.Linear(3, units), nn.Dropout(0.2), nn.Unflatten(1, shape))
        critic = nn.Sequential(nn.Flatten(), nn.Linear(units, 5), nn.LeakyReLU(0.2), nn.Linear(5, 1))
        config = TrainConfig(
            steps=5, n_critic=2, batch_size=5, track=track, log_every=3, engine="autograd", out=tmp_path / str(track)
        )
        Trainer(generator, critic, data, config).fit()
    plain, tracked = (tmp_path / name for name in "02")
    assert_same_checkpoint(newest_checkpoint(tracked), newest_checkpoint(plain))
    records = metrics_of(tracked)
    assert [record["step"] for record in records if TRACKED[source][0] in record] == [2, 4, 5]
    untracked = [{key: record[key] for key in record if key not in TRACKED[source]} for record in records]
    assert [record for record in untracked if record["step"] in (3, 5)] == metrics_of(plain)


@pytest.mark.usefixtures("quick_ratings")
@pytest.mark.parametrize("name", ["digits", "8gaussians"])
def test_what_is_tracked_is_the_quality_of_what_is_sampled(tmp_path, capfd, name):
    settings = ["--data", name, "--width", "4", "--batch-size", "5", "--engine", "autograd", "--learning-rate", "0.01"]
    main(["train", *settings, "--steps", "4", "--track", "3", "--seed", "7", "--out", str(tmp_path / "run")])
    tracker = quality.tracker(load_data(name, seed=7), load_labels(name, seed=7), seed=7)
    figures = tracker.rate(Run.load(tmp_path / "run").sample(tracker.samples, seed=7))
    last = metrics_of(tmp_path / "run")[-1]
    assert {key: last[key] for key in TRACKED[name]} == pytest.approx(figures, rel=1e-6)
    said = [line for line in capfd.readouterr().err.splitlines() if TRACKED[name][0].replace("_", " ") in line]
    assert [line.partition(":")[0] for line in said] == ["step 3", "step 4"]


def test_tracking_without_held_out_data_is_refused_before_anything_is_written(tmp_path):
    config = TrainConfig(data="8gaussians", track=1, out=tmp_path / "run")
    Trainer.from_config(config)  # a toy set is endless: its held-out side is another stream
    with pytest.raises(InputError, match=r"track needs held-out samples .*holdout 0"):
        Trainer.from_config(dataclasses.replace(config, data="digits", holdout=0.0))
    assert not (tmp_path / "run").exists()


def test_pictures_and_checkpoints_come_as_often_as_asked(tmp_path):
    trainer_of(tmp_path, steps=7, sample_every=3, checkpoint_every=2, keep=10, log_every=4).fit()
    out = tmp_path / "run"
    assert sorted(path.name for path in (out / "samples").iterdir()) == [f"step-{k:08d}.png" for k in (3, 6, 7)]
    checkpoints = sorted(path.name for path in (out / "checkpoints").glob("*.safetensors"))
    assert checkpoints == [f"step-{k:08d}.safetensors" for k in (2, 4, 6, 7)]
    records = metrics_of(out)
    assert [record["step"] for record in records] == [3, 4, 6, 7]
    assert ["held_out_wasserstein" in record for record in records] == [True, False, True, True]


def test_new_runs_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("array-wgan-gp", "array-wgan-gp-2", "array-wgan-gp-3"):
        summary = Trainer(*networks(), points().numpy(), TrainConfig(steps=1, batch_size=5)).fit()
        assert summary.out == Path("runs") / name
        assert config_of(summary.out)["out"] == f"runs/{name}"


def test_trainer_passes_image_settings_to_the_data(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 9, 9, 3), dtype=np.uint8)
    generator = nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (1, 4, 4)), nn.Tanh())
    generator.latent_dim = 2
    critic = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    config = TrainConfig(image_size=4, channels=1, steps=1, batch_size=5, out=tmp_path / "run")
    trainer = Trainer(generator, critic, images, config)
    assert trainer.data.sample_shape == (1, 4, 4)
    trainer.fit()


def test_run_given_as_objects_resumes_with_objects(tmp_path):
    whole = trainer_of(tmp_path / "whole", steps=4)
    whole.fit()
    trainer_of(tmp_path, steps=2).fit()
    again = trainer_of(tmp_path, steps=4)
    again.fit(resume=True)
    assert all(same_bits(a, b) for a, b in zip(again.critic.state_dict().values(), whole.critic.state_dict().values()))
    with pytest.raises(InputError, match="given as objects"):
        Trainer.from_run(tmp_path / "run")
    with pytest.raises(InputError, match="given as objects"):
        Run.load(tmp_path / "run")


def test_training_leaves_tensorboard_the_same_figures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer_of(tmp_path, steps=3, log_every=1).fit()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("critic_loss")]
    records = metrics_of(tmp_path / "run")
    assert [step for step, _ in logged] == [1, 2, 3]
    assert [value for _, value in logged] == pytest.approx([record["critic_loss"] for record in records], rel=1e-6)


def test_trainers_built_before_any_of_them_runs_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainers = [Trainer(*networks(), points().numpy(), TrainConfig(steps=1, batch_size=5)) for _ in range(3)]
    assert len({trainer.fit().out for trainer in trainers}) == 3


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path):
    trainer_of(tmp_path, steps=2).fit()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    hold += "; print(flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run" / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="is being trained by another process"):
        trainer_of(tmp_path, steps=4).fit(resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    other.kill()
    other.communicate()
    assert trainer_of(tmp_path, steps=4).fit(resume=True).steps == 4


def test_an_interrupted_trainer_without_a_checkpoint_does_not_pretend_to_start_anew(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, steps=6)
    put = trainer._watch.put

    def interrupted(step, result):
        if step == 3:
            raise KeyboardInterrupt
        return put(step, result)

    monkeypatch.setattr(trainer._watch, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    monkeypatch.undo()
    with pytest.raises(InputError, match="has no checkpoint to go back to: build the Trainer anew"):
        trainer.fit(resume=True)


def test_resuming_a_finished_run_keeps_its_summary(tmp_path):
    trainer_of(tmp_path, steps=2).fit()
    before = (tmp_path / "run" / "summary.txt").read_bytes()
    trainer_of(tmp_path, steps=2).fit(resume=True)
    assert (tmp_path / "run" / "summary.txt").read_bytes() == before


def test_purposes_do_not_share_random_numbers(tmp_path):
    trainer = trainer_of(tmp_path, steps=1)
    seed_everything(0, TRAINING)
    first_batch = torch.randn(5, 3)
    assert not torch.equal(first_batch, trainer._looking.noise[:5])
    torch.manual_seed(0)
    assert not torch.equal(torch.randn(5, 3), first_batch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_25_gaussians_are_found_by_the_toy_networks(tmp_path):
    out = tmp_path / "run"
    options = ["--width", "256", "--learning-rate", "5e-4", "--steps", "3500", "--sample-every", "3500"]
    main(["train", "--data", "25gaussians", *options, "--out", str(out)])
    main(["evaluate", str(out), "--samples", "2500"])
    report = json.loads((out / "evaluation.json").read_text())
    # Measured: 25 of 25, with 84 % of the samples within three standard deviations of a mode.
    assert report["modes_covered"] >= 23


# Networks of every kind


def fit(out: Path, generator: nn.Module, critic: nn.Module, data: Tensor, **settings: Any) -> Trainer:
    given = {"batch_size": 5, "steps": 3, "n_critic": 2, "latent_dim": 3, "engine": "autograd", "learning_rate": 0.01}
    trainer = Trainer(generator, critic, data, TrainConfig(out=out, **{**given, **settings}))
    trainer.fit()
    return trainer


def values_of(*networks: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for network in networks for p in network.parameters()])


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_networks_of_two_dtypes_train_as_those_of_one(tmp_path, dtypes):
    moved = []
    for number, (generator_dtype, critic_dtype) in enumerate([dtypes, (dtypes[0], dtypes[0])]):
        generator, critic = networks()
        generator, critic = generator.to(generator_dtype), critic.to(critic_dtype)
        before = values_of(generator, critic)
        # Without a penalty no α is drawn, in float32 or in float64.
        trainer = fit(tmp_path / f"{number}", generator, critic, points(), method="gan", optimizer="rmsprop")
        assert {p.dtype for p in trainer.ema.parameters()} == {generator_dtype}
        moved.append(values_of(generator, critic) - before)
    assert moved[1].abs().max() > 0.01
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-4)
    fit(tmp_path / "bf16", generator, critic.to(dtypes[1]), points(), precision="bf16")
    assert values_of(generator, critic).isfinite().all()


def test_networks_of_two_dtypes_are_sampled_and_evaluated(tmp_path, monkeypatch):
    model = "import own_model\ndef build(shape):\n    generator, critic = own_model.build(shape)\n"
    (tmp_path / "doubled.py").write_text(model + "    return generator.double(), critic\n")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(tmp_path))
    out = str(tmp_path / "run")
    arguments = ["--data", "digits", "--model", "doubled:build", "--engine", "autograd", "--batch-size", "5"]
    main(["train", *arguments, "--steps", "1", "--out", out])
    main(["train", "--resume", out, "--steps", "2"])
    main(["sample", out, "--grid", "1x2", "--scores"])
    main(["evaluate", out, "--samples", "5"])


def volume_networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(5)
    generator = nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (2, 1, 2, 2)), nn.ConvTranspose3d(2, 3, (3, 2, 3)))
    critic = nn.Sequential(nn.Conv3d(3, 4, 2), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 2 * 2 * 3, 1, bias=False))
    return generator.double(), critic.double()


def test_volumes_train_the_same_in_channels_last_memory(tmp_path):
    data = torch.randn(20, 3, 3, 3, 4, dtype=torch.float64)
    runs = [fit(tmp_path / f"{last}", *volume_networks(), data, channels_last=last) for last in (False, True)]
    assert runs[1].critic[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    plain, laid_out = (values_of(run.generator, run.critic) for run in runs)
    assert (plain - values_of(*volume_networks())).abs().max() > 0.01
    torch.testing.assert_close(laid_out, plain, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("make", [torch.jit.script, lambda network: torch.jit.trace(network, torch.zeros(2, 4))])
def test_networks_in_torchscript_train_as_they_would_outside(tmp_path, make):
    generator, critic = (network.double() for network in networks())
    before = values_of(generator, critic)
    plain = fit(tmp_path / "plain", copy.deepcopy(generator), copy.deepcopy(critic), points(), generate_ahead=False)
    critic = make(critic.float()).double()
    scripted = fit(tmp_path / "run", torch.jit.script(generator), critic, points())
    whole = values_of(plain.generator, plain.critic, plain.ema)
    assert (whole[: len(before)] - before).abs().max() > 0.01
    torch.testing.assert_close(values_of(scripted.generator, scripted.critic, scripted.ema), whole, rtol=0, atol=1e-9)
    with pytest.warns(RuntimeWarning, match="autograd"):
        fit(tmp_path / "auto", torch.jit.script(generator), critic, points(), engine="auto")


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_spectral_norm_that_torchscript_does_not_take_is_refused(tmp_path):
    generator, critic = networks()
    with pytest.raises(InputError, match="spectral_norm must be False for a critic in TorchScript"):
        fit(tmp_path / "run", generator, torch.jit.script(critic), points(), method="hinge")
    fit(tmp_path / "run", generator, torch.jit.script(critic), points(), method="hinge", spectral_norm=False)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_weights_that_a_hook_computes_are_trained_as_they_are(tmp_path, norm, called):
    def normed() -> tuple[nn.Module, nn.Module]:
        generator, critic = networks()
        norm(generator[-1])
        for layer in critic:
            if isinstance(layer, nn.Linear):
                norm(layer)
        return generator, critic

    trained = []
    for settings in ({"method": "hinge"}, {"method": "hinge", "spectral_norm": False}):
        generator, critic = normed()
        if called:
            critic(generator(torch.ones(2, 3)))
        trained.append(fit(tmp_path / f"run{len(trained)}", generator, critic, points(), **settings))
    values = [values_of(trainer.generator, trainer.critic, trainer.ema) for trainer in trained]
    assert (values[0][: -values_of(trained[0].ema).numel()] - values_of(*normed())).abs().max() > 0.01
    assert same_bits(*values)  # the norm that is there already takes the place of hinge's own


def test_the_folder_may_be_named_by_a_string():
    assert TrainConfig(out="runs/mine").out == Path("runs/mine")
