"""The four-pass engine in other people's training code: loops, scalers, compilers, processes, copies."""

import copy
import gc
import os
import pickle
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import textbook
import torch
from critic_steps import PENALTIES, assert_equal_figures, points_of
from textbook import CASES, CRITIC_LOSSES, LAYOUTS, Case, assert_equal_gradients, distance, gradients_left_in
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

from wgan_fast import CriticStep, GradientPenalty, PenaltyConfig, explain, gradient_penalty, losses, reference
from wgan_fast.four_pass import CaptureError
from wgan_fast.training import models


@pytest.fixture(autouse=True)
def _no_warning():
    """A fallback that no test expects fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


class Branching(nn.Module):
    """Branches on data, which torch.export cannot capture."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.layers(x)
        return 2 * self.layers(x)


class SpectralCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(spectral_norm(nn.Linear(5, 9)), nn.LeakyReLU(0.2), spectral_norm(nn.Linear(9, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 9), nn.LeakyReLU(0.2), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 1)).to(dtype)


def samples(batch: int = 7) -> tuple[Tensor, Tensor]:
    return CASES["mlp"].samples(batch=batch)


def alpha(batch: int = 7) -> Tensor:
    return CASES["mlp"].alpha(batch=batch)


def gradients_of(value: Tensor, critic: nn.Module) -> dict[str, Tensor]:
    return textbook.gradients(value, critic)


def assert_same(critic: nn.Module, penalty: Callable[[str], Tensor]) -> None:
    """``penalty(engine)`` has the value and gradients of autograd under "auto", which may not fall back."""
    expected, actual = penalty("autograd"), penalty("auto")
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
    assert_equal_gradients(gradients_of(actual, critic), gradients_of(expected, critic))


@pytest.mark.parametrize(
    ("at", "one_sided"),
    [
        ("interpolates", False),
        ("interpolates", True),
        ("real", False),
        ("fake", True),
        ("both", True),
        ("perturbed", False),
    ],
)
def test_penalty_is_that_of_autograd(case: Case, at: str, one_sided: bool) -> None:
    critic, (real, fake) = case.critic(), case.samples()
    target = case.typical_norm([real, fake]) if one_sided else 0.3

    def penalty(engine):
        torch.manual_seed(4)
        return gradient_penalty(
            critic, real, fake, weight=3.0, target=target, one_sided=one_sided, at=at, engine=engine,
            alpha=case.alpha(), group_size=case.group_size, critic_args=case.args, critic_kwargs=case.kwargs,
        )  # fmt: skip

    assert_same(critic, penalty)


@pytest.mark.parametrize("target", [0.0, 1.0, 2.5])
def test_penalty_is_that_of_autograd_at_every_target(target: float) -> None:
    critic, (real, fake) = mlp(), samples()
    assert_same(critic, lambda e: gradient_penalty(critic, real, fake, alpha=alpha(), target=target, engine=e))


def test_backward_scales_with_what_comes_from_above() -> None:
    critic, (real, fake) = mlp(), samples()
    whole = gradients_of(gradient_penalty(critic, real, fake, alpha=alpha()), critic)
    scaled = gradients_of(0.25 * gradient_penalty(critic, real, fake, alpha=alpha()) + 3, critic)
    assert_equal_gradients(scaled, {name: 0.25 * g for name, g in whole.items()})


def test_penalty_goes_through_a_gradient_scaler() -> None:
    critic, (real, fake) = mlp(torch.float32), [x.float() for x in samples()]
    expected = gradients_of(gradient_penalty(critic, real, fake, alpha=alpha()), critic)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.optim.SGD(critic.parameters(), 0.1)
    critic.zero_grad()
    scaler.scale(gradient_penalty(critic, real, fake, alpha=alpha())).backward()
    assert_equal_gradients(gradients_left_in(critic), {name: 2.0**10 * g for name, g in expected.items()}, rtol=1e-6)
    scaler.unscale_(optimizer)
    assert_equal_gradients(gradients_left_in(critic), expected, rtol=1e-6)


def test_gradients_accumulate_over_calls() -> None:
    critic, (real, fake) = mlp(), samples()
    first = gradients_of(gradient_penalty(critic, real, fake, alpha=alpha()), critic)
    second = gradients_of(gradient_penalty(critic, fake, real, alpha=alpha()), critic)
    critic.zero_grad()
    gradient_penalty(critic, real, fake, alpha=alpha()).backward()
    gradient_penalty(critic, fake, real, alpha=alpha()).backward()
    assert_equal_gradients(gradients_left_in(critic), {name: first[name] + second[name] for name in first})


