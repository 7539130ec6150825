"""Steps that are compared with autograd: right ones pass, wrong ones raise."""

import pytest
import torch
from exact_critics import CRITICS, perturbed
from torch.nn.attention import SDPBackend, sdpa_kernel

from wgan_fast import CriticStep, gradient_penalty
from wgan_fast.engine import checked
from wgan_fast.four_pass.plan import Plan


@pytest.mark.filterwarnings("ignore:wgan_fast differentiates with autograd")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CRITICS)
def test_every_critic_passes_its_check(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    make, shape = CRITICS[name]
    critic = perturbed(make()).to(dtype)
    step = CriticStep(critic, engine="checked")
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(4):
            real, fake = torch.randn(2, *shape, dtype=dtype)
            step(real, fake)
            gradient_penalty(critic, real, fake, engine="checked").backward()


def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every plan give gradients a tenth too large."""
    run = Plan.run

    def wrong(self, *args, **options):
        output = run(self, *args, **options)
        return output._replace(gradients=[None if g is None else 1.1 * g for g in output.gradients])

    monkeypatch.setattr(Plan, "run", wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("how", ["engine", "environment"])
@pytest.mark.parametrize("use", ["step", "penalty"])
def test_wrong_gradients_raise(use: str, how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch)
    if how == "environment":
        monkeypatch.setenv("WGAN_FAST_CHECK", "1")
    engine = "checked" if how == "engine" else "auto"
    critic = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(dtype)
    real, fake = torch.randn(2, 7, 5, dtype=dtype)
    step = CriticStep(critic, engine=engine)

    def take() -> None:
        for _ in range(2):
            if use == "step":
                step(real, fake)
            else:
                gradient_penalty(critic, real, fake, engine=engine)

    with pytest.raises(checked.GradientsDifferError, match="report"):
        take()


def test_steps_are_compared_at_first_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(checked, "ONE_IN", 10)
    monkeypatch.setattr(checked.Check, "__call__", lambda self, *given: compared.append(step.steps_taken))
    critic = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    step = CriticStep(critic, engine="checked")
    for _ in range(25):
        step(*torch.randn(2, 7, 5))
    assert compared == [0, 1, 2, 10, 20]


@pytest.mark.filterwarnings("ignore:wgan_fast differentiates with autograd")
@pytest.mark.parametrize("norm", [torch.nn.BatchNorm1d, torch.nn.LayerNorm])
def test_a_checked_step_leaves_random_numbers_and_buffers_as_an_unchecked_one(norm: type[torch.nn.Module]) -> None:
    left = []
    for engine in ("checked", "auto"):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(5, 8), norm(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)]
        critic = torch.nn.Sequential(*layers).double()
        real, fake = torch.randn(2, 7, 5).double()
        gradient_penalty(critic, real, fake, engine=engine).backward()
        left.append([*(p.grad for p in critic.parameters()), *critic.buffers(), torch.rand(3)])
    for ours, theirs in zip(*left, strict=True):
        if ours is not None or theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
