"""Forms of the penalty that people write: maps of scores, points of one's own, any α, one batch where one will do."""

import pytest
import torch
from textbook import generator
from torch import Tensor, nn

from wgan_fast import CriticStep, GradientPenalty, PenaltyConfig, explain, gradient_penalty, interpolate, losses

ENGINES = ["four_pass", "autograd"]
N, SHAPE = 5, (5, 3, 8, 8)


def patches() -> nn.Module:
    """A critic that scores every patch: [N, 1, 4, 4]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 2, 1), nn.Tanh(), nn.Conv2d(6, 8, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3, 1, 1)
    ).double()


def several() -> nn.Module:
    """A critic with three scores a sample."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.SiLU(), nn.Linear(7, 3)).double()


CRITICS = {"patches": patches, "several": several}


def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    real, fake = torch.randn(2, *SHAPE, dtype=torch.float64).unbind()
    return real, fake


def penalty_of(critic: nn.Module, points: Tensor, target: float = 1.0, weight: float = 10.0) -> Tensor:
    """As training scripts have it, with the sum of all that the critic returns."""
    x = points.detach().requires_grad_()
    scores = critic(x)
    (gradient,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
    return weight * ((gradient.flatten(1).norm(dim=1) - target) ** 2).mean()


def gradients(critic: nn.Module, value: Tensor) -> list[Tensor]:
    critic.zero_grad()
    value.backward()
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in critic.parameters()]


def assert_same(critic: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(critic, ours), gradients(critic, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("at", ["interpolates", "real", "fake", "both"])
def test_maps_of_scores_are_summed(name: str, engine: str, at: str) -> None:
    critic, (real, fake), alpha = CRITICS[name](), pair(), torch.rand(N, dtype=torch.float64)
    points = {"interpolates": [interpolate(real, fake, alpha)], "real": [real], "fake": [fake], "both": [real, fake]}
    ours = gradient_penalty(critic, real, fake, at=at, alpha=alpha, engine=engine)
    assert_same(critic, ours, sum(penalty_of(critic, x) for x in points[at]))


@pytest.mark.parametrize("loss", ["wasserstein", "non_saturating", "least_squares", "hinge"])
@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("at", ["interpolates", "real", "both"])
def test_a_step_takes_maps_of_scores(name: str, loss: str, at: str) -> None:
    critic, (real, fake), alpha = CRITICS[name](), pair(), torch.rand(N, dtype=torch.float64)
    points = {"interpolates": [interpolate(real, fake, alpha)], "real": [real], "both": [real, fake]}[at]
    expected = losses.get_loss(loss).critic(critic(real), critic(fake)) + sum(penalty_of(critic, x) for x in points)
    theirs = gradients(critic, expected)
    for schedule in ("batched", "split"):
        step = CriticStep(critic, loss=loss, penalty=PenaltyConfig(at=at), engine="four_pass", schedule=schedule)
        result = step(real, fake, alpha)
        torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(result.wasserstein, critic(real).mean() - critic(fake).mean(), rtol=1e-10, atol=0)
        for p, b in zip(critic.parameters(), theirs, strict=True):
            torch.testing.assert_close(p.grad, b, rtol=1e-10, atol=1e-12)


def test_the_loss_keeps_to_its_own_draws_where_a_map_is_penalised_at_the_samples() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.Dropout(0.5), nn.Linear(7, 3)).double()
    real, fake = pair()
    step = CriticStep(critic, loss="non_saturating", penalty=PenaltyConfig.r1(), engine="four_pass", schedule="batched")
    torch.manual_seed(5)
    result = step(real, fake)
    torch.manual_seed(5)
    scores = critic(torch.cat([real, fake, real]))  # as the four passes join them
    torch.testing.assert_close(result.real_score, scores[:N].mean().detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(result.fake_score, scores[N : 2 * N].mean().detach(), rtol=1e-10, atol=0)


def test_a_map_is_explained() -> None:
    assert explain(patches(), pair()[0]).engine == "four_pass"


class Structured(nn.Module):
    """Scores and class logits, put together as ``pack`` says."""

    def __init__(self, pack) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1), nn.Tanh(), nn.Flatten())
        self.score, self.classes = nn.Linear(96, 1), nn.Linear(96, 4)
        self.pack = pack
        self.double()

    def forward(self, x: Tensor):
        features = self.body(x)
        return self.pack(self.score(features), self.classes(features))


def named(output) -> Tensor:
    return output["score"] + 0.1 * output["classes"].logsumexp(1, keepdim=True)


