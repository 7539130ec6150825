"""The four-pass engine gives the value and every gradient that autograd's double backward gives, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from exact_critics import (
    CHANNELS_LAST,
    COUPLED,
    CRITICS,
    OBJECTIVES,
    UNPROVEN,
    Custom,
    assert_exact,
    batches_of,
    cross_entropy,
    perturbed,
    truth,
    wasserstein,
)
from four_passes import FourPassEngine
from torch import nn

from wgan_fast.engine.autograd import attach
from wgan_fast.four_pass import CaptureError, Objective

L, C = nn.Linear, nn.Conv2d
VECTORS, IMAGES = (6, 30), (4, 3, 8, 8)


def combinations():
    """Every critic under every objective and schedule; WGAN-GP and one more of the others stay in the fast tests."""
    others = [(objective, s) for objective in OBJECTIVES if objective != "wgan-gp" for s in ("batched", "split")]
    for i, name in enumerate(CRITICS):
        for objective, schedule in [("wgan-gp", "batched"), ("wgan-gp", "split"), *others]:
            fast = objective == "wgan-gp" or (objective, schedule) == others[i % len(others)]
            marks = () if fast else pytest.mark.slow
            yield pytest.param(name, objective, schedule, marks=marks, id=f"{name}-{objective}-{schedule}")


@pytest.mark.parametrize(("name", "objective", "schedule"), list(combinations()))
def test_value_gradients_and_buffers_are_those_of_double_backward(name, objective, schedule):
    torch.manual_seed(1)
    objective = OBJECTIVES[objective]
    make, shape = CRITICS[name]
    critic = perturbed(make())
    plain = copy.deepcopy(critic)
    batches = batches_of(shape, torch.channels_last if name in CHANNELS_LAST else torch.contiguous_format)
    engine = FourPassEngine(critic, objective, schedule=schedule)
    for _ in range(2):
        assert_exact(engine(batches), lambda module: truth(module, objective, batches), plain)
    for ours, theirs in zip(critic.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (plan,) = engine.plans.values()
    assert (plan.coupled is not None) == (name in COUPLED | UNPROVEN)


def projection(self, x, label):
    h = torch.tanh(self.a(x))
    return self.o(h).squeeze(1) + (self.e(label) * h).sum(1)


CONDITIONAL = {
    "projection": Custom(projection, a=L(30, 8), o=L(8, 1), e=nn.Embedding(5, 8)),
    "concatenated": Custom(
        lambda s, x, c: s.o(torch.relu(s.a(torch.cat([x, s.e(c)], 1)))),
        a=L(38, 8),
        o=L(8, 1),
        e=nn.Embedding(5, 8),
    ),
    "modulated": Custom(lambda s, x, c: s.o(torch.relu(s.a(x) * s.e(c))), a=L(30, 8), o=L(8, 1), e=nn.Embedding(5, 8)),
}


@pytest.mark.parametrize("schedule", ["batched", "split"])
@pytest.mark.parametrize("objective", [OBJECTIVES["wgan-gp"], OBJECTIVES["one-sided at both"]])
@pytest.mark.parametrize("critic", CONDITIONAL.values(), ids=CONDITIONAL)
def test_conditional_critics_are_exact(critic, objective, schedule):
    critic = critic.double()
    batches, labels = batches_of(VECTORS), torch.tensor([0, 4, 1, 1, 3, 0])
    output = FourPassEngine(critic, objective, schedule=schedule)(batches, (labels,))
    assert_exact(output, lambda module: truth(module, objective, batches, (labels,)), critic)


@pytest.mark.parametrize("schedule", ["batched", "split"])
@pytest.mark.parametrize("at", ["given", "real", "both"])
def test_packed_samples_share_one_norm(at, schedule):
    critic = Custom(lambda s, x: s.o(torch.tanh(s.a(x.view(-1, 60)))), a=L(60, 8), o=L(8, 1)).double()
    objective = Objective(cross_entropy, at=at, group_size=2)
    batches = batches_of(VECTORS)
    output = FourPassEngine(critic, objective, schedule=schedule)(batches)
    assert_exact(output, lambda module: truth(module, objective, batches), critic)


RANDOM = {
    "dropout": nn.Dropout(0.5),
    "alpha dropout": nn.AlphaDropout(0.4),
    "dropout of features": nn.Dropout1d(0.4),
    "alpha dropout of features": nn.FeatureAlphaDropout(0.4),
    "noise": Custom(lambda s, x: x + 0.3 * torch.randn_like(x)),
    "random gates": Custom(lambda s, x: x * torch.bernoulli(torch.sigmoid(x))),
    "gumbel softmax": Custom(lambda s, x: F.gumbel_softmax(x)),
}


@pytest.mark.parametrize("schedule", ["batched", "split"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_drawn_once_for_forward_and_tangent(name, schedule):
    def forward(self, x):
        return self.c(RANDOM[name](torch.tanh(self.b(RANDOM[name](F.leaky_relu(self.a(x)).view(-1, 4, 4)).flatten(1)))))

    critic = Custom(forward, a=L(30, 16), b=L(16, 16), c=L(16, 1)).double()
    if name == "dropout of features":
        critic.function = lambda s, x: s.c(torch.tanh(s.b(RANDOM[name](s.a(x).view(-1, 4, 4)).flatten(1))))
    batches, objective = batches_of(VECTORS), Objective(wasserstein)
    engine = FourPassEngine(critic, objective, schedule=schedule)
    joined = engine.plan(batches).schedule == "batched"

    def double_backward(module):
        torch.manual_seed(5)
        return truth(module, objective, batches, (), [["real", "fake", "points"]] if joined else None)

    torch.manual_seed(5)
    assert_exact(engine(batches), double_backward, critic)


@pytest.mark.parametrize("objective", [Objective(cross_entropy, weight=None), Objective(wasserstein)])
def test_memory_is_read_between_its_writes(objective):
    """Padding and masks are written piece by piece, batch after batch, while running statistics keep their order."""
    padding, dropout = C(3, 6, 3, padding=1, padding_mode="circular"), nn.AlphaDropout(0.4)
    again = C(6, 6, 3, padding=1, padding_mode="circular")
    critic = nn.Sequential(padding, nn.BatchNorm2d(6), nn.Tanh(), again, dropout, nn.Flatten(), L(384, 1)).double()
    batches = batches_of(IMAGES)
    engine = FourPassEngine(critic, objective)
    engine.plan(batches)

    def double_backward(module):
        torch.manual_seed(5)
        return truth(module, objective, batches)

    plain = copy.deepcopy(critic)
    torch.manual_seed(5)
    assert_exact(engine(batches), double_backward, plain)


def test_an_activation_that_autograd_differentiates_once_is_right():
    """PyTorch has no second derivative of hardsigmoid; the same critic in other words has."""
    torch.manual_seed(1)
    critic = nn.Sequential(L(30, 16), nn.Hardsigmoid(), L(16, 1)).double()
    plain = Custom(lambda s, x: s.b(F.relu6(s.a(x) + 3) / 6), a=critic[0], b=critic[2])
    batches, objective = batches_of(VECTORS), Objective(wasserstein)
    output = FourPassEngine(critic, objective)(batches)
    value, gradients = truth(plain, objective, batches)
    # PyTorch's first derivative of it is float32's sixth in every precision, 3e-8 too much.
    torch.testing.assert_close(output.loss, value, rtol=1e-7, atol=0)
    for ours, theirs in zip(output.gradients[:3], gradients[:3], strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-15


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_run_in_float32_too(kind):
    """Where PyTorch has kernels of its own for them, which the engine must not record."""
    critic = Custom(lambda s, x: s.b(s.r(x.view(-1, 5, 6))[0][:, -1]), r=kind(6, 4, batch_first=True), b=L(4, 1))
    batches, objective = batches_of(VECTORS), Objective(wasserstein)
    double = copy.deepcopy(critic).double()
    output = FourPassEngine(critic, objective)({name: x.float() for name, x in batches.items()})
    value, gradients = truth(double, objective, batches)
    torch.testing.assert_close(output.loss.double(), value, rtol=1e-5, atol=0)
    for ours, theirs in zip(output.gradients, gradients, strict=True):
        ours = torch.zeros_like(theirs) if ours is None else ours.double()
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6  # float32 rounds to 6e-8


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_recurrent_layers_run_whatever_convolutions_compute_in(setting, convolutions_compute_in):
    convolutions_compute_in(setting)  # cuDNN's own switch refuses to be read under some
    critic = Custom(lambda s, x: s.b(s.a(x.view(6, 5, 6))[0][:, -1]), a=nn.LSTM(6, 4, batch_first=True), b=L(4, 1))
    batches = batches_of(VECTORS)
    output = FourPassEngine(critic.double(), Objective(wasserstein))(batches)
    assert_exact(output, lambda module: truth(module, Objective(wasserstein), batches), critic)


def test_zero_input_gradient_costs_but_does_not_poison():
    critic = nn.Sequential(L(30, 8), nn.ReLU(), L(8, 1)).double()
    nn.init.constant_(critic[0].bias, -1e3)
    output = FourPassEngine(critic, Objective(wasserstein))(batches_of(VECTORS))
    assert output.penalty == 10
    assert all(torch.isfinite(g).all() for g in output.gradients)


def test_gradients_are_fresh_memory_at_every_call():
    critic = nn.Sequential(L(30, 8), nn.ReLU(), L(8, 1)).double()
    engine, batches = FourPassEngine(critic, Objective(wasserstein), schedule="batched"), batches_of(VECTORS)
    first = [g.clone() for g in engine(batches).gradients]
    for gradient in engine(batches).gradients:
        gradient.fill_(torch.nan)
    for ours, theirs in zip(engine(batches).gradients, first, strict=True):
        assert torch.equal(ours, theirs)


def test_parameters_are_read_at_every_call():
    critic = nn.Sequential(L(30, 8), nn.Tanh(), L(8, 1)).double()
    engine, batches = FourPassEngine(critic, Objective(wasserstein)), batches_of(VECTORS)
    engine(batches)
    with torch.no_grad():
        critic[0].weight.mul_(2)
    critic[2].bias.data = critic[2].bias.data + 1
    assert_exact(engine(batches), lambda module: truth(module, Objective(wasserstein), batches), critic)


def test_state_that_changes_the_graph_makes_a_new_plan():
    critic = nn.Sequential(L(30, 8), nn.BatchNorm1d(8), nn.Tanh(), L(8, 1)).double()
    engine, batches = FourPassEngine(critic, Objective(wasserstein)), batches_of(VECTORS)
    engine(batches)
    critic.eval()
    assert_exact(engine(batches), lambda module: truth(module, Objective(wasserstein), batches), critic)
    critic[0].requires_grad_(False)
    output = engine(batches)
    assert len(output.gradients) == 4
    assert len(engine.plans) == 3


def test_attached_penalty_scales_and_accumulates_like_any_loss():
    critic = nn.Sequential(L(30, 8), nn.Tanh(), L(8, 1)).double()
    batches, objective = batches_of(VECTORS), Objective(None, at="given")
    output = FourPassEngine(critic, objective)(batches)
    value = attach(output.loss, list(critic.parameters()), output.gradients)
    (3 * value + critic(batches["real"]).mean()).backward()
    ours = [p.grad.clone() for p in critic.parameters()]
    critic.zero_grad()
    critic(batches["real"]).mean().backward()
    for mine, p, g in zip(ours, critic.parameters(), truth(critic, objective, batches)[1], strict=True):
        torch.testing.assert_close(mine, p.grad + 3 * (0 if g is None else g))


def test_what_cannot_be_captured_is_named_with_its_line():
    critic = Custom(lambda s, x: s.a(x) * (2 if x.sum() > 0 else 1), a=L(30, 1)).double()
    with pytest.raises(CaptureError, match=r"torch\.compile could not capture"):
        FourPassEngine(critic, Objective(wasserstein))(batches_of(VECTORS))


def test_an_operator_without_double_backward_is_named_with_its_line():
    def forward(self, x):
        return self.b(torch._adaptive_avg_pool2d(self.a(x).view(-1, 1, 4, 4), [2, 2]).median(dim=-1).values.flatten(1))

    critic = Custom(forward, a=L(30, 16), b=L(2, 1)).double()
    try:
        output = FourPassEngine(critic, Objective(wasserstein))(batches_of(VECTORS))
    except CaptureError as error:
        assert "test_exactness.py" in str(error)  # noqa: PT017 (either way is fine, silence is not)
    else:
        batches = batches_of(VECTORS)
        assert output.loss.isfinite()
        assert_exact(
            FourPassEngine(critic, Objective(wasserstein))(batches),
            lambda module: truth(module, Objective(wasserstein), batches),
            critic,
        )
