"""Scores and penalty from one forward: what loops need that have the scores already and want R1 at the same points."""

import collections
import contextlib
import functools
import operator

import pytest
import torch
from plain import N, assert_same, assert_same_gradients, gradients, norms, opened, penalty
from published_critics import MultiScale, StarGANDiscriminator
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.flop_counter import FlopCounterMode

from wgan_fast import CriticStep, GradientPenalty, PenaltyConfig, PenaltyResult, explain, gradient_penalty

ENGINES = ["four_pass", "autograd"]


def mlp(activation: type[nn.Module] = nn.ReLU, last: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(5, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 64), activation()
    return nn.Sequential(*layers, nn.Linear(64, last)).double()


def patches() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(6, 1, 3, 1, 1)).double()


def coupled() -> nn.Module:
    """Samples that mix, in batch statistics."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()


def embedded() -> nn.Module:
    """A sigmoid last: the scores are what its derivative is computed from."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 1), nn.Sigmoid()).double()


CRITICS = {
    "piecewise linear": (mlp, (N, 5)),
    "smooth": (lambda: mlp(nn.Tanh), (N, 5)),
    "several scores": (lambda: mlp(nn.SiLU, 3), (N, 5)),
    "a map": (patches, (N, 3, 8, 8)),
    "batch norm": (coupled, (N, 5)),
    "a sigmoid": (embedded, (N, 5)),
    "flat scores": (lambda: nn.Sequential(mlp(), nn.Flatten(0)), (N, 5)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CRITICS)
def test_r1_and_a_loss_of_the_same_scores(name: str, engine: str) -> None:
    make, shape = CRITICS[name]
    critic, real = make(), torch.randn(shape, dtype=torch.float64)
    for _ in range(2):
        result = gradient_penalty(
            critic, real, at="real", target=0.0, weight=5.0, engine=engine, return_scores=True, return_norms=True
        )
        assert isinstance(result, PenaltyResult)
        scores, _, gradient = opened(critic, real, lambda out: out)
        torch.testing.assert_close(result.scores.detach(), scores.detach(), rtol=1e-12, atol=1e-14)
        assert result.scores.shape == scores.shape
        assert not result.norms.requires_grad
        torch.testing.assert_close(result.norms, norms(gradient).detach(), rtol=1e-10, atol=0)
        theirs = softplus(-critic(real)).mean() + penalty(critic, real, weight=5.0, target=0.0)
        assert_same(softplus(-result.scores).mean() + result.penalty, theirs, critic)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", ["penalty", "scores", "both, apart", "neither's gradient"])
def test_any_part_of_it_may_be_used(what: str, engine: str) -> None:
    critic, real = mlp(nn.Tanh), torch.randn(N, 5, dtype=torch.float64)
    tensors = list(critic.parameters())
    result = gradient_penalty(critic, real, at="real", target=0.0, engine=engine, return_scores=True)
    value = penalty(critic, real, target=0.0)
    if what == "penalty":
        assert_same(result.penalty, value, critic)
    elif what == "scores":
        assert_same(result.scores.square().mean(), critic(real).square().mean(), critic)
    elif what == "both, apart":
        result.penalty.backward(retain_graph=True)
        result.scores.square().mean().backward()
        ours = [t.grad.clone() for t in tensors]
        assert_same_gradients(ours, gradients(value + critic(real).square().mean(), tensors))
    else:
        with torch.no_grad():
            constant = gradient_penalty(critic, real, at="real", target=0.0, engine=engine, return_scores=True)
        assert not constant.penalty.requires_grad
        assert not constant.scores.requires_grad
        torch.testing.assert_close(constant.penalty, value.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_last_bias_has_zeros_from_a_penalty_as_by_autograd(engine: str) -> None:
    critic, real = mlp(), torch.randn(N, 5, dtype=torch.float64)
    tensors = list(critic.parameters())
    ours = gradients(gradient_penalty(critic, real, at="real", engine=engine, return_scores=True).penalty, tensors)
    assert_same_gradients(ours, gradients(penalty(critic, real), tensors))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("score", [0, 1, lambda out: [0.5 * out[0], out[1]]])
def test_scores_are_what_was_picked(score, engine: str) -> None:
    torch.manual_seed(0)
    critic, real = StarGANDiscriminator(16, classes=3).double(), torch.randn(N, 3, 16, 16, dtype=torch.float64)
    pick = score if callable(score) else lambda out: out[score]
    result = gradient_penalty(critic, real, at="real", target=0.0, score=score, engine=engine, return_scores=True)
    expected = pick(critic(real))
    assert type(result.scores) is type(expected)

    def loss(scores) -> Tensor:
        return sum(softplus(part).mean() for part in (scores if isinstance(scores, list) else [scores]))

    assert_same(loss(result.scores) + result.penalty, loss(expected) + penalty(critic, real, pick, target=0.0), critic)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_list_of_maps(engine: str) -> None:
    torch.manual_seed(0)
    critic, real = MultiScale().double(), torch.randn(N, 3, 32, 32, dtype=torch.float64)
    pick = lambda out: [w * part for w, part in zip((1.0, 0.5, 2.0), out)]  # noqa: E731
    result = gradient_penalty(critic, real, at="real", target=0.0, score=pick, engine=engine, return_scores=True)
    ours = sum(softplus(-part).mean() for part in result.scores) + result.penalty
    theirs = sum(softplus(-part).mean() for part in pick(critic(real))) + penalty(critic, real, pick, target=0.0)
    assert_same(ours, theirs, critic)


@pytest.mark.parametrize("engine", ENGINES)
def test_r1_and_r2(engine: str) -> None:
    critic, (real, fake) = mlp(nn.LeakyReLU), torch.randn(2, N, 5, dtype=torch.float64)
    result = gradient_penalty(
        critic, real, fake, at="both", target=0.0, weight=5.0, engine=engine, return_scores=True, return_norms=True
    )
    assert result.norms.shape == (2 * N,)
    real_scores, fake_scores = result.scores
    theirs = softplus(critic(fake)).mean() + softplus(-critic(real)).mean()
    theirs = theirs + sum(penalty(critic, x, weight=5.0, target=0.0) for x in (real, fake))
    assert_same(softplus(fake_scores).mean() + softplus(-real_scores).mean() + result.penalty, theirs, critic)


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("make", [mlp, lambda: nn.Sequential(mlp(), nn.Flatten(0))])
def test_r1_costs_four_forwards_of_a_piecewise_linear_critic(make) -> None:
    """One forward, one backward, one tangent pass, one gradient of the weights; less the first layer's share."""
    critic, real = make(), torch.randn(64, 5, dtype=torch.float64)
    planned = GradientPenalty(critic, at="real", target=0.0, weight=5.0, engine="four_pass", return_scores=True)

    def step() -> None:
        result = planned(real)
        (softplus(-result.scores).mean() + result.penalty).backward()

    step()
    forward = flops(lambda: critic(real))
    assert flops(step) <= 4 * forward
    assert explain(critic, real, loss=None, penalty=PenaltyConfig.r1(), return_scores=True).units <= 4


def test_r1_and_r2_with_their_loss_cost_eight() -> None:
    critic, (real, fake) = mlp(), torch.randn(2, 64, 5, dtype=torch.float64)

    def step() -> None:
        options = {"target": 0.0, "weight": 5.0, "engine": "four_pass", "return_scores": True}
        r1 = gradient_penalty(critic, real, at="real", **options)
        r2 = gradient_penalty(critic, fake=fake, at="fake", **options)
        loss = softplus(-r1.scores).mean() + softplus(r2.scores).mean()
        (loss + r1.penalty + r2.penalty).backward()

    step()
    assert flops(step) <= 8.1 * flops(lambda: critic(real))


def test_a_tuple_costs_what_its_score_does_and_a_map_one_backward_more() -> None:
    real = torch.randn(32, 5, dtype=torch.float64)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor):
            return self.inner(x), None

    for options in ({}, {"return_scores": True}):
        r1 = PenaltyConfig.r1()
        costs = [
            explain(critic, real, loss=None, penalty=r1, score=score, **options)
            for critic, score in ((mlp(), None), (Two(), 0))
        ]
        assert costs[0].units == costs[1].units
        assert costs[0].launches == costs[1].launches
    assert "scales what the penalty pulled back" in str(costs[0])
    wide = explain(mlp(last=3), real, loss=None, penalty=r1, return_scores=True)
    assert 4.5 < wide.units < 6.1
    assert "one more backward pass, because there are several scores to a sample" in str(wide)
    mixes = explain(coupled(), real, loss=None, penalty=r1, return_scores=True)
    assert "one more backward pass" in (mixes.outside or "")


@pytest.mark.parametrize("engine", ENGINES)
def test_functions_methods_and_conditions(engine: str) -> None:
    inner, x, c = mlp(nn.Tanh), torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)

    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def score(self, condition: Tensor, x: Tensor) -> Tensor:
            return self.inner(torch.cat([x, condition], 1))

    module = Method()
    theirs = penalty(lambda z: module.score(c, z), x)
    forms = {
        "lambda": lambda: gradient_penalty(lambda z: module.score(c, z), points=x, engine=engine),
        "partial": lambda: gradient_penalty(functools.partial(module.score, c), points=x, engine=engine),
        "keyword": lambda: gradient_penalty(
            lambda z, condition: module.score(condition, z), points=x, critic_kwargs={"condition": c}, engine=engine
        ),
    }
    for form in forms.values():
        ours = form()
        assert_same(ours, theirs, module)
        theirs = penalty(lambda z: module.score(c, z), x)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_data_parallel_on_one_device_is_its_module(engine: str, recwarn: pytest.WarningsRecorder) -> None:
    critic, (real, fake) = mlp(nn.Tanh), torch.randn(2, N, 5, dtype=torch.float64)
    spread = nn.DataParallel(critic)
    assert_same(
        gradient_penalty(spread, real, fake, alpha=0.5, engine=engine), penalty(critic, 0.5 * (real + fake)), critic
    )
    step = CriticStep(spread, engine=engine)(real, fake, 0.5)
    torch.testing.assert_close(step.penalty, penalty(critic, 0.5 * (real + fake)).detach(), rtol=1e-10, atol=0)
    assert not [w for w in recwarn.list if "wgan_fast" in str(w.message)]


