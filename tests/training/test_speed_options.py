"""Options that make training faster train the same networks."""

import copy
import functools
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    TINY,
    assert_same_checkpoint,
    assert_same_run,
    metrics_of,
    newest_checkpoint,
    read_checkpoint,
    same_bits,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wgan_fast import CriticStep, GradientPenalty, PenaltyConfig
from wgan_fast.backends import convolves_in_tensor_cores
from wgan_fast.errors import InputError
from wgan_fast.four_pass.stand_ins import is_view
from wgan_fast.points import thinned
from wgan_fast.training import Callback, TrainConfig, Trainer
from wgan_fast.training.cli import main
from wgan_fast.training.data import batches, load_data
from wgan_fast.training.divergence import QUANTITIES
from wgan_fast.training.graphed import WARM_UP, GraphedCalls, StaticInputs
from wgan_fast.training.iteration import as_it_is, for_device, keeps_samples_apart
from wgan_fast.training.models import build

pytestmark = pytest.mark.usefixtures("no_curves")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]

OFF = {"fused": False, "generate_ahead": False, "channels_last": False, "engine": "autograd"}
"""The plain loop: every option off."""
LATENT = 3
STEPS = 5


def networks(norm: bool = False) -> tuple[nn.Module, nn.Module]:
    """Convolutions, an odd size, and no bias whose gradient is rounding alone: Adam would magnify it."""
    torch.manual_seed(3)
    generator = nn.Sequential(
        nn.Linear(LATENT, 4 * 3 * 3, bias=False),
        nn.Unflatten(1, (4, 3, 3)),
        *([nn.BatchNorm2d(4)] if norm else []),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 3, stride=2),
        nn.Tanh(),
    )
    generator.latent_dim = LATENT
    critic = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.Softplus(), nn.Conv2d(4, 6, 2), nn.Softplus(), nn.Flatten(),
        nn.Linear(24, 1, bias=False),
    )  # fmt: skip
    return generator.double(), critic.double()


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 3, 7, 7), dtype=np.uint8)


def trained(folder: Path, *, norm: bool = False, **settings: Any) -> Trainer:
    given = {"batch_size": 6, "n_critic": 3, "steps": STEPS, "learning_rate": RATE, "device": "cpu", **settings}
    trainer = Trainer(*networks(norm), images(), TrainConfig(out=folder, **given))
    trainer.fit()
    return trainer


def parameters(trainer: Trainer) -> Tensor:
    """Every parameter of both networks and of the average, in float64."""
    modules = [module for module in (trainer.generator, trainer.critic, trainer.ema) if module is not None]
    return torch.cat([p.detach().flatten().double().cpu() for module in modules for p in module.parameters()])


# In float64 the orders of addition differ by 1e-16, and Adam's division by small second moments magnifies that.
ROUNDING = 1e-9
"""How far an option may move a weight, in units of what training moved."""
FLOAT32_RATE = 2**-23
"""The same where a graph's learning rate is not exact in float32, or Adam, not fused, corrects its bias there: a
rounding of 1 in 1 − β₂ᵗ, so over 1 − β₂, in every step, and what follows from it."""
RATE = 2**-7
"""Float32 holds it exactly."""

