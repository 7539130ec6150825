import copy
from collections.abc import Callable
from typing import Any

import pytest
import textbook
import torch
from bad_arguments import CALL_ERRORS, CRITIC_ERRORS, OPTION_ERRORS, SAMPLE_ERRORS, assert_says, rows
from textbook import CASES, LAYOUTS, Case, assert_equal_gradients, distance, generator, gradients, random_pair
from torch import Tensor, nn

from wgan_fast import GradientPenalty, PenaltyConfig, gradient_penalty, reference

AT = ("interpolates", "real", "fake", "both", "perturbed")


def penalty_of(case: Case, critic: nn.Module, real: Tensor, fake: Tensor, **options: Any) -> Tensor:
    return gradient_penalty(
        critic,
        real,
        fake,
        group_size=case.group_size,
        critic_args=case.args,
        critic_kwargs=case.kwargs,
        engine="autograd",
        **options,
    )


def textbook_penalty(case: Case, critic: nn.Module, points: list[Tensor], **options: Any) -> Tensor:
    return textbook.penalty(critic, points, group_size=case.group_size, args=case.args, kwargs=case.kwargs, **options)


def dense_critic(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.LeakyReLU(0.2), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 1)).to(dtype)


def image_critic(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 4, 1),
    ).to(dtype)