def test_modules_shared_with_another_loss_get_both_gradients() -> None:
    trunk, head, other = mlp()[:4], nn.Linear(9, 1).double(), nn.Linear(9, 3).double()
    critic, (real, fake) = nn.Sequential(trunk, head), samples()

    def loss(engine):
        penalty = gradient_penalty(critic, real, fake, alpha=alpha(), engine=engine)
        return penalty + other(trunk(real)).square().mean() + critic(fake).mean() - critic(real).mean()

    both = nn.ModuleList([critic, other])
    assert_equal_gradients(gradients_of(loss("auto"), both), gradients_of(loss("autograd"), both))


def test_freezing_parameters_between_calls_takes_their_gradients_away() -> None:
    critic, (real, fake) = mlp(), samples()
    penalty = GradientPenalty(critic)
    everything = gradients_of(penalty(real, fake, alpha()), critic)
    critic[0].requires_grad_(False)
    rest = gradients_of(penalty(real, fake, alpha()), critic)
    assert critic[0].weight.grad is None
    assert_equal_gradients(rest, {name: everything[name] for name in rest})
    critic[0].requires_grad_(True)
    assert_equal_gradients(gradients_of(penalty(real, fake, alpha()), critic), everything)


def test_penalty_of_a_frozen_critic_has_a_backward_that_leaves_nothing() -> None:
    critic, (real, fake) = mlp().requires_grad_(False), samples()
    penalty = gradient_penalty(critic, real, fake, alpha=alpha(), engine="four_pass")
    assert penalty > 0
    penalty.backward()
    assert all(parameter.grad is None for parameter in critic.parameters())


@pytest.mark.parametrize("change", ["in place", "data", "optimizer", "load_state_dict", "new parameter"])
def test_parameters_are_read_at_every_call(change: str) -> None:
    critic, (real, fake) = mlp(), samples()
    penalty = GradientPenalty(critic)
    before = penalty(real, fake, alpha())
    if change == "in place":
        with torch.no_grad():
            critic[0].weight.mul_(2)
    elif change == "data":
        critic[0].weight.data = critic[0].weight.data + 0.5
    elif change == "optimizer":
        before.backward()
        torch.optim.SGD(critic.parameters(), 0.1).step()
    elif change == "load_state_dict":
        critic.load_state_dict({name: 1.5 * p for name, p in critic.state_dict().items()}, assign=True)
    else:
        critic[0].weight = nn.Parameter(2 * critic[0].weight.detach())
    assert not torch.isclose(penalty(real, fake, alpha()), before)
    assert_same(critic, lambda engine: gradient_penalty(critic, real, fake, alpha=alpha(), engine=engine))


def test_spectral_norm_in_training_is_that_of_autograd() -> None:
    torch.manual_seed(1)
    critic, (real, fake) = SpectralCritic().double(), samples()
    plain = copy.deepcopy(critic)
    for _ in range(2):
        ours = gradients_of(gradient_penalty(critic, real, fake, alpha=alpha()), critic)
        theirs = gradients_of(gradient_penalty(plain, real, fake, alpha=alpha(), engine="autograd"), plain)
        assert_equal_gradients(ours, theirs)
    for ours, theirs in zip(critic.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_train_and_eval_are_planned_apart() -> None:
    torch.manual_seed(1)
    critic = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 1)).double()
    real, fake = samples()

    def penalty(engine):
        engine = "four_pass" if engine == "auto" else engine
        return gradient_penalty(critic, real, fake, alpha=alpha(), engine=engine)

    for training in (True, False, True):
        critic.train(training)
        assert_same(critic, penalty)


def test_a_last_smaller_batch_is_exact() -> None:
    critic = mlp()
    for batch in (7, 3, 1, 7):
        real, fake = samples(batch)
        assert_same(critic, lambda e, r=real, f=fake: gradient_penalty(critic, r, f, alpha=alpha(len(r)), engine=e))


def test_no_grad_gives_the_value() -> None:
    critic, (real, fake) = mlp(), samples()
    expected = gradient_penalty(critic, real, fake, alpha=alpha(), engine="autograd")
    with torch.no_grad():
        penalty = gradient_penalty(critic, real, fake, alpha=alpha())
    assert not penalty.requires_grad
    torch.testing.assert_close(penalty, expected.detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["module", "function", "bound method"])
