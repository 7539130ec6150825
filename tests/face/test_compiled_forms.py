"""Every form inside of a caller's own ``torch.compile(fullgraph=True)``."""

from collections.abc import Callable

import pytest
import torch
from plain import N, assert_same_gradients, gradients
from torch import Tensor, nn
from torch.nn.functional import softplus

from wgan_fast import GradientPenalty, PenaltyConfig, gradient_penalty
from wgan_fast.engine import choice as choice_module
from wgan_fast.engine import compiled_callers


class Two(nn.Module):
    """A score and class logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.score, self.classes = nn.Linear(8, 1), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.score(h), self.classes(h)


class Dict(nn.Module):
    """A score of a dict of samples, and of a condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).double()

    def forward(self, samples: dict[str, Tensor], condition: Tensor | None = None) -> Tensor:
        h = torch.cat([samples["a"], samples["b"]], 1)
        return self.inner(h if condition is None else h * condition)


def tripled(output: tuple[Tensor, Tensor]) -> Tensor:
    return 3 * output[0]


two, of_dict = Two(), Dict()
bn = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1)).double()
picked = GradientPenalty(two, score=tripled)
planned = GradientPenalty(two, PenaltyConfig(score=0, at="real", penalty=lambda g: g.norm(dim=1) ** 6))


