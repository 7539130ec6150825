"""What four passes cannot do is left to autograd, without a crash."""

from collections.abc import Callable
from typing import Any

import pytest
import textbook
import torch
from awkward_critics import CRITICS, Branching, old_norm
from side_by_side import (
    ALPHA,
    FAKE,
    REAL,
    USES,
    Critic,
    SideBySide,
    assert_same_gradients,
    mlp,
    outcome,
    vector,
)
from textbook import CRITIC_LOSSES
from torch import Tensor, nn

from wgan_fast import CriticStep, PenaltyConfig, gradient_penalty

ignored = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@ignored
@pytest.mark.parametrize(
    ("use", "loss"),
    [("penalty", "wasserstein"), ("step", "hinge"), pytest.param("step", "wasserstein", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", CRITICS)
def test_every_critic_that_autograd_differentiates_runs(name: str, use: str, loss: str) -> None:
    critic = CRITICS[name]()
    pair = SideBySide(use, critic, loss=loss)
    for _ in range(3):
        pair.check()
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.mul_(1.1)


def powered(critic: nn.Module, loss: str, batched: bool) -> Tensor:
    """The step of a critic whose power iteration runs once a forward: three forwards, or one over all batches."""
    points = textbook.interpolates(REAL, FAKE, ALPHA).requires_grad_()
    if batched:
        real, fake, mixed = critic(torch.cat([REAL, FAKE, points])).chunk(3)
    else:
        real, fake, mixed = critic(REAL), critic(FAKE), critic(points)
    (gradient,) = torch.autograd.grad(mixed.sum(), points, create_graph=True)
    value = CRITIC_LOSSES[loss](real, fake) + 10 * (gradient.norm(2, dim=1) - 1).square().mean()
    value.backward()
    return value.detach()


@ignored
@pytest.mark.parametrize("loss", ["hinge", "wasserstein", "non_saturating"])
@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm"])
def test_old_style_norms_in_training_step_with_every_loss(norm: str, loss: str) -> None:
    critic = old_norm(getattr(nn.utils, norm))().train()
    step = CriticStep(critic, loss=loss)
    for _ in range(4):
        critic(REAL)  # somebody else's call, which iterates, too
        start = {name: buffer.clone() for name, buffer in critic.named_buffers()}
        actual, ours = outcome(lambda: step(REAL, FAKE, ALPHA).loss, list(critic.parameters()))
        after = {name: buffer.clone() for name, buffer in critic.named_buffers()}
        matches = []
        for batched in (True, False):
            for name, buffer in critic.named_buffers():
                buffer.copy_(start[name])
            expected, theirs = outcome(
                lambda batched=batched: powered(critic, loss, batched), list(critic.parameters())
            )
            matches.append(torch.allclose(actual, expected, rtol=1e-10, atol=0))
            if matches[-1]:
                assert_same_gradients(ours, theirs)
                for name, buffer in critic.named_buffers():
                    torch.testing.assert_close(after[name], buffer, rtol=1e-12, atol=1e-14)
        assert any(matches)
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.mul_(1.1)


SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "COO": lambda dense: dense.to_sparse(),
    "CSR": lambda dense: dense.to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state", "ignore::RuntimeWarning")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", ["positional", "keyword", "attribute", "in a list"])
@pytest.mark.parametrize("layout", SPARSE)
def test_sparse_tensors_beside_the_samples(layout: str, how: str, use: str) -> None:
    torch.manual_seed(3)
    adjacency = [SPARSE[layout]((torch.rand(6, 6) > 0.5).double() * i) for i in (1, 2, 3)]
    critic = Critic(lambda critic, h, a=None: torch.sparse.mm(critic.held[0] if a is None else a, h.T).T, held=[None])
    pair = SideBySide(use, critic)
    values = []
    for a in adjacency:
        given: dict[str, Any] = {}
        if how == "positional":
            given["args"] = lambda a=a: (a,)
        elif how == "keyword":
            given["kwargs"] = lambda a=a: {"a": a}
        else:
            critic.held = [a] if how == "in a list" else (a,)
        values.append(pair.check(**given))
    assert len(set(values)) == 3


@ignored
@pytest.mark.parametrize("use", USES)
def test_tensors_on_meta_are_refused_by_name_or_give_meta_results(use: str) -> None:
    critic, real, fake, alpha = mlp().to("meta"), REAL.to("meta"), FAKE.to("meta"), ALPHA.to("meta")
    assert textbook.penalty(critic, [textbook.interpolates(real, fake, alpha)]).is_meta  # as plain autograd does
    try:
        value = SideBySide(use, critic).ours(real, fake, alpha, (), None)
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        message = f"{value.device} {tuple(value.shape)}"
    assert "meta" in message
    assert "\n" not in message


@ignored
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("at", ["fake", "interpolates", "both", "real"])
def test_batches_made_in_inference_mode(at: str, use: str) -> None:
    with torch.inference_mode():
        fake, real = FAKE * 1, REAL * 1
    critic = mlp()
    pair = SideBySide(use, critic, at=at)
    leaves = list(critic.parameters())
    for r, f in ((REAL, fake), (real, FAKE), (real, fake)):
        actual, ours = outcome(lambda r=r, f=f: pair.ours(r, f, ALPHA, (), None), leaves)
        expected, theirs = outcome(lambda: pair.plain(REAL, FAKE, ALPHA, (), None), leaves)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
        assert_same_gradients(ours, theirs)


@ignored
@pytest.mark.parametrize("use", USES)
def test_further_arguments_made_in_inference_mode(use: str) -> None:
    with torch.inference_mode():
        style = vector() * 1
    critic = Critic(lambda critic, h, y: h + y)
    SideBySide(use, critic).check(args=lambda: (style,))


@pytest.mark.parametrize("name", ["branch on data", "TorchScript", "packed sequences"])
@ignored
def test_four_pass_raises_where_auto_gives_way(name: str) -> None:
    critic = CRITICS[name]()
    for call in (
        lambda: gradient_penalty(critic, REAL, FAKE, engine="four_pass"),
        lambda: CriticStep(critic, engine="four_pass")(REAL, FAKE),
    ):
        with pytest.raises(RuntimeError, match=r"\w"):
            call()
    assert all(p.grad is None for p in critic.parameters())


@ignored
@pytest.mark.parametrize("switch", ["environment", "decorator", "stance"])
def test_where_the_compiler_is_switched_off_results_are_right(switch: str) -> None:
    critic = mlp()
    for use in USES:
        pair = SideBySide(use, critic)
        if switch == "environment":
            with torch._dynamo.config.patch(disable=True):  # as TORCHDYNAMO_DISABLE=1 sets it
                pair.check()
        elif switch == "decorator":
            torch.compiler.disable(pair.check)()
        else:
            with torch.compiler.set_stance("force_eager"):
                pair.check()
        pair.check()


@ignored
@pytest.mark.parametrize("use", USES)
def test_a_failed_call_leaves_nothing_behind(use: str) -> None:
    """The next call after one that a wrong batch stopped is right."""
    critic = Critic(lambda critic, h: h * critic.mix, mix=vector())
    pair = SideBySide(use, critic)
    pair.check()
    critic.mix = torch.ones(4, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must match the size"):
            pair.ours(REAL, FAKE, ALPHA, (), None)
    critic.mix = vector(2.0)
    pair.check()
    pair.check()


@ignored
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_that_gives_way_keeps_its_count(every: int) -> None:
    critic = Branching()
    step = CriticStep(critic, penalty=PenaltyConfig(every=every))
    carried = [step(REAL, FAKE, ALPHA).penalty.item() > 0 for _ in range(4)]
    assert carried == [i % every == 0 for i in range(4)]
    assert step.steps_taken == 4