FAST = {"fused": True, "generate_ahead": True, "channels_last": True, "engine": "four_pass"}
OPTIONS = {
    **{name: {name: value} for name, value in FAST.items()},
    "cuda_graph": {"cuda_graph": True},
    "all but the graph": FAST,
    "all": {**FAST, "cuda_graph": True},
}
TRAININGS = {
    "constant rate": {},
    "cosine schedule": {"schedule": "cosine"},
    "lazy penalty": {"penalty_every": 2},
    "penalty on a part": {"penalty_samples": 2},
    "lazy penalty on a part, dragan": {"method": "dragan", "n_critic": 3, "penalty_every": 2, "penalty_samples": 3},
    "batch norm": {"norm": True},
    "r1": {"method": "r1", "n_critic": 2},
    "dragan": {"method": "dragan", "n_critic": 2},
    "wgan-clip": {"method": "wgan-clip"},
    "no average": {"ema": 0.0},
    "augmentation": {"flip": True, "augment": ("color", "translation", "cutout")},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    """What each training comes to without options; each device draws other random numbers."""
    folder = tmp_path_factory.mktemp("plain")

    @functools.cache
    def train(name: str, device: str = "cpu") -> Tensor:
        return parameters(trained(folder / f"{name} {device}", **{**OFF, **TRAININGS[name], "device": device}))

    return train


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("option", OPTIONS)
def test_option_trains_the_same_networks(plain, tmp_path, option, training, device):
    given = OPTIONS[option]
    trainer = trained(tmp_path / "run", **{**OFF, **TRAININGS[training], **given, "device": device})
    actual, expected = parameters(trainer), plain(training, device)
    in_float32 = "cuda_graph" in given and (training == "cosine schedule" or "fused" not in given)
    tolerance = FLOAT32_RATE / (1 - (trainer.config.beta2 or 0)) if in_float32 else ROUNDING
    start = networks(TRAININGS[training].get("norm", False))
    moved = torch.cat([p.detach().flatten() for module in start for p in module.parameters()])
    distance = (expected[: len(moved)] - moved).abs().max()
    assert distance > 1e-4  # or the comparison would mean nothing
    assert (actual - expected).abs().max() <= tolerance * distance


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_compiled_step_trains_the_same_networks(plain, tmp_path, training):
    trainer = trained(tmp_path / "run", **{**OFF, **TRAININGS[training], "engine": "four_pass", "compile": True})
    assert (parameters(trainer) - plain(training)).abs().max() <= ROUNDING


@pytest.mark.parametrize("training", ["constant rate", "penalty on a part", "r1", "augmentation"])
def test_options_in_bfloat16_err_no_more_than_the_plain_loop_does_in_it(tmp_path, training):
    """Against float32, which draws the same numbers and rounds 65,536 times as finely."""

    def end(name: str, **settings: Any) -> Tensor:
        given = {"batch_size": 6, "n_critic": 3, "steps": STEPS, "learning_rate": RATE, "device": "cpu"}
        given |= OFF | TRAININGS[training] | settings
        trainer = Trainer(*(n.float() for n in networks()), images(), TrainConfig(out=tmp_path / name, **given))
        trainer.fit()
        return parameters(trainer)

    exact, plain, fast = end("exact"), end("plain", precision="bf16"), end("fast", precision="bf16", **OPTIONS["all"])
    error = (plain - exact).abs().mean()
    assert error > 0
    assert (fast - exact).abs().mean() <= 2 * error


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_data_trains_the_same_networks_bit_for_bit(tmp_path, monkeypatch, workers):
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images()):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "images" / f"{index}.png")
    settings = {"batch_size": 6, "n_critic": 3, "steps": STEPS, "device": "cpu", "engine": "autograd"}
    trainers = []
    for name, resident in (("resident", 1 << 30), ("streamed", 0)):
        monkeypatch.setattr("wgan_fast.training.data.splits.RESIDENT_BYTES", resident)
        config = TrainConfig(out=tmp_path / name, workers=workers, **settings)
        trainers.append(Trainer(*networks(), load_data(tmp_path / "images"), config))
        trainers[-1].fit()
    assert same_bits(*map(parameters, trainers))


def test_static_buffers_change_no_bit_of_the_critic(tmp_path):
    """The graph's path without the replay; only the average is computed in another way."""
    one, other = (trained(tmp_path / str(on), cuda_graph=on) for on in (False, True))
    for a, b in zip([*one.critic.parameters(), *one.generator.parameters()],
                    [*other.critic.parameters(), *other.generator.parameters()]):  # fmt: skip
        assert same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("before", [{}, {"channels_last": True, "fused": False}, {"cuda_graph": True}])
def test_run_goes_on_with_other_options(tmp_path, before):
    """What may be changed on resuming changes nothing but the rounding."""
    whole = trained(tmp_path / "whole", norm=True)
    given = {"batch_size": 6, "n_critic": 3, "learning_rate": RATE, "out": tmp_path / "run"}
    Trainer(*networks(norm=True), images(), TrainConfig(steps=2, **given, **before)).fit()
    again = Trainer(*networks(norm=True), images(), TrainConfig(steps=STEPS, **given))
    again.fit(resume=True)
    assert (parameters(again) - parameters(whole)).abs().max() <= ROUNDING


