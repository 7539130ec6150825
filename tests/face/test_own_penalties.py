"""Penalties that are any function of the input gradient: other norms and shapes, arguments, drawn at random."""

import random
from collections.abc import Callable

import pytest
import torch
from plain import N, assert_same, assert_same_gradients, gradients, mixed, penalty
from published_critics import GraphCritic, InteratomicPotential, SignedDistance, StyleGenerator
from torch import Tensor, nn

from wgan_fast import CriticStep, GradientPenalty, PenaltyConfig, gradient_penalty
from wgan_fast.losses import wasserstein

ENGINES = ["four_pass", "autograd"]
SHAPE = (N, 3, 6, 6)


def patches() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 4, 2, 1), nn.Tanh(), nn.Conv2d(6, 8, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3, 1, 1)
    return nn.Sequential(*layers).double()


def points(seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(SHAPE, dtype=torch.float64)


def flat(g: Tensor) -> Tensor:
    return g.flatten(1).norm(dim=1)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "a norm a position": lambda g: (g.norm(2, dim=1) - 1) ** 2,
    "the sixth power": lambda g: flat(g) ** 6,
    "relu of the excess": lambda g: torch.relu(flat(g) - 0.1),
    "relu of the square's excess": lambda g: torch.relu(flat(g) ** 2 - 0.01),
    "the absolute excess": lambda g: (flat(g) - 1).abs(),
    "Huber": lambda g: nn.functional.huber_loss(flat(g), torch.ones(N, dtype=g.dtype), reduction="none"),
    "L1": lambda g: (g.flatten(1).abs().sum(1) - 1) ** 2,
    "L-infinity": lambda g: (g.flatten(1).abs().amax(1) - 1) ** 2,
    "the largest of the batch": lambda g: (flat(g).max() - 1) ** 2,
    "one norm over the batch": lambda g: (g.norm() - 1) ** 2,
    "a mean": lambda g: flat(g).square().mean(),
    "a column": lambda g: (flat(g).unsqueeze(1) - 1) ** 2,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_people_write(name: str, engine: str) -> None:
    critic, x, own = patches(), points(), FORMS[name]
    for weight in (10.0, 0.5):
        ours = gradient_penalty(critic, points=x, penalty=own, weight=weight, engine=engine)
        assert_same(ours, penalty(critic, x, own=own, weight=weight), critic)
    real, fake, alpha = points(2), points(3), torch.rand(N, dtype=torch.float64)
    config = PenaltyConfig(penalty=own)
    planned = GradientPenalty(critic, config, engine=engine)(real, fake, alpha)

    def whole() -> Tensor:
        return wasserstein.critic(critic(real), critic(fake)) + penalty(critic, mixed(real, fake, alpha), own=own)

    assert_same(planned + wasserstein.critic(critic(real), critic(fake)), whole(), critic)
    step = CriticStep(critic, penalty=config, engine=engine)(real, fake, alpha)
    torch.testing.assert_close(step.loss, whole().detach(), rtol=1e-10, atol=1e-12)
    ours = [p.grad.clone() for p in critic.parameters()]
    assert_same_gradients(ours, gradients(whole(), list(critic.parameters())))


@pytest.mark.parametrize("schedule", ["batched", "split"])
@pytest.mark.parametrize("loss", ["wasserstein", "non_saturating"])
@pytest.mark.parametrize("at", ["real", "fake", "both", "perturbed"])
def test_at_the_samples_themselves(at: str, loss: str, schedule: str) -> None:
    critic, real, fake, own = patches(), points(2), points(3), FORMS["a norm a position"]
    results, left = [], []
    for engine in ENGINES:
        torch.manual_seed(4)
        step = CriticStep(
            critic, loss=loss, penalty=PenaltyConfig(at=at, penalty=own), engine=engine, schedule=schedule
        )
        results.append(step(real, fake))
        left.append([p.grad.clone() for p in critic.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(left[0], left[1], rtol=1e-10, atol=1e-12)
    if at == "both":
        torch.testing.assert_close(
            results[0].penalty, (penalty(critic, real, own=own) + penalty(critic, fake, own=own)).detach()
        )


def drawn(seed: int) -> Callable[..., Tensor]:
    """A penalty at random: a norm along some dimensions, of order 1 to 6 or infinite, then smooth or kinked."""
    rng = random.Random(seed)
    dims = sorted(rng.sample([1, 2, 3], rng.randint(1, 3)))
    p = rng.choice([1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, float("inf")])
    target = rng.choice([0.0, 0.01, 0.3, 1.0])
    bends = [
        lambda r: (r - target) ** 2,
        lambda r: (r - target).abs(),
        lambda r: torch.relu(r - target),
        lambda r: torch.relu(target - r) ** 2,
        lambda r: nn.functional.softplus(r - target),
        lambda r: (r * r + target).log1p(),
        lambda r: nn.functional.huber_loss(r, torch.full_like(r, target), reduction="none", delta=0.1),
        lambda r: r**3,
    ]
    bend, reduce = rng.choice(bends), rng.choice(["no", "samples", "all"])
    factor = rng.random() < 0.5

    def own(g: Tensor, *further: Tensor) -> Tensor:
        r = torch.linalg.vector_norm(g, p, dim=dims)
        cost = bend(r)
        if further and factor:
            cost = cost * further[0].reshape(-1, *[1] * (cost.dim() - 1))
        elif further:
            cost = cost + (g.flatten(1) * further[0][:, None]).sum() ** 2
        return {"no": cost, "samples": cost.reshape(len(cost), -1).sum(1), "all": cost.mean()}[reduce]

    return own


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[] if s < 40 else [pytest.mark.slow]) for s in range(400)])
def test_a_penalty_drawn_at_random(seed: int) -> None:
    own, critic, x = drawn(seed), patches(), points(seed)
    further = (torch.rand(N, dtype=torch.float64),) if seed % 2 else ()
    ours = gradient_penalty(critic, points=x, penalty=own, penalty_args=further, weight=3.0, engine="four_pass")
    assert_same(ours, penalty(critic, x, own=lambda g: own(g, *further), weight=3.0), critic)
    config, (real, fake) = PenaltyConfig(penalty=own), (points(seed + 1), points(seed + 2))
    left = []
    for engine in ENGINES:
        CriticStep(critic, penalty=config, engine=engine)(real, fake, 0.3, penalty_args=further)
        left.append([p.grad.clone() for p in critic.parameters()])
    torch.testing.assert_close(left[0], left[1], rtol=1e-10, atol=1e-12)


