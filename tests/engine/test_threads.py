"""Critics of several threads at once."""

import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from side_by_side import (
    ALPHA,
    FAKE,
    REAL,
    USES,
    SideBySide,
    mlp,
    outcome,
)
from torch import Tensor, nn

from wgan_fast import GradientPenalty, gradient_penalty

ignored = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Hidden(nn.Module):
    """A critic of a given width, whose graph is not the others'."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.layers = nn.ModuleList([nn.Linear(5, width), *[nn.Linear(width, width) for _ in range(width % 4)]])
        self.last = nn.Linear(width, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x)


def in_threads(calls: list[Callable[[], None]]) -> list[BaseException]:
    """Start all at once and return what they raised."""
    barrier, raised = threading.Barrier(len(calls)), []

    def run(call: Callable[[], None]) -> None:
        barrier.wait()
        try:
            call()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def logging_state() -> dict[str, Any]:
    names = [None, *(n for n in list(logging.root.manager.loggerDict) if n.split(".")[0] in ("torch", "wgan_fast"))]
    loggers = {name: logging.getLogger(name) for name in names}
    return {
        str(name): (logger.level, logger.disabled, logger.propagate, list(logger.filters))
        for name, logger in loggers.items()
    }


@pytest.fixture
def _process_restored():
    """A test that finds the process changed says so alone, not every test after it."""
    kept = sys.stderr, sys.stdout, logging.root.manager.disable, logging_state()
    yield
    sys.stderr, sys.stdout, logging.root.manager.disable = kept[:3]
    for name, (level, disabled, propagate, filters) in kept[3].items():
        logger = logging.getLogger(None if name == "None" else name)
        logger.setLevel(level)
        logger.disabled, logger.propagate, logger.filters = disabled, propagate, filters


@ignored
@pytest.mark.usefixtures("_process_restored")
@pytest.mark.parametrize("shared", [False, True], ids=["four critics", "one critic"])
@pytest.mark.parametrize("use", USES)
def test_critics_in_four_threads(use: str, shared: bool) -> None:
    gradient_penalty(mlp(), REAL, FAKE)  # loggers are made as torch's parts are imported
    before = sys.stderr, sys.stdout, sys.excepthook, logging.root.manager.disable, logging_state()
    one = Hidden(9)
    critics = [one if shared else Hidden(width) for width in (5, 6, 7, 8)]
    values: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        if use == "step" and not shared:
            pair = SideBySide(use, critics[i])
            values[i] = [pair.ours(REAL, FAKE, ALPHA, (), None) for _ in range(3)]
        else:  # one critic has one .grad
            penalty = GradientPenalty(critics[i])
            values[i] = [penalty(REAL, FAKE, ALPHA).detach() for _ in range(3)]

    raised = in_threads([lambda i=i: work(i) for i in range(4)])
    after = sys.stderr, sys.stdout, sys.excepthook, logging.root.manager.disable, logging_state()
    assert raised == []
    assert after[:4] == before[:4]
    # Parts of torch that are imported meanwhile bring loggers of their own.
    assert {name: after[4][name] for name in before[4]} == before[4]
    for i, critic in enumerate(critics):
        pair = SideBySide("penalty" if shared else use, critic)
        expected, _ = outcome(lambda pair=pair: pair.plain(REAL, FAKE, ALPHA, (), None), list(critic.parameters()))
        for value in values[i]:
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        pair.check()
    print("the streams still work", file=sys.stderr)