@pytest.mark.parametrize("engine", ["autograd", "four_pass"])
def test_run_with_channels_last_resumes_bit_for_bit(tmp_path, engine):
    """Fused Adam goes through memory side by side: moments must come back in their parameters' layout."""
    settings = {"channels_last": True, "fused": True, "engine": engine, "batch_size": 6, "n_critic": 1}
    settings["learning_rate"] = RATE
    for name, stops in (("whole", [4]), ("halves", [2, 4])):
        for steps in stops:
            config = TrainConfig(steps=steps, out=tmp_path / name, **settings)
            trainer = Trainer(*networks(), images(), config)
            trainer.fit(resume=steps != stops[0])
    names = [tmp_path / name / "checkpoints" / "step-00000004.safetensors" for name in ("whole", "halves")]
    (whole, _), (halves, _) = map(read_checkpoint, names)
    assert [name for name in whole if not same_bits(whole[name], halves[name])] == []
    weight = trainer.critic[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_all_options_together_resume_bit_for_bit(tmp_path):
    options = ["--cuda-graph", "--engine", "four_pass", "--schedule", "cosine", "--penalty-every", "3"]
    for name in ("whole", "halves"):
        main(["train", *TINY, *options, "--steps", "6", "--checkpoint-every", "3", "--out", str(tmp_path / name)])
    for part in ("safetensors", "json"):
        (tmp_path / "halves" / "checkpoints" / f"step-00000006.{part}").unlink()
    main(["train", "--resume", str(tmp_path / "halves")])
    assert_same_run(tmp_path / "halves", tmp_path / "whole")


# Generating ahead


class OwnForward(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


def hooked() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, inputs, output: output - output.mean(dim=0))
    return layer


def patched(network: nn.Module) -> nn.Module:
    network.forward = lambda x: x - x.mean(dim=0)
    return network


COUPLED = {
    "batch norm": lambda: nn.BatchNorm1d(2),
    "dropout": lambda: nn.Dropout(),
    "a forward of one's own": lambda: OwnForward(nn.Linear(2, 2)),
    "a forward of a layer's own": lambda: patched(nn.Linear(2, 2)),
    "a forward of a chain's own": lambda: patched(nn.Sequential(nn.Linear(2, 2))),
    "a hook": hooked,
    "spectral norm": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
    "instance norm with state": lambda: nn.InstanceNorm1d(2, track_running_stats=True),
}


@pytest.mark.parametrize("kind", COUPLED)
def test_samples_are_not_generated_ahead_where_that_is_not_proven_to_be_the_same(kind):
    apart = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    assert keeps_samples_apart(apart)
    assert not keeps_samples_apart(nn.Sequential(apart, nn.Sequential(COUPLED[kind]())))


@pytest.mark.parametrize("name", ["toy-mlp", "mlp", "mnist-dcgan"])
def test_generators_without_batch_norm_are_proven(name):
    shape = (2,) if name == "toy-mlp" else (1, 28, 28)
    assert keeps_samples_apart(build(name, shape, width=2)[0])


def forwards(trainer: Trainer) -> Iterator[int]:
    """Rows of every forward of the generator in training mode."""
    rows: list[int] = []
    trainer.generator[0].forward = recording(trainer.generator[0], rows)
    trainer.fit()
    return iter(rows)


def recording(layer: nn.Module, rows: list[int]) -> Any:
    forward = layer.forward

    def record(x: Tensor) -> Tensor:
        if layer.training:
            rows.append(len(x))
        return forward(x)

    return record


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [18, 6]),
        ({"generate_ahead": False}, [6, 6, 6, 6]),
        ({"norm": True}, [6, 6, 6, 6]),
        ({"method": "dragan"}, [6, 6, 6, 6]),
        ({"dropout": True}, [6, 6, 6, 6]),
    ],
)
def test_samples_of_all_critic_steps_come_from_one_forward(tmp_path, change, expected):
    change = dict(change)
    generator, critic = networks(change.pop("norm", False))
    if change.pop("dropout", False):
        critic = nn.Sequential(nn.Dropout(0.1), *critic)
    config = TrainConfig(steps=1, batch_size=6, n_critic=3, out=tmp_path / "run", **change)
    assert list(forwards(Trainer(generator, critic, images(), config))) == expected


def test_large_activations_are_not_joined_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("wgan_fast.training.iteration.AHEAD_BYTES", 18 * 3 * 7 * 7 * 8 - 1)
    config = TrainConfig(steps=1, batch_size=6, n_critic=3, out=tmp_path / "run")
    assert list(forwards(Trainer(*networks(), images(), config))) == [6, 6, 6, 6]


