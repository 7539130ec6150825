"""The critic step and the penalty against the plain implementation, in one process and interleaved.

The baseline is `wgan_fast.reference`, written well: α on the device, fake samples detached, one backward pass. Every
variant's gradients are compared with float64 before it is timed. `make bench` runs it and prints the ratios.
"""

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wgan_fast import CriticStep, GradientPenalty, losses, models, reference

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ROUNDS = 20
LEAST_SECONDS = 0.05
"""What one reading of the clock spans at least."""

# (model, shape of a sample, width, batch size)
CRITICS = {
    "toy-mlp": ("toy-mlp", (2,), 512, 256),
    "dcgan-28": ("mnist-dcgan", (1, 28, 28), 64, 64),
    "resnet-32": ("cifar-resnet", (3, 32, 32), 64, 32),
}

Step = Callable[[], object]


class Batch:
    """A critic and one batch for it."""

    def __init__(self, critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor) -> None:
        self.critic, self.real, self.fake, self.alpha = critic, real, fake, alpha

    @classmethod
    def of(cls, name: str, device: str) -> "Batch":
        torch.manual_seed(0)
        model, shape, width, N = CRITICS[name]
        critic = models.build(model, shape, width=width)[1].to(device)
        return cls(critic, *torch.randn(2, N, *shape, device=device), torch.rand(N, device=device))

    def double(self) -> "Batch":
        critic = copy.deepcopy(self.critic).double()
        return Batch(critic, self.real.double(), self.fake.double(), self.alpha.double())

    def points(self) -> list[Tensor]:
        return [reference.interpolate(self.real, self.fake, self.alpha)]

    def gradients(self, step: Step) -> Tensor:
        step()
        # A bias that the penalty does not reach has no gradient here and a gradient of zeros there.
        parameters = self.critic.parameters()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return torch.cat([gradient.flatten() for gradient in found]).double()


def naive_step(batch: Batch, precision: str = "fp32") -> Step:
    def step() -> None:
        points = batch.points()
        with torch.autocast(batch.real.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = losses.wasserstein.critic(batch.critic(batch.real), batch.critic(batch.fake))
            loss = loss + reference.gradient_penalty(batch.critic, points)[0]
        batch.critic.zero_grad(set_to_none=True)
        loss.backward()

    return step


def our_step(batch: Batch, precision: str = "fp32") -> Step:
    step = CriticStep(batch.critic, engine="four_pass", precision=precision)
    return lambda: step(batch.real, batch.fake, batch.alpha)


def naive_penalty(batch: Batch) -> Step:
    def step() -> None:
        batch.critic.zero_grad(set_to_none=True)
        reference.gradient_penalty(batch.critic, batch.points())[0].backward()

    return step


def our_penalty(batch: Batch) -> Step:
    penalty = GradientPenalty(batch.critic, engine="four_pass")

    def step() -> None:
        batch.critic.zero_grad(set_to_none=True)
        penalty(batch.real, batch.fake, batch.alpha).backward()

    return step


def seconds(step: Step, calls: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def ratios(steps: dict[str, Step], baseline: str, device: str) -> dict[str, list[float]]:
    """Time of the baseline over that of every step, round by round."""
    once = max(seconds(step, 3, device) for step in steps.values())
    calls = max(1, round(LEAST_SECONDS / once))
    rounds = [{name: seconds(step, calls, device) for name, step in steps.items()} for _ in range(ROUNDS)]
    return {name: [times[baseline] / times[name] for times in rounds] for name in steps}


def report(title: str, measured: dict[str, list[float]], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{title}, {torch.get_num_threads()} threads, torch {torch.__version__}: times as fast as the baseline")
        for name, values in measured.items():
            low, median, high = statistics.quantiles(values, n=4)
            print(f"  {name:12} {median:5.2f}  (quartiles {low:.2f} to {high:.2f})")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CRITICS)
def test_critic_step(name: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    batch = Batch.of(name, device)
    steps = {
        "naive": naive_step(batch),
        "four_pass": our_step(batch),
        "naive bf16": naive_step(batch, "bf16"),
        "ours bf16": our_step(batch, "bf16"),
    }
    double = batch.double()
    truth = double.gradients(naive_step(double))
    error = {variant: (batch.gradients(step) - truth).norm() for variant, step in steps.items()}
    # Twice the plain implementation's own error in the same precision.
    assert error["four_pass"] <= 2 * error["naive"]
    assert error["ours bf16"] <= 2 * error["naive bf16"]
    measured = ratios(steps, "naive", device)
    report(f"critic step, {name} on {device}", measured, capsys)
    assert statistics.median(measured["four_pass"]) > 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CRITICS)
def test_gradient_penalty(name: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    batch = Batch.of(name, device)
    steps = {"naive": naive_penalty(batch), "four_pass": our_penalty(batch)}
    double = batch.double()
    truth = double.gradients(naive_penalty(double))
    error = {variant: (batch.gradients(step) - truth).norm() for variant, step in steps.items()}
    assert error["four_pass"] <= 2 * error["naive"]
    measured = ratios(steps, "naive", device)
    report(f"penalty alone, {name} on {device}", measured, capsys)
    assert statistics.median(measured["four_pass"]) > 1