OUTPUTS = {
    "the first of a tuple": (lambda s, c: (s, c), 0, lambda out: out[0]),
    "the last of a list": (lambda s, c: [c, s], -1, lambda out: out[-1]),
    "a tuple with None": (lambda s, c: (s, None), 0, lambda out: out[0]),
    "a key": (lambda s, c: {"classes": c, "score": s}, "score", lambda out: out["score"]),
    "a function": (lambda s, c: {"classes": c, "score": s}, named, named),
    "a head of several": (lambda s, c: (s, c), 1, lambda out: out[1]),
    "weighted parts": (
        lambda s, c: [s, c],
        lambda out: [w * part for w, part in zip((0.5, 2.0), out)],
        lambda out: torch.cat([0.5 * out[0], 2.0 * out[1]], 1),
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_score_says_what_of_an_output_is_differentiated(kind: str, engine: str) -> None:
    pack, score, pick = OUTPUTS[kind]
    critic, (real, fake), alpha = Structured(pack), pair(), torch.rand(N, dtype=torch.float64)
    alone = lambda x: pick(critic(x))  # noqa: E731
    points = interpolate(real, fake, alpha)
    for _ in range(2):
        ours = gradient_penalty(critic, real, fake, score=score, alpha=alpha, engine=engine)
        x = points.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(alone(x).sum(), x, create_graph=True)
        assert_same(critic, ours, 10.0 * ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean())
    expected = alone(fake).mean() - alone(real).mean()
    step = CriticStep(critic, score=score, engine=engine)
    result = step(real, fake, alpha)
    torch.testing.assert_close(result.loss - result.penalty, expected.detach(), rtol=1e-10, atol=1e-12)
    left = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in critic.parameters()]
    whole = gradients(critic, expected + gradient_penalty(critic, real, fake, score=score, alpha=alpha, engine=engine))
    for a, b in zip(left, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_two_scores_of_one_critic_are_two_penalties() -> None:
    critic, (real, fake), alpha = Structured(lambda s, c: (s, c)), pair(), torch.rand(N, dtype=torch.float64)
    values = [gradient_penalty(critic, real, fake, score=i, alpha=alpha, engine="four_pass").item() for i in (0, 1, 0)]
    assert values[0] == values[2] != values[1]


def test_a_function_that_is_made_anew_is_what_it_now_is() -> None:
    critic, (real, fake), alpha = Structured(lambda s, c: (s, c)), pair(), torch.rand(N, dtype=torch.float64)

    def at_weight(w: float) -> Tensor:
        return gradient_penalty(
            critic, real, fake, score=lambda out: w * out[0], target=0.0, alpha=alpha, engine="four_pass"
        )

    torch.testing.assert_close(at_weight(3.0), 9 * at_weight(1.0), rtol=1e-10, atol=0)


def test_a_critic_in_float32_is_checked_against_autograd_with_its_score() -> None:
    critic, (real, fake) = Structured(lambda s, c: (s, c)).float(), (x.float() for x in pair())
    assert gradient_penalty(critic, real, fake, score=0, engine="checked").isfinite()


def test_a_score_is_picked_under_torch_compile() -> None:
    critic, (real, fake), alpha = Structured(lambda s, c: {"s": s, "c": c}), pair(), torch.rand(N, dtype=torch.float64)
    penalty = GradientPenalty(critic, score="s")
    compiled = torch.compile(lambda x, y, a: penalty(x, y, a), fullgraph=True, backend="aot_eager")
    assert_same(critic, compiled(real, fake, alpha), penalty(real, fake, alpha))


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize(
    ("score", "error", "words"),
    [
        (None, TypeError, r"tensor of scores, got tuple; which part is the score, say: score=0"),
        (True, TypeError, "score must be an index, a key, a function"),
        (1.5, TypeError, "score must be an index, a key, a function"),
    ],
)
def test_an_output_without_a_score_is_refused_and_told_how(
    score: object, error: type[Exception], words: str, engine: str
) -> None:
    with pytest.raises(error, match=words):
        gradient_penalty(Structured(lambda s, c: (s, c)), *pair(), score=score, engine=engine)


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize(
    ("pack", "score", "has"),
    [
        (lambda s, c: (s, c), 2, "2 parts"),
        (lambda s, c: [s, c], "score", "2 parts"),
        (lambda s, c: {"s": s, "c": c}, "score", r"the keys \['s', 'c'\]"),
    ],
)
def test_a_score_that_is_not_there_is_refused_and_what_is_there_told(pack, score, has: str, engine: str) -> None:
    with pytest.raises(ValueError, match=f"is not in what the critic returns, which has {has}"):
        gradient_penalty(Structured(pack), *pair(), score=score, engine=engine)


def test_a_score_of_a_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="picks from a tuple, list or dict, and the critic returns a tensor"):
        gradient_penalty(patches(), *pair(), score=0, engine="autograd")


ALPHAS = {
    "a number": 0.3,
    "an integer": 1,
    "a tensor without dimensions": torch.tensor(0.3, dtype=torch.float64),
    "one per sample": torch.rand(N, dtype=torch.float64),
    "one per sample, as a column": torch.rand(N, 1, 1, 1, dtype=torch.float64),
    "one per element": torch.rand(SHAPE, dtype=torch.float64),
    "one per pixel": torch.rand(N, 1, 8, 8, dtype=torch.float64),
    "one per column": torch.rand(8, dtype=torch.float64),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ALPHAS)
def test_any_alpha_that_broadcasts_mixes(kind: str, engine: str) -> None:
    critic, (real, fake), alpha = patches(), pair(), ALPHAS[kind]
    weight = alpha
    if kind == "one per sample":
        weight = alpha.view(-1, 1, 1, 1)
    mixed = weight * real + (1 - weight) * fake
    torch.testing.assert_close(interpolate(real, fake, alpha), mixed, rtol=1e-12, atol=1e-14)
    assert_same(critic, gradient_penalty(critic, real, fake, alpha=alpha, engine=engine), penalty_of(critic, mixed))
    step = CriticStep(critic, engine=engine)(real, fake, alpha)
    torch.testing.assert_close(step.penalty, penalty_of(critic, mixed).detach(), rtol=1e-10, atol=0)


def test_elementwise_alpha_writes_into_out_and_differentiates() -> None:
    (real, fake), alpha = pair(), ALPHAS["one per pixel"].clone().requires_grad_()
    out = torch.empty_like(real)
    assert interpolate(real, fake, alpha, out=out) is out
    torch.testing.assert_close(out, interpolate(real, fake, alpha).detach(), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(interpolate(real, fake, alpha).sum(), alpha)
    torch.testing.assert_close(gradient, (real - fake).sum(1, keepdim=True), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_batch_will_do_where_the_other_is_not_used(engine: str) -> None:
    critic, (real, fake) = patches(), pair()
    r1 = gradient_penalty(critic, real, at="real", target=0.0, weight=5.0, engine=engine)
    assert_same(critic, r1, penalty_of(critic, real, 0.0, 5.0))
    r2 = gradient_penalty(critic, fake=fake, at="fake", target=0.0, weight=5.0, engine=engine)
    assert_same(critic, r2, penalty_of(critic, fake, 0.0, 5.0))
    drawn = gradient_penalty(critic, real, at="perturbed", generator=generator(3), engine=engine)
    pair_of_them = gradient_penalty(critic, real, fake, at="perturbed", generator=generator(3), engine=engine)
    assert torch.equal(drawn.detach(), pair_of_them.detach())


@pytest.mark.parametrize("engine", ENGINES)
def test_points_stand_for_themselves(engine: str) -> None:
    critic, (points, _) = patches(), pair()
    assert_same(critic, gradient_penalty(critic, points=points, engine=engine), penalty_of(critic, points))
    planned = GradientPenalty(critic, weight=3.0, engine=engine)
    leaf = points.clone().requires_grad_()
    assert_same(critic, planned(points=leaf), penalty_of(critic, points, weight=3.0))
    assert leaf.grad is None


def test_points_are_compiled_like_any_batch() -> None:
    critic, (points, _) = patches(), pair()
    penalty = GradientPenalty(critic)
    compiled = torch.compile(lambda x: penalty(points=x), fullgraph=True, backend="aot_eager")
    assert_same(critic, compiled(points), penalty_of(critic, points))


def test_samples_thin_out_given_points() -> None:
    critic, (points, _) = patches(), pair()
    penalty = GradientPenalty(critic, PenaltyConfig(samples=1))
    assert_same(critic, penalty(points=points), penalty_of(critic, points[:1]))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, TypeError, "real must be a tensor, got NoneType"),
        ({"real": torch.ones(4, 3)}, TypeError, "fake must be a tensor, got NoneType"),
        ({"fake": torch.ones(4, 3), "at": "both"}, TypeError, "real must be a tensor, got NoneType"),
        ({"real": torch.ones(4, 3), "points": torch.ones(4, 3)}, ValueError, "points stand in place of real"),
        ({"real": torch.ones(4, 3), "fake": torch.ones(4, 3), "alpha": torch.nan}, ValueError, "alpha must be finite"),
        ({"points": torch.ones(4, 3), "alpha": 0.5}, ValueError, "points stand in place of real"),
        ({"points": torch.ones(4, 3), "at": "real"}, ValueError, "points stand in place of real"),
        ({"points": [1.0]}, TypeError, r"points is a list, which must hold tensors alone, and points\[0\] is float"),
        ({"points": torch.ones(0, 3)}, ValueError, r"points .*\[0, 3\]"),
        ({"points": torch.ones(5, 3), "group_size": 2}, ValueError, "group_size 2 does not divide the batch of 5"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gradient_penalty(nn.Linear(3, 1), **given)