# The generator's step


def test_generators_step_computes_no_gradient_of_the_critic(tmp_path):
    trainer = Trainer(*networks(), images(), TrainConfig(steps=2, n_critic=1, batch_size=6, out=tmp_path / "run"))
    computed: list[str] = []
    for name, network in (("critic", trainer.critic), ("generator", trainer.generator)):
        for parameter in network.parameters():
            parameter.register_hook(lambda gradient, name=name: computed.append(name))
    move, steps = trainer._iteration._move, []

    def moved(name: str) -> None:
        steps.append((name, set(computed)))
        computed.clear()
        move(name)

    trainer._iteration._move = moved
    trainer.fit()
    assert [reached for name, reached in steps if name == "generator"] == [{"generator"}] * 2


# Lazy penalties


def test_lazy_penalty_is_applied_at_every_kth_critic_step_with_k_times_the_weight(tmp_path):
    config = TrainConfig(steps=3, n_critic=2, batch_size=6, penalty_every=3, log_every=1, out=tmp_path / "run")
    trainer = Trainer(*networks(), images(), config)
    seen = []
    step = trainer._iteration.critic_step

    class Watched:
        code = ""

        def __call__(self, real: Tensor, fake: Tensor, alpha: Tensor | None, critic_args: tuple[()]) -> Any:
            truth = copy.deepcopy(step.critic)
            taken, result = step.steps_taken, step(real, fake, alpha)
            if alpha is not None:
                points = (alpha.view(-1, 1, 1, 1) * real + (1 - alpha.view(-1, 1, 1, 1)) * fake).requires_grad_()
                (gradient,) = torch.autograd.grad(truth(points).sum(), points)
                expected = 3 * 10 * (gradient.flatten(1).norm(dim=1) - 1).square().mean()
                assert result.penalty.item() == pytest.approx(expected.item(), rel=1e-9)
            seen.append((taken, result.penalty.item() > 0))
            return result

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(step, name, value)

    trainer._iteration.critic_step = Watched()
    trainer.fit()
    assert seen == [(k, k % 3 == 0) for k in range(6)]


@pytest.mark.parametrize("options", [OFF, {**FAST, "cuda_graph": True}], ids=["plain", "all options"])
@pytest.mark.parametrize("every", [2, 7])
def test_logged_penalty_is_that_of_the_iterations_last_critic_step_with_one(tmp_path, every, options):
    steps = 9
    settings = {"steps": steps, "n_critic": 5, "penalty_every": every, "log_every": 1, "device": "cpu", **options}
    config = TrainConfig(batch_size=6, learning_rate=RATE, out=tmp_path / "run", **settings)
    trainer = Trainer(*networks(), images(), config)
    step, average = trainer._iteration.critic_step, trainer._iteration.replicas.average_gradients
    measured: list[Any] = []

    def noting(name: str, network: list[nn.Parameter], figures: Any) -> Any:
        figures = average(name, network, figures)
        if name == "critic":
            measured.append((step.steps_taken - 1, *(figure.item() for figure in figures)))
        return figures

    trainer._iteration.replicas.average_gradients = noting
    trainer.fit()
    assert [taken for taken, *_ in measured] == list(range(5 * steps))
    expected = []
    for i in range(steps):
        own = measured[5 * i : 5 * i + 5]
        with_penalty = [(penalty, norm) for taken, _, penalty, _, _, _, norm in own if taken % every == 0]
        assert all(penalty > 0 for penalty, _ in with_penalty)
        expected.append((own[-1][1], *(with_penalty[-1] if with_penalty else (None, None))))
    assert any(penalty is None for _, penalty, _ in expected) == (every == 7)
    logged = [(row["critic_loss"], row["penalty"], row["gradient_norm"]) for row in metrics_of(tmp_path / "run")]
    assert logged == expected


# Penalties on a part of the batch


