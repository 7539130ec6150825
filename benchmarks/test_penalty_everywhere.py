"""The drop-in penalty on every critic of the engine's tests: the engine that it chooses is never slower.

`gradient_penalty`, which takes the engine that costs less by count, and its backward against `wgan_fast.reference`,
in turns in one process: each then finds the other's code and memory in the caches, as between the steps of a training
loop. The baseline's ratio to its own next reading says what is noise. These critics are tiny: what is timed is the
cost of a call rather than of arithmetic, which is where a drop-in could lose.
"""

import itertools
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wgan_fast import gradient_penalty, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from exact_critics import CRITICS as EXACT
from exact_critics import Custom


def recurrent(kind, length):
    """A critic of sequences of 16 features."""

    def forward(critic, x):
        return critic.b(critic.r(x.view(-1, length, 16))[0][:, -1])

    return lambda: Custom(forward, r=kind(16, 64, batch_first=True), b=nn.Linear(64, 1)), (4, 16 * length)


CRITICS = EXACT | {
    f"{kind.__name__} of {length}": recurrent(kind, length) for kind in (nn.RNN, nn.GRU, nn.LSTM) for length in (8, 100)
}
BATCH = 64
ROUNDS = 25
LEAST_SECONDS = 0.01
"""What one reading of the clock spans at least."""


def seconds(step, calls):
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


@pytest.mark.filterwarnings("ignore:wgan_fast differentiates with autograd")
@pytest.mark.parametrize("name", CRITICS)
def test_penalty_is_never_slower(name, capsys):
    torch.manual_seed(0)
    make, (_, *shape) = CRITICS[name]
    critic = make()
    layout = torch.channels_last if name == "channels last" else torch.preserve_format
    real, fake = (x.contiguous(memory_format=layout) if len(shape) == 3 else x for x in torch.randn(2, BATCH, *shape))
    alpha = torch.rand(BATCH)

    def naive():
        critic.zero_grad(set_to_none=True)
        points = [reference.interpolate(real, fake, alpha)]
        reference.gradient_penalty(critic, points)[0].backward()

    def ours():
        critic.zero_grad(set_to_none=True)
        gradient_penalty(critic, real, fake, alpha=alpha).backward()

    with sdpa_kernel(SDPBackend.MATH):  # the only attention that autograd differentiates twice
        calls = max(1, round(LEAST_SECONDS / max(seconds(step, 3) for step in (naive, ours))))
        rounds = [(seconds(naive, calls), seconds(ours, calls)) for _ in range(ROUNDS)]
    ratio = statistics.median(theirs / mine for theirs, mine in rounds)
    noise = statistics.quantiles([one / other for (one, _), (other, _) in itertools.pairwise(rounds)], n=4)
    naive_us, ours_us = (1e6 * statistics.median(times) for times in zip(*rounds))
    with capsys.disabled():
        print(f"\n{name:24} {ratio:5.2f} times as fast ({naive_us:6.0f} µs -> {ours_us:6.0f} µs)", end="")
    assert ratio >= min(0.95, noise[0] - 0.02), f"{ratio:.2f} of the baseline's speed, whose quartile is {noise[0]:.2f}"
