"""What is said, to whom and how often: nothing where all is well, and the user's own line where it is not."""

import linecache
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from awkward_critics import CRITICS, Branching, linear_in
from side_by_side import (
    ALPHA,
    FAKE,
    REAL,
    USES,
    Critic,
    SideBySide,
    in_turn,
    mlp,
)
from torch import Tensor, nn

from wgan_fast import CriticStep, GradientPenalty, explain, gradient_penalty

ignored = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Tokens(nn.Module):
    """Attention over rows of the input and a class token, expanded to the batch in a way of its own."""

    def __init__(self, expand: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 2, 6))
        self.first, self.query, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.expand = expand
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.expand(self.token, x), self.first(x).unsqueeze(1)], 1) + self.position
        weights = torch.softmax(self.query(h) @ h.transpose(1, 2), -1)
        return self.last((h + weights @ h)[:, 0])


QUIET: dict[str, Callable[[], nn.Module]] = {
    "len in expand": lambda: Tokens(lambda token, x: token.expand(len(x), -1, -1)),
    "size in expand": lambda: Tokens(lambda token, x: token.expand(x.size(0), -1, -1)),
    "shape in repeat": lambda: Tokens(lambda token, x: token.repeat(x.shape[0], 1, 1)),
    "len in repeat": lambda: Tokens(lambda token, x: token.repeat(len(x), 1, 1)),
    "expand_as": lambda: Tokens(lambda token, x: token.expand_as(x[:, :1, None].expand(-1, 1, 6))),
    "len in zeros": lambda: Critic(lambda c, h: h + torch.zeros(len(h), 6, dtype=h.dtype)),
    "len in view": lambda: Critic(lambda c, h: h.view(len(h), -1).sin()),
    "int of a size": lambda: Critic(lambda c, h: h.view(int(h.shape[0]), 6).sin()),
    "number of samples in a factor": lambda: Critic(lambda c, h: h / len(h)),
    "list of sizes": lambda: Critic(lambda c, h: h.reshape(*[int(s) for s in h.shape])),
    "range over the batch": lambda: Critic(lambda c, h: torch.stack([h[i] for i in range(len(h))]).sin()),
    "iteration over the batch": lambda: Critic(lambda c, h: torch.stack([row.sin() for row in h])),
    "batch norm": lambda: nn.Sequential(linear_in(), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double(),
    "dropout": lambda: nn.Sequential(linear_in(), nn.Dropout(0.0), nn.Tanh(), nn.Linear(6, 1)).double(),
    "mlp": mlp,
}


# torch.compile logs on its own account once it has compiled a layer eight times.
AWKWARD = {name: make for name, make in CRITICS.items() if name != "compiled layer"}


def cases() -> list[Any]:
    """Critics that need no fallback in every way; those that may, in one way fast."""
    explained = [pytest.param(name, "explain", id=f"{name}-explain") for name in QUIET]
    slow = [pytest.param(name, use, marks=pytest.mark.slow, id=f"{name}-{use}") for name in AWKWARD for use in USES]
    return [*in_turn(QUIET), *explained, *slow, *[pytest.param(n, "explain", id=f"{n}-explain") for n in AWKWARD]]


@ignored
@pytest.mark.parametrize(("name", "use"), cases())
def test_nothing_is_printed_or_logged(
    name: str, use: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    critic = (QUIET | AWKWARD)[name]()
    capfd.readouterr()
    caplog.clear()
    if use == "explain":
        explain(critic, REAL)
    else:
        pair = SideBySide(use, critic)
        pair.check()
        pair.check(REAL[:4], FAKE[:4], ALPHA[:4])
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO] == []


@ignored
@pytest.mark.parametrize("use", USES)
def test_lazy_layers_run_or_are_refused_by_name(use: str) -> None:
    torch.manual_seed(1)
    critic = nn.Sequential(nn.LazyLinear(6, dtype=torch.float64), nn.Tanh(), nn.Linear(6, 1).double())
    refusal = ""
    try:
        SideBySide(use, critic).ours(REAL, FAKE, ALPHA, (), None)
    except (RuntimeError, TypeError, ValueError) as error:
        refusal = str(error)
        assert "\n" not in refusal
        critic(REAL)
    assert refusal == "" or "lazy" in refusal.lower()
    pair = SideBySide(use, critic)
    pair.check()
    pair.check()


@pytest.mark.parametrize("critic", [mlp(), Critic(lambda c, h: h.sin() if h.sum() > 0 else h)], ids=["mlp", "branch"])
def test_inference_mode_is_named_where_it_forbids_gradients(critic: nn.Module) -> None:
    calls: list[Callable[[], object]] = [
        lambda: gradient_penalty(critic, REAL, FAKE),
        lambda: gradient_penalty(critic, REAL, FAKE, engine="autograd"),
        lambda: GradientPenalty(critic)(REAL, FAKE),
        lambda: CriticStep(critic)(REAL, FAKE),
    ]
    for call in calls:
        with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
            call()


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.last = linear_in(), nn.Embedding(3, 6), nn.Linear(6, 1)
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) * self.table(labels)))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_forgotten_label_is_the_users_own_error() -> None:
    critic = Labelled()
    calls: list[Callable[[], object]] = [
        lambda: explain(critic, REAL),
        lambda: gradient_penalty(critic, REAL, FAKE),
        lambda: GradientPenalty(critic)(REAL, FAKE),
        lambda: CriticStep(critic)(REAL, FAKE),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'labels'"):
            call()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_errors_of_the_critic_itself_are_no_reason_for_autograd() -> None:
    batch_norm = QUIET["batch norm"]()
    wrong = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1)).double()

    def refuse(critic: Any, h: Tensor) -> Tensor:
        raise KeyError("my own error")

    for critic, real, error, message in (
        (batch_norm, REAL[:1], ValueError, "more than 1 value per channel"),
        (wrong, REAL, RuntimeError, "shapes cannot be multiplied"),
        (Critic(refuse), REAL, KeyError, "my own error"),
    ):
        for call in (
            lambda c=critic, r=real: explain(c, r),
            lambda c=critic, r=real: gradient_penalty(c, r, r),
            lambda c=critic, r=real: CriticStep(c)(r, r),
        ):
            with pytest.raises(error, match=message) as caught:
                call()
            assert type(caught.value) is error


