"""What forward reads, draws and asks: batches, random numbers, gradient modes, cached weights."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import textbook
import torch
import torch.nn.functional as F
from side_by_side import (
    ALPHA,
    FAKE,
    REAL,
    USES,
    Critic,
    SideBySide,
    in_turn,
    linear,
    mlp,
    network,
    outcome,
    vector,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from wgan_fast import gradient_penalty

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # to leave a critic to autograd is right, too


SERIES = torch.sin(torch.arange(40, dtype=torch.float64) ** 2)


OVERLAPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "windows": lambda x: SERIES.unfold(0, 5, 1)[: len(x)],
    "windows two apart": lambda x: SERIES.unfold(0, 5, 2)[: len(x)],
    "one sample expanded": lambda x: x[:1].expand(len(x), -1),
    "one number expanded": lambda x: x[:, :1].expand(-1, 5),
    "strided": lambda x: torch.as_strided(x.contiguous(), x.shape, (2, 1)),
    "windows, transposed": lambda x: SERIES.unfold(0, len(x), 1)[:5].T,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("at", ["interpolates", "real", "both"])
@pytest.mark.parametrize("name", OVERLAPPING)
def test_batches_whose_memory_overlaps(name: str, at: str, use: str) -> None:
    pair = SideBySide(use, mlp(), at=at)
    overlap = OVERLAPPING[name]
    for real, fake in ((overlap(REAL), FAKE), (REAL, overlap(FAKE)), (overlap(REAL), overlap(FAKE))):
        before = real.clone(), fake.clone()
        pair.check(real, fake)
        pair.check(*before)
        assert torch.equal(real, before[0])
        assert torch.equal(fake, before[1])


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["one sample expanded", "strided"])
def test_further_arguments_whose_memory_overlaps(name: str, use: str) -> None:
    critic = Critic(lambda critic, h, y: h * torch.cat([y, y[:, :1]], 1))
    SideBySide(use, critic).check(args=lambda: (OVERLAPPING[name](FAKE),))


@pytest.mark.parametrize("use", USES)
def test_an_expanded_alpha(use: str) -> None:
    SideBySide(use, mlp()).check(alpha=ALPHA[:1].expand(7))


@pytest.mark.parametrize("use", USES)
def test_images_whose_memory_overlaps(use: str) -> None:
    critic = network(nn.Conv2d(2, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 1))
    real, fake = textbook.random_pair(3, 2, 6, 6)
    windows = SERIES.unfold(0, 6, 1).unfold(0, 6, 1)[:6].reshape(1, -1)[:, :72].view(1, 2, 6, 6).expand(3, -1, -1, -1)
    for pair in (
        (real[:, :1].expand(-1, 2, -1, -1), fake),
        (real, fake[..., :1].expand(-1, -1, -1, 6)),
        (windows, fake),
    ):
        SideBySide(use, critic).check(*pair, alpha=ALPHA[:3])


def deviation(critic: Any, h: Tensor) -> Tensor:
    """What progressive growing appends to the features, over groups of as many samples as there are, up to four."""
    group = min(4, len(h))
    grouped = h[: len(h) // group * group].view(group, -1, 6)
    return h + ((grouped - grouped.mean(0)).square().mean(0) + 1e-8).sqrt().mean()


BATCHES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "divides by the number of samples": lambda c, h: h / len(h),
    "divides by the number of numbers": lambda c, h: h / h.numel(),
    "mean by hand": lambda c, h: h + h.sum(0, keepdim=True) / h.shape[0],
    "branch on the number of samples": lambda c, h: h.sin() if len(h) > 8 else h,
    "remainder of the number of samples": lambda c, h: h * (1 + h.size(0) % 4),
    "place in the batch": lambda c, h: h * (1 + torch.arange(len(h), dtype=h.dtype)).unsqueeze(1),
    "first sample": lambda c, h: h - h[:1].sigmoid(),
    "halves": lambda c, h: torch.cat([h[: len(h) // 2] * 2, h[len(h) // 2 :].sin()]),
    "reversed": lambda c, h: h + h.flip(0).sin(),
    "shifted": lambda c, h: h + h.roll(1, 0).sin(),
    "running sum": lambda c, h: h.cumsum(0),
    "weights over the batch": lambda c, h: h * h.softmax(0),
    "largest of the batch": lambda c, h: h - h.amax(0, keepdim=True),
    "product over the batch": lambda c, h: h @ h.T @ h / 9,
    "deviation over groups": deviation,
    "table by place": lambda c, h: h * c.table[: len(h)],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", BATCHES)
def test_forward_sees_each_batch_by_itself(name: str, use: str) -> None:
    """Of a step's three batches, too: what it reads of a batch, its size included, is not that of all three."""
    critic = Critic(BATCHES[name], table=torch.linspace(0.5, 1.5, 12, dtype=torch.float64).unsqueeze(1))
    pair = SideBySide(use, critic)
    for batch in (7, 4, 7, 5):
        pair.check(REAL[:batch], FAKE[:batch], ALPHA[:batch])


NUMBERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "random.random": lambda c, h: h.flip(1) if random.random() < 0.5 else h,
    "random.random as a factor": lambda c, h: h * random.random(),
    "random.choice": lambda c, h: random.choice([torch.sin, torch.sigmoid, F.softplus])(h),
    "random.shuffle": lambda c, h: h[:, random.sample(range(6), 6)] * vector(),
    "random.Random of its own": lambda c, h: h * c.draws.random(),
    "NumPy": lambda c, h: h * np.random.rand(),  # noqa: NPY002 (as people write it)
    "NumPy array": lambda c, h: h * torch.from_numpy(np.random.randn(6)),  # noqa: NPY002
    "NumPy permutation": lambda c, h: h[:, np.random.permutation(6)] * vector(),  # noqa: NPY002
    "NumPy branch": lambda c, h: h.flip(1) if np.random.uniform() < 0.5 else h,  # noqa: NPY002
    "NumPy generator of its own": lambda c, h: h * c.numbers.random(),
    "rarely": lambda c, h: h.flip(1) if random.random() < 0.05 else h,
    "mostly": lambda c, h: h.flip(1) if np.random.uniform() < 0.95 else h,  # noqa: NPY002
}


def state_of_generators(critic: Any) -> tuple[Any, ...]:
    numpy = np.random.get_state()  # noqa: NPY002
    own = critic.draws.getstate(), str(critic.numbers.bit_generator.state)
    return random.getstate(), numpy[1].tolist(), numpy[2:], *own, torch.get_rng_state().tolist()


@pytest.fixture
def _generators_restored():
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


