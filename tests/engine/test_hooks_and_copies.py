"""What a critic keeps of its forward, how often its hooks run, and copies of what holds a penalty or a step."""

import copy
import gc
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import textbook
import torch
from side_by_side import ALPHA, FAKE, REAL, USES, Critic, SideBySide, assert_same_gradients, mlp, outcome, vector
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from wgan_fast import CriticStep, GradientPenalty, PenaltyConfig, gradient_penalty, losses

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # to leave a critic to autograd is right, too


def tensors_in(kept: Any) -> list[Tensor]:
    if isinstance(kept, Tensor):
        return [kept]
    if isinstance(kept, dict):
        kept = list(kept.values())
    return [x for part in kept for x in tensors_in(part)] if isinstance(kept, list | tuple) else []


def keeper(keep: Callable[[Any, Tensor], object]) -> Callable[[], Critic]:
    """A critic whose forward keeps something of its own."""

    def middle(critic: Any, h: Tensor) -> Tensor:
        keep(critic, h)
        return h

    return lambda: Critic(middle, kept=[], calls=0)


def hooked(register: Callable[[nn.Module, list[Any]], Any]) -> Callable[[], nn.Module]:
    """A critic with hooks that write into its list ``kept``."""

    def make() -> nn.Module:
        critic = mlp()
        critic.kept, critic.calls = [], 0
        critic.handle = register(critic, critic.kept)
        return critic

    return make


def replace_features(critic: Any, h: Tensor) -> None:
    critic.kept = {"features": h, "rows": len(h)}


def count(critic: Any, h: Tensor) -> None:
    critic.calls += 1


def keep_hook(module: nn.Module, given: Any, out: Tensor) -> None:
    module.features = out


KEEPERS: dict[str, Callable[[], nn.Module]] = {
    "list of features": keeper(lambda critic, h: critic.kept.append(h)),
    "last features": keeper(replace_features),
    "detached features": keeper(lambda critic, h: critic.kept.append(h.detach())),
    "mean of the features": keeper(lambda critic, h: critic.kept.append(h.mean())),
    "number of calls": keeper(count),
    "sizes": keeper(lambda critic, h: critic.kept.append(tuple(h.shape))),
    "forward hook that appends": hooked(
        lambda critic, kept: critic[1].register_forward_hook(lambda module, given, out: kept.append(out))
    ),
    "forward hook that appends its input": hooked(
        lambda critic, kept: critic[1].register_forward_hook(lambda module, given, out: kept.append(given[0]))
    ),
    "forward hook that sets an attribute": hooked(lambda critic, kept: critic[1].register_forward_hook(keep_hook)),
    "forward hook that counts": hooked(
        lambda critic, kept: critic[1].register_forward_hook(lambda module, given, out: kept.append(1))
    ),
    "forward hook that changes and keeps": hooked(
        lambda critic, kept: critic[1].register_forward_hook(lambda module, given, out: kept.append(out) or out * 2)
    ),
    "hook before forward": hooked(
        lambda critic, kept: critic[2].register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    ),
    "hook on the critic": hooked(
        lambda critic, kept: critic.register_forward_hook(lambda module, given, out: kept.append(out))
    ),
    "hook that is always called": hooked(
        lambda critic, kept: critic[1].register_forward_hook(
            lambda module, given, out: kept.append(1), always_call=True
        )
    ),
    "hook of all modules": hooked(
        lambda critic, kept: torch.nn.modules.module.register_module_forward_hook(
            lambda module, given, out: kept.append(out) if isinstance(module, nn.Tanh) else None
        )
    ),
}


def everything_kept(critic: Any) -> list[Any]:
    return [critic.kept, critic.calls, *[m.features for m in critic.modules() if hasattr(m, "features")]]


