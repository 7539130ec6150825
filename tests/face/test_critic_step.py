import copy
from dataclasses import replace
from typing import Any

import pytest
import textbook
import torch
from bad_arguments import CRITIC_ERRORS, SAMPLE_ERRORS, Row, assert_says, rows
from critic_steps import PENALTIES, assert_equal_figures, dense_critic, points_of, textbook_step
from textbook import CASES, CRITIC_LOSSES, Case, assert_equal_gradients, distance, gradients, random_pair
from torch import Tensor, nn

from wgan_fast import CriticStep, CriticStepResult, GradientPenalty, PenaltyConfig, losses, reference
from wgan_fast.training import models


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("loss", CRITIC_LOSSES)
def test_equals_the_textbook_step_and_the_reference(loss: str, penalty: str) -> None:
    critic, config = dense_critic(), PENALTIES[penalty]
    real, fake = random_pair(7, 6)
    alpha = torch.rand(7, dtype=torch.float64)
    expected = textbook_step(critic, real, fake, alpha, loss=loss, config=config)
    expected_gradients = gradients(expected["loss"], critic)
    if config is not None:
        truth = reference.critic_step(
            critic,
            real,
            fake,
            points_of(config, real, fake, alpha),
            loss=getattr(losses, loss).critic,
            weight=config.weight,
            target=config.target,
            one_sided=config.one_sided,
        )
        torch.testing.assert_close(truth.loss, expected["loss"].detach(), rtol=1e-10, atol=0)
    critic.zero_grad()
    result = CriticStep(critic, loss=loss, penalty=config, engine="autograd")(real, fake, alpha)
    assert isinstance(result, CriticStepResult)
    assert_equal_figures(result, expected)
    assert_equal_gradients(textbook.gradients_left_in(critic), expected_gradients)
    if config is not None:
        names = [name for name, _ in critic.named_parameters()]
        assert_equal_gradients(textbook.gradients_left_in(critic), dict(zip(names, truth.gradients)))
        for name, value in (("penalty", truth.penalty), ("gradient_norm", truth.gradient_norm)):
            torch.testing.assert_close(getattr(result, name), value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("penalty", ["wgan_lp", "both"])
def test_every_critic(case: Case, penalty: str) -> None:
    critic, (real, fake), alpha = case.critic(), case.samples(), case.alpha()
    config = replace(PENALTIES[penalty], group_size=case.group_size)
    expected = textbook_step(critic, real, fake, alpha, config=config, args=case.args, kwargs=case.kwargs)
    expected_gradients = gradients(expected["loss"], critic)
    step = CriticStep(critic, penalty=config, engine="autograd")
    result = step(real, fake, alpha, critic_args=case.args, critic_kwargs=case.kwargs)
    assert_equal_figures(result, expected)
    assert_equal_gradients(textbook.gradients_left_in(critic), expected_gradients)


def test_defaults_are_wgan_gp_and_fresh_gradients() -> None:
    critic = dense_critic()
    real, fake = random_pair(7, 6)
    alpha = torch.rand(7, dtype=torch.float64)
    expected = textbook_step(critic, real, fake, alpha)
    expected_gradients = gradients(expected["loss"], critic)
    for parameter in critic.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)  # left over: replaced, not added to
    result = CriticStep(critic)(real, fake, alpha)
    assert_equal_figures(result, expected)
    assert_equal_gradients(textbook.gradients_left_in(critic), expected_gradients)


def test_accumulate_adds_to_the_gradients_that_are_there() -> None:
    critic = dense_critic()
    step = CriticStep(critic, engine="autograd")
    batches = [(*random_pair(7, 6), torch.rand(7, dtype=torch.float64)) for _ in range(3)]
    total = sum(textbook_step(critic, *batch)["loss"] for batch in batches)
    expected = gradients(total, critic)
    step(*batches[0], accumulate=False)
    step(*batches[1], accumulate=True)
    step(*batches[2], True)
    assert_equal_gradients(textbook.gradients_left_in(critic), expected)


def test_parameters_are_read_as_they_are_at_each_call() -> None:
    critic = dense_critic()
    step = CriticStep(critic, engine="autograd")
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    for _ in range(3):
        real, fake = random_pair(7, 6)
        alpha = torch.rand(7, dtype=torch.float64)
        expected = textbook_step(critic, real, fake, alpha)
        expected_gradients = gradients(expected["loss"], critic)
        assert_equal_figures(step(real, fake, alpha), expected)
        assert_equal_gradients(textbook.gradients_left_in(critic), expected_gradients)
        optimizer.step()