@pytest.mark.usefixtures("_generators_restored")
@pytest.mark.parametrize(("name", "use"), in_turn(NUMBERS))
def test_pythons_and_numpys_random_numbers_are_drawn_as_by_autograd(name: str, use: str) -> None:
    critic = Critic(NUMBERS[name])
    pair = SideBySide(use, critic)

    def seeded(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        critic.draws, critic.numbers = random.Random(seed), np.random.default_rng(seed)

    found = []
    for call in (pair.ours, pair.plain):
        results: list[Any] = []
        for seed in range(6):
            seeded(seed)
            for _ in range(3):
                value, gradients = outcome(lambda call=call: call(REAL, FAKE, ALPHA, (), None), list(pair.leaves()))
                results += [value, *gradients]
            results.append(state_of_generators(critic))
        found.append(results)
    for ours, theirs in zip(*found, strict=True):
        if isinstance(theirs, tuple):
            assert ours == theirs
        elif theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("_generators_restored")
@pytest.mark.parametrize("use", USES)
def test_planning_leaves_the_callers_generators_alone(use: str) -> None:
    critic = Critic(lambda critic, h: h.sin())
    critic.draws, critic.numbers = random.Random(0), np.random.default_rng(0)
    pair = SideBySide(use, critic)
    before = state_of_generators(critic)
    pair.ours(REAL, FAKE, ALPHA, (), None)
    assert state_of_generators(critic) == before


@torch.no_grad()
def decorated(h: Tensor) -> Tensor:
    return h.sigmoid()


def inferred(c: Any, h: Tensor) -> Tensor:
    with torch.inference_mode():
        features = h.sigmoid()
    return h + 3 * features


def inferred_from_the_input(c: Any, h: Tensor) -> Tensor:
    with torch.inference_mode():
        features = c.extractor(h)
    return h * features.clone()


def without(c: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        features = h.sigmoid()
    return h * features


def switched_off(c: Any, h: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    features = h.sigmoid()
    torch.set_grad_enabled(True)
    return h * features


def without_and_with(c: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.enable_grad():
            inner = h.sigmoid()
        outer = h.sin()
    return h * inner + outer


MODES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "inference_mode": inferred,
    "inference_mode, cloned": inferred_from_the_input,
    "no_grad": without,
    "no_grad by decorator": lambda c, h: h * decorated(h),
    "set_grad_enabled": switched_off,
    "enable_grad in no_grad": without_and_with,
    "detach": lambda c, h: h * h.detach().sigmoid(),
    "data": lambda c, h: h * h.data.sigmoid(),
    "detached clone": lambda c, h: h * h.clone().detach_().sigmoid(),
    "if grad is enabled": lambda c, h: h.sin() if torch.is_grad_enabled() else h,
    "if not in inference mode": lambda c, h: h if torch.is_inference_mode_enabled() else h.sin(),
    "if it requires a gradient": lambda c, h: h.sin() if h.requires_grad else h,
    "if it has a function": lambda c, h: h.sin() if h.grad_fn is not None else h,
    "if weights are frozen": lambda c, h: h.sin() if c.first.weight.requires_grad else h,
}


@pytest.mark.parametrize(("name", "use"), in_turn(MODES))
def test_gradient_modes_in_forward_mean_what_they_mean_to_autograd(name: str, use: str) -> None:
    critic = Critic(MODES[name], extractor=linear(3))
    pair = SideBySide(use, critic)
    for _ in range(3):
        pair.check()
        critic.first.weight.data.mul_(1.2)


class Questioning(nn.Module):
    """Asks of its own input what autograd alone decides."""

    def __init__(self, ask: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.layers, self.ask = mlp(), ask

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * 2) if self.ask(x) else self.layers(x)


ASKED: dict[str, Callable[[Tensor], bool]] = {
    "requires a gradient": lambda x: x.requires_grad,
    "requires none": lambda x: not x.requires_grad,
    "is a leaf": lambda x: x.is_leaf,
    "has no function": lambda x: x.grad_fn is None,
}


@pytest.mark.parametrize("at", ["interpolates", "real", "both"])
@pytest.mark.parametrize(("asked", "use"), in_turn(ASKED))
def test_a_branch_on_whether_the_input_requires_a_gradient(asked: str, at: str, use: str) -> None:
    pair = SideBySide(use, Questioning(ASKED[asked]), at=at)
    pair.check()
    pair.check()


PARAMETRISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", PARAMETRISED)
def test_cached_parametrisations_hold_real_tensors(name: str, use: str) -> None:
    torch.manual_seed(1)
    critic = nn.Sequential(PARAMETRISED[name](nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, 1)).double().eval()
    expected = critic(FAKE).detach()
    pair = SideBySide(use, critic)
    for _ in range(2):
        start = copy.deepcopy(critic.state_dict())
        with parametrize.cached():
            actual, ours = outcome(lambda: pair.ours(REAL, FAKE, ALPHA, (), None), list(critic.parameters()))
            assert all(type(kept) in (Tensor, nn.Parameter) for kept in parametrize._cache.values())
            torch.testing.assert_close(critic(FAKE), expected)
        critic.load_state_dict(start)
        with parametrize.cached():
            value, theirs = outcome(lambda: pair.plain(REAL, FAKE, ALPHA, (), None), list(critic.parameters()))
        torch.testing.assert_close(actual, value, rtol=1e-10, atol=0)
        for g, other in zip(ours, theirs):
            torch.testing.assert_close(g, other, rtol=1e-10, atol=1e-14)


def test_a_cached_loop_that_adds_a_loss_to_the_penalty() -> None:
    torch.manual_seed(1)
    critic = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, 1)).double()

    def loss(penalty: Callable[[], Tensor]) -> Tensor:
        with parametrize.cached():
            value = penalty()
            total = critic(FAKE).mean() - critic(REAL).mean() + value
            total.backward()
        return total.detach()

    leaves = list(critic.parameters())
    actual, ours = outcome(lambda: loss(lambda: gradient_penalty(critic, REAL, FAKE, alpha=ALPHA)), leaves)
    points = [textbook.interpolates(REAL, FAKE, ALPHA)]
    expected, theirs = outcome(lambda: loss(lambda: textbook.penalty(critic, points)), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    for g, other in zip(ours, theirs):
        torch.testing.assert_close(g, other, rtol=1e-10, atol=1e-14)