# Exactness


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("at", AT)
def test_value_and_gradients_equal_the_textbook_recipe(case: Case, at: str, one_sided: bool) -> None:
    critic = case.critic()
    real, fake = case.samples()
    random, again = generator(5), generator(5)
    alpha = torch.rand(case.batch // case.group_size, dtype=torch.float64, generator=again)
    noise = torch.rand(real.shape, dtype=torch.float64, generator=again)
    points = textbook.points_at(at, real, fake, alpha.repeat_interleave(case.group_size), noise)
    target = case.typical_norm(points)
    expected = textbook_penalty(case, critic, points, weight=3.5, target=target, one_sided=one_sided)
    assert expected > 0
    actual = penalty_of(
        case, critic, real, fake, weight=3.5, target=target, one_sided=one_sided, at=at, generator=random
    )
    assert actual.shape == ()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert_equal_gradients(gradients(actual, critic), gradients(expected, critic))


@pytest.mark.parametrize("at", ["interpolates", "both"])
def test_equals_the_package_reference(case: Case, at: str) -> None:
    critic = case.critic()
    real, fake = case.samples()
    points = textbook.points_at(at, real, fake, case.alpha())
    expected, _ = reference.gradient_penalty(
        critic,
        points,
        weight=3.5,
        target=0.25,
        group_size=case.group_size,
        critic_args=case.args,
        critic_kwargs=case.kwargs,
    )
    actual = penalty_of(case, critic, real, fake, alpha=case.alpha(), weight=3.5, target=0.25, at=at)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert_equal_gradients(gradients(actual, critic), gradients(expected, critic))


def test_defaults_are_those_of_the_paper() -> None:
    critic = dense_critic()
    real, fake = random_pair(5, 6)
    alpha = torch.rand(5, dtype=torch.float64)
    expected = textbook.penalty(critic, [textbook.interpolates(real, fake, alpha)], weight=10.0, target=1.0)
    torch.testing.assert_close(
        gradient_penalty(critic, real, fake, alpha=alpha, engine="autograd"), expected, rtol=1e-10, atol=0
    )


@pytest.mark.parametrize(("one_sided", "excess"), [(False, 4.0), (True, 4.0), (False, -1.0), (True, 0.0)])
def test_linear_critic_has_the_closed_form(one_sided: bool, excess: float) -> None:
    critic = nn.Linear(2, 1).double()
    nn.init.zeros_(critic.bias)
    critic.weight.data = torch.tensor([[3.0, 4.0]], dtype=torch.float64)  # ‖∇D‖ = 5 everywhere
    target = 1.0 if excess > 0 else 6.0
    real, fake = random_pair(3, 2)
    penalty = gradient_penalty(critic, real, fake, weight=0.5, target=target, one_sided=one_sided, engine="autograd")
    assert penalty.item() == pytest.approx(0.5 * excess**2, rel=1e-14)
    penalty.backward()
    expected = torch.tensor([[3.0 / 5, 4.0 / 5]], dtype=torch.float64) * (2 * 0.5 * excess)
    torch.testing.assert_close(critic.weight.grad, expected, rtol=1e-14, atol=0)


class QuadraticCritic(nn.Module):
    """D(x) = ½ c ‖x‖², so that ∇D = c x and the penalty shows at which points it was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.curvature = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.curvature * x.flatten(1).square().sum(dim=1)


def test_penalty_is_taken_at_the_stated_points() -> None:
    critic = QuadraticCritic()
    real = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    fake = torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    alpha = torch.tensor([0.25, 1.0, 0.5], dtype=torch.float64)
    mean_square = {  # of c‖x‖ with c = 2
        "interpolates": (8.5**2 + 4**2 + 2**2) / 3,  # 0.25 · 2 + 0.75 · 5 = 4.25; 2; 1
        "real": 16.0,
        "fake": (100 + 100 + 0) / 3,
        "both": 16 + 200 / 3,
    }
    for at, expected in mean_square.items():
        penalty = gradient_penalty(critic, real, fake, weight=0.5, target=0.0, at=at, alpha=alpha, engine="autograd")
        assert penalty.item() == pytest.approx(0.5 * expected, rel=1e-14), at


def test_gradients_equal_finite_differences_of_the_value() -> None:
    critic = image_critic()
    real, fake = random_pair(3, 2, 6, 8)
    alpha = torch.rand(3, dtype=torch.float64)

    def value() -> Tensor:
        return gradient_penalty(critic, real, fake, alpha=alpha, target=0.5, engine="autograd")

    exact = gradients(value(), critic)
    step = 1e-6  # error of a central difference: O(step²) + 1e-16 / step, about 1e-10 of the value
    for name, parameter in critic.named_parameters():
        for index in (0, parameter.numel() // 2):
            entry = parameter.data.view(-1)[index]
            before = entry.item()
            entry.fill_(before + step)
            above = value().item()
            entry.fill_(before - step)
            below = value().item()
            entry.fill_(before)
            expected = (above - below) / (2 * step)
            assert exact[name].view(-1)[index].item() == pytest.approx(expected, rel=1e-6, abs=1e-8), name


def test_critic_that_couples_samples_is_called_as_in_the_textbook() -> None:
    # Batch norm: the gradient is that of the sum of scores, and running statistics move once per call.
    torch.manual_seed(1)
    critic = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 1)).double()
    twin = copy.deepcopy(critic)
    real, fake = random_pair(7, 6)
    alpha = torch.rand(7, dtype=torch.float64)
    expected = textbook.penalty(twin, [textbook.interpolates(real, fake, alpha)])
    actual = gradient_penalty(critic, real, fake, alpha=alpha, engine="autograd")
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert_equal_gradients(gradients(actual, critic), gradients(expected, twin))
    assert critic[1].num_batches_tracked == 1
    torch.testing.assert_close(critic[1].running_var, twin[1].running_var, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scores_shape", [(-1,), (-1, 1), (-1, 1, 1, 1)])
def test_scores_may_have_trailing_dimensions_of_one(scores_shape: tuple[int, ...]) -> None:
    critic = dense_critic()
    real, fake = random_pair(3, 6)
    alpha = torch.rand(3, dtype=torch.float64)
    expected = textbook.penalty(critic, [textbook.interpolates(real, fake, alpha)])
    actual = gradient_penalty(lambda x: critic(x).reshape(scores_shape), real, fake, alpha=alpha, engine="autograd")
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert_equal_gradients(gradients(actual, critic), gradients(expected, critic))


# Random numbers


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 1, 1, 1)])
def test_explicit_alpha_has_one_value_per_sample(shape: tuple[int, ...]) -> None:
    critic = image_critic()
    real, fake = random_pair(7, 2, 6, 8)
    alpha = torch.rand(7, dtype=torch.float64)
    before = torch.get_rng_state()
    actual = gradient_penalty(critic, real, fake, alpha=alpha.view(shape), engine="autograd")
    assert torch.equal(torch.get_rng_state(), before)
    expected = textbook.penalty(critic, [textbook.interpolates(real, fake, alpha)])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert_equal_gradients(gradients(actual, critic), gradients(expected, critic))


def test_explicit_alpha_may_be_given_per_group() -> None:
    case = CASES["packed"]
    critic, (real, fake) = case.critic(), case.samples()
    per_group = case.alpha()[:: case.group_size]
    expected = textbook_penalty(case, critic, [textbook.interpolates(real, fake, case.alpha())])
    for alpha in (per_group, per_group.view(-1, 1), case.alpha()):
        torch.testing.assert_close(penalty_of(case, critic, real, fake, alpha=alpha), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_alpha_is_one_draw_from_the_given_generator(dtype: torch.dtype) -> None:
    critic = dense_critic(dtype)
    real, fake = random_pair(63, 6, dtype=dtype)
    given, twin = generator(11), generator(11)
    before = torch.get_rng_state()
    drawn = gradient_penalty(critic, real, fake, generator=given, engine="autograd")
    assert torch.equal(torch.get_rng_state(), before)
    alpha = torch.rand(63, dtype=torch.float64 if dtype == torch.float64 else torch.float32, generator=twin)
    assert torch.equal(given.get_state(), twin.get_state())
    assert torch.equal(drawn, gradient_penalty(critic, real, fake, alpha=alpha, engine="autograd"))


def test_alpha_is_one_draw_from_the_default_generator_before_the_critic_runs() -> None:
    layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 1)).double()
    real, fake = random_pair(63, 6)
    torch.manual_seed(3)
    alpha = torch.rand(63, dtype=torch.float64)
    expected = textbook.penalty(layers, [textbook.interpolates(real, fake, alpha)])
    after = torch.get_rng_state()
    torch.manual_seed(3)
    actual = gradient_penalty(layers, real, fake, engine="autograd")
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)


def test_a_group_shares_one_alpha() -> None:
    case = CASES["packed"]
    critic, (real, fake) = case.critic(), case.samples()
    given, twin = generator(11), generator(11)
    alpha = torch.rand(case.batch // case.group_size, dtype=torch.float64, generator=twin)
    actual = penalty_of(case, critic, real, fake, generator=given)
    assert torch.equal(given.get_state(), twin.get_state())
    points = textbook.interpolates(real, fake, alpha.repeat_interleave(case.group_size))
    torch.testing.assert_close(actual, textbook_penalty(case, critic, [points]), rtol=1e-10, atol=0)


@pytest.mark.parametrize("at", ["real", "fake", "both"])
def test_nothing_is_drawn_where_no_point_is_random(at: str) -> None:
    critic = dense_critic()
    real, fake = random_pair(3, 6)
    given = generator(11)
    states = torch.get_rng_state(), given.get_state()
    gradient_penalty(critic, real, fake, at=at, engine="autograd")
    gradient_penalty(critic, real, fake, at=at, generator=given, engine="autograd")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(given.get_state(), states[1])


# Degenerate gradients


@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("one_sided", [False, True])
def test_zero_gradient_costs_psi_of_zero_and_moves_nothing(target: float, one_sided: bool) -> None:
    critic = dense_critic()
    for parameter in critic.parameters():
        nn.init.zeros_(parameter)
    real, fake = random_pair(3, 6)
    penalty = gradient_penalty(critic, real, fake, weight=10.0, target=target, one_sided=one_sided, engine="autograd")
    assert penalty.item() == (0.0 if one_sided else 10.0 * target**2)
    for name, gradient in gradients(penalty, critic).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


def test_samples_without_a_gradient_leave_those_of_the_others_exact() -> None:
    critic = nn.Sequential(nn.ReLU(), nn.Linear(2, 1)).double()
    critic[1].weight.data = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)  # norms 5, 0, 4
    penalty = gradient_penalty(critic, x, x, weight=3.0, at="real", engine="autograd")
    assert penalty.item() == pytest.approx((4.0**2 + 1.0 + 3.0**2), rel=1e-14)
    penalty.backward()
    expected = torch.tensor([[2 * 4 * 0.6, 2 * (4 * 0.8 + 3)]], dtype=torch.float64)
    torch.testing.assert_close(critic[1].weight.grad, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("at", ["interpolates", "real", "perturbed"])
def test_non_finite_samples_show_in_the_value(bad: float, one_sided: bool, at: str) -> None:
    real, fake = random_pair(3, 6)
    real[1, 2] = bad
    assert not torch.isfinite(
        gradient_penalty(QuadraticCritic(), real, fake, at=at, one_sided=one_sided, engine="autograd")
    )


@pytest.mark.parametrize("one_sided", [False, True])
def test_non_finite_weights_show_in_the_value(one_sided: bool) -> None:
    critic = dense_critic()
    critic[0].weight.data[0, 0] = torch.nan
    real, fake = random_pair(3, 6)
    assert gradient_penalty(critic, real, fake, one_sided=one_sided, engine="autograd").isnan()


# Autograd


@pytest.mark.parametrize("at", AT)
def test_no_gradient_reaches_the_samples_or_the_generator(at: str) -> None:
    critic, source = dense_critic(), nn.Linear(4, 6).double()
    real = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(5, dtype=torch.float64, requires_grad=True)
    fake = source(torch.randn(5, 4, dtype=torch.float64))
    gradient_penalty(critic, real, fake, at=at, alpha=alpha, engine="autograd").backward()
    assert real.grad is None
    assert alpha.grad is None
    assert all(parameter.grad is None for parameter in source.parameters())
    assert critic[0].weight.grad.norm() > 0


@pytest.mark.parametrize("at", AT)
def test_samples_and_alpha_are_left_as_they_were(at: str) -> None:
    real, fake = random_pair(5, 6)
    alpha = torch.rand(5, dtype=torch.float64)
    copies = [tensor.clone() for tensor in (real, fake, alpha)]
    gradient_penalty(dense_critic(), real, fake, at=at, alpha=alpha, engine="autograd").backward()
    assert all(torch.equal(tensor, before) for tensor, before in zip((real, fake, alpha), copies))
    assert not real.requires_grad
    assert not fake.requires_grad


def test_nothing_lands_in_grad_before_backward() -> None:
    critic = dense_critic()
    gradient_penalty(critic, *random_pair(3, 6), engine="autograd")
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_gradients_accumulate_and_scale_with_what_the_penalty_is_part_of() -> None:
    critic = dense_critic()
    real, fake = random_pair(3, 6)
    alpha = torch.rand(3, dtype=torch.float64)
    penalty = textbook.penalty(critic, [textbook.interpolates(real, fake, alpha)])
    expected = gradients(critic(fake).mean() - critic(real).mean() + 0.5 * penalty, critic)
    critic.zero_grad()
    (critic(fake).mean() - critic(real).mean()).backward()
    (0.5 * gradient_penalty(critic, real, fake, alpha=alpha, engine="autograd")).backward()
    assert_equal_gradients(textbook.gradients_left_in(critic), expected)


def test_frozen_parameters_get_no_gradient_and_change_none_of_the_others() -> None:
    critic = dense_critic()
    real, fake = random_pair(5, 6)
    alpha = torch.rand(5, dtype=torch.float64)
    expected = gradients(textbook.penalty(critic, [textbook.interpolates(real, fake, alpha)]), critic)
    critic.zero_grad()
    critic[2].requires_grad_(False)
    gradient_penalty(critic, real, fake, alpha=alpha, engine="autograd").backward()
    assert critic[2].weight.grad is None
    assert critic[2].bias.grad is None
    actual = textbook.gradients_left_in(critic)
    assert_equal_gradients(actual, {name: expected[name] for name in actual})
    assert set(actual) == set(expected) - {"2.weight", "2.bias"}


@pytest.mark.parametrize("at", AT)
def test_under_no_grad_there_is_only_the_value(at: str) -> None:
    critic = dense_critic()
    real, fake = random_pair(5, 6)
    options = {"at": at, "engine": "autograd"}
    with_graph = gradient_penalty(critic, real, fake, generator=generator(1), **options)
    with torch.no_grad():
        value = gradient_penalty(critic, real, fake, generator=generator(1), **options)
    assert with_graph.requires_grad
    assert not value.requires_grad
    assert torch.equal(value, with_graph.detach())
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_under_no_grad_nothing_is_kept_for_a_second_derivative() -> None:
    critic = dense_critic()
    real, fake = random_pair(5, 6)

    def saved(compute: Callable[[], Tensor]) -> int:
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):
            compute()
        return len(tensors)

    with torch.no_grad():
        without = saved(lambda: gradient_penalty(critic, real, fake, at="real", engine="autograd"))
    assert without == saved(lambda: critic(real.detach().requires_grad_()))


def test_train_and_eval_mode_are_those_of_the_critic() -> None:
    critic = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.9), nn.Linear(9, 1)).double().eval()
    real, fake = random_pair(3, 6)
    penalty = gradient_penalty(critic, real, fake, engine="autograd")
    assert not critic.training
    slope = (critic[2].weight @ critic[0].weight).norm()
    torch.testing.assert_close(penalty, 10 * (slope - 1) ** 2, rtol=1e-10, atol=0)


# Precisions and memory formats


def errors(critic: nn.Module, value: Tensor, truth_value: Tensor, truth: dict[str, Tensor]) -> tuple[float, float]:
    return abs(value.double() - truth_value).item(), distance(gradients(value, critic), truth)


def assert_no_worse_than_twice(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> None:
    """Root-mean-square error over several batches, of value and of gradient: one batch can be lucky."""
    ours_rms, theirs_rms = (torch.tensor(pairs).square().mean(dim=0).sqrt() for pairs in (ours, theirs))
    assert (ours_rms <= 2 * theirs_rms).all(), (ours_rms, theirs_rms)


@pytest.mark.parametrize("kind", ["dense", "image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_error_is_at_most_twice_that_of_the_textbook(dtype: torch.dtype, kind: str) -> None:
    make, shape = (dense_critic, (63, 6)) if kind == "dense" else (image_critic, (7, 2, 6, 8))
    critic = make(dtype)
    exact_critic = copy.deepcopy(critic).double()
    ours, theirs = [], []
    for _ in range(8):
        real, fake = random_pair(*shape, dtype=dtype)
        alpha = torch.randint(65, (shape[0],)) / 64  # exact in bfloat16, so that all three use the same one
        exact = textbook.penalty(exact_critic, [textbook.interpolates(real.double(), fake.double(), alpha.double())])
        truth = gradients(exact, exact_critic)
        penalty = gradient_penalty(critic, real, fake, alpha=alpha, engine="autograd")
        assert penalty.dtype == torch.float32
        ours.append(errors(critic, penalty, exact, truth))
        usual = textbook.penalty(critic, [textbook.interpolates(real, fake, alpha.to(dtype))])
        theirs.append(errors(critic, usual, exact, truth))
    assert_no_worse_than_twice(ours, theirs)


@pytest.mark.parametrize("kind", ["dense", "image"])
def test_autocast_error_is_at_most_twice_that_of_the_textbook(kind: str) -> None:
    make, shape = (dense_critic, (63, 6)) if kind == "dense" else (image_critic, (7, 2, 6, 8))
    critic = make(torch.float32)
    exact_critic = copy.deepcopy(critic).double()
    ours, theirs = [], []
    for _ in range(8):
        real, fake = random_pair(*shape, dtype=torch.float32)
        alpha = torch.rand(shape[0])
        exact = textbook.penalty(exact_critic, [textbook.interpolates(real.double(), fake.double(), alpha.double())])
        truth = gradients(exact, exact_critic)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            penalty = gradient_penalty(critic, real, fake, alpha=alpha, engine="autograd")
            usual = textbook.penalty(critic, [textbook.interpolates(real, fake, alpha)])
        assert penalty.dtype == torch.float32
        ours.append(errors(critic, penalty, exact, truth))
        theirs.append(errors(critic, usual, exact, truth))
        assert all(parameter.grad.dtype == torch.float32 for parameter in critic[0].parameters())
    assert max(error for error, _ in ours) > 1e-5 * exact, "autocast did not reach the critic"
    assert_no_worse_than_twice(ours, theirs)


def test_norms_of_float16_gradients_do_not_overflow() -> None:
    # ‖∇D‖² = 1000 · 64² is 63 times the largest float16; the norm is 64 √1000.
    critic = nn.Linear(1000, 1).half()
    nn.init.constant_(critic.weight, 64.0)
    real, fake = random_pair(3, 1000, dtype=torch.float16)
    penalty = gradient_penalty(critic, real, fake, target=0.0, weight=1.0, engine="autograd")
    assert penalty.item() == pytest.approx(64.0**2 * 1000, rel=1e-6)


def test_a_grad_scaler_scales_the_penalty_gradients() -> None:
    critic = dense_critic(torch.float32)
    real, fake = random_pair(5, 6, dtype=torch.float32)
    alpha = torch.rand(5)
    expected = gradients(gradient_penalty(critic, real, fake, alpha=alpha, engine="autograd"), critic)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10)
    critic.zero_grad()
    scaler.scale(gradient_penalty(critic, real, fake, alpha=alpha, engine="autograd")).backward()
    scaled = textbook.gradients_left_in(critic)
    scaler.unscale_(optimizer)
    unscaled = textbook.gradients_left_in(critic)
    for name in expected:  # a power of two scales without rounding
        assert torch.equal(scaled[name], 2.0**10 * expected[name]), name
        assert torch.equal(unscaled[name], expected[name]), name


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r, self.b = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.b(self.r(x)[0][:, -1])
        return scores


@pytest.mark.parametrize("critic", [Recurrent, lambda: nn.Sequential(nn.Flatten(), nn.Linear(15, 4), nn.Tanh())])
def test_autograds_penalty_may_be_differentiated_twice(critic: Callable[[], nn.Module]) -> None:
    made = critic() if critic is Recurrent else nn.Sequential(critic(), nn.Linear(4, 1))
    made = made.double()
    x, alpha = torch.randn(4, 5, 3).double(), torch.ones(4).double()

    def second(penalty: Tensor) -> Tensor:
        weight = next(made.parameters())
        (first,) = torch.autograd.grad(penalty, weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    ours = second(gradient_penalty(made, x, x, alpha=alpha, engine="autograd"))
    torch.testing.assert_close(ours, second(reference.gradient_penalty(made, [x])[0]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ["autograd", "four_pass"])
def test_a_loss_may_be_scaled_past_the_range_of_the_samples(engine: str) -> None:
    class Raised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.body(x.float())
            return scores

    critic, x, scale = Raised(), torch.randn(1024, 3).half(), 65536.0
    plain = copy.deepcopy(critic)
    (gradient_penalty(critic, x, x, engine=engine) * scale).backward()  # type: ignore[arg-type, no-untyped-call]
    reference.gradient_penalty(plain, [x.float()])[0].backward()  # type: ignore[no-untyped-call]
    slack = 2e-2  # the input gradient, and in four passes its cotangent, have the precision of the samples
    for ours, theirs in zip(critic.parameters(), plain.parameters()):
        if theirs.grad is not None:
            expected = theirs.grad * scale
            torch.testing.assert_close(ours.grad, expected, rtol=slack, atol=slack * float(expected.abs().max()))


@pytest.mark.parametrize("engine", ["auto", "autograd", "four_pass"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_penalty_that_reaches_no_parameter_has_a_backward(engine: str, trainable: bool) -> None:
    bias = nn.Parameter(torch.zeros(()))
    frozen = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).requires_grad_(False)

    def distant(x: Tensor) -> Tensor:
        return x.square().sum(1) + bias

    penalty = gradient_penalty(distant if trainable else frozen, *torch.randn(2, 6, 4), engine=engine)  # type: ignore[arg-type]
    penalty.backward()  # type: ignore[no-untyped-call]
    assert bias.grad is None
    assert all(p.grad is None for p in frozen.parameters())


def test_autograds_gradients_may_be_batched() -> None:
    critic, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(6, 4)
    penalty = gradient_penalty(critic, x, x, engine="autograd")
    weight = critic[0].weight
    batched = torch.autograd.grad(penalty, weight, torch.arange(5.0), is_grads_batched=True, retain_graph=True)[0]
    (single,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(batched, torch.arange(5.0)[:, None, None] * single)


@pytest.mark.usefixtures("replaced_however_small")
def test_a_compiled_part_of_the_critic_keeps_its_activations() -> None:
    body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    compiled, x = torch.compile(body, backend="eager"), torch.randn(8, 8)
    gradient_penalty(lambda x: compiled(x), x, x, engine="autograd").backward()  # type: ignore[no-untyped-call]
    found = [p.grad for p in body.parameters()]
    body.zero_grad()
    reference.gradient_penalty(body, [x])[0].backward()  # type: ignore[no-untyped-call]
    for ours, parameter in zip(found, body.parameters()):
        torch.testing.assert_close(ours, parameter.grad)


def test_the_default_dtype_may_change_between_plans() -> None:
    class Masked(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.a, self.w = nn.Linear(3, n), nn.Parameter(torch.randn(n, 1))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            # An integer times a number is of the default dtype.
            return ((h > 0).long() * 0.5) @ self.w * h.sum(1, keepdim=True)

    try:
        for n, dtype in ((5, torch.float32), (6, torch.float64)):
            torch.set_default_dtype(dtype)
            critic, x = Masked(n), torch.randn(8, 3)
            ours = gradient_penalty(critic, x, x, engine="four_pass")
            torch.testing.assert_close(ours, reference.gradient_penalty(critic, [x])[0])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("batch", [1, 3, 63])
@pytest.mark.parametrize("at", AT)
def test_any_batch_size(batch: int, at: str) -> None:
    critic = dense_critic()
    real, fake = random_pair(batch, 6)
    random, again = generator(5), generator(5)
    alpha = torch.rand(batch, dtype=torch.float64, generator=again)
    noise = torch.rand(real.shape, dtype=torch.float64, generator=again)
    expected = textbook.penalty(critic, textbook.points_at(at, real, fake, alpha, noise))
    actual = gradient_penalty(critic, real, fake, at=at, generator=random, engine="autograd")
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert_equal_gradients(gradients(actual, critic), gradients(expected, critic))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("at", AT)
def test_any_memory_layout(layout: str, at: str) -> None:
    critic = image_critic()
    real, fake = random_pair(3, 2, 6, 8)
    options = {"at": at, "engine": "autograd"}
    expected = gradient_penalty(critic, real, fake, generator=generator(1), **options)
    strided = LAYOUTS[layout](real)
    assert torch.equal(strided, real)
    actual = gradient_penalty(critic, strided, fake, generator=generator(1), **options)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert_equal_gradients(gradients(actual, critic), gradients(expected, critic))


# GradientPenalty and PenaltyConfig


@pytest.mark.parametrize("at", AT)
def test_a_planned_penalty_equals_the_function(case: Case, at: str) -> None:
    critic = case.critic()
    real, fake = case.samples()
    options: dict[str, Any] = {
        "weight": 3.5,
        "target": case.typical_norm([real, fake]),
        "one_sided": True,
        "at": at,
        "group_size": case.group_size,
        "critic_args": case.args,
        "critic_kwargs": case.kwargs,
        "engine": "autograd",
    }
    planned = GradientPenalty(critic, generator=generator(5), **options)
    random = generator(5)
    for _ in range(2):  # the second call draws afresh and reads the parameters as they are now
        expected = gradient_penalty(critic, real, fake, generator=random, **options)
        actual = planned(real, fake)
        assert torch.equal(actual, expected)
        assert_equal_gradients(gradients(actual, critic), gradients(expected, critic))
        with torch.no_grad():
            next(critic.parameters()).mul_(1.25)
    expected = gradient_penalty(critic, real, fake, alpha=case.alpha(), generator=random, **options)
    assert torch.equal(planned(real, fake, case.alpha()), expected)


def test_a_planned_penalty_takes_the_labels_of_the_batch() -> None:
    case = CASES["conditional"]
    critic, (real, fake) = case.critic(), case.samples()
    planned = GradientPenalty(critic, critic_args=case.args, critic_kwargs={"scale": 0.5}, engine="autograd")
    labels = (torch.arange(case.batch) + 1) % textbook.CLASSES
    points = [textbook.interpolates(real, fake, case.alpha())]
    for args, kwargs in (((labels,), None), (None, {"scale": 2.0}), ((labels,), {"scale": 2.0}), (None, {})):
        expected = textbook.penalty(
            critic,
            points,
            args=case.args if args is None else args,
            kwargs={"scale": 0.5} if kwargs is None else kwargs,
        )
        actual = planned(real, fake, case.alpha(), critic_args=args, critic_kwargs=kwargs)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)


PRESETS = {
    # (config, weight, target, one_sided, at) as in the papers: R1 and R2 have γ/2 E‖∇D‖².
    "wgan_gp": (PenaltyConfig.wgan_gp(), 10.0, 1.0, False, "interpolates"),
    "wgan_lp": (PenaltyConfig.wgan_lp(), 10.0, 1.0, True, "interpolates"),
    "r1": (PenaltyConfig.r1(), 5.0, 0.0, False, "real"),
    "r2": (PenaltyConfig.r2(gamma=1.0), 0.5, 0.0, False, "fake"),
    "dragan": (PenaltyConfig.dragan(weight=2.0), 2.0, 1.0, False, "perturbed"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_of_the_papers(name: str) -> None:
    config, weight, target, one_sided, at = PRESETS[name]
    assert config == PenaltyConfig(weight, target, one_sided, at, group_size=1, every=1)


def test_a_config_is_a_constant() -> None:
    config = PenaltyConfig()
    assert config == PenaltyConfig.wgan_gp()
    assert hash(config) == hash(PenaltyConfig.wgan_gp())
    with pytest.raises(AttributeError):
        config.weight = 1.0


# Errors


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize(
    ("wrong", "exception", "words"), rows(OPTION_ERRORS, CALL_ERRORS, SAMPLE_ERRORS, CRITIC_ERRORS)
)
def test_bad_arguments_raise_and_touch_nothing(
    wrong: dict[str, Any], exception: type[Exception], words: tuple[str, ...], as_object: bool
) -> None:
    net = dense_critic(torch.float32)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    arguments = {
        "critic": net,
        "real": torch.ones(4, 6),
        "fake": torch.zeros(4, 6),
        "alpha": torch.rand(4),
        "engine": "autograd",
        **wrong,
    }
    if wrong.get("group_size") == 2:
        arguments["alpha"] = None

    def call() -> None:
        if as_object:
            batch = [arguments.pop(name) for name in ("real", "fake", "alpha")]
            GradientPenalty(**arguments)(*batch)
        else:
            gradient_penalty(**arguments)

    with pytest.raises(exception) as caught:
        call()
    assert_says(str(caught.value), words)
    assert type(caught.value) is exception
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in net.parameters())


def test_detached_critic_with_parameters_is_found_too() -> None:
    net = dense_critic()
    real, fake = random_pair(4, 6)
    with pytest.raises(ValueError, match=r"critic.*input"):
        gradient_penalty(lambda x: net(x.detach()), real, fake, engine="autograd")


@pytest.mark.parametrize(
    ("wrong", "exception", "words"),
    rows(
        OPTION_ERRORS,
        [
            ("every is zero", {"every": 0}, ValueError, ("every", "0")),
            ("every is a float", {"every": 4.0}, TypeError, ("every", "float")),
            ("every is a bool", {"every": True}, TypeError, ("every", "bool")),
        ],
    ),
)
def test_bad_config_raises(wrong: dict[str, Any], exception: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(exception) as caught:
        PenaltyConfig(**wrong)
    assert_says(str(caught.value), words)


@pytest.mark.parametrize(("name", "value"), [("critic_args", [1]), ("critic_kwargs", [("scale", 1)])])
def test_bad_arguments_of_a_batch_raise(name: str, value: Any) -> None:
    planned = GradientPenalty(dense_critic(), engine="autograd")
    with pytest.raises(TypeError, match=f"{name}.*list"):
        planned(*random_pair(4, 6), **{name: value})