@pytest.mark.parametrize("engine", ["autograd", "four_pass"])
@pytest.mark.parametrize(("method", "every"), [("wgan-gp", 1), ("wgan-lp", 3), ("r1", 2), ("dragan", 1)])
def test_penalty_on_a_part_is_that_of_evenly_spread_points(tmp_path, method, every, engine):
    settings = {"penalty_samples": 2, "penalty_every": every, "batch_size": 6, "n_critic": 2, "engine": engine}
    config = TrainConfig(method=method, out=tmp_path / "run", device="cpu", **settings)
    trainer = Trainer(*networks(), images(), config)
    step, critic, draw = trainer._iteration.critic_step, trainer.critic, torch.Generator().manual_seed(0)
    weight, target, one_sided = {"r1": (5, 0, False), "wgan-lp": (10, 1, True)}.get(method, (10, 1, False))
    for taken in range(4):
        real, fake = torch.randn(2, 6, 3, 7, 7, generator=draw, dtype=torch.float64)
        alpha = torch.rand(6, generator=draw, dtype=torch.float64)
        torch.manual_seed(taken)
        result = step(real, fake, None if method == "r1" else alpha)
        torch.manual_seed(taken)
        share = alpha.view(-1, 1, 1, 1)
        points = share * real + (1 - share) * fake
        if method == "r1":
            points = real
        elif method == "dragan":  # by the spread of all six
            points = real + share * 0.5 * real.std(correction=0) * torch.rand_like(real)
        scores = [critic(real), critic(fake)]
        if method in ("r1", "dragan"):
            loss = nn.functional.softplus(scores[1]).mean() + nn.functional.softplus(-scores[0]).mean()
        else:
            loss = scores[1].mean() - scores[0].mean()
        if taken % every == 0:
            points = points[[0, 3]].requires_grad_()
            (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
            norms = gradient.flatten(1).norm(dim=1)
            over = (norms - target).clamp(min=0) if one_sided else norms - target
            penalty = weight * every * over.square().mean()
            loss = loss + penalty
            assert result.penalty.item() == pytest.approx(penalty.item(), rel=1e-10)
            assert result.gradient_norm.item() == pytest.approx(norms.mean().item(), rel=1e-10)
        else:
            assert result.penalty.item() == 0
            assert result.gradient_norm.isnan()
        assert result.loss.item() == pytest.approx(loss.item(), rel=1e-10)
        for parameter, expected in zip(critic.parameters(), torch.autograd.grad(loss, list(critic.parameters()))):
            assert (parameter.grad - expected).abs().max() <= 1e-10 * expected.abs().max()


def on_a_third(**penalty) -> CriticStep:
    return CriticStep(networks()[1], penalty=PenaltyConfig(samples=2, **penalty), engine="autograd")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_thinned_samples_keep_their_layout(memory_format):
    samples = torch.randn(6, 3, 7, 7).contiguous(memory_format=memory_format)
    kept = thinned(PenaltyConfig(samples=2), samples, 6)
    assert torch.equal(kept, samples[[0, 3]])
    assert kept.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty_samples": 4}, "penalty_samples must divide the batch_size of 6, got 4"),
        ({"penalty_samples": 0}, "penalty_samples must be at least 1, got 0"),
        ({"penalty_samples": 3, "method": "hinge"}, "penalty_samples was given, but method hinge has no gradient"),
    ],
)
def test_part_of_the_batch_that_there_is_not_is_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        Trainer(*networks(), images(), TrainConfig(batch_size=6, out=tmp_path / "run", **settings))


@pytest.mark.parametrize(
    "use",
    [lambda critic, config: CriticStep(critic, penalty=config), lambda critic, config: GradientPenalty(critic, config)],
)
def test_a_part_that_does_not_divide_the_batch_is_refused(use):
    critic = networks()[1]
    with pytest.raises(ValueError, match=r"samples must divide the batch of 6, got 4"):
        use(critic, PenaltyConfig(samples=4))(*torch.randn(2, 6, 3, 7, 7, dtype=torch.float64))
    assert all(parameter.grad is None for parameter in critic.parameters())
    with pytest.raises(ValueError, match="samples must be a multiple of the group_size of 3, got 2"):
        PenaltyConfig(samples=2, group_size=3)


@pytest.mark.parametrize("taken", [0, 1])
@pytest.mark.parametrize("shape", [(2,), (5,), (8,)])
def test_alpha_of_another_length_is_refused_and_changes_nothing(shape, taken):
    """Also one as long as the part, and at a step without a penalty."""
    step = on_a_third(every=2)
    step.steps_taken = taken
    real, fake = torch.randn(2, 6, 3, 7, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"have one value per sample, shape \[6\], or broadcast to .*, got"):
        step(real, fake, torch.rand(shape, dtype=torch.float64))
    assert step.steps_taken == taken
    assert all(parameter.grad is None for parameter in step.critic.parameters())