def description(kept: Any) -> Any:
    """What was kept, tensors by shape and sum; the order of a step's three batches is nobody's concern."""
    if isinstance(kept, dict):
        return {key: description(value) for key, value in kept.items()}
    if isinstance(kept, list):
        return sorted((description(x) for x in kept), key=repr)
    return (tuple(kept.shape), float(f"{kept.sum().item():.8e}")) if isinstance(kept, Tensor) else kept


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", KEEPERS)
def test_what_forward_and_hooks_keep_are_real_tensors_and_as_many(name: str, use: str) -> None:
    critics, found = [], []
    for plain in (False, True):
        critic = KEEPERS[name]()
        pair = SideBySide(use, critic)
        for _ in range(4):
            value, gradients = outcome(
                lambda pair=pair, plain=plain: (pair.plain if plain else pair.ours)(REAL, FAKE, ALPHA, (), None),
                list(critic.parameters()),
            )
            for kept in tensors_in(everything_kept(critic)):
                assert type(kept) is Tensor
                assert not isinstance(kept, FakeTensor)
        if hasattr(critic, "handle"):
            critic.handle.remove()
        critics.append(critic)
        found.append((value, gradients, everything_kept(critic)))
    (value, gradients, ours), (expected, others, theirs) = found
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    assert_same_gradients(gradients, others)
    if "last features" not in name and "sets an attribute" not in name:
        assert description(ours) == description(theirs)
    # A removed hook keeps nothing more, and a critic is copied, called and freed as before.
    length = len(critics[0].kept)
    copy.deepcopy(critics[0].state_dict())
    critics[0](REAL)
    if "hook" in name:
        assert len(critics[0].kept) == length


@pytest.mark.parametrize("use", USES)
def test_hooks_registered_after_use_run_as_often_as_with_autograd(use: str) -> None:
    counts = {}
    for engine in ("auto", "autograd"):
        critic, seen = mlp(), []
        pair = SideBySide(use, critic, engine=engine)
        counts[engine] = [0]
        for i in range(6):
            if i in (1, 3):
                critic[i].register_forward_hook(lambda module, given, out, seen=seen: seen.append(type(out)))
            if i == 4:
                critic[1]._forward_hooks.clear()
            pair.check()
            counts[engine].append(len(seen))
        assert set(seen) == {Tensor}
    assert counts["auto"] == counts["autograd"]


@pytest.mark.parametrize("use", USES)
def test_hooks_that_read_outside_state_see_its_present_value(use: str) -> None:
    critic, table = mlp(), {"by": 1.0}
    critic[1].register_forward_hook(lambda module, given, out: out * table["by"])
    pair = SideBySide(use, critic)
    values = []
    for by in (1.0, 3.0, 0.5, 2.0):
        table["by"] = by
        values += [pair.check()]
        pair.check()
    assert len(set(values)) == 4


def reachable(start: object) -> list[object]:
    """Everything that a critic holds, however deep: not classes and not what is imported."""
    found: dict[int, object] = {}
    waiting = [start]
    while waiting:
        thing = waiting.pop()
        if id(thing) not in found and not isinstance(thing, type | types.ModuleType | types.FunctionType):
            found[id(thing)] = thing
            waiting += gc.get_referents(thing)
            if isinstance(thing, Tensor):
                waiting += [x for x in (thing.grad, thing.data) if x is not None and x is not thing]
        if len(found) > 10_000:
            break
    return list(found.values())


@pytest.mark.parametrize("use", USES)
def test_nothing_that_a_used_critic_holds_is_a_stand_in(use: str) -> None:
    critic = Critic(lambda critic, h: h * critic.scale + critic.shift[0], scale=vector(), shift=[vector(2.0)])
    before = len(reachable(critic))
    SideBySide(use, critic).check()
    held = reachable(critic)
    assert not [x for x in held if isinstance(x, FakeTensor)]
    # Gradients came and nothing of a plan.
    assert len(held) <= before + 2 * len(list(critic.parameters())) + 5