@pytest.mark.parametrize("engine", ["autograd", "four_pass"])
def test_a_lazy_penalty_has_k_times_the_weight_at_every_kth_call(engine: str) -> None:
    critic = dense_critic()
    config = PenaltyConfig(weight=2.0, every=3)
    step = CriticStep(critic, penalty=config, engine=engine)
    for call in range(7):
        assert step.steps_taken == call
        real, fake = random_pair(7, 6)
        alpha = torch.rand(7, dtype=torch.float64)
        now = PenaltyConfig(weight=6.0) if call % 3 == 0 else None
        expected = textbook_step(critic, real, fake, alpha, config=now)
        expected_gradients = gradients(expected["loss"], critic)
        result = step(real, fake, alpha)
        assert (result.penalty > 0) == (call % 3 == 0)
        assert result.gradient_norm.isnan() == (call % 3 != 0)
        assert_equal_figures(result, expected)
        assert_equal_gradients(textbook.gradients_left_in(critic), expected_gradients)
    assert step.penalty == config


@pytest.mark.parametrize("engine", ["autograd", "four_pass"])
def test_a_lazy_penalty_leaves_a_packed_critic_packed(engine: str) -> None:
    critic = models.PackedCritic(3, 4, group_size=5, dropout=0.0).double()
    step = CriticStep(critic, penalty=PenaltyConfig(group_size=5, every=2), engine=engine)
    real, fake = random_pair(15, 3)
    step(real, fake)
    result = step(real, fake)
    loss = critic(fake).mean() - critic(real).mean()
    assert result.penalty == 0
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-10, atol=0)
    assert_equal_gradients(textbook.gradients_left_in(critic), gradients(loss, critic))