def test_its_derivative_is_that_of_finite_differences() -> None:
    """Of the value, in the critic's weights: not autograd's word for it."""
    critic, x = patches(), points()
    target = torch.rand(SHAPE, dtype=torch.float64)
    own = lambda g, f: ((g + f) ** 2).flatten(1).sum(1) + FORMS["the sixth power"](g)  # noqa: E731

    def value(*weights: Tensor) -> Tensor:
        made = lambda z: torch.func.functional_call(critic, dict(zip(names, weights)), (z,))  # noqa: E731
        return gradient_penalty(made, points=x, penalty=own, penalty_args=(target,), engine="four_pass")

    names = [name for name, _ in critic.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in critic.parameters()]
    assert torch.autograd.gradcheck(value, weights, fast_mode=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_it_reads_may_change_and_learn(engine: str) -> None:
    critic, x, learned = patches(), points(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    scale = [1.0]
    own = lambda g: scale[0] * (flat(g) - learned) ** 2  # noqa: E731
    tensors = [*critic.parameters(), learned]
    for scale[0] in (1.0, 2.5):
        ours = gradient_penalty(critic, points=x, penalty=own, engine=engine)
        assert_same(ours, penalty(critic, x, own=own), tensors)
    step, real, fake = CriticStep(critic, penalty=PenaltyConfig(penalty=own), engine=engine), points(2), points(3)
    step(real, fake, 0.5)
    (theirs,) = torch.autograd.grad(penalty(critic, 0.5 * (real + fake), own=own), [learned])
    torch.testing.assert_close(learned.grad, theirs, rtol=1e-10, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_arguments_are_thinned_with_the_samples(engine: str) -> None:
    critic, x = patches(), points()
    target = torch.rand(SHAPE, dtype=torch.float64)
    own = lambda g, f: (g - f).flatten(1).square().sum(1)  # noqa: E731
    planned = GradientPenalty(critic, PenaltyConfig(samples=2, penalty=own), engine=engine)
    ours = planned(points=x, penalty_args=(target,))
    assert_same(ours, penalty(critic, x[::3], own=lambda g: own(g, target[::3])), critic)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_has_one_score_and_its_nodes_have_norms(engine: str) -> None:
    """Graphs of unequal size, their nodes side by side: samples whose first dimension is the nodes."""

    class OfNodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(5, 7).double(), nn.Linear(7, 1).double()

        def forward(self, x: Tensor, graph: Tensor, count: int) -> Tensor:
            h = torch.tanh(self.first(x))
            pooled = torch.zeros(count, 7, dtype=x.dtype).index_add(0, graph, h)
            return self.last(torch.relu(pooled))

    critic, x = OfNodes(), torch.randn(9, 5, dtype=torch.float64)
    graph = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])
    of_nodes = lambda g: (g.norm(dim=1) - 1) ** 2  # noqa: E731
    of_graphs = lambda g: (torch.zeros(3, dtype=g.dtype).index_add(0, graph, g.square().sum(1)).sqrt() - 1) ** 2  # noqa: E731
    for own in (of_nodes, of_graphs):
        result = gradient_penalty(
            critic, points=x, critic_args=(graph, 3), penalty=own, engine=engine, return_norms=True, return_scores=True
        )
        assert result.norms.shape == (9,)
        assert result.scores.shape == (3, 1)
        scores = lambda out: out  # noqa: E731
        theirs = penalty(critic, x, scores, own, graph, 3)
        loss = (result.scores - 1).square().mean()
        assert_same(result.penalty + loss, theirs + (critic(x, graph, 3) - 1).square().mean(), critic)
    with pytest.raises(ValueError, match="a row of scores per sample"):
        gradient_penalty(critic, points=x, critic_args=(graph, 3), engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_score_without_dimensions(engine: str) -> None:
    """A mean, or the loss of an auxiliary head."""
    critic, x, own = patches(), points(), FORMS["the sixth power"]
    for pick in (lambda out: out.mean(), lambda out: nn.functional.softplus(out).sum()):
        result = gradient_penalty(critic, points=x, score=pick, penalty=own, engine=engine, return_scores=True)
        assert_same(result.penalty + 2 * result.scores, penalty(critic, x, pick, own) + 2 * pick(critic(x)), critic)
    config = PenaltyConfig(penalty=own, score=lambda out: out.mean())
    left = []
    for each in ENGINES:
        CriticStep(critic, penalty=config, engine=each)(points(2), points(3), 0.5)
        left.append([p.grad.clone() for p in critic.parameters()])
    torch.testing.assert_close(left[0], left[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_adjacency_and_nodes_are_one_sample(engine: str) -> None:
    torch.manual_seed(0)
    critic = GraphCritic().double()
    adjacency, nodes = torch.rand(N, 5, 5, 3, dtype=torch.float64), torch.rand(N, 5, 4, dtype=torch.float64)
    assert_same(
        gradient_penalty(critic, points=(adjacency, nodes), engine=engine), penalty(critic, (adjacency, nodes)), critic
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_forces_are_matched(engine: str) -> None:
    torch.manual_seed(0)
    model = InteratomicPotential().double()
    positions = torch.randn(N, 5, 3, dtype=torch.float64)
    forces, energies = torch.randn_like(positions), torch.randn(N, dtype=torch.float64)
    own = lambda g, f: ((g + f) ** 2).flatten(1).sum(1)  # noqa: E731
    ours = gradient_penalty(
        model, points=positions, weight=1.0, penalty=own, penalty_args=(forces,), return_scores=True, engine=engine
    )
    x = positions.clone().requires_grad_()
    energy = model(x)
    (g,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    theirs = own(g, forces).mean() + (energy.flatten() - energies).square().mean()
    assert_same(ours.penalty + (ours.scores.flatten() - energies).square().mean(), theirs, model)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_distance_has_gradients_of_one(engine: str) -> None:
    torch.manual_seed(0)
    model = SignedDistance().double()
    x = torch.randn(N, 3, dtype=torch.float64)
    own = lambda g: (g.norm(dim=1) - 1) ** 2  # noqa: E731
    ours = gradient_penalty(model, points=x, weight=0.1, penalty=own, return_scores=True, engine=engine)
    theirs = penalty(model, x, own=own, weight=0.1) + model(x).abs().mean()
    assert_same(ours.penalty + ours.scores.abs().mean(), theirs, model)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_path_lengths_of_a_generator(engine: str, grouped: bool) -> None:
    """StyleGAN2's: the gradient of the images times noise, with the running mean of its lengths."""
    torch.manual_seed(0)
    generator = StyleGenerator(grouped=grouped).double()
    mean = torch.tensor(0.0, dtype=torch.float64)
    own = lambda g, a: (g.square().sum(-1).mean(-1).sqrt() - a) ** 2  # noqa: E731
    for _ in range(3):
        w = torch.randn(3, generator.layers, 6, dtype=torch.float64)
        noise = torch.randn_like(generator(w)) / generator(w)[0, 0].numel() ** 0.5
        score = lambda images: (images * noise).sum((1, 2, 3))  # noqa: B023, E731
        ours = gradient_penalty(
            generator, points=w, score=score, weight=2.0, penalty=own, penalty_args=(mean,), engine=engine,
            return_norms=True,
        )  # fmt: skip
        theirs = penalty(generator, w, score, lambda g: own(g, mean), weight=2.0)  # noqa: B023
        assert_same(ours.penalty, theirs, generator)
        mean = mean.lerp(ours.norms.mean() / generator.layers**0.5, 0.1)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"penalty": 3.0}, TypeError, "penalty must be a function or None, got float"),
        ({"penalty": flat, "target": 0.0}, ValueError, "target and one_sided must not be given with it"),
        ({"penalty": flat, "one_sided": True}, ValueError, "target and one_sided must not be given with it"),
        ({"penalty": lambda g: 1.0}, TypeError, "penalty must return a tensor, got float"),
        ({"penalty": lambda g: g[:0]}, ValueError, "penalty must return a value per sample"),
        ({"penalty": lambda g: g > 0}, TypeError, "penalty must return a floating-point tensor"),
        ({"penalty_args": (1,)}, ValueError, "penalty_args are arguments of penalty, which is not given"),
        ({"penalty": flat, "penalty_args": [1]}, TypeError, "penalty_args must be a tuple, got list"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_does_not_fit_is_refused(engine: str, given: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gradient_penalty(nn.Linear(3, 1), points=torch.ones(4, 3), engine=engine, **given)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_of_its_own_is_its_own_and_leaves_no_gradient(engine: str) -> None:
    critic, real, fake = patches(), points(2), points(3)
    for p in critic.parameters():
        p.grad = torch.ones_like(p)

    def own(g: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        CriticStep(critic, penalty=PenaltyConfig(penalty=own), engine=engine)(real, fake)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in critic.parameters())