def branching_function(critic: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: critic(x)


@pytest.mark.parametrize("kind", ["module", "function", "step", "object", "all"])
def test_a_branch_on_data_warns_once_and_names_the_line(kind: str) -> None:
    critic = Branching()
    step, penalty = CriticStep(critic), GradientPenalty(critic)
    calls: dict[str, Callable[[], object]] = {
        "module": lambda: gradient_penalty(critic, REAL, FAKE, alpha=ALPHA),
        "function": lambda: gradient_penalty(branching_function(critic), REAL, FAKE, alpha=ALPHA),
        "step": lambda: step(REAL, FAKE, ALPHA),
        "object": lambda: penalty(REAL, FAKE, ALPHA),
    }
    used = [calls[name] for name in ("module", "step", "object") if kind in (name, "all")] or [calls[kind]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in 4 * used:
            call()
    (warning,) = [w for w in caught if w.category is RuntimeWarning]
    message = str(warning.message)
    assert "autograd" in message
    if kind == "function":
        assert __file__ in message or "awkward_critics.py" in message
    else:
        assert "awkward_critics.py" in message
        assert "if x.sum() > 0" in message
    # The warning itself points at the user's call.
    assert warning.filename == __file__
    line = linecache.getline(__file__, warning.lineno)
    assert "penalty(" in line or "step(" in line


def test_four_pass_names_the_branch_on_data() -> None:
    critic = Branching()
    for call in (
        lambda: gradient_penalty(critic, REAL, FAKE, engine="four_pass"),
        lambda: CriticStep(critic, engine="four_pass")(REAL, FAKE),
    ):
        with pytest.raises(RuntimeError, match=r"awkward_critics\.py(.|\n)*if x\.sum\(\) > 0"):
            call()


def test_explain_names_the_branch_on_data() -> None:
    report = explain(Branching(), REAL)
    assert report.engine == "autograd"
    assert "awkward_critics.py" in report.reason
    assert "if x.sum() > 0" in report.reason
