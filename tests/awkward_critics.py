"""Critics that a tracer refuses, mistakes or is noisy about, and autograd differentiates."""

import contextlib
from collections.abc import Callable
from typing import Any

import textbook
import torch
from side_by_side import (
    REAL,
    Critic,
    linear,
    mlp,
    vector,
)
from torch import Tensor, nn


def recorded(critic: Any, h: Tensor) -> Tensor:
    with torch.profiler.record_function("middle"):
        return h.sin()


def recorded_by_autograd(critic: Any, h: Tensor) -> Tensor:
    with torch.autograd.profiler.record_function("middle"):
        h = h.sin()
    with torch.autograd.profiler.record_function("more"):
        return h * vector()


def printing(critic: Any, h: Tensor) -> Tensor:
    with contextlib.nullcontext():
        return h.sin()


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


def packed(critic: Any, h: Tensor) -> Tensor:
    lengths = torch.tensor([3, 1, 2, 3, 2, 1, 3])
    sequence = nn.utils.rnn.pack_padded_sequence(
        h.view(-1, 3, 2), lengths[: len(h)], batch_first=True, enforce_sorted=False
    )
    return critic.recurrent(sequence)[1].transpose(0, 1).flatten(1)


def recurrent() -> Critic:
    critic = Critic(packed)
    critic.recurrent = nn.GRU(2, 6, batch_first=True).double()
    return critic


def of_sequences(kind: Callable[..., nn.Module]) -> Critic:
    critic = Critic(lambda critic, h: critic.recurrent(h.view(-1, 3, 2))[0].flatten(1))
    critic.recurrent = kind(2, 2, batch_first=True).double()
    return critic


def smooth() -> nn.Module:
    """Without a slope to round: TorchScript computes a leaky ReLU otherwise from its third call on, by 1e-9."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)).double()


def scripted() -> nn.Module:
    """Past the calls after which TorchScript optimises, and leaves zeros where it left None."""
    critic = torch.jit.script(smooth())
    for _ in range(4):
        (textbook.penalty(critic, [REAL]) + critic(REAL).sum()).backward()
    critic.zero_grad()
    return critic


def traced() -> nn.Module:
    return torch.jit.trace(smooth(), REAL)


def script_within() -> nn.Module:
    critic = Critic(lambda critic, h: critic.body(h))
    critic.body = torch.jit.script(nn.Sequential(linear(3), nn.Tanh()))
    return critic


def old_norm(norm: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(1)
        layers = norm(nn.Linear(5, 6), **options), nn.LeakyReLU(0.2), norm(nn.Linear(6, 1), **options)
        return nn.Sequential(*layers).double().eval()

    return make


def linear_in() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(5, 6)


def attempt(h: Tensor) -> Tensor:
    try:
        return h.view(-1, 5)
    except RuntimeError:
        return h.sin()


def hooked(h: Tensor) -> Tensor:
    h = h * 1
    if h.requires_grad:
        h.register_hook(lambda gradient: 2 * gradient)
    return h


def derived(h: Tensor) -> Tensor:
    with torch.enable_grad():
        y = h if h.requires_grad else h.detach().requires_grad_()
        (slope,) = torch.autograd.grad(torch.sin(y).sum(), y, create_graph=True)
    return slope * h


@torch.compiler.disable
def excluded(h: Tensor) -> Tensor:
    return h.sin()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.layers(x)
        return 2 * self.layers(x)


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "profiled block": lambda: Critic(recorded),
    "profiled blocks of autograd": lambda: Critic(recorded_by_autograd),
    "DataParallel": lambda: nn.DataParallel(mlp()),
    "DataParallel within": lambda: nn.Sequential(nn.DataParallel(mlp()), nn.Softplus()),
    "context that does nothing": lambda: Critic(printing),
    "branch on data": lambda: Critic(lambda c, h: h.sin() if h.sum() > 0 else h.sigmoid()),
    "number from data": lambda: Critic(lambda c, h: h * float(h.detach().mean())),
    "loop on data": lambda: Critic(lambda c, h: sum(h * i for i in range(int(h.detach().abs().sum()) % 3 + 1))),
    "shape from data": lambda: Critic(lambda c, h: h + h[h[:, 0] > 0].mean(0)),
    "try and except": lambda: Critic(lambda c, h: attempt(h)),
    "function of autograd": lambda: Critic(lambda c, h: Double.apply(h).sin()),
    "hook on the features": lambda: Critic(lambda c, h: hooked(h).sin()),
    "derivative in forward": lambda: Critic(lambda c, h: derived(h)),
    "packed sequences": recurrent,
    "LSTM": lambda: of_sequences(nn.LSTM),
    "GRU": lambda: of_sequences(nn.GRU),
    "TorchScript": scripted,
    "TorchScript by tracing": traced,
    "TorchScript within": script_within,
    "old-style spectral norm": old_norm(nn.utils.spectral_norm),
    "old-style weight norm": old_norm(nn.utils.weight_norm),
    "old-style weight norm as a whole": old_norm(nn.utils.weight_norm, dim=None),
    "NumPy within": lambda: Critic(lambda c, h: h * torch.from_numpy(h.detach().numpy().copy()).sum()),
    "complex numbers": lambda: Critic(lambda c, h: torch.fft.fft(h).abs()),
    "checkpointed": lambda: Critic(lambda c, h: torch.utils.checkpoint.checkpoint(torch.sin, h, use_reentrant=False)),
    "compiled layer": lambda: nn.Sequential(
        linear_in(), torch.compile(nn.Tanh(), backend="eager"), nn.Linear(6, 1)
    ).double(),
    "excluded from compilers": lambda: Critic(lambda c, h: excluded(h)),
}