def test_what_cannot_be_captured_warns_once_and_is_exact(kind: str) -> None:
    torch.manual_seed(1)
    critic, (real, fake) = Branching().double(), samples()

    def function(x: Tensor) -> Tensor:
        return critic(x)

    def call() -> Callable[[Tensor], Tensor]:
        return {"module": critic, "function": function, "bound method": critic.forward}[kind]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for weight in (10.0, 10.0, 3.0):
            penalty = gradient_penalty(call(), real, fake, alpha=alpha(), weight=weight)
            if kind == "module":
                CriticStep(critic)(real, fake, alpha())
    (warning,) = [w for w in caught if w.category is RuntimeWarning]
    message = str(warning.message)
    assert warning.filename == __file__
    assert "test_engine_use.py" in message
    assert "if x.sum() > 0" in message
    assert "Data-dependent" in message
    expected = textbook.penalty(critic, [textbook.interpolates(real, fake, alpha())], weight=3.0)
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)
    assert_equal_gradients(gradients_of(penalty, critic), gradients_of(expected, critic))


@pytest.mark.parametrize("kind", ["module", "function"])
def test_four_pass_raises_where_it_cannot_capture(kind: str) -> None:
    critic, (real, fake) = Branching().double(), samples()
    called = critic if kind == "module" else lambda x: critic(x)
    with pytest.raises(CaptureError, match=r"test_engine_use\.py"):
        gradient_penalty(called, real, fake, engine="four_pass")


@pytest.mark.parametrize("engine", ["auto", "four_pass", "autograd"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            nn.Sequential(nn.Linear(5, 1), nn.Flatten(0), nn.Unflatten(0, (1, -1))),
            ValueError,
            r"a row of scores per sample, shape \[7\] or \[7, \.\.\.\], got \[1, 7\]",
        ),
        (nn.LSTM(5, 1), TypeError, "must return a tensor of scores, got tuple"),
    ],
    ids=["transposed", "tuple"],
)
def test_wrong_scores_raise_in_every_engine(
    wrong: nn.Module, error: type[Exception], message: str, engine: str
) -> None:
    critic, (real, fake) = copy.deepcopy(wrong).double(), samples()
    with pytest.raises(error, match=message):
        gradient_penalty(critic, real, fake, engine=engine)
    with pytest.raises(error, match=message):
        CriticStep(critic, engine=engine)(real, fake)
    assert all(p.grad is None for p in critic.parameters())


def stepped(critic: nn.Module, steps: Callable[[CriticStep], object], **options: object) -> dict[str, Tensor]:
    critic.zero_grad()
    steps(CriticStep(critic, **options))
    return gradients_left_in(critic)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("loss", CRITIC_LOSSES)