class Training:
    """As people hold a critic and a step in an object of their own."""

    def __init__(self, critic: nn.Module, kind: str) -> None:
        self.critic = critic
        self.kind = kind
        self.objective = CriticStep(critic) if kind == "step" else GradientPenalty(critic)

    def run(self) -> Tensor:
        self.critic.zero_grad()
        if self.kind == "step":
            return self.objective(REAL, FAKE, ALPHA).loss
        value = self.objective(REAL, FAKE, ALPHA)
        value.backward()
        return value.detach()


class Module(nn.Module):
    """The same, as a module: what Lightning's users write."""

    def __init__(self, critic: nn.Module, kind: str) -> None:
        super().__init__()
        self.critic, self.kind = critic, kind
        self.objective = CriticStep(critic) if kind == "step" else GradientPenalty(critic)

    run = Training.run


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda held: pickle.loads(pickle.dumps(held)),
    "deepcopy of a copy": lambda held: copy.deepcopy(copy.deepcopy(held)),
    "pickle of a copy": lambda held: pickle.loads(pickle.dumps(copy.deepcopy(held))),
}


@pytest.mark.parametrize("kind", ["penalty", "step"])
@pytest.mark.parametrize("holder", [Training, Module])
@pytest.mark.parametrize("uses", [0, 1, 3])
@pytest.mark.parametrize("name", COPIES)
def test_the_copy_of_what_holds_a_step_steps_the_copy(name: str, uses: int, holder: Any, kind: str) -> None:
    held = holder(mlp(), kind)
    for _ in range(uses):
        held.run()
    held.critic.zero_grad()
    other = COPIES[name](held)
    assert other.objective.critic is other.critic
    with torch.no_grad():
        other.critic[0].weight.mul_(2)
    for training, untouched in ((other, held.critic), (held, other.critic), (other, held.critic)):
        untouched.zero_grad()
        value = training.run()
        assert all(p.grad is None for p in untouched.parameters())
        ours = [None if p.grad is None else p.grad.clone() for p in training.critic.parameters()]
        pair = SideBySide(kind, training.critic)
        expected, theirs = outcome(
            lambda pair=pair: pair.plain(REAL, FAKE, ALPHA, (), None), list(training.critic.parameters())
        )
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
def test_a_critic_is_copied_after_use(name: str, use: str) -> None:
    critic = mlp()
    SideBySide(use, critic).check()
    other = COPIES[name](critic)
    SideBySide(use, other).check()
    with torch.no_grad():
        critic[0].weight.zero_()
    SideBySide(use, other).check()


@pytest.mark.parametrize("kind", ["penalty", "step"])
def test_a_step_whose_loss_cannot_be_pickled_says_so_in_one_line(kind: str) -> None:
    critic = mlp()
    critic.activation = lambda h: h
    held = Training(critic, kind)
    held.run()
    with pytest.raises((TypeError, pickle.PicklingError, AttributeError), match="lambda") as caught:
        pickle.dumps(held)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["penalty", "step"])