def test_weights_that_change_before_the_backward_are_noticed() -> None:
    critic, real = mlp(nn.Tanh), torch.randn(N, 5, dtype=torch.float64)
    result = gradient_penalty(critic, real, at="real", engine="four_pass", return_scores=True)
    with torch.no_grad():
        critic[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.penalty.backward()


def test_scores_may_be_written_to() -> None:
    """They are the caller's own, also where the backward pass is computed from them."""
    critic, real = embedded(), torch.randn(N, 5, dtype=torch.float64)
    result = gradient_penalty(critic, real, at="real", engine="four_pass", return_scores=True)
    scores = result.scores
    scores.add_(1)
    theirs = (critic(real) + 1).square().mean() + penalty(critic, real)
    assert_same(scores.square().mean() + result.penalty, theirs, critic)


def test_dropout_masks_are_the_same_in_both_pieces() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Tanh(), nn.Linear(40, 1)).double()
    real = torch.randn(N, 5, dtype=torch.float64)
    torch.manual_seed(7)
    ours = gradient_penalty(critic, real, at="real", engine="four_pass", return_scores=True)
    torch.manual_seed(7)
    theirs = gradient_penalty(critic, real, at="real", engine="autograd", return_scores=True)
    assert_same(ours.penalty + ours.scores.square().mean(), theirs.penalty + theirs.scores.square().mean(), critic)


