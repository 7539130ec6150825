"""Critic steps with losses of all that a critic returns, and further arguments of real and fake apart."""

import pytest
import torch
from plain import N, assert_same_gradients, gradients, mixed, penalty
from published_critics import MultiScale, StarGANDiscriminator, TwoHeads
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from wgan_fast import CriticStep, PenaltyConfig, losses

ENGINES = ["four_pass", "autograd"]
SCHEDULES = ["batched", "split"]
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


def images(seed: int, size: int = 16) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(N, 3, size, size, dtype=torch.float64)


def stargan() -> nn.Module:
    torch.manual_seed(0)
    return StarGANDiscriminator(16, classes=3).double()


def star_loss(real, fake, labels: Tensor) -> Tensor:
    """StarGAN's: means of the maps, and cross-entropy of the real images' classes."""
    (real_map, logits), (fake_map, _) = real, fake
    return fake_map.mean() - real_map.mean() + cross_entropy(logits, labels)


def check(step: CriticStep, expected: Tensor, *call, tensors=None, **options) -> None:
    tensors = list(step.critic.parameters()) if tensors is None else tensors
    for tensor in tensors:
        tensor.grad = None
    result = step(*call, **options)
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-10, atol=1e-12)
    ours = [None if t.grad is None else t.grad.clone() for t in tensors]
    assert_same_gradients(ours, gradients(expected, tensors))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("config", [PenaltyConfig(), PenaltyConfig.r1(), PenaltyConfig(at="both"), None], ids=str)