def r1_and_loss(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    r1 = gradient_penalty(two, x, at="real", score=0, target=0.0, weight=5.0, return_scores=True)
    return r1.penalty + softplus(-r1.scores).mean()


def r1_and_r2(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    both = gradient_penalty(
        two, x, y, at="both", score=0, target=0.0, weight=5.0, return_scores=True, return_norms=True
    )
    return both.penalty + softplus(-both.scores[0]).mean() + softplus(both.scores[1]).mean() + both.norms.mean()


def forces(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
    found = gradient_penalty(
        two, points=x, score=0, weight=1.0, penalty=lambda g, f: (g + f).square().sum(1), penalty_args=(y,),
        return_scores=True,
    )  # fmt: skip
    return found.penalty + (found.scores.flatten() - a).square().mean()


FORMS: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "a tuple": (two, lambda x, y, a: gradient_penalty(two, x, y, alpha=a, score=0)),
    "a dict of samples": (
        of_dict,
        lambda x, y, a: gradient_penalty(of_dict, {"a": x, "b": y}, {"a": y, "b": x}, alpha=a),
    ),
    "a condition beside them": (
        of_dict,
        lambda x, y, a: gradient_penalty(
            of_dict, {"a": x, "b": y}, {"a": y, "b": x}, alpha=a, critic_kwargs={"condition": a[:, None]}
        ),
    ),
    "a norm a position": (
        two,
        lambda x, y, a: gradient_penalty(two, x, y, alpha=a, score=0, penalty=lambda g: (g.norm(2, 1) - 1) ** 2),
    ),
    "a function that picks": (two, lambda x, y, a: picked(x, y, a)),
    "one config": (two, lambda x, y, a: planned(x)),
    "scores too": (two, r1_and_loss),
    "R1 and R2": (two, r1_and_r2),
    "forces": (two, forces),
    "batch norm": (bn, lambda x, y, a: gradient_penalty(bn, x, y, alpha=a, penalty=lambda g: g.norm(2, 1) ** 4)),
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()


def samples(n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 4, dtype=torch.float64), torch.rand(n).double()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMS)
def test_it_compiles_and_is_the_same(name: str, backend: str) -> None:
    critic, form = FORMS[name]
    compiled, tensors = torch.compile(form, fullgraph=True, backend=backend), list(critic.parameters())
    for n in (N, 4, 9):
        given, start = samples(n), {k: v.clone() for k, v in critic.state_dict().items()}
        expected = form(*given)
        theirs, after = gradients(expected, tensors), {k: v.clone() for k, v in critic.state_dict().items()}
        critic.load_state_dict(start)
        ours = compiled(*given)
        torch.testing.assert_close(ours.detach(), expected.detach(), rtol=1e-10, atol=1e-12)
        left = [torch.zeros_like(p) if g is None else g for p, g in zip(tensors, gradients(ours, tensors))]
        # The compiler leaves zeros in what autograd would leave None.
        assert_same_gradients(left, [torch.zeros_like(p) if g is None else g for p, g in zip(tensors, theirs)])
        torch.testing.assert_close(critic.state_dict(), after)


def waiting() -> int:
    return sum(len(choice.waiting) for choice in choice_module._BY_NUMBER.values())


def test_nothing_is_kept_after_a_backward_nor_without_gradients() -> None:
    _, form = FORMS["scores too"]
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    given, before = samples(), waiting()
    compiled(*given).backward()
    assert waiting() == before
    with torch.no_grad():
        compiled(*given)
    assert waiting() == before
    for _ in range(2 * compiled_callers.KEPT):
        compiled(*given)
    assert waiting() <= before + compiled_callers.KEPT


@pytest.mark.slow
def test_memory_that_the_compiler_uses_again_is_not_what_passes_3_and_4_read() -> None:
    critic = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    real, fake = torch.randn(2, 32, 64, dtype=torch.float64)
    alpha = torch.rand(32, dtype=torch.float64)
    busy = lambda g: (g.sin() / (g.norm(dim=1, keepdim=True) + 1)).cumsum(1).tanh().sum(1)  # noqa: E731
    for options in ({}, {"return_scores": True}):
        planned = GradientPenalty(critic, penalty=busy, **options)

        def form(x: Tensor, y: Tensor, planned=planned) -> Tensor:
            found = planned(x, y, alpha)
            return found if isinstance(found, Tensor) else found.penalty + found.scores.square().mean()

        tensors = list(critic.parameters())
        expected = gradients(form(real, fake), tensors)
        ours = gradients(torch.compile(form, fullgraph=True)(real, fake), tensors)
        for a, b in zip(ours, expected):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-9, atol=1e-12)


def test_points_may_be_written_to_before_the_backward() -> None:
    critic, form = FORMS["scores too"]
    compiled, (x, y, a) = torch.compile(form, fullgraph=True, backend="aot_eager"), samples()
    tensors = list(critic.parameters())
    expected = gradients(compiled(x.clone(), y, a), tensors)
    value = compiled(z := x.clone(), y, a)
    z.add_(5)
    for ours, theirs in zip(gradients(value, tensors), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_two_equal_calls_are_two() -> None:
    critic = nn.Sequential(nn.Linear(4, 40), nn.Dropout(0.5), nn.Tanh(), nn.Linear(40, 1)).double()
    planned = GradientPenalty(critic)
    compiled = torch.compile(lambda x: (planned(points=x), planned(points=x)), fullgraph=True, backend="aot_eager")
    one, other = compiled(samples()[0])
    assert one != other
    (one + one * other).backward()


def test_a_backward_that_comes_too_late_says_so() -> None:
    _, form = FORMS["scores too"]
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    given = samples()
    first = compiled(*given)
    for _ in range(compiled_callers.KEPT):
        compiled(*given)
    with pytest.raises(RuntimeError, match="can be differentiated once, and before 8 further ones"):
        first.backward()


def test_functions_of_one_code_pick_what_each_of_them_does() -> None:
    x, y, a = samples()
    one, three = (GradientPenalty(two, score=lambda out, w=w: w * out[0], target=0.0) for w in (1.0, 3.0))
    compiled = torch.compile(lambda p, x, y, a: p(x, y, a), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(three, x, y, a), 9 * compiled(one, x, y, a), rtol=1e-10, atol=0)


def test_a_function_made_inside_cannot_pick() -> None:
    def form(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
        return gradient_penalty(two, x, y, alpha=a, score=lambda out: out[0])

    with pytest.raises(Exception, match=r"a GradientPenalty that was made outside|id\(\)"):
        torch.compile(form, fullgraph=True, backend="aot_eager")(*samples())


def test_autocast_around_it() -> None:
    critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    device = torch.get_default_device().type

    def form(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            r1 = gradient_penalty(critic, x, at="real", target=0.0, return_scores=True)
            return r1.penalty + r1.scores.float().square().mean()

    x, y, _ = (t.float() for t in samples())
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), form(x, y), rtol=1e-5, atol=1e-6)