def test_what_holds_a_step_is_freed_with_the_critic(kind: str) -> None:
    held = Training(mlp(), kind)
    held.run()
    alive = [weakref.ref(held.critic), weakref.ref(held.critic[0])]
    del held
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def attempted(change: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a change returns, or what is said where the attribute cannot be set."""
    try:
        return change(), None
    except AttributeError as error:
        return None, str(error)


def with_loss(step: CriticStep, critic: nn.Module) -> SideBySide:
    step.loss = losses.hinge
    return SideBySide("step", step.critic, loss="hinge")


def with_critic(step: CriticStep, critic: nn.Module) -> SideBySide:
    step.critic = critic
    return SideBySide("step", critic)


def with_penalty(step: CriticStep, critic: nn.Module) -> SideBySide:
    step.penalty = PenaltyConfig(at="real")
    return SideBySide("step", step.critic, at="real")


SETTINGS: dict[str, Callable[[CriticStep, nn.Module], SideBySide]] = {
    "loss": with_loss,
    "critic": with_critic,
    "penalty": with_penalty,
}


@pytest.mark.parametrize("uses", [0, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_step_are_used_or_refused(name: str, uses: int) -> None:
    critic, other = mlp(), Critic()
    step = CriticStep(critic)
    for _ in range(uses):
        step(REAL, FAKE, ALPHA)
    pair, refusal = attempted(lambda: SETTINGS[name](step, other))
    if refusal is not None:
        assert name in refusal
        return
    leaves = [*critic.parameters(), *other.parameters()]
    actual, ours = outcome(lambda: step(REAL, FAKE, ALPHA).loss, leaves)
    expected, theirs = outcome(lambda: pair.plain(REAL, FAKE, ALPHA, (), None), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("uses", [0, 2])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", PenaltyConfig(weight=3.0, target=0.2)),
        ("config", PenaltyConfig(at="real")),
        ("config", PenaltyConfig(one_sided=True, target=0.1)),
        ("critic", Critic()),
        ("critic_args", (vector(2.0),)),
    ],
    ids=["weight and target", "points", "one-sided", "critic", "critic_args"],
)
def test_settings_of_a_penalty_are_used_or_refused(name: str, value: Any, uses: int) -> None:
    critic = Critic(lambda critic, h, by=1.0: h * by)
    penalty = GradientPenalty(critic)
    for _ in range(uses):
        penalty(REAL, FAKE, ALPHA)
    _, refusal = attempted(lambda: setattr(penalty, name, value))
    if refusal is not None:
        assert name in refusal
        return
    config = value if name == "config" else PenaltyConfig()
    plain = textbook.penalty(
        value if name == "critic" else critic,
        textbook.points_at(config.at, REAL, FAKE, ALPHA),
        weight=config.weight,
        target=config.target,
        one_sided=config.one_sided,
        args=value if name == "critic_args" else (),
    )
    torch.testing.assert_close(penalty(REAL, FAKE, ALPHA), plain, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["loss", "critic", "penalty", "precision", "schedule", "engine", "compile"])
def test_a_setting_of_a_step_that_means_nothing_is_not_taken_in_silence(name: str) -> None:
    step = CriticStep(mlp())
    step(REAL, FAKE, ALPHA)

    def replaced() -> None:
        setattr(step, name, "nonsense")
        step(REAL, FAKE, ALPHA)

    with pytest.raises((AttributeError, TypeError, ValueError)):
        replaced()


def test_lazy_penalties_follow_the_step_count_that_is_set() -> None:
    critic = mlp()
    step = CriticStep(critic, penalty=PenaltyConfig(every=4))
    for taken, weight in ((0, 40.0), (1, None), (4, 40.0), (7, None)):
        step.steps_taken = taken
        result = step(REAL, FAKE, ALPHA)
        points = [textbook.interpolates(REAL, FAKE, ALPHA)]
        expected = 0 * result.loss if weight is None else textbook.penalty(critic, points, weight=weight).detach()
        torch.testing.assert_close(result.penalty, expected, rtol=1e-10, atol=0)


def test_a_penalty_in_a_critics_own_attribute_is_copied_with_it() -> None:
    critic = mlp()
    critic.penalty = GradientPenalty(critic)
    critic.penalty(REAL, FAKE, ALPHA).backward()
    other = copy.deepcopy(critic)
    assert other.penalty.critic is other
    with torch.no_grad():
        other[0].weight.mul_(2)
    other.zero_grad()
    critic.zero_grad()
    value = other.penalty(REAL, FAKE, ALPHA)
    value.backward()
    assert all(p.grad is None for p in critic.parameters())
    torch.testing.assert_close(
        value, gradient_penalty(other, REAL, FAKE, alpha=ALPHA, engine="autograd"), rtol=1e-10, atol=0
    )