# Static inputs and graphs


@pytest.mark.parametrize("device", DEVICES)
def test_static_inputs_keep_their_place(device):
    example = torch.zeros(3, 2, device=device)
    inputs = StaticInputs(example, 2)
    address = inputs.buffer.data_ptr()
    for value in range(3):
        batches = [torch.full((3, 2), float(2 * value + k), device=device) for k in range(2)]
        views = inputs.fill(batches)
        assert [view.unique().item() for view in views] == [2 * value, 2 * value + 1]
        assert [view.data_ptr() for view in views] == [address, address + views[0].nbytes]


@pytest.mark.parametrize(
    "batches", [[torch.zeros(3, 2)], [torch.zeros(3, 2), torch.zeros(2, 2)], [torch.zeros(3, 2, dtype=torch.int)] * 2]
)
def test_static_inputs_refuse_other_batches(batches):
    with pytest.raises(ValueError, match=r"batches must be 2 of \[3, 2\] torch.float32, got"):
        StaticInputs(torch.zeros(3, 2), 2).fill(batches)


class Outside(TorchDispatchMode):
    """Counts the operators that compute between replays: each is a launch of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found, self.replaying = Counter[str](), False
        make = GraphedCalls.__init__

        def made(calls: GraphedCalls, function: Callable[..., Any], device: torch.device, **options: Any) -> None:
            def replayed(*inputs: Any) -> Any:
                self.replaying = True
                try:
                    return function(*inputs)
                finally:
                    self.replaying = False

            make(calls, replayed, device, **options)

        monkeypatch.setattr(GraphedCalls, "__init__", made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.replaying and not is_view(func):
            self.found[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data": "8gaussians"}, {"_foreach_copy_": 1, "fill_": 1}),
        ({"data": "digits"}, {"_foreach_copy_": 1, "fill_": 1}),
        ({"data": "digits", "conditional": True, "flip": True, "ema": 0.0}, {"_foreach_copy_": 2, "fill_": 0}),
        ({"data": "digits", "schedule": "linear"}, {"_foreach_copy_": 1, "fill_": 3}),
    ],
)
def test_a_replayed_iteration_leaves_little_outside_of_its_graph(settings, expected, tmp_path, monkeypatch):
    """Data that is kept is brought as rows and gathered inside; the watched figures are one tensor, for the host."""
    outside, steps = Outside(monkeypatch), []

    class Steps(Callback):
        def on_step(self, trainer, result):
            steps.append(dict(outside.found))
            outside.found.clear()

    config = TrainConfig(
        **settings, model="auto", width=4, steps=9, batch_size=8, cuda_graph=True, out=tmp_path / "run", log_every=100,
        sample_every=100, checkpoint_every=100, engine="autograd",
    )  # fmt: skip
    trainer = Trainer.from_config(config, callbacks=[Steps()])
    with outside:
        trainer.fit()
    # The first one makes the buffers, the last one is followed by what ends a run.
    assert steps[1:-1] == [{name: count for name, count in expected.items() if count}] * 7


def test_rows_that_are_read_later_are_the_batches():
    split = load_data(np.random.default_rng(0).integers(0, 256, (23, 4, 4), dtype=np.uint8)).train
    settings = {"seed": 3, "start": 4, "part": slice(2, 5)}
    resident = split.resident(torch.device("cpu"))
    rows, drawn = resident.rows(6, **settings), batches(split, 6, **settings)
    for _ in range(9):  # two epochs and more
        assert torch.equal(resident.read(next(rows)), next(drawn))


@pytest.mark.parametrize("settings", [{"conditional": True}, {"schedule": "cosine", "ema": 0.5}])
def test_a_run_by_rows_equals_one_by_batches(settings, tmp_path, monkeypatch):
    """With labels too, over the ends of epochs, and where it goes on."""
    options = {"width": 4, "batch_size": 500, "n_critic": 2, "data": "digits", "engine": "autograd", **settings}
    for kept in ("kept", "streamed"):
        out = tmp_path / kept
        Trainer.from_config(TrainConfig(**options, steps=3, out=out, cuda_graph=True)).fit()
        trainer = Trainer.from_run(out, steps=6)
        trainer.fit(resume=True)
        assert trainer._iteration._read_real is as_it_is  # the data is not held any longer
        monkeypatch.setattr("wgan_fast.training.data.splits.RESIDENT_BYTES", 0)
    assert_same_checkpoint(*(newest_checkpoint(tmp_path / kept) for kept in ("kept", "streamed")))


def test_a_rate_that_a_callback_changes_is_the_one_that_is_trained_with(tmp_path):
    class Faster(Callback):
        def on_step(self, trainer, result):
            trainer._iteration.optimizers["critic"].param_groups[0]["initial_lr"] = 0.05

    for graph in (False, True):
        config = TrainConfig(data="digits", width=4, steps=3, batch_size=8, cuda_graph=graph, out=tmp_path / str(graph))
        trainer = Trainer.from_config(config, callbacks=[Faster()])
        trainer.fit()
        assert float(trainer._iteration.optimizers["critic"].param_groups[0]["lr"]) == pytest.approx(0.05)


def test_what_is_watched_is_what_is_measured(tmp_path):
    trainer = Trainer.from_config(TrainConfig(data="digits", width=4, batch_size=8, out=tmp_path / "run"))
    result = trainer._iteration(list(itertools.islice(batches(trainer.data.train, 8, seed=0), 5)), stop=True)
    critic = result.critic
    measured = critic.penalty, critic.loss, result.generator_loss, critic.wasserstein
    assert result.watched.tolist() == [*map(float, measured), 1.0]
    assert len(QUANTITIES) == 4


@needs_cuda
def test_replayed_calls_draw_new_random_numbers_and_see_new_inputs():
    def draw(batches: tuple[Tensor, ...]) -> Tensor:
        return batches[0].sum() + torch.rand((), device="cuda")

    def run(calls: GraphedCalls | None) -> list[float]:
        torch.manual_seed(0)
        batches = [[torch.full((3,), float(k), device="cuda")] for k in range(WARM_UP + 4)]
        return [(calls(batch) if calls else draw(batch)).item() for batch in batches]

    assert run(GraphedCalls(draw, torch.device("cuda"))) == run(None)


@needs_cuda
def test_iterations_do_not_wait_for_the_device(tmp_path):
    config = TrainConfig(steps=20, batch_size=6, n_critic=3, device="cuda", out=tmp_path / "run")
    trainer = Trainer(*networks(), images(), config)
    reals = [torch.rand(6, 3, 7, 7, device="cuda") for _ in range(3)]
    trainer._iteration(reals)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer._iteration(reals)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("settings", "alone", "graph", "channels_last"),
    [
        ({}, True, True, False),  # float32 proper has no tensor cores
        ({"precision": "bf16"}, True, True, True),
        ({"model": "mnist-dcgan", "precision": "tf32"}, False, False, True),
        ({"model": "custom"}, True, False, False),  # it may keep what a replay leaves out, and views
        ({"model": "mine:networks"}, True, False, False),
        ({"engine": "checked", "precision": "bf16"}, True, False, True),
        ({"cuda_graph": False, "channels_last": False}, True, False, False),
        ({"model": "custom", "cuda_graph": True, "channels_last": True}, True, True, True),
    ],
)
def test_a_gpu_decides_what_is_left_to_it(settings, alone, graph, channels_last, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = for_device(TrainConfig(**settings), torch.device("cuda"), alone=alone)
    assert (config.cuda_graph, config.channels_last) == (graph, channels_last)
    on_cpu = for_device(TrainConfig(), torch.device("cpu"), alone=True)
    assert (on_cpu.cuda_graph, on_cpu.channels_last) == (False, False)


def test_checked_steps_are_not_replayed_unasked(monkeypatch):
    monkeypatch.setenv("WGAN_FAST_CHECK", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert for_device(TrainConfig(), torch.device("cuda"), alone=True).cuda_graph is False


def switches():
    """PyTorch's older ones, None where it refuses to read them beside the newer ones, and all newer ones."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    older = []
    for read in (torch.get_float32_matmul_precision, lambda: cuda.allow_tf32, lambda: cudnn.allow_tf32):
        try:
            older.append(read())
        except RuntimeError:
            older.append(None)
    parts = (torch.backends, cuda, cudnn, cudnn.conv, cudnn.rnn, torch.backends.mkldnn.matmul)
    return older, [part.fp32_precision for part in parts]


