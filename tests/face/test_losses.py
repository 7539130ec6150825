import math
from typing import Any

import pytest
import torch
from textbook import CRITIC_LOSSES, GENERATOR_LOSSES
from torch import Tensor

from wgan_fast import losses
from wgan_fast.losses import LOSSES, AdversarialLoss, get_loss

NAMES = ("wasserstein", "non_saturating", "least_squares", "hinge")


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def log_sigmoid(score: float) -> float:
    return -math.log1p(math.exp(-score)) if score > 0 else score - math.log1p(math.exp(score))


# The formulas of the papers, in Python floats. "real" and "fake" are lists of scores D(x) and D(G(z)).
PAPERS = {
    # Arjovsky et al. 2017, eq. 3: the critic maximises E D(x) - E D(G(z)), the generator E D(G(z)).
    "wasserstein": (lambda real, fake: mean(fake) - mean(real), lambda fake: -mean(fake)),
    # Goodfellow et al. 2014, eq. 1 with D = sigmoid(score), and section 3: the generator maximises log D(G(z)).
    "non_saturating": (
        lambda real, fake: -mean([log_sigmoid(s) for s in real]) - mean([log_sigmoid(-s) for s in fake]),
        lambda fake: -mean([log_sigmoid(s) for s in fake]),
    ),
    # Mao et al. 2017, eq. 2 and 9, with a = 0 and b = c = 1.
    "least_squares": (
        lambda real, fake: 0.5 * mean([(s - 1) ** 2 for s in real]) + 0.5 * mean([s**2 for s in fake]),
        lambda fake: 0.5 * mean([(s - 1) ** 2 for s in fake]),
    ),
    # Lim and Ye 2017, section 4: margins at 1 and -1; the generator maximises E D(G(z)).
    "hinge": (
        lambda real, fake: mean([max(0.0, 1 - s) for s in real]) + mean([max(0.0, 1 + s) for s in fake]),
        lambda fake: -mean(fake),
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("column", [False, True])
def test_equals_the_formula_of_the_paper(name: str, scale: float, column: bool) -> None:
    real, fake = torch.randn(63, dtype=torch.float64) * scale, torch.randn(31, dtype=torch.float64) * scale + 0.5
    shape = (-1, 1) if column else (-1,)
    loss, (critic, generator) = getattr(losses, name), PAPERS[name]
    actual = loss.critic(real.view(shape), fake.view(shape))
    assert actual.shape == ()
    assert actual.item() == pytest.approx(critic(real.tolist(), fake.tolist()), rel=1e-12)
    actual = loss.generator(fake.view(shape))
    assert actual.shape == ()
    assert actual.item() == pytest.approx(generator(fake.tolist()), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_losses_of_torch_and_so_do_the_gradients(name: str) -> None:
    real, fake = (torch.randn(63, dtype=torch.float64, requires_grad=True) for _ in range(2))
    actual, expected = LOSSES[name].critic(real, fake), CRITIC_LOSSES[name](real, fake)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)
    for ours, theirs in zip(torch.autograd.grad(actual, (real, fake)), torch.autograd.grad(expected, (real, fake))):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    actual, expected = LOSSES[name].generator(fake), GENERATOR_LOSSES[name](fake)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(
        torch.autograd.grad(actual, fake)[0], torch.autograd.grad(expected, fake)[0], rtol=1e-13, atol=0
    )


def test_non_saturating_tails_are_exact() -> None:
    # Between 20, where implementations of softplus turn linear, and 37, where float64 would agree with them.
    scores = torch.linspace(-45, 45, 91, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(losses.non_saturating.generator(scores), scores)
    assert slope.tolist() == pytest.approx([-1 / (1 + math.exp(s)) / 91 for s in scores.tolist()], rel=1e-13, abs=0)
    (slope,) = torch.autograd.grad(losses.non_saturating.critic(scores.detach(), scores), scores)
    assert slope.tolist() == pytest.approx([1 / (1 + math.exp(-s)) / 91 for s in scores.tolist()], rel=1e-13, abs=0)
    (slope,) = torch.autograd.grad(losses.non_saturating.critic(scores, scores.detach()), scores)
    assert slope.tolist() == pytest.approx([-1 / (1 + math.exp(s)) / 91 for s in scores.tolist()], rel=1e-13, abs=0)


@pytest.mark.parametrize("name", NAMES)
def test_first_and_second_derivatives(name: str) -> None:
    # Away from the kinks of the hinge at 1 and -1.
    real, fake = (torch.linspace(-2.9, 2.75, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(LOSSES[name].critic, (real, fake))
    assert torch.autograd.gradgradcheck(LOSSES[name].critic, (real, fake))
    assert torch.autograd.gradcheck(LOSSES[name].generator, (fake,))
    assert torch.autograd.gradgradcheck(LOSSES[name].generator, (fake,))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_huge_scores_overflow_neither_value_nor_gradient(name: str, dtype: torch.dtype, sign: tuple[int, int]) -> None:
    # The square of 1e4 overflows float16, its exponential everything.
    real, fake = (torch.full((3,), s * 1e4, dtype=dtype, requires_grad=True) for s in sign)
    loss, (critic, generator) = LOSSES[name], PAPERS[name]
    exact_real, exact_fake = real.detach().double().requires_grad_(), fake.detach().double().requires_grad_()
    for value, truth, leaves, exact_leaves in (
        (
            loss.critic(real, fake),
            critic(exact_real.tolist(), exact_fake.tolist()),
            (real, fake),
            (exact_real, exact_fake),
        ),
        (loss.generator(fake), generator(exact_fake.tolist()), (fake,), (exact_fake,)),
    ):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.item() == pytest.approx(truth, rel=1e-6)
        exact = loss.critic(*exact_leaves) if len(leaves) == 2 else loss.generator(*exact_leaves)
        for ours, theirs in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(exact, exact_leaves)):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_error_is_at_most_twice_that_of_torch(name: str, dtype: torch.dtype) -> None:
    ours, theirs = [], []
    for _ in range(16):
        real, fake = (3 * torch.randn(63)).to(dtype), (3 * torch.randn(63)).to(dtype)
        exact = CRITIC_LOSSES[name](real.double(), fake.double())
        ours.append((LOSSES[name].critic(real, fake).double() - exact).item())
        theirs.append((CRITIC_LOSSES[name](real, fake).double() - exact).item())
    assert torch.tensor(ours).square().mean().sqrt() <= 2 * torch.tensor(theirs).square().mean().sqrt()


@pytest.mark.parametrize("name", NAMES)
def test_nan_scores_show_in_the_loss(name: str) -> None:
    good, bad = torch.randn(3), torch.tensor([1.0, float("nan"), 0.0])
    assert LOSSES[name].critic(good, bad).isnan()
    assert LOSSES[name].critic(bad, good).isnan()
    assert LOSSES[name].generator(bad).isnan()


def test_every_loss_is_known_by_its_name() -> None:
    assert tuple(LOSSES) == NAMES
    for name in NAMES:
        assert get_loss(name) is LOSSES[name] is getattr(losses, name)
        assert LOSSES[name].name == name


def test_a_loss_of_ones_own_passes_through() -> None:
    def nothing(*scores: Tensor) -> Tensor:
        return scores[0].sum() * 0

    own = AdversarialLoss("own", nothing, nothing)
    assert get_loss(own) is own


@pytest.mark.parametrize(
    ("wrong", "exception", "words"),
    [
        ("wassertein", ValueError, ("loss", "'wassertein'", *NAMES)),
        (None, TypeError, ("loss", "NoneType")),
        (PAPERS["hinge"], TypeError, ("loss", "tuple")),
    ],
)
def test_an_unknown_loss_is_refused(wrong: Any, exception: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(exception) as caught:
        get_loss(wrong)
    for word in words:
        assert word in str(caught.value)
