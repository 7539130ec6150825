"""ClippedRMSprop against torch.optim.RMSprop and two foreach clamps, in one process and interleaved.

Memory bounds both: a step must read the parameter, its gradient and its average and write two of them back.
`make bench` runs it and prints the ratios.
"""

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from test_clipping import BOUND, CRITICS, DEVICES
from test_clipping import foreach as foreach_clamp
from torch import Tensor

from wgan_fast.optim import ClippedRMSprop

ROUNDS = 100
TARGET = 2.0
"""How many times as fast a step is to be at least, on a critic whose state the caches of one core do not hold."""

Step = Callable[[], None]


def with_gradients(weights: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


def variants(name: str, device: str) -> dict[str, tuple[list[Tensor], Step]]:
    """For each variant the weights that it trains and its step; all begin alike."""
    critic = CRITICS[name]().to(device)
    ours, theirs = (with_gradients(list(copy.deepcopy(critic).parameters())) for _ in range(2))
    fused = ClippedRMSprop(ours, clip=BOUND)
    plain = torch.optim.RMSprop(theirs, lr=5e-5, foreach=True)

    def plain_step() -> None:
        plain.step()
        foreach_clamp(theirs)

    return {"foreach": (theirs, plain_step), "wgan_fast": (ours, lambda: fused.step())}


def seconds(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CRITICS)
def test_a_clipped_step(name: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    (theirs, plain), (ours, fused) = variants(name, device).values()
    for _ in range(10):
        plain()
        fused()
    torch.testing.assert_close(ours, theirs)
    rounds = [(seconds(plain, device), seconds(fused, device)) for _ in range(ROUNDS)]
    low, median, high = statistics.quantiles([theirs / ours for theirs, ours in rounds], n=4)
    # The parameter and its average twice, its gradient once.
    moved = 5 * sum(weight.numel() * weight.element_size() for weight in ours)
    rate = moved / statistics.median(ours for _, ours in rounds) / 1e9
    with capsys.disabled():
        print(
            f"\n{name} on {device}, {torch.get_num_threads()} threads: {median:.2f} times as fast as foreach "
            f"(quartiles {low:.2f} to {high:.2f}), {rate:.0f} GB/s"
        )
    assert median >= (TARGET if name == "dcgan-64" and device == "cpu" else 1)