def test_step_is_that_of_autograd_and_of_the_reference(loss: str, penalty: str) -> None:
    critic, (real, fake), config = mlp(), samples(), PENALTIES[penalty]
    results = {}

    def take(step: CriticStep) -> None:
        torch.manual_seed(4)
        results[step.engine] = step(real, fake, alpha())

    ours = stepped(critic, take, loss=loss, penalty=config, engine="four_pass")
    theirs = stepped(critic, take, loss=loss, penalty=config, engine="autograd")
    assert_equal_figures(results["four_pass"], results["autograd"]._asdict())
    assert_equal_gradients(ours, theirs)
    if config is None:
        return
    torch.manual_seed(4)
    truth = reference.critic_step(
        critic, real, fake, points_of(config, real, fake, alpha()), loss=CRITIC_LOSSES[loss],
        weight=config.weight, target=config.target, one_sided=config.one_sided,
    )  # fmt: skip
    torch.testing.assert_close(results["four_pass"].loss, truth.loss, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(results["four_pass"].gradient_norm, truth.gradient_norm, rtol=1e-10, atol=0)
    expected = {name: torch.zeros_like(ours[name]) if g is None else g for name, g in zip(ours, truth.gradients)}
    assert_equal_gradients(ours, expected)


@pytest.mark.parametrize("name", CASES)
def test_step_is_that_of_autograd_for_every_critic(name: str) -> None:
    case = CASES[name]
    critic, (real, fake) = case.critic(), case.samples()
    options = {"penalty": PenaltyConfig(group_size=case.group_size)}

    def take(step: CriticStep) -> None:
        step(real, fake, case.alpha(), critic_args=case.args, critic_kwargs=case.kwargs)

    assert_equal_gradients(
        stepped(critic, take, engine="four_pass", **options), stepped(critic, take, engine="autograd", **options)
    )


def test_steps_accumulate() -> None:
    critic, (real, fake) = mlp(), samples()

    def take(step: CriticStep) -> None:
        step(real, fake, alpha())
        step(fake, real, alpha(), accumulate=True)

    assert_equal_gradients(stepped(critic, take, engine="four_pass"), stepped(critic, take, engine="autograd"))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_lazy_penalty_is_that_of_autograd(steps: int) -> None:
    critic, (real, fake) = mlp(), samples()

    def take(step: CriticStep) -> None:
        for i in range(steps):
            step(real, fake, alpha(), accumulate=i > 0)

    options = {"penalty": PenaltyConfig(every=3)}
    assert_equal_gradients(
        stepped(critic, take, engine="four_pass", **options), stepped(critic, take, engine="autograd", **options)
    )


@pytest.mark.parametrize("name", ["mlp", "dcgan"])
def test_bf16_errs_at_most_twice_as_much_as_that_of_autograd(name: str) -> None:
    case = CASES[name]
    critic, batch = case.critic(torch.float32), 64
    real, fake = case.samples(torch.float32, batch)
    exact = copy.deepcopy(critic).double()
    truth = stepped(exact, lambda step: step(real.double(), fake.double(), case.alpha(batch=batch)), engine="autograd")
    errors = {
        engine: distance(
            stepped(critic, lambda step: step(real, fake, case.alpha(batch=batch)), engine=engine, precision="bf16"),
            truth,
        )
        for engine in ("four_pass", "autograd")
    }
    assert 0 < errors["four_pass"] <= 2 * errors["autograd"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_takes_any_layout(layout: str) -> None:
    case = CASES["dcgan"]
    critic, (real, fake) = case.critic(), case.samples()
    if layout == "channels_last":
        critic = critic.to(memory_format=torch.channels_last)
    laid_out = LAYOUTS[layout](real), LAYOUTS[layout](fake)
    if layout == "every second":
        real, fake = (x.clone() for x in laid_out)
    expected = stepped(critic, lambda step: step(real, fake, case.alpha()), engine="autograd")
    ours = stepped(critic, lambda step: step(*laid_out, case.alpha()), engine="four_pass")
    assert_equal_gradients(ours, expected)
    mixed = stepped(critic, lambda step: step(laid_out[0], fake, case.alpha()), engine="four_pass")
    assert_equal_gradients(mixed, expected)


@pytest.mark.parametrize("engine", ["auto", "four_pass", "autograd"])
def test_step_of_a_frozen_critic_raises(engine: str) -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        CriticStep(mlp().requires_grad_(False), engine=engine)(*samples())


@pytest.mark.parametrize("engine", ["auto", "four_pass", "autograd"])
def test_scores_that_do_not_depend_on_the_input_raise(engine: str) -> None:
    class Blind(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    critic = Blind(5, 1).double()
    with pytest.raises(ValueError, match="do not depend on its input"):
        gradient_penalty(critic, *samples(), engine=engine)
    with pytest.raises(ValueError, match="do not depend on its input"):
        CriticStep(critic, engine=engine)(*samples())


def test_a_loss_of_ones_own_is_what_it_is_at_every_step(recwarn: pytest.WarningsRecorder) -> None:
    scale = [2.0]

    def loss(real: Tensor, fake: Tensor) -> Tensor:
        return (fake - real).mean() * (scale[0] if real.mean().item() > -1e6 else 1.0)

    critic, (real, fake) = mlp(), samples()
    own = losses.AdversarialLoss("own", loss, losses.wasserstein.generator)
    for scale[0] in (2.0, 3.0):
        ours = stepped(critic, lambda step: step(real, fake, alpha()), loss=own, engine="four_pass")
        assert_equal_gradients(
            ours, stepped(critic, lambda step: step(real, fake, alpha()), loss=own, engine="autograd")
        )
    assert not recwarn.list


def user_step(critic: nn.Module, penalty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A training script's loss, to be compiled whole."""

    def loss(real: Tensor, fake: Tensor, alpha: Tensor, *args: Tensor) -> Tensor:
        options = {"critic_args": args} if args else {}
        return critic(fake, *args).mean() - critic(real, *args).mean() + penalty(real, fake, alpha, **options)

    return loss


def naive(critic: nn.Module) -> Callable[..., Tensor]:
    def penalty(real: Tensor, fake: Tensor, alpha: Tensor, critic_args: tuple[Tensor, ...] = ()) -> Tensor:
        points = [textbook.interpolates(real, fake, alpha)]
        return textbook.penalty(critic, points, args=critic_args)

    return penalty


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [mlp, textbook.ConditionalCritic, SpectralCritic], ids=lambda make: make.__name__)
def test_penalty_compiles_within_the_callers_step(make: Callable[[], nn.Module], backend: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(1)
    critic = make().double()
    plain = copy.deepcopy(critic)
    compiled = torch.compile(user_step(critic, GradientPenalty(critic)), fullgraph=True, backend=backend)
    for batch in (7, 4, 7):
        real, fake = samples(batch)
        args = (torch.arange(batch) % textbook.CLASSES,) if make is textbook.ConditionalCritic else ()
        ours = gradients_of(compiled(real, fake, alpha(batch), *args), critic)
        theirs = gradients_of(user_step(plain, naive(plain))(real, fake, alpha(batch), *args), plain)
        assert_equal_gradients(ours, theirs)
    for ours, theirs in zip(critic.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


class Fading(nn.Module):
    """Reads all that a module may hold, as progressive growing does, and keeps what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(5, 4), nn.Linear(4, 1)
        self._slope, self.alpha, self.settings = 0.2, torch.tensor(0.3, dtype=torch.float64), {"scale": 0.5}
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.leaky_relu(self.inner(x), self._slope) * self.alpha * self.settings["scale"]
        self.rows = x.shape[0]
        return self.last(hidden)


class Counting(Fading):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_whatever_a_module_holds_may_change_between_calls() -> None:
    critic = Fading().double()
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: setattr(critic, "_slope", 0.9),
        lambda: setattr(critic, "alpha", torch.tensor(2.0, dtype=torch.float64)),
        lambda: critic.settings.update(scale=1.5),
        lambda: critic.inner.register_forward_hook(lambda module, given, out: out * 2),
        lambda: (critic.inner._forward_hooks.clear(), critic.inner.register_forward_hook(lambda m, g, out: out * 3)),
    ]
    penalty = GradientPenalty(critic, engine="four_pass")
    for change in changes:
        change()
        for _ in range(2):
            ours = gradients_of(penalty(*samples(), alpha()), critic)
            assert_equal_gradients(ours, gradients_of(naive(critic)(*samples(), alpha()), critic))
    # What the forward keeps for itself is no reason to plan again.
    assert len(penalty._four_passes.four_pass.plans) <= len(changes)


def test_a_forward_that_counts_its_calls_is_left_to_autograd() -> None:
    critic, plain = Counting().double(), Counting().double()
    plain.load_state_dict(critic.state_dict())
    with pytest.warns(RuntimeWarning, match="computes something else at every call"):
        first = stepped(critic, lambda step: step(*samples(), alpha()))
    for ours in (first, stepped(critic, lambda step: step(*samples(), alpha()))):
        assert_equal_gradients(ours, stepped(plain, lambda step: step(*samples(), alpha()), engine="autograd"))
    assert critic.calls == plain.calls == 6
    for _ in range(3):
        torch.testing.assert_close(
            gradient_penalty(critic, *samples(), alpha=alpha()), naive(plain)(*samples(), alpha())
        )


def test_the_function_compiles_cold_and_knows_one_critic_from_another() -> None:
    torch.compiler.reset()

    def penalty(critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
        return gradient_penalty(critic, real, fake, alpha=alpha)

    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    real, fake = samples()
    for slope in (0.1, 0.7, 0.3):
        critic = nn.Sequential(nn.Linear(5, 4), nn.LeakyReLU(slope), nn.Linear(4, 1)).double()
        ours = gradients_of(compiled(critic, real, fake, alpha()), critic)
        assert_equal_gradients(ours, gradients_of(naive(critic)(real, fake, alpha()), critic))


def test_naive_penalty_does_not_compile_within_the_callers_step() -> None:
    """What the operator is for; where torch learns it, this test says so."""
    torch.compiler.reset()
    critic = mlp()
    compiled = torch.compile(user_step(critic, naive(critic)), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"autograd\.grad|double backward|requires_grad"):
        compiled(*samples(), alpha()).backward()


def test_operators_pass_opcheck() -> None:
    critic, (real, _) = mlp(), samples()
    penalty = GradientPenalty(critic, engine="four_pass", return_scores=True)
    parameters = [p.detach().clone().requires_grad_() for p in critic.parameters()]
    number, nest = penalty._four_passes.number, "['tuple', (0,), ['tuple', ], {}, ]"
    arguments = (number, [real], [0], parameters, [], nest, None, True, True, 0)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.wgan_fast.input_gradient.default, arguments, test_utils=checks)
    token, gradient, scores = torch.ops.wgan_fast.input_gradient(*arguments)
    constants = [p.detach() for p in parameters]
    given = number, token, constants, [gradient.detach(), scores.detach()]
    torch.library.opcheck(torch.ops.wgan_fast.parameter_gradients.default, given, test_utils=("test_faketensor",))


@pytest.mark.slow
def test_compiled_step_is_the_uncompiled_one() -> None:
    torch.compiler.reset()
    critic = mlp()
    step = CriticStep(critic, compile=True, engine="four_pass")
    for batch in (7, 4, 7):
        real, fake = samples(batch)
        step(real, fake, alpha(batch))
        ours = gradients_left_in(critic)
        plain = stepped(critic, lambda step, r=real, f=fake: step(r, f, alpha(len(r))), engine="four_pass")
        assert_equal_gradients(ours, plain)


@pytest.mark.slow
def test_compiling_again_happens_once_for_a_last_smaller_batch() -> None:
    torch._dynamo.reset()
    critic = mlp()
    step = CriticStep(critic, compile=True, engine="four_pass")
    torch._dynamo.utils.counters.clear()
    frames = []
    for batch in (6, 4, 6, 4, 6):
        step(*samples(batch), alpha(batch))
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # Of the first step the critic's own trace is one, too.
    assert frames == [2, 3, 3, 3, 3]


def test_the_code_of_a_step_can_be_read() -> None:
    critic, (real, fake) = mlp(), samples()
    step = CriticStep(critic)
    assert step.code == ""
    step(real, fake)
    assert "def forward(self, p_0_weight" in step.code
    assert "threshold_backward" in step.code or "tanh_backward" in step.code


def test_compiler_failure_warns_once_and_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(graph: Callable[..., object], **options: object) -> Callable[..., object]:
        def fail(*args: object) -> object:
            raise RuntimeError("no compiler here\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    critic, (real, fake) = mlp(), samples()
    step = CriticStep(critic, compile=True)
    with pytest.warns(RuntimeWarning, match="no compiler here$"):
        step(real, fake, alpha())
    step(real, fake, alpha())  # a second warning would raise
    ours = gradients_left_in(critic)
    assert_equal_gradients(ours, stepped(critic, lambda step: step(real, fake, alpha()), engine="autograd"))


def _train_in_parallel(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    critic = mlp()
    wrapped = DistributedDataParallel(critic)
    rows = slice(4 * rank, 4 * rank + 4)
    real, fake = (x[rows] for x in samples(8))
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        loss = wrapped(fake).mean() - wrapped(real).mean()
        (loss + gradient_penalty(wrapped, real, fake, alpha=alpha(8)[rows])).backward()
    found["loop"] = gradients_left_in(critic)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CriticStep(wrapped)(real, fake, alpha(8)[rows])
        CriticStep(wrapped)(real, fake, alpha(8)[rows])
    found["warnings"] = [str(w.message) for w in caught if w.category is RuntimeWarning]
    found["step"] = gradients_left_in(critic)
    try:
        CriticStep(wrapped, engine="four_pass")(real, fake)
    except CaptureError as error:
        found["error"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_the_joined_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_in_parallel, (str(tmp_path),), nprocs=2)
    critic, (real, fake) = mlp(), samples(8)
    expected = stepped(critic, lambda step: step(real, fake, alpha(8)), engine="autograd")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_equal_gradients(found["loop"], expected)
        assert_equal_gradients(found["step"], expected)
        (warning,) = found["warnings"]
        assert "DistributedDataParallel" in warning
        assert "DistributedDataParallel" in found["error"]


@pytest.mark.parametrize("use", ["penalty", "step", "explain"])
def test_plans_do_not_keep_a_critic_alive(use: str) -> None:
    critic, (real, fake) = mlp(), samples()
    if use == "penalty":
        gradient_penalty(critic, real, fake).backward()
    elif use == "step":
        CriticStep(critic)(real, fake)
    else:
        str(explain(critic, real))
    alive = [weakref.ref(critic), weakref.ref(critic[0]), weakref.ref(critic[0].weight)]
    del critic
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_a_critic_can_be_duplicated_after_use(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    critic, (real, fake) = mlp(), samples()
    expected = gradient_penalty(critic, real, fake, alpha=alpha()).detach()
    other = duplicate(critic)
    with torch.no_grad():
        critic[0].weight.zero_()
    penalty = gradient_penalty(other, real, fake, alpha=alpha())
    torch.testing.assert_close(penalty.detach(), expected, rtol=1e-10, atol=0)
    assert_same(other, lambda engine: gradient_penalty(other, real, fake, alpha=alpha(), engine=engine))


def test_explain_of_an_mlp_reports_ten_units_and_no_curvature() -> None:
    report = explain(models.build("toy-mlp", (2,))[1], torch.randn(256, 2))
    assert (report.engine, report.reason, report.schedule) == ("four_pass", None, "batched")
    assert report.curved == ()
    assert report.units <= 10.05
    assert 0 < report.launches <= 40
    assert "aten.linear.default" in report.linear
    assert "no curvature pass" in str(report)


def test_explain_names_what_is_curved() -> None:
    report = explain(models.build("cifar-resnet", (3, 32, 32), width=3)[1], torch.randn(2, 3, 32, 32))
    assert report.engine == "four_pass"
    assert report.curved == ("aten.group_norm.default",)
    assert "curved     aten.group_norm.default" in str(report)


def test_explain_names_the_line_that_cannot_be_captured() -> None:
    report = explain(Branching(), torch.randn(4, 5))
    assert (report.engine, report.units) == ("autograd", None)
    assert "test_engine_use.py" in report.reason
    assert "if x.sum() > 0" in str(report)


def _hooked(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda gradient: 2 * gradient)
    return h


class Scaled(nn.Module):
    """A critic that reads attributes, counts its calls, and has something of its own in the middle."""

    def __init__(self, middle: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.head, self.tail, self.activation = nn.Linear(5, 8), nn.Linear(8, 1), nn.SiLU()
        self.scale, self.calls, self.middle = 1.0, 0, middle

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = len(x)
        out: Tensor = self.tail(self.activation(self.middle(self.head(x)) * self.scale))
        return out


def scaled(middle: Callable[[Tensor], Tensor] = lambda h: h) -> Scaled:
    torch.manual_seed(0)
    return Scaled(middle).double()


@pytest.mark.parametrize(
    ("middle", "said"),
    [
        (_hooked, "a hook on a tensor's gradient"),
        (lambda h: torch.fft.fft(h).abs(), "complex numbers"),
    ],
)
def test_a_backward_that_the_forward_does_not_tell_is_left_to_autograd(middle: Any, said: str) -> None:
    critic, (real, fake) = scaled(middle), samples()
    if torch.__version__ < "2.13":
        said = "differentiates with autograd"  # earlier versions stop elsewhere
    with pytest.warns(RuntimeWarning, match=said):
        gradient_penalty(critic, real, fake, alpha=alpha())
    assert_same(critic, lambda engine: gradient_penalty(critic, real, fake, alpha=alpha(), engine=engine))


def test_backward_hooks_of_modules_are_left_to_autograd() -> None:
    critic, (real, fake) = scaled(), samples()
    gradient_penalty(critic, real, fake, alpha=alpha(), engine="four_pass")
    for register, hook in (
        (critic.head.register_full_backward_hook, lambda module, inputs, outputs: (2 * inputs[0],)),
        (critic.head.register_full_backward_pre_hook, lambda module, outputs: (2 * outputs[0],)),
    ):
        handle = register(hook)
        with pytest.raises(CaptureError, match="backwards hooks"):
            gradient_penalty(critic, real, fake, alpha=alpha(), engine="four_pass")
        handle.remove()


def test_attributes_that_the_forward_reads_are_noticed_when_they_change() -> None:
    critic, (real, fake) = scaled(), samples()

    def check() -> None:
        for _ in range(2):
            assert_same(critic, lambda engine: gradient_penalty(critic, real, fake, alpha=alpha(), engine=engine))

    check()
    critic.scale = 2.5
    check()
    critic.activation = nn.Tanh()
    check()
    critic.activation = nn.LeakyReLU(0.1)
    check()
    critic.activation.negative_slope = 0.7
    check()
    critic.forward = lambda x: critic.tail(critic.head(x).tanh())
    check()


def test_attributes_that_the_forward_writes_ask_for_no_new_plan() -> None:
    critic, (real, fake) = scaled(), samples()
    step = CriticStep(critic, engine="four_pass")
    for _ in range(3):
        step(real, fake, alpha())
        critic(real)
    ((choice, _),) = step._choices.values()
    assert choice.four_pass is not None
    assert len({id(plan) for plan in choice.four_pass.plans.values()}) <= 3
    assert critic.calls == 3 * (3 + 1)


def test_what_the_proof_does_not_follow_runs_split() -> None:
    def scattered(h: Tensor) -> Tensor:
        return torch.zeros_like(h).index_put((torch.arange(len(h)),), h)

    critic, (real, fake) = scaled(scattered), samples()
    assert explain(critic, real).schedule == "split"
    assert_same(critic, lambda engine: gradient_penalty(critic, real, fake, alpha=alpha(), engine=engine))


class Encoder(nn.Module):
    """Sequences of 5 through a transformer's layer, features or samples first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed, self.last, self.batch_first = nn.Linear(3, 8), nn.Linear(8, 1), batch_first
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.layer(h) if self.batch_first else self.layer(h.transpose(0, 1)).transpose(0, 1)
        scores: Tensor = self.last(h.mean(1))
        return scores


def flattened(h: Tensor, layer: nn.Linear) -> Tensor:
    """Samples between positions, flattened for a layer whose output is kept flat as well."""
    T, N, _ = h.shape
    flat = layer(h.reshape(T * N, -1))
    return flat.view(T, N, -1) * flat.sum(1).view(T, N, 1).tanh()


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformers_layer_runs_batched(batch_first: bool) -> None:
    critic, (real, fake) = Encoder(batch_first).double(), torch.randn(2, 4, 5, 3, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        assert explain(critic, real).schedule == "batched"
        share = torch.full((4,), 0.3, dtype=torch.float64)
        assert_same(critic, lambda engine: gradient_penalty(critic, real, fake, alpha=share, engine=engine))


def test_a_flattened_layer_that_is_read_flat_is_exact() -> None:
    critic, layer = scaled(), nn.Linear(8, 8).double()
    critic.layer, critic.middle = layer, lambda h: flattened(torch.stack([h, h.sin()]), layer).sum(0)
    real, fake = samples()
    assert_same(critic, lambda engine: gradient_penalty(critic, real, fake, alpha=alpha(), engine=engine))


class Flattening(nn.Module):
    """A layer over flattened samples of 3 positions, part of it constant, or after a write to what it flattened."""

    def __init__(self, constant: str = "", written: bool = False) -> None:
        super().__init__()
        self.constant, self.written = constant, written
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 1)
        self.register_buffer("bank", torch.randn(4, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        whole = self.bank.transpose(0, 1) if self.written else x
        with torch.set_grad_enabled(self.constant != "flat"):
            flat = whole.reshape(-1, 4)
        if self.written:
            with torch.no_grad():
                self.bank.mul_(0.5)
        with torch.set_grad_enabled(self.constant != "layer"):
            rows = self.layer(flat)
        with torch.set_grad_enabled(self.constant != "unflat"):
            rows = rows.reshape(whole.shape[0], whole.shape[1], 4)
        if self.written:
            return torch.einsum("nte,tfe->nf", x, rows).tanh().sum(1)
        scores: Tensor = self.last(torch.tanh(rows * x)).mean((1, 2))
        return scores


@pytest.mark.parametrize("constant", ["", "flat", "layer", "unflat"])
@pytest.mark.parametrize("written", [False, True])
def test_a_flattened_layer_keeps_what_is_constant_and_when_it_was_read(constant: str, written: bool) -> None:
    critic, x = Flattening(constant, written).double(), torch.randn(6, 3, 4, dtype=torch.float64)
    plain = copy.deepcopy(critic)
    for _ in range(3):
        ours = gradient_penalty(critic, x, x, engine="four_pass")
        theirs, _ = reference.gradient_penalty(plain, [x])
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        if theirs.requires_grad and not (written and constant):
            assert_equal_gradients(gradients_of(ours, critic), gradients_of(theirs, plain))


def test_a_first_call_that_will_be_long_says_so() -> None:
    layers = [m for _ in range(110) for m in (nn.Linear(3, 3), nn.ReLU())]
    critic = nn.Sequential(*layers, nn.Linear(3, 1))
    with pytest.warns(RuntimeWarning, match=r"222 operators, which takes about \d s once") as caught:
        gradient_penalty(critic, *torch.randn(2, 4, 3))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_penalty(critic, *torch.randn(2, 4, 3))


def test_explain_shows_the_cost_of_both_engines() -> None:
    report = explain(
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(7, 5)
    )
    assert report.autograd_units is not None
    assert report.units <= report.autograd_units
    assert report.launches < report.autograd_launches
    assert f"by autograd {report.autograd_units:.2f}" in str(report)


@pytest.mark.parametrize("engine", ["four_pass", "autograd"])
def test_what_a_critic_does_to_its_input_is_no_matter_of_the_batch(engine: str) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.requires_grad_())

    real, fake = torch.randn(4, 3), torch.randn(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CriticStep(Asks(), engine="auto" if engine == "four_pass" else engine)(real, fake)
    assert not real.requires_grad
    assert not fake.requires_grad
    assert real.grad is None


def test_one_batch_as_real_and_as_fake_has_each_sides_arguments() -> None:
    torch.manual_seed(0)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x).tanh() * y

    critic, x = Scaled(), torch.randn(4, 3)
    penalties = []
    for engine, fake in [("four_pass", x), ("autograd", x), ("autograd", x.clone())]:
        step = CriticStep(critic, engine=engine, penalty=PenaltyConfig.r1())
        penalties.append(step(x, fake, critic_args=(torch.ones(4, 1),), fake_args=(torch.full((4, 1), 2.0),)).penalty)
    torch.testing.assert_close(penalties[0], penalties[2])
    torch.testing.assert_close(penalties[1], penalties[2])
