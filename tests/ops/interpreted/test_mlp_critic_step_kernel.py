import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import nn
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from wgan_fast import CriticStep, reference
from wgan_fast.engine import fused_mlp
from wgan_fast.kernels import mlp_critic_step as kernels
from wgan_fast.ops.registry import launch_on


def critic(D: int, widths: list[int], slope: float) -> nn.Sequential:
    torch.manual_seed(0)
    modules = [m for a, b in pairwise([D, *widths]) for m in (nn.Linear(a, b), nn.LeakyReLU(slope))]
    return nn.Sequential(*modules, nn.Linear(widths[-1], 1), nn.Flatten(0)).double()


def truth(made, real, fake, alpha, **penalty):
    points = reference.interpolate(real, fake, alpha)
    scores = made(real).mean(), made(fake).mean()
    value, norms = reference.gradient_penalty(made, [points], **penalty)
    loss = scores[1] - scores[0] + value
    gradients = torch.autograd.grad(loss, list(made.parameters()), allow_unused=True, materialize_grads=True)
    return torch.stack([*scores, value]).detach(), norms, torch.cat([g.flatten() for g in gradients])


# Widths and batches below, at and above a block; one hidden layer and several.
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(
    ("N", "D", "widths", "slope", "penalty"),
    [
        (5, 2, [7], 0.0, {}),
        (67, 3, [20] * 2, 0.2, {"one_sided": True, "target": 0.3}),
        (64, 16, [64] * 3, 0.0, {"weight": 3.0}),
        (33, 70, [65] * 2, 0.1, {"target": 0.0}),
        (40, 5, [70, 33], 0.2, {}),
        (21, 40, [17, 130, 64, 9], 0.0, {}),
        (18, 40, [512, 256], 0.0, {}),
        (7, 3, [4, 9, 17, 5, 33, 8], 0.3, {}),
    ],
)
def test_float64_equals_autograd(N, D, widths, slope, penalty, rows, monkeypatch):
    monkeypatch.setattr(kernels, "_ROWS", (rows, rows))
    made = critic(D, widths, slope)
    real, fake = torch.randn(2, N, D, dtype=torch.float64).unbind()
    alpha = torch.rand(N, dtype=torch.float64)
    options = {"weight": 10.0, "target": 1.0, "one_sided": False} | penalty
    parameters = [p.detach() for p in made.parameters()]
    figures, norms, gradients = kernels.mlp_critic_step(
        real, fake, alpha, parameters, slope, precision="fp32", **options
    )
    assert len({g.untyped_storage().data_ptr() for g in (figures, norms, *gradients)}) == 2 + len(gradients)
    gradient = torch.cat([g.flatten() for g in gradients])
    expected = truth(made, real, fake, alpha, **options)
    torch.testing.assert_close(figures[:3], expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((figures[3], norms.mean()), (norms.mean(), expected[1].mean()), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected[2], rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def _launched_on_a_cpu() -> None:
    """Once: some versions of PyTorch refuse a second registration, others warn of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        launch_on("CPU", "mlp_critic_step")


@pytest.fixture
def _dots_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widen what is multiplied: the interpreter would multiply the bit patterns of bfloat16 as integers."""

    def wide(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *further: dot(self, wide(a), wide(b), *further)
    )


ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-24, "bf16": 2.0**-9}
"""Of one product; the interpreter takes TF32 for float32."""


# Widths and batches that 16 divides and that it does not.
@pytest.mark.usefixtures("_launched_on_a_cpu", "_dots_of_bfloat16")
@pytest.mark.parametrize(("N", "D", "widths"), [(37, 3, [20, 20]), (64, 32, [32] * 3), (37, 5, [48, 17])])
@pytest.mark.parametrize("precision", ROUNDOFF)
def test_the_operator_keeps_the_precision_that_it_is_told(precision, N, D, widths):
    made = critic(D, widths, 0.2)
    real, fake = torch.randn(2, N, D, dtype=torch.float64).unbind()
    alpha = torch.rand(N, dtype=torch.float64)
    options = {"weight": 10.0, "target": 1.0, "one_sided": False}
    given = [t.float() for t in (real, fake, alpha)], [p.detach().float() for p in made.parameters()]
    figures, _, gradients = torch.ops.wgan_fast.mlp_critic_step(*given[0], given[1], 0.2, *options.values(), precision)
    expected = truth(made, real, fake, alpha, **options)
    # On a gradient's way each layer is passed three times and two more products follow; each rounds both its sides,
    # and a third and fourth time where what it gives is kept and where signs near 0 turn.
    bound = 4 * (3 * len(widths) + 2) * ROUNDOFF[precision]
    gradient = torch.cat([g.flatten() for g in gradients]).double()
    error = (gradient - expected[2]).norm() / expected[2].norm()
    assert error <= bound
    # bfloat16 was asked for, and nothing wider.
    assert precision != "bf16" or error > ROUNDOFF["bf16"] / 16
    torch.testing.assert_close(figures[:3].double(), expected[0], rtol=bound, atol=bound)
    assert all(g.shape == p.shape and g.is_contiguous() for g, p in zip(gradients, given[1]))


@pytest.mark.usefixtures("_launched_on_a_cpu")
def test_a_critic_step_runs_the_kernels(monkeypatch):
    monkeypatch.setattr(fused_mlp, "widest", lambda samples: 256 if samples.dtype == torch.float64 else 0)
    launched = []
    monkeypatch.setattr(
        kernels,
        "mlp_critic_step",
        lambda *args, run=kernels.mlp_critic_step: launched.append(run(*args)) or launched[-1],
    )
    made = critic(3, [20, 12], 0.2)
    real, fake = torch.randn(2, 19, 3, dtype=torch.float64).unbind()
    alpha = torch.rand(19, dtype=torch.float64)
    result = CriticStep(made)(real, fake, alpha)
    figures, norms, gradient = truth(made, real, fake, alpha, weight=10.0, target=1.0, one_sided=False)
    assert len(launched) == 1
    torch.testing.assert_close(result.loss, figures[1] - figures[0] + figures[2], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.gradient_norm, norms.mean().detach(), rtol=1e-10, atol=0)
    left = torch.cat([p.grad.flatten() for p in made.parameters()])
    torch.testing.assert_close(left, gradient, rtol=1e-10, atol=1e-12)
