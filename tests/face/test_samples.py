"""Samples of any structure: tuples, lists and dicts of tensors, integers among them."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from plain import N, assert_same, assert_same_gradients, mixed, norms, opened, penalty
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from wgan_fast import CriticStep, GradientPenalty, PenaltyConfig, explain, gradient_penalty
from wgan_fast.losses import wasserstein

ENGINES = ["four_pass", "autograd"]


class Pair(NamedTuple):
    image: Tensor
    latent: Tensor


class Joint(nn.Module):
    """A critic of an image and a latent, read from samples as ``take`` says."""

    def __init__(self, take) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.latent, self.last = nn.Conv2d(2, 4, 3), nn.Linear(5, 16), nn.Linear(32, 1)
        self.take = take
        self.double()

    def forward(self, samples):
        image, latent = self.take(samples)
        h = torch.cat([torch.tanh(self.conv(image)).flatten(1), self.latent(latent)], 1)
        return self.last(nn.functional.leaky_relu(h, 0.2))


def tensors(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(N, 2, 4, 4, dtype=torch.float64), torch.randn(N, 5, dtype=torch.float64)


NESTS = {
    "a tuple": (lambda x, z: (x, z), lambda s: s),
    "a list": (lambda x, z: [x, z], lambda s: s),
    "a dict": (lambda x, z: {"image": x, "latent": z}, lambda s: (s["image"], s["latent"])),
    "an ordered dict": (lambda x, z: OrderedDict(latent=z, image=x), lambda s: (s["image"], s["latent"])),
    "a named tuple": (Pair, lambda s: (s.image, s.latent)),
    "a nest": (lambda x, z: {"a": [x], "b": {"c": (z,)}}, lambda s: (s["a"][0], s["b"]["c"][0])),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at", ["interpolates", "real", "fake", "both"])
@pytest.mark.parametrize("kind", NESTS)
def test_one_norm_is_taken_over_all_tensors(kind: str, at: str, engine: str) -> None:
    nest, take = NESTS[kind]
    critic, alpha = Joint(take), torch.rand(N, dtype=torch.float64)
    real, fake = nest(*tensors(1)), nest(*tensors(2))
    sets = {"interpolates": [mixed(real, fake, alpha)], "real": [real], "fake": [fake], "both": [real, fake]}[at]
    for _ in range(2):
        ours = gradient_penalty(critic, real, fake, at=at, alpha=alpha, engine=engine)
        assert_same(ours, sum(penalty(critic, x) for x in sets), critic)
    whole = gradient_penalty(
        critic, real, fake, at=at, alpha=alpha, engine=engine, return_norms=True, return_scores=True
    )
    found = [opened(critic, x, lambda out: out) for x in sets]
    torch.testing.assert_close(whole.norms, torch.cat([norms(g) for _, _, g in found]).detach(), rtol=1e-10, atol=0)
    scores = whole.scores if at == "both" else [whole.scores]
    for a, (b, _, _) in zip(scores, found, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", ["batched", "split"])
@pytest.mark.parametrize("at", ["interpolates", "real", "both"])
@pytest.mark.parametrize("kind", NESTS)
def test_a_step_takes_them(kind: str, at: str, schedule: str) -> None:
    nest, take = NESTS[kind]
    critic, alpha = Joint(take), torch.rand(N, dtype=torch.float64)
    real, fake = nest(*tensors(1)), nest(*tensors(2))
    sets = {"interpolates": [mixed(real, fake, alpha)], "real": [real], "both": [real, fake]}[at]
    expected = wasserstein.critic(critic(real), critic(fake)) + sum(penalty(critic, x) for x in sets)
    step = CriticStep(critic, penalty=PenaltyConfig(at=at), engine="four_pass", schedule=schedule)
    for _ in range(2):
        result = step(real, fake, alpha)
        torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-10, atol=1e-12)
    ours = [p.grad.clone() for p in critic.parameters()]
    critic.zero_grad()
    expected.backward()
    assert_same_gradients(ours, [p.grad for p in critic.parameters()])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_penalty_of_ones_own_sees_the_gradient_nested_as_the_samples(engine: str) -> None:
    nest, take = NESTS["a dict"]
    critic, points, seen = Joint(take), nest(*tensors(1)), []

    def own(gradient):
        seen.append({name: tuple(part.shape) for name, part in gradient.items()})
        return gradient["image"].flatten(1).norm(dim=1) ** 2 + gradient["latent"].abs().sum(1)

    assert_same(
        gradient_penalty(critic, points=points, penalty=own, engine=engine), penalty(critic, points, own=own), critic
    )
    assert seen == [{"image": (N, 2, 4, 4), "latent": (N, 5)}] * 2


def reversed_keys(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(reversed(samples.items()))


@pytest.mark.parametrize("engine", ENGINES)
def test_keys_may_come_in_any_order(engine: str) -> None:
    """Also of tensors of one shape, which could be taken for each other."""

    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right, self.last = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 1)
            self.double()

        def forward(self, samples):
            return self.last(torch.tanh(self.left(samples["a"]) * self.right(samples["b"])))

    critic, own = Sides(), lambda g: g["a"].norm(dim=1) + 2 * g["b"].norm(dim=1)
    real, fake = ({"a": tensors(seed)[1], "b": tensors(seed + 5)[1]} for seed in (1, 2))
    expected = penalty(critic, mixed(real, fake, torch.full((N,), 0.5).double())).detach()
    step = CriticStep(critic, engine=engine)
    for x, y in ((real, fake), (real, reversed_keys(fake)), (reversed_keys(real), fake)):
        ours = gradient_penalty(critic, x, y, alpha=0.5, engine=engine)
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-10, atol=0)
        result = step(x, y, 0.5)
        torch.testing.assert_close(result.penalty, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(result.fake_score, critic(fake).mean().detach(), rtol=1e-10, atol=1e-12)
        assert_same(
            gradient_penalty(critic, points=x, penalty=own, engine=engine), penalty(critic, real, own=own), critic
        )


@pytest.mark.filterwarnings("ignore:wgan_fast differentiates with autograd")
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_a_critic_may_add_to_its_samples(engine: str) -> None:
    inner = nn.Linear(5, 1).double()

    def critic(samples):
        samples["h"] = samples["x"] * 2
        return inner(samples["h"]).tanh()

    points = {"x": tensors(1)[1]}
    ours = gradient_penalty(critic, points=points, engine=engine)
    assert_same(ours, penalty(lambda x: inner(x * 2).tanh(), points["x"]), inner)
    assert list(points) == ["x"]


class Labelled(nn.Module):
    """A critic of a tensor and integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.label, self.last = nn.Linear(5, 6), nn.Embedding(3, 6), nn.Linear(6, 1)
        self.double()

    def forward(self, samples):
        return self.last(torch.tanh(self.first(samples["x"]) * self.label(samples["y"])))