def test_checked_compares_what_others_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from wgan_fast.engine import checked
    from wgan_fast.four_pass.plan import Plan

    critic, real = mlp(nn.Tanh), torch.randn(N, 5, dtype=torch.float64)

    def step() -> None:
        result = gradient_penalty(critic, real, at="real", engine="checked", return_scores=True)
        (result.penalty + result.scores.square().mean()).backward()

    step()
    go_on = Plan.go_on

    def wrong(self, *args):
        *figures, gradients = go_on(self, *args)
        return (*figures, [None if g is None else 1.1 * g for g in gradients])

    monkeypatch.setattr(Plan, "go_on", wrong)
    with pytest.raises(checked.GradientsDifferError):
        step()


@pytest.mark.parametrize("what", ["penalty", "scores"])
def test_a_second_derivative_raises_instead_of_missing(what: str) -> None:
    critic, real = mlp(nn.Tanh), torch.randn(N, 5, dtype=torch.float64)
    weight = critic[0].weight
    result = gradient_penalty(critic, real, at="real", engine="four_pass", return_scores=what == "scores")
    value = result.scores.exp().mean() if what == "scores" else result
    (first,) = torch.autograd.grad(value + weight.square().sum(), weight, create_graph=True)
    torch.testing.assert_close(first, first.detach())
    with pytest.raises(RuntimeError, match='engine="autograd" gives ones that can'):
        first.square().sum().backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_score_that_is_listed_twice_counts_twice(engine: str) -> None:
    critic, real = mlp(nn.Tanh), torch.randn(N, 5, dtype=torch.float64)
    twice = lambda out: [out, out]  # noqa: E731
    with pytest.warns(RuntimeWarning, match="listed twice") if engine == "four_pass" else contextlib.nullcontext():
        ours = gradient_penalty(
            critic, real, at="real", score=twice, engine="auto" if engine == "four_pass" else engine
        )
    assert_same(ours, penalty(critic, real, lambda out: 2 * out), critic)


