"""Weight clipping against two foreach operators, which is the fastest that PyTorch itself offers.

`make bench` runs it. Every variant is called as training code calls it, in grad mode, and starts each round from
weights of which some are out of range, as an optimizer's step leaves them.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wgan_fast import clip_weights_

BOUND = 0.01
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def convolutional_critic(channels: list[int], head: int) -> nn.Module:
    """4x4 convolutions of stride 2 and a linear head on ``head`` features."""
    convolutions = [nn.Conv2d(*pair, 4, stride=2, padding=1) for pair in itertools.pairwise(channels)]
    return nn.Sequential(*convolutions, nn.Linear(head, 1))


CRITICS = {
    "dcgan-64": lambda: convolutional_critic([3, 64, 128, 256, 512], 8192),
    "dcgan-mnist": lambda: convolutional_critic([1, 64, 128], 6272),
}


def foreach(weights: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_clamp_min_(weights, -BOUND)
        torch._foreach_clamp_max_(weights, BOUND)


def wgan_fast(weights: list[Tensor]) -> None:
    clip_weights_(weights, BOUND)


VARIANTS: dict[str, Callable[[list[Tensor]], None]] = {"foreach": foreach, "wgan_fast": wgan_fast}


@pytest.fixture(params=CRITICS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DEVICES)
def weights(request: pytest.FixtureRequest, name: str) -> list[Tensor]:
    weights = list(CRITICS[name]().to(request.param).parameters())
    with torch.no_grad():
        for weight in weights:
            nn.init.trunc_normal_(weight, std=BOUND / 2, a=-1, b=1)
    return weights


def call(variant: Callable[[list[Tensor]], None], weights: list[Tensor]) -> None:
    variant(weights)
    if weights[0].is_cuda:
        torch.cuda.synchronize()


def assert_both_clip_alike(weights: list[Tensor]) -> None:
    for variant in VARIANTS.values():
        copies = [weight.detach().clone() for weight in weights]
        variant(copies)
        for weight, copy in zip(weights, copies):
            assert torch.equal(copy, weight.detach().clamp(-BOUND, BOUND))


@pytest.mark.parametrize("variant", VARIANTS)
def test_clipping(benchmark: Callable, variant: str, weights: list[Tensor]) -> None:
    assert_both_clip_alike(weights)
    originals = [weight.detach().clone() for weight in weights]

    def refill() -> None:
        with torch.no_grad():
            torch._foreach_copy_(weights, originals)

    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(call, args=(VARIANTS[variant], weights), setup=refill, rounds=200, warmup_rounds=10)


def test_clipping_is_no_slower_than_foreach(
    name: str, weights: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_both_clip_alike(weights)
    originals = [weight.detach().clone() for weight in weights]
    ratios = []
    for _ in range(300):
        seconds = {}
        for variant, clip in VARIANTS.items():
            with torch.no_grad():
                torch._foreach_copy_(weights, originals)
            start = time.perf_counter()
            call(clip, weights)
            seconds[variant] = time.perf_counter() - start
        ratios.append(seconds["wgan_fast"] / seconds["foreach"])
    low, median, high = statistics.quantiles(ratios, n=4)
    with capsys.disabled():
        print(f"\n{name} on {weights[0].device}: {median:.2f} of foreach's time (quartiles {low:.2f} to {high:.2f})")
    assert median <= 1
