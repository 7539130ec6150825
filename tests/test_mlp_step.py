"""The critic step of a narrow MLP as one operator: autograd's gradients, and a reason where it cannot be taken."""

import pytest
import torch
from torch import Tensor, nn

from wgan_fast import reference
from wgan_fast.mlp_critic_step import FusedMLP, fused_mlp_step

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def mlp(D: int, H: int, layers: int, activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [m for _ in range(layers - 1) for m in (nn.Linear(H, H), activation)]
    return nn.Sequential(nn.Linear(D, H), activation, *hidden, nn.Linear(H, 1), nn.Flatten(0)).double()


def run(critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor, **penalty: float) -> tuple:
    found = fused_mlp_step(critic)
    assert isinstance(found, FusedMLP)
    parameters = [p.detach() for p in found.parameters]
    return torch.ops.wgan_fast.mlp_critic_step(
        real, fake, alpha, parameters, found.negative_slope, *penalty.values(), "fp32"
    )


@pytest.mark.parametrize(
    ("N", "D", "H", "layers", "activation", "penalty"),
    [
        (5, 2, 7, 1, nn.ReLU(), {}),
        (67, 3, 20, 2, nn.LeakyReLU(0.2), {"target": 0.3, "one_sided": True}),
        (1, 63, 65, 4, nn.ReLU(inplace=True), {"weight": 3.0}),
        (100, 5, 9, 3, nn.LeakyReLU(), {"target": 0.0}),
    ],
)
def test_float64_equals_autograd(N: int, D: int, H: int, layers: int, activation: nn.Module, penalty: dict) -> None:
    critic = mlp(D, H, layers, activation)
    options = {"weight": 10.0, "target": 1.0, "one_sided": False} | penalty
    real, fake = torch.randn(2, N, D, dtype=torch.float64).unbind()
    alpha = torch.rand(N, dtype=torch.float64)
    figures, norms, gradients = run(critic, real, fake, alpha, **options)

    scores = critic(real).mean(), critic(fake).mean()
    value, norm = reference.gradient_penalty(critic, [reference.interpolate(real, fake, alpha)], **options)
    loss = scores[1] - scores[0] + value
    expected = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(figures, torch.stack([*scores, value, norm]).detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norms.mean(), norm.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(tuple(gradients), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    critic = mlp(3, 8, 2, nn.ReLU()).float().to(device)
    real, fake = torch.randn(2, 6, 3, device=device).unbind()
    parameters = [p.detach() for p in critic.parameters()]
    arguments = real, fake, torch.rand(6, device=device), parameters, 0.0, 10.0, 1.0, False, "fp32"
    torch.library.opcheck(torch.ops.wgan_fast.mlp_critic_step, arguments)


@pytest.mark.parametrize(
    ("critic", "reason"),
    [
        (nn.Linear(3, 1), "no nn.Sequential"),
        (nn.Sequential(nn.Linear(3, 1)), "activation between"),
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), "neither ReLU nor LeakyReLU"),
        (nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)), "with a bias"),
        (nn.Sequential(nn.Linear(3, 300), nn.ReLU(), nn.Linear(300, 1)), "wider than 256"),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "one score"),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)), "equally wide"),
        (nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.ReLU(), nn.Linear(4, 1)), "frozen"),
    ],
)
def test_a_critic_that_it_cannot_run_is_told_why(critic: nn.Module, reason: str) -> None:
    found = fused_mlp_step(critic)
    assert isinstance(found, str)
    assert reason in found