def test_a_map_and_a_class_head(config: PenaltyConfig | None, engine: str, schedule: str) -> None:
    critic, real, fake, alpha = stargan(), images(1), images(2), torch.rand(N, dtype=torch.float64)
    step = CriticStep(critic, loss=star_loss, score=0, penalty=config, engine=engine, schedule=schedule)
    for labels in (LABELS, LABELS.flip(0)):
        expected = star_loss(critic(real), critic(fake), labels)
        if config is not None:
            sets = {"interpolates": [mixed(real, fake, alpha)], "real": [real], "both": [real, fake]}[config.at]
            options = {"weight": config.weight, "target": config.target}
            expected = expected + sum(penalty(critic, x, lambda out: out[0], **options) for x in sets)
        check(step, expected, real, fake, alpha, loss_args=(labels,))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_penalty_may_be_of_another_output(engine: str) -> None:
    critic, real, fake = stargan(), images(1), images(2)
    config = PenaltyConfig(at="real", target=0.0, score=lambda out: cross_entropy(out[1], LABELS, reduction="none"))
    step = CriticStep(critic, loss="hinge", score=0, penalty=config, engine=engine)
    scores = critic(real)[0], critic(fake)[0]
    expected = losses.hinge.critic(*scores) + penalty(critic, real, config.score, target=0.0)
    check(step, expected, real, fake)
    figures = step(real, fake)
    torch.testing.assert_close(figures.real_score, scores[0].mean().detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_features_are_matched(engine: str, schedule: str) -> None:
    torch.manual_seed(0)
    critic, real, fake, alpha = TwoHeads().double(), images(1), images(2), torch.rand(N, dtype=torch.float64)

    def loss(real, fake) -> Tensor:
        pairs = zip(real["features"], fake["features"])
        return (
            softplus(-real["out"]).mean() + softplus(fake["out"]).mean() + sum((a - b).abs().mean() for a, b in pairs)
        )

    step = CriticStep(critic, loss=loss, score="out", engine=engine, schedule=schedule)
    expected = loss(critic(real), critic(fake)) + penalty(critic, mixed(real, fake, alpha), lambda out: out["out"])
    check(step, expected, real, fake, alpha)


@pytest.mark.parametrize("engine", ENGINES)
def test_lists_of_maps_weigh_differently(engine: str) -> None:
    torch.manual_seed(0)
    critic, real, fake = MultiScale().double(), images(1, 32), images(2, 32)
    weights = (0.3, 1.7, 0.6)
    score = lambda out: [w * part for w, part in zip(weights, out)]  # noqa: E731

    def loss(real, fake) -> Tensor:
        return sum(softplus(-r).mean() + softplus(f).mean() for r, f in zip(real, fake))

    step = CriticStep(critic, loss=loss, score=score, penalty=PenaltyConfig.r1(), engine=engine)
    expected = loss(critic(real), critic(fake)) + penalty(critic, real, score, weight=5.0, target=0.0)
    check(step, expected, real, fake)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_loss_leaves_out_has_no_gradient(engine: str) -> None:
    """As by autograd: None, until the loss uses it."""
    critic, real, fake, used = stargan(), images(1), images(2), [False]

    def loss(real, fake) -> Tensor:
        value = fake[0].mean() - real[0].mean()
        return value + real[1].square().mean() if used[0] else value

    step = CriticStep(critic, loss=loss, score=0, engine=engine)
    found = []
    for used[0] in (False, True, False):
        critic.zero_grad()
        step(real, fake, 0.5)
        found.append([p.grad is None for p in critic.parameters()])
        expected = loss(critic(real), critic(fake)) + penalty(critic, 0.5 * (real + fake), lambda out: out[0])
        ours = [None if p.grad is None else p.grad.clone() for p in critic.parameters()]
        assert_same_gradients(ours, gradients(expected, list(critic.parameters())))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_else_the_loss_is_of_learns_too(engine: str) -> None:
    """Its own weights, and the critic's where it adds a decay."""
    critic, real, fake = stargan(), images(1), images(2)
    log_variance = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(real, fake) -> Tensor:
        decay = sum(p.square().sum() for p in critic.parameters())
        return log_variance.exp() * (fake[0].mean() - real[0].mean()) + log_variance + 1e-3 * decay

    step = CriticStep(critic, loss=loss, score=0, engine=engine)
    tensors = [*critic.parameters(), log_variance]
    for _ in range(2):
        expected = loss(critic(real), critic(fake)) + penalty(critic, 0.5 * (real + fake), lambda out: out[0])
        check(step, expected, real, fake, 0.5, tensors=tensors)
    before = gradients(loss(critic(real), critic(fake)), tensors)
    step(real, fake, 0.5)
    once = [t.grad.clone() for t in tensors]
    step(real, fake, 0.5, accumulate=True)
    for tensor, first in zip(tensors, once):
        torch.testing.assert_close(tensor.grad, 2 * first, rtol=1e-10, atol=1e-12)
    assert any(g is not None for g in before)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_penalty_that_fails_leaves_nothing_of_the_loss_behind(engine: str) -> None:
    critic, real, fake = stargan(), images(1), images(2)
    learned = torch.ones((), dtype=torch.float64, requires_grad=True)
    for p in critic.parameters():
        p.grad = torch.ones_like(p)

    def own(gradient: Tensor) -> Tensor:
        raise KeyError("mine")

    loss = lambda real, fake: learned * (fake[0].mean() - real[0].mean())  # noqa: E731
    step = CriticStep(critic, loss=loss, score=0, penalty=PenaltyConfig(penalty=own), engine=engine)
    with pytest.raises(KeyError, match="mine"):
        step(real, fake)
    assert learned.grad is None
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in critic.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_part_of_the_batch_is_penalised_beside_a_loss_of_ones_own(engine: str) -> None:
    critic, real, fake = stargan(), images(1), images(2)
    own = lambda g: (g.norm(2, dim=1) - 1) ** 2  # noqa: E731
    for config in (PenaltyConfig(at="real", samples=3), PenaltyConfig(at="real", samples=3, penalty=own)):
        step = CriticStep(critic, loss=star_loss, score=0, penalty=config, engine=engine)
        value = penalty(critic, real[::2], lambda out: out[0], config.penalty)
        check(step, star_loss(critic(real), critic(fake), LABELS) + value, real, fake, loss_args=(LABELS,))


class Conditional(nn.Module):
    """Scores of samples and labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.label = nn.Linear(5, 8), nn.Linear(8, 1), nn.Embedding(3, 8)
        self.double()

    def forward(self, x: Tensor, labels: Tensor, *, style: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.first(x)) * self.label(labels)
        return self.last(h if style is None else h * style)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at", ["interpolates", "real", "fake", "both"])
def test_real_and_fake_have_labels_of_their_own(at: str, engine: str, schedule: str) -> None:
    """The interpolates have those of real."""
    critic, (real, fake) = Conditional(), torch.randn(2, N, 5, dtype=torch.float64)
    alpha, theirs = torch.rand(N, dtype=torch.float64), LABELS.roll(1)
    step = CriticStep(critic, penalty=PenaltyConfig(at=at), engine=engine, schedule=schedule)
    sets = {
        "interpolates": [(mixed(real, fake, alpha), LABELS)],
        "real": [(real, LABELS)],
        "fake": [(fake, theirs)],
        "both": [(real, LABELS), (fake, theirs)],
    }[at]
    expected = critic(fake, theirs).mean() - critic(real, LABELS).mean()
    expected = expected + sum(penalty(critic, x, lambda out: out, None, y) for x, y in sets)
    check(step, expected, real, fake, alpha, critic_args=(LABELS,), fake_args=(theirs,))
    same = critic(fake, LABELS).mean() - critic(real, LABELS).mean()
    same = same + sum(penalty(critic, x, lambda out: out, None, LABELS) for x, _ in sets)
    check(step, same, real, fake, alpha, critic_args=(LABELS,))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at", ["fake", "both"])
def test_part_of_a_batch_keeps_to_the_labels_of_its_side(at: str, engine: str) -> None:
    critic, (real, fake) = Conditional(), torch.randn(2, N, 5, dtype=torch.float64)
    theirs = LABELS.roll(1)
    step = CriticStep(critic, penalty=PenaltyConfig(at=at, samples=3), engine=engine)
    expected = penalty(critic, fake[::2], lambda out: out, None, theirs[::2])
    if at == "both":
        expected = expected + penalty(critic, real[::2], lambda out: out, None, LABELS[::2])
    expected = expected + critic(fake, theirs).mean() - critic(real, LABELS).mean()
    check(step, expected, real, fake, critic_args=(LABELS,), fake_args=(theirs,))


@pytest.mark.filterwarnings("ignore:wgan_fast differentiates with autograd")
def test_a_critic_that_counts_its_calls_gets_the_arguments_of_each() -> None:
    class Counting(Conditional):
        calls = 0

        def forward(self, x: Tensor, labels: Tensor, *, style: Tensor | None = None) -> Tensor:
            self.calls += 1
            return super().forward(x, labels) * (1 if self.calls % 2 else 2)

    critic, (real, fake) = Counting(), torch.randn(2, N, 5, dtype=torch.float64)
    result = CriticStep(critic, penalty=None)(real, fake, critic_args=(LABELS,), fake_args=(LABELS.roll(1),))
    plain = Conditional.forward
    torch.testing.assert_close(result.real_score, plain(critic, real, LABELS).mean().detach())
    torch.testing.assert_close(result.fake_score, 2 * plain(critic, fake, LABELS.roll(1)).mean().detach())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_both_conditions_learn(engine: str, schedule: str) -> None:
    critic, (real, fake) = Conditional(), torch.randn(2, N, 5, dtype=torch.float64)
    ours, theirs = torch.randn(2, N, 8, dtype=torch.float64).unbind()
    ours, theirs = ours.requires_grad_(), theirs.clone().requires_grad_()
    step = CriticStep(critic, engine=engine, schedule=schedule)
    tensors = [*critic.parameters(), ours, theirs]
    expected = critic(fake, LABELS, style=theirs).mean() - critic(real, LABELS, style=ours).mean()
    expected = expected + penalty(critic, 0.5 * (real + fake), lambda out: out, None, LABELS, style=ours)
    check(
        step, expected, real, fake, 0.5, tensors=tensors, critic_args=(LABELS,), critic_kwargs={"style": ours},
        fake_kwargs={"style": theirs},
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:wgan_fast differentiates with autograd")
def test_arguments_of_another_form_are_left_to_autograd() -> None:
    critic, (real, fake) = Conditional(), torch.randn(2, N, 5, dtype=torch.float64)
    style = torch.randn(8, dtype=torch.float64)
    expected = critic(fake, LABELS).mean() - critic(real, LABELS, style=style).mean()
    expected = expected + penalty(critic, 0.5 * (real + fake), lambda out: out, None, LABELS, style=style)
    step = CriticStep(critic)
    check(step, expected, real, fake, 0.5, critic_args=(LABELS,), critic_kwargs={"style": style}, fake_kwargs={})


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_loss_of_ones_own_adversarial_loss_gets_scores(engine: str) -> None:
    critic, real, fake = stargan(), images(1), images(2)
    own = losses.AdversarialLoss("relativistic", lambda r, f: softplus(f - r).mean(), lambda f: -f.mean())
    step = CriticStep(critic, loss=own, score=0, engine=engine)
    expected = softplus(critic(fake)[0] - critic(real)[0]).mean()
    expected = expected + penalty(critic, 0.5 * (real + fake), lambda out: out[0])
    check(step, expected, real, fake, 0.5)


def test_autocast_and_checks() -> None:
    critic, real, fake = stargan().float(), images(1).float(), images(2).float()
    options = {"loss": star_loss, "score": 0}
    exact = CriticStep(critic, **options)(real, fake, 0.5, loss_args=(LABELS,))
    for more in ({"precision": "bf16"}, {"engine": "checked"}):
        step = CriticStep(critic, **options, **more)
        for _ in range(2):
            result = step(real, fake, 0.5, loss_args=(LABELS,))
        torch.testing.assert_close(result.loss, exact.loss, rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_a_compiled_step_calls_them_between_its_pieces() -> None:
    torch.compiler.reset()
    critic, real, fake = stargan(), images(1), images(2)
    config = PenaltyConfig(penalty=lambda g: (g.norm(2, dim=1) - 1) ** 2)
    left = []
    for compile in (False, True):
        step = CriticStep(critic, loss=star_loss, score=0, penalty=config, engine="four_pass", compile=compile)
        for _ in range(2):
            step(real, fake, 0.5, loss_args=(LABELS,))
        left.append([p.grad.clone() for p in critic.parameters()])
    torch.testing.assert_close(left[0], left[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("options", "given", "error", "words"),
    [
        ({"loss": lambda r, f: 1.0}, {}, TypeError, "loss must return a tensor, got float"),
        ({"loss": lambda r, f: r - f}, {}, ValueError, "loss must return a 0-dim tensor"),
        ({"loss": lambda r, f: r.detach().mean()}, {}, ValueError, "reaches no trainable parameter"),
        ({}, {"loss_args": (1,)}, ValueError, "loss_args are arguments of a loss that is a function"),
        ({"loss": lambda r, f: r.mean()}, {"loss_args": [1]}, TypeError, "loss_args must be a tuple, got list"),
        ({}, {"fake_args": torch.ones(4)}, TypeError, "fake_args must be a tuple, got Tensor"),
        ({}, {"fake_kwargs": [1]}, TypeError, "fake_kwargs must be a mapping or None, got list"),
        ({}, {"penalty_args": (1,)}, ValueError, "penalty_args are arguments of penalty"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict, given: dict, error: type[Exception], words: str, engine: str
) -> None:
    critic = nn.Linear(3, 1)
    for p in critic.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(error, match=words):
        CriticStep(critic, engine=engine, **options)(torch.ones(4, 3), torch.zeros(4, 3), **given)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in critic.parameters())


def test_a_tuple_without_a_score_is_refused_and_told_how() -> None:
    for engine in ("auto", *ENGINES):
        with pytest.raises(TypeError, match="which part is the score, say: score=0"):
            CriticStep(stargan(), loss=star_loss, engine=engine)(images(1), images(2), loss_args=(LABELS,))