TOLD = {
    "nothing": "",
    "older": "torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "convolutions": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "cudnn": "torch.backends.cudnn.fp32_precision = 'tf32'",
    "everything": "torch.backends.fp32_precision = 'tf32'",
}


@pytest.mark.parametrize("told", TOLD)
def test_what_float32_is_computed_in_holds_inside_alone(told):
    """In a process of its own: PyTorch has no way back to what it was told at first."""
    program = f"""
import contextlib, itertools, sys, torch
sys.path[:0] = {sys.path!r}
from test_speed_options import switches
from wgan_fast.backends import float32_products
{TOLD[told]}
before, cudnn = switches(), torch.backends.cudnn
for in_tf32, fails in itertools.product((False, True), repeat=2):
    with contextlib.suppress(ZeroDivisionError), float32_products(in_tf32):
        for part in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn):
            assert (part.fp32_precision == "tf32") is in_tf32, part
        if before[0][0] is not None:
            assert torch.get_float32_matmul_precision() == ("high" if in_tf32 else "highest")
        1 / (not fails)
    assert switches() == before, (switches(), before)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_tf32_is_a_precision_of_a_gpu():
    step = CriticStep(nn.Linear(3, 1), precision="tf32")
    with step._arithmetic("cuda"):
        assert torch.backends.cuda.matmul.allow_tf32
    with step._arithmetic("cpu"):
        assert not torch.backends.cuda.matmul.allow_tf32
    plain = CriticStep(copy.deepcopy(step.critic))
    given = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    assert step(*given).loss == plain(*given).loss
    with pytest.raises(InputError, match="tf32 is an NVIDIA GPU's arithmetic"):
        for_device(TrainConfig(precision="tf32"), torch.device("cpu"), alone=True)


@pytest.mark.parametrize(("precision", "there"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_a_gpu_trains_channels_last_where_it_convolves_in_tensor_cores(precision, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert for_device(TrainConfig(precision=precision), torch.device("cuda"), alone=True).channels_last is there


@pytest.mark.parametrize(
    ("capability", "dtype", "setting", "there"),
    [
        ((9, 0), torch.float32, "tf32", True),
        ((9, 0), torch.float32, "ieee", False),
        ((7, 5), torch.float32, "tf32", False),
        ((7, 5), torch.bfloat16, "ieee", False),
        ((7, 5), torch.float16, "ieee", True),
        ((8, 0), torch.bfloat16, "ieee", True),
        ((9, 0), torch.float64, "tf32", False),
    ],
)
def test_tensor_cores_are_asked_for_where_they_are(
    capability, dtype, setting, there, monkeypatch, convolutions_compute_in
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    convolutions_compute_in(setting)
    assert convolves_in_tensor_cores(dtype, torch.device("cuda")) is there
    assert convolves_in_tensor_cores(dtype, torch.device("cpu")) is False


@needs_cuda
def test_graphs_are_captured_anew_after_they_were_forgotten():
    calls = GraphedCalls(lambda batches: batches[0] * 2, torch.device("cuda"))
    kept = None
    for _ in range(2):
        for k in range(WARM_UP + 2):
            kept = calls([torch.full((3,), float(k), device="cuda")])
            assert torch.equal(kept, torch.full((3,), 2.0 * k, device="cuda"))
        calls.clear()


@needs_cuda
def test_a_default_that_cannot_be_captured_gives_way():
    calls = GraphedCalls(lambda batches: torch.tensor(batches[0].sum().item()), torch.device("cuda"), gives_way=True)
    for _ in range(WARM_UP):
        calls([torch.ones(2, device="cuda")])
    with pytest.warns(RuntimeWarning, match="cannot capture"):
        assert calls([torch.ones(2, device="cuda")]) == 2
    assert calls([torch.ones(2, device="cuda")]) == 2


@needs_cuda
def test_what_a_graph_cannot_hold_is_refused():
    calls = GraphedCalls(lambda batches: torch.tensor(batches[0].sum().item()), torch.device("cuda"))
    for _ in range(WARM_UP):
        calls([torch.ones(2, device="cuda")])
    with pytest.raises(ValueError, match="cuda_graph cannot capture this training"):
        calls([torch.ones(2, device="cuda")])
    assert torch.rand(3, device="cuda").isfinite().all()  # PyTorch leaves its generator as if it were captured