@pytest.mark.parametrize("engine", ENGINES)
def test_integers_come_along(engine: str) -> None:
    critic, labels, alpha = Labelled(), torch.tensor([0, 1, 2, 0, 1, 2]), torch.rand(N, dtype=torch.float64)
    real, fake = ({"x": tensors(seed)[1], "y": labels.clone()} for seed in (1, 2))
    ours = gradient_penalty(critic, real, fake, alpha=alpha, engine=engine)
    assert_same(ours, penalty(critic, mixed(real, fake, alpha)), critic)
    other = {**fake, "y": labels.flip(0)}
    both = gradient_penalty(critic, real, other, at="both", engine=engine)
    assert_same(both, penalty(critic, real) + penalty(critic, other), critic)
    seen = []
    gradient_penalty(critic, points=real, penalty=lambda g: seen.append(g) or g["x"].norm(dim=1), engine=engine)
    assert seen[0]["y"] is None
    with pytest.raises(TypeError, match="differ between real and fake and cannot be mixed"):
        gradient_penalty(critic, real, other, engine=engine)
    step = CriticStep(critic, penalty=PenaltyConfig.r1(), engine=engine)(real, other)
    scores = critic(real).mean() - critic(other).mean()
    torch.testing.assert_close(step.wasserstein, scores.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tensor_that_the_critic_does_not_read_counts_for_nothing(engine: str) -> None:
    critic = Joint(lambda s: (s[0], s[2]))
    (x, z), unread = tensors(1), torch.randn(N, 3, dtype=torch.float64)
    seen = []

    def own(gradient):
        seen.append(gradient[1])
        return gradient[0].flatten(1).norm(dim=1) + gradient[1].sum(1)

    ours = gradient_penalty(critic, points=(x, unread, z), penalty=own, engine=engine)
    assert_same(ours, penalty(critic, (x, unread, z), own=own), critic)
    assert all(part.shape == (N, 3) and not part.any() for part in seen)
    assert_same(gradient_penalty(critic, points=(x, unread, z), engine=engine), penalty(critic, (x, unread, z)), critic)


@pytest.mark.parametrize("engine", ENGINES)
def test_perturbed_samples_and_parts_of_a_batch(engine: str) -> None:
    nest, take = NESTS["a tuple"]
    critic, real, fake = Joint(take), nest(*tensors(1)), nest(*tensors(2))
    torch.manual_seed(3)
    drawn = gradient_penalty(critic, real, at="perturbed", engine=engine)
    torch.manual_seed(3)
    alpha = torch.rand(N, dtype=torch.float64)
    noise = [torch.rand_like(x) for x in real]
    points = tuple(
        x + alpha.view(-1, *[1] * (x.dim() - 1)) * 0.5 * x.std(correction=0) * u for x, u in zip(real, noise)
    )
    assert_same(drawn, penalty(critic, points), critic)
    part = GradientPenalty(critic, PenaltyConfig(at="real", samples=2), engine=engine)(real)
    assert_same(part, penalty(critic, tree_map(lambda x: x[:: N // 2], real)), critic)
    step = CriticStep(critic, penalty=PenaltyConfig(at="real", samples=2), engine=engine)(real, fake)
    torch.testing.assert_close(step.penalty, part.detach(), rtol=1e-10, atol=0)


def test_groups_are_packed() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(14, 6).double(), nn.Linear(6, 1).double()

        def forward(self, samples):
            return self.last(torch.tanh(self.first(torch.cat(samples, 1).reshape(N // 2, -1))))

    critic = Packed()
    points = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 4, dtype=torch.float64)

    def own(gradient):
        return (torch.cat(gradient, 1).reshape(N // 2, -1).norm(dim=1) - 1) ** 2

    for engine in ENGINES:
        ours = gradient_penalty(critic, points=points, group_size=2, engine=engine)
        assert_same(ours, penalty(critic, points, own=own), critic)


def test_samples_are_explained_and_compared() -> None:
    nest, take = NESTS["a dict"]
    critic, real, fake = Joint(take), nest(*tensors(1)), nest(*tensors(2))
    assert explain(critic, real).engine == "four_pass"
    for _ in range(2):
        gradient_penalty(critic, real, fake, engine="checked").backward()
        CriticStep(critic, engine="checked")(real, fake)
    critic.float()
    real, fake = (tree_map(Tensor.float, x) for x in (real, fake))
    gradient_penalty(critic, real, fake, engine="checked", return_scores=True).penalty.backward()


def test_autocast_takes_samples_of_either_precision() -> None:
    critic = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
    real, fake = torch.randn(2, N, 5)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        low = gradient_penalty(critic, real, fake.bfloat16(), alpha=0.5)
        same = gradient_penalty(critic, real, fake.bfloat16().float(), alpha=0.5)
        CriticStep(critic)(real, fake.bfloat16())
    assert torch.equal(low.detach(), same.detach())
    with pytest.raises(TypeError, match="fake must have the dtype of real"):
        gradient_penalty(critic, real, fake.bfloat16())


X, Z = torch.ones(4, 3), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"real": (X, Z), "fake": (X,)}, ValueError, r"fake must be nested as real, got .*fake\[0\]"),
        ({"real": {"a": X}, "fake": {"b": X}}, ValueError, "fake must be nested as real"),
        ({"real": {"a": X}, "fake": X}, ValueError, "fake must be nested as real"),
        ({"real": X, "fake": {"a": X}}, TypeError, "fake must be a tensor, got dict"),
        ({"real": (X, Z[:2]), "fake": (X, Z[:2])}, ValueError, r"one number of samples, got 4 and, in real\[1\], 2"),
        ({"real": (X, Z), "fake": (X, X)}, ValueError, r"fake\[1\] must have the shape of its counterpart in real"),
        ({"real": (X, Z), "fake": (X, Z.double())}, TypeError, r"fake\[1\] must have the dtype"),
        ({"points": (X.int(),)}, TypeError, "points must hold a floating-point tensor"),
        ({"points": ()}, TypeError, "points must hold a floating-point tensor"),
        ({"points": {"a": torch.ones(())}}, ValueError, r"points\['a'\] must be a non-empty batch"),
        (
            {"points": {"a": X, "b": None}},
            TypeError,
            r"points is a dict, which must hold tensors alone, and points\['b'",
        ),
        ({"points": (X, Z), "alpha": 0.5}, ValueError, "points stand in place of"),
        ({"real": (X, Z), "fake": (X, Z), "alpha": torch.ones(3)}, ValueError, "alpha must be a number"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gradient_penalty(nn.Linear(3, 1), **given)
