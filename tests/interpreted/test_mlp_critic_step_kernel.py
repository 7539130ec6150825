import pytest
import torch
from torch import nn
from wgan_fast.kernels.mlp_critic_step import mlp_critic_step

from wgan_fast import ops, reference


def critic(D: int, H: int, layers: int, slope: float) -> nn.Sequential:
    torch.manual_seed(0)
    modules = [nn.Linear(D, H), nn.LeakyReLU(slope)]
    for _ in range(layers - 1):
        modules += [nn.Linear(H, H), nn.LeakyReLU(slope)]
    return nn.Sequential(*modules, nn.Linear(H, 1), nn.Flatten(0)).double()


def truth(made, real, fake, alpha, **penalty):
    points = reference.interpolate(real, fake, alpha)
    scores = made(real).mean(), made(fake).mean()
    value, norms = reference.gradient_penalty(made, [points], **penalty)
    loss = scores[1] - scores[0] + value
    gradients = torch.autograd.grad(loss, list(made.parameters()), allow_unused=True, materialize_grads=True)
    return torch.stack([*scores, value]).detach(), norms, torch.cat([g.flatten() for g in gradients])


# Widths and batches below, at and above a block; one hidden layer and several.
@pytest.mark.parametrize(
    ("N", "D", "H", "layers", "slope", "penalty"),
    [
        (5, 2, 7, 1, 0.0, {}),
        (67, 3, 20, 2, 0.2, {"one_sided": True, "target": 0.3}),
        (64, 16, 64, 3, 0.0, {"weight": 3.0}),
        (33, 70, 65, 2, 0.1, {"target": 0.0}),
    ],
)
def test_float64_equals_autograd(N, D, H, layers, slope, penalty):
    made = critic(D, H, layers, slope)
    real, fake = torch.randn(2, N, D, dtype=torch.float64).unbind()
    alpha = torch.rand(N, dtype=torch.float64)
    options = {"weight": 10.0, "target": 1.0, "one_sided": False} | penalty
    parameters = torch.cat([p.detach().flatten() for p in made.parameters()])
    figures, norms, gradient = mlp_critic_step(
        real, fake, alpha, parameters, H, layers, slope, precision="fp32", **options
    )
    expected = truth(made, real, fake, alpha, **options)
    torch.testing.assert_close(figures[:3], expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((figures[3], norms.mean()), (norms.mean(), expected[1].mean()), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, expected[2], rtol=1e-10, atol=1e-12)


# Not "bf16": the interpreter multiplies the bit patterns of bfloat16 as integers.
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_operator_keeps_the_precision_that_it_is_told(precision):
    ops._register_mlp_critic_step("CPU")
    layers = 2
    made = critic(3, 20, layers, 0.2)
    real, fake = torch.randn(2, 37, 3, dtype=torch.float64).unbind()
    alpha = torch.rand(37, dtype=torch.float64)
    options = {"weight": 10.0, "target": 1.0, "one_sided": False}
    given = [t.float() for t in (real, fake, alpha)], [p.detach().float() for p in made.parameters()]
    figures, _, gradients = torch.ops.wgan_fast.mlp_critic_step(*given[0], given[1], 0.2, *options.values(), precision)
    expected = truth(made, real, fake, alpha, **options)
    # Both sides of every product on a gradient's way are rounded once; the interpreter takes TF32 for float32.
    bound = 4 * (3 * layers + 2) * 2.0**-23
    gradient = torch.cat([g.flatten() for g in gradients]).double()
    assert (gradient - expected[2]).norm() <= bound * expected[2].norm()
    torch.testing.assert_close(figures[:3].double(), expected[0], rtol=bound, atol=bound)