def test_a_lazy_penalty_resumes_where_it_was() -> None:
    step = CriticStep(dense_critic(), penalty=PenaltyConfig(every=3), engine="autograd")
    step.steps_taken = 5
    real, fake = random_pair(7, 6)
    penalties = [step(real, fake).penalty.item() for _ in range(3)]
    assert [penalty > 0 for penalty in penalties] == [False, True, False]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_default_generator_is_drawn_from_before_the_critic_runs(penalty: str) -> None:
    config, states = PENALTIES[penalty], []

    class Recording(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            states.append(torch.get_rng_state())
            return super().forward(x)

    critic = Recording(6, 1).double()
    real, fake = random_pair(7, 6)
    torch.manual_seed(3)
    CriticStep(critic, penalty=config, engine="autograd")(real, fake)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    if config is not None and config.at in ("interpolates", "perturbed"):
        torch.rand(7, dtype=torch.float64)
        if config.at == "perturbed":
            torch.rand(7, 6, dtype=torch.float64)
    assert states
    assert all(torch.equal(state, torch.get_rng_state()) for state in [*states, after])


def test_frozen_parameters_get_no_gradient() -> None:
    critic = dense_critic()
    real, fake = random_pair(7, 6)
    alpha = torch.rand(7, dtype=torch.float64)
    critic[2].requires_grad_(False)
    expected = gradients(textbook_step(critic, real, fake, alpha)["loss"], critic)
    CriticStep(critic, engine="autograd")(real, fake, alpha)
    assert critic[2].weight.grad is None
    assert critic[2].bias.grad is None
    assert_equal_gradients(textbook.gradients_left_in(critic), expected)


@pytest.mark.parametrize("loss", CRITIC_LOSSES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_no_gradient_reaches_the_samples_or_the_generator(loss: str, penalty: str) -> None:
    critic, source = dense_critic(), nn.Linear(4, 6).double()
    real = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(7, dtype=torch.float64, requires_grad=True)
    fake = source(torch.randn(7, 4, dtype=torch.float64))
    kept = [tensor.detach().clone() for tensor in (real, fake, alpha)]
    CriticStep(critic, loss=loss, penalty=PENALTIES[penalty], engine="autograd")(real, fake, alpha)
    assert real.grad is None
    assert alpha.grad is None
    assert all(parameter.grad is None for parameter in source.parameters())
    assert all(torch.equal(tensor, before) for tensor, before in zip((real, fake, alpha), kept))
    fake.sum().backward()  # the generator's graph is still there for its own step


def test_gradients_are_computed_under_no_grad_too() -> None:
    critic = dense_critic()
    real, fake = random_pair(7, 6)
    alpha = torch.rand(7, dtype=torch.float64)
    expected = gradients(textbook_step(critic, real, fake, alpha)["loss"], critic)
    with torch.no_grad():
        CriticStep(critic, engine="autograd")(real, fake, alpha)
    assert_equal_gradients(textbook.gradients_left_in(critic), expected)


@pytest.mark.parametrize("batch", [1, 3, 63])
def test_any_batch_size(batch: int) -> None:
    critic = dense_critic()
    real, fake = random_pair(batch, 6)
    alpha = torch.rand(batch, dtype=torch.float64)
    expected = textbook_step(critic, real, fake, alpha)
    expected_gradients = gradients(expected["loss"], critic)
    assert_equal_figures(CriticStep(critic, engine="autograd")(real, fake, alpha), expected)
    assert_equal_gradients(textbook.gradients_left_in(critic), expected_gradients)


def test_nan_samples_show_in_the_loss_and_the_gradients() -> None:
    critic = dense_critic()
    real, fake = random_pair(7, 6)
    real[3, 2] = torch.nan
    result = CriticStep(critic, engine="autograd")(real, fake)
    assert result.loss.isnan()
    assert result.real_score.isnan()
    assert result.fake_score.isfinite()
    assert critic[4].weight.grad.isnan().any()


@pytest.mark.parametrize("loss", CRITIC_LOSSES)
def test_bf16_error_is_at_most_twice_that_of_the_textbook_under_autocast(loss: str) -> None:
    critic = dense_critic(torch.float32)
    exact_critic = copy.deepcopy(critic).double()
    step = CriticStep(critic, loss=loss, precision="bf16", engine="autograd")
    errors: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for _ in range(8):  # root-mean-square over several batches: one can be lucky
        real, fake = random_pair(63, 6, dtype=torch.float32)
        alpha = torch.rand(63)
        exact = textbook_step(exact_critic, real.double(), fake.double(), alpha.double(), loss=loss)
        truth = gradients(exact["loss"], exact_critic)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            usual = textbook_step(critic, real, fake, alpha, loss=loss)
        usual_gradients = gradients(usual["loss"], critic)
        result = step(real, fake, alpha)
        for figure in result:
            assert figure.dtype == torch.float32
            assert figure.isfinite()
        ours = textbook.gradients_left_in(critic)
        assert all(gradient.dtype == torch.float32 for gradient in ours.values())
        for name, value, grads in (("ours", result.loss, ours), ("theirs", usual["loss"], usual_gradients)):
            errors[name].append((abs(value.double() - exact["loss"]).item(), distance(grads, truth)))
    ours_rms, theirs_rms = (torch.tensor(errors[name]).square().mean(dim=0).sqrt() for name in ("ours", "theirs"))
    assert (ours_rms <= 2 * theirs_rms).all()
    assert ours_rms[1] > 1e-4 * textbook.distance(truth, {n: torch.zeros_like(g) for n, g in truth.items()})


def test_fp32_means_the_dtype_of_the_critic() -> None:
    critic = dense_critic(torch.float32)
    real, fake = random_pair(7, 6, dtype=torch.float32)
    alpha = torch.rand(7)
    expected = textbook_step(critic, real, fake, alpha)
    result = CriticStep(critic, precision="fp32", engine="autograd")(real, fake, alpha)
    for name in CriticStepResult._fields:
        # 100 roundings of float32, far from bfloat16's 2⁻⁹
        torch.testing.assert_close(getattr(result, name), expected[name].detach(), rtol=100 * 2**-24, atol=1e-6)


def test_a_half_precision_critic_reports_in_float32() -> None:
    critic = dense_critic(torch.bfloat16)
    result = CriticStep(critic, engine="autograd")(*random_pair(63, 6, dtype=torch.bfloat16))
    assert {figure.dtype for figure in result} == {torch.float32}
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in critic.parameters())


def test_a_loss_of_ones_own() -> None:
    def logistic(real: Tensor, fake: Tensor) -> Tensor:
        return (real - fake).exp().log1p().mean()

    critic = dense_critic()
    real, fake = random_pair(7, 6)
    own = losses.AdversarialLoss("logistic", logistic, lambda fake: fake.mean())
    expected = gradients(logistic(critic(real), critic(fake)), critic)
    CriticStep(critic, loss=own, penalty=None, engine="autograd")(real, fake)
    assert_equal_gradients(textbook.gradients_left_in(critic), expected)


# Errors

CONSTRUCTION_ERRORS: list[Row] = [
    ("critic is a function", {"critic": lambda x: x.sum(1)}, TypeError, ("critic", "function")),
    ("loss is unknown", {"loss": "wassertein"}, ValueError, ("loss", "'wassertein'", "wasserstein")),
    ("loss is a number", {"loss": 1.0}, TypeError, ("loss", "float")),
    ("penalty is a weight", {"penalty": 10.0}, TypeError, ("penalty", "float")),
    ("engine is unknown", {"engine": "warp"}, ValueError, ("engine", "'warp'", "autograd")),
    ("precision is unknown", {"precision": "fp16"}, ValueError, ("precision", "'fp16'", "bf16")),
    ("precision is a dtype", {"precision": torch.bfloat16}, ValueError, ("precision", "torch.bfloat16", "bf16")),
    ("schedule is unknown", {"schedule": "fast"}, ValueError, ("schedule", "'fast'", "batched")),
    ("compile is a backend", {"compile": "inductor"}, TypeError, ("compile", "'inductor'", "True or False")),
    ("compile is a number", {"compile": 1}, TypeError, ("compile", "1", "True or False")),
    (
        "compile is asked of autograd",
        {"compile": True, "engine": "autograd"},
        ValueError,
        ("compile", "True", "four-pass", '"autograd"'),
    ),
]


@pytest.mark.parametrize(("wrong", "exception", "words"), rows(CONSTRUCTION_ERRORS))
def test_bad_settings_raise(wrong: dict[str, Any], exception: type[Exception], words: tuple[str, ...]) -> None:
    arguments = {"critic": dense_critic(), **wrong}
    with pytest.raises(exception) as caught:
        CriticStep(arguments.pop("critic"), **arguments)
    assert_says(str(caught.value), words)


class Wrapped(nn.Module):
    """A critic with parameters that returns what ``function`` makes of its input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.function(x * self.weight)


def flat_loss(real: Tensor, fake: Tensor) -> Tensor:
    return (fake - real).flatten()


STEP_ERRORS: list[Row] = [
    ("critic_args is a tensor", {"critic_args": torch.zeros(0)}, TypeError, ("critic_args", "Tensor")),
    ("critic_kwargs is a tuple", {"critic_kwargs": ()}, TypeError, ("critic_kwargs", "tuple")),
    ("loss is not a mean", {"loss": losses.AdversarialLoss("flat", flat_loss, flat_loss)}, ValueError, ("loss", "[4]")),
    (
        "loss is a number",
        {"loss": losses.AdversarialLoss("number", lambda *scores: 1.0, flat_loss)},
        TypeError,
        ("loss", "float"),
    ),
]


# Without a penalty nothing is packed, and scores need not depend on the input.
PENALTY_ONLY = [row for row in CRITIC_ERRORS if "group_size" in row[1] or "input" in row[3]]
ANY_STEP = [row for row in CRITIC_ERRORS if row not in PENALTY_ONLY]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("penalty", "wrong", "exception", "words"),
    [
        *rows([(f"{p}, {row[0]}", p, *row[1:]) for p in PENALTIES for row in SAMPLE_ERRORS + ANY_STEP + STEP_ERRORS]),
        *rows([(f"{p}, {row[0]}", p, *row[1:]) for p in PENALTIES if p != "none" for row in PENALTY_ONLY]),
    ],
)
def test_bad_batches_raise_and_touch_no_gradient(
    penalty: str, wrong: dict[str, Any], exception: type[Exception], words: tuple[str, ...], accumulate: bool
) -> None:
    arguments = {"real": torch.ones(4, 6), "fake": torch.zeros(4, 6), "alpha": torch.rand(4), **wrong}
    config = PENALTIES[penalty]
    if "group_size" in wrong:
        config = replace(config, group_size=arguments.pop("group_size"))
        arguments["alpha"] = None
    critic = Wrapped(arguments.pop("critic")) if "critic" in wrong else dense_critic(torch.float32)
    for parameter in critic.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    step = CriticStep(critic, loss=arguments.pop("loss", "wasserstein"), penalty=config, engine="autograd")
    with pytest.raises(exception) as caught:
        step(**arguments, accumulate=accumulate)
    assert_says(str(caught.value), words)
    assert type(caught.value) is exception
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in critic.parameters())
    assert step.steps_taken == 0


@pytest.mark.parametrize("penalty", ["wgan_gp", "none"])
def test_a_critic_with_nothing_to_train_is_refused(penalty: str) -> None:
    critic = dense_critic()
    for parameter in critic.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    critic.requires_grad_(False)
    with pytest.raises(ValueError, match=r"critic.*frozen"):
        CriticStep(critic, penalty=PENALTIES[penalty], engine="autograd")(*random_pair(4, 6))
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in critic.parameters())


def test_a_bad_alpha_is_refused_at_the_calls_without_a_penalty_too() -> None:
    step = CriticStep(dense_critic(), penalty=PenaltyConfig(every=2), engine="autograd")
    real, fake = random_pair(4, 6)
    step(real, fake, torch.rand(4))
    with pytest.raises(ValueError, match=r"alpha.*\[4\].*\[3\]"):
        step(real, fake, torch.rand(3))


def test_packing_is_that_of_the_penalty() -> None:
    case = CASES["packed"]
    critic, (real, fake) = case.critic(), case.samples()
    with pytest.raises(ValueError, match=r"critic.*\[15\].*\[5, 1\]"):
        CriticStep(critic, engine="autograd")(real, fake)


class Labelled(nn.Module):
    """Packs samples in groups, and takes a label for each."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group, self.labels = group, nn.Embedding(3, 4)
        self.body = nn.Sequential(nn.Linear(9 * group, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scores: Tensor = self.body(torch.cat([x, self.labels(labels)], 1).reshape(len(x) // self.group, -1))
        return scores


@pytest.mark.parametrize("engine", ["auto", "autograd", "four_pass"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("at", ["interpolates", "both"])
def test_a_penalty_on_part_of_the_batch_is_that_of_those_samples(at: Any, group: int, engine: Any) -> None:
    critic = Labelled(group).double()
    real, fake = torch.randn(2, 12, 5, dtype=torch.float64).unbind()
    alpha, labels = torch.rand(12 // group, dtype=torch.float64).repeat_interleave(group), torch.arange(12) % 3
    config = PenaltyConfig(at=at, group_size=group, samples=4)
    kept = torch.tensor([0, 3, 6, 9] if group == 1 else [0, 1, 6, 7])
    points = [reference.interpolate(real, fake, alpha)] if at == "interpolates" else [real, fake]
    penalty, norm = reference.gradient_penalty(
        critic, [x[kept] for x in points], critic_args=(labels[kept],), group_size=group
    )
    loss = critic(fake, labels).mean() - critic(real, labels).mean()
    parameters = list(critic.parameters())
    expected = torch.autograd.grad(loss + penalty, parameters, retain_graph=True)
    step = CriticStep(critic, penalty=config, engine=engine)
    for _ in range(2):
        result = step(real, fake, alpha, critic_args=(labels,))
        torch.testing.assert_close(result.loss, (loss + penalty).detach())
        torch.testing.assert_close((result.penalty, result.gradient_norm), (penalty.detach(), norm.detach()))
        torch.testing.assert_close(tuple(p.grad for p in parameters), expected, rtol=1e-10, atol=1e-12)
    critic.zero_grad()
    alone = GradientPenalty(critic, config, engine=engine)(real, fake, alpha, critic_args=(labels,))
    alone.backward()  # type: ignore[no-untyped-call]
    expected = torch.autograd.grad(penalty, parameters, allow_unused=True)
    torch.testing.assert_close(alone, penalty)
    for parameter, gradient in zip(parameters, expected):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_a_config_and_options_exclude_each_other() -> None:
    critic = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="config says what is penalised"):
        GradientPenalty(critic, PenaltyConfig.r1(), weight=3.0)
    with pytest.raises(TypeError, match="config must be a PenaltyConfig or None, got float"):
        GradientPenalty(critic, 10.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["auto", "autograd", "four_pass"])
def test_a_penalty_on_part_of_the_batch_that_fails_touches_no_gradient(engine: Any) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) != 12:
                raise ValueError("12 samples, please")
            scores: Tensor = self.layer(x)
            return scores

    step = CriticStep(Whole(), penalty=PenaltyConfig(samples=4), engine=engine)
    with pytest.raises((ValueError, RuntimeError)):
        step(*torch.randn(2, 12, 5))
    assert all(parameter.grad is None for parameter in step.critic.parameters())
    assert step.steps_taken == 0


def test_the_part_is_checked_at_steps_without_a_penalty_too() -> None:
    step = CriticStep(nn.Linear(5, 1), penalty=PenaltyConfig(samples=5, every=2))
    step.steps_taken = 1
    with pytest.raises(ValueError, match="samples must divide the batch of 12, got 5"):
        step(*torch.randn(2, 12, 5))