@pytest.mark.parametrize("engine", ENGINES)
def test_names_and_getters_pick(engine: str) -> None:
    inner, real = mlp(nn.Tanh), torch.randn(N, 5, dtype=torch.float64)
    outputs = collections.namedtuple("outputs", "score features")

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor):
            return outputs(self.inner(x), x)

    critic, theirs = Named(), penalty(inner, real)
    getters = [] if engine == "four_pass" else [operator.itemgetter(0), operator.attrgetter("score")]
    for score in ("score", 0, *getters):
        ours = gradient_penalty(critic, real, at="real", score=score, engine=engine)
        assert_same(ours, theirs, inner)
        theirs = penalty(inner, real)


def test_several_scores_of_one_critic_stay_in_four_passes(recwarn: pytest.WarningsRecorder) -> None:
    real = torch.randn(N, 5, dtype=torch.float64)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(nn.Tanh, 6)

        def forward(self, x: Tensor):
            return self.inner(x).unbind(1)

    heads = Heads()
    for i in range(6):
        gradient_penalty(heads, real, at="real", score=i)
    assert not [w for w in recwarn.list if "wgan_fast" in str(w.message)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_penalty_may_write_to_the_gradient(engine: str) -> None:
    critic, (real, fake) = mlp(nn.Tanh), torch.randn(2, N, 5, dtype=torch.float64)
    own = lambda g: g.pow_(2).sum(1)  # noqa: E731
    ours = gradient_penalty(critic, real, at="real", penalty=own, engine=engine)
    assert_same(ours, penalty(critic, real, own=lambda g: g.pow(2).sum(1)), critic)
    loss = lambda r, f: f.add_(1).mean() - r.mul_(2).mean()  # noqa: E731
    step = CriticStep(critic, loss=loss, penalty=PenaltyConfig(at="real", penalty=own), engine=engine)
    expected = (
        (critic(fake) + 1).mean() - 2 * critic(real).mean() + penalty(critic, real, own=lambda g: g.pow(2).sum(1))
    )
    torch.testing.assert_close(step(real, fake).loss, expected.detach(), rtol=1e-10, atol=1e-12)
