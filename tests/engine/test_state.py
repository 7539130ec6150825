"""Whatever a critic's forward reads may change between calls, and the next call is right."""

import collections
import enum
import itertools
import os
import random
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from side_by_side import USES, Critic, SideBySide, check_changes, in_turn, vector
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # to leave a critic to autograd is right, too

SCALE = 1.0
TABLE = {"scales": {1: 1.0}}
MIX = torch.zeros(6, dtype=torch.float64)
SETTINGS = types.SimpleNamespace(scale=1.0)


class Mode(enum.Enum):
    SOFT, HARD = 0.4, 2.0


def softened(x: Tensor, slope: float = 0.3) -> Tensor:
    return F.softplus(x) * slope


def times_alpha(critic: Any, h: Tensor) -> Tensor:
    return h * critic.alpha


ATTRIBUTES: dict[str, tuple[Callable[..., Tensor], list[Any]]] = {
    "NumPy number": (times_alpha, [np.float64(0.9), np.float64(0.3), np.float64(1.7), np.float64(0.9)]),
    "NumPy number of one dimension": (lambda c, h: h * float(c.alpha[0]), [np.array([v]) for v in (0.9, 0.3, 1.7)]),
    "NumPy float32": (lambda c, h: h * float(c.alpha), [np.float32(0.5), np.float32(0.25), np.float32(2.0)]),
    "NumPy integer": (lambda c, h: h * int(c.alpha), [np.int64(1), np.int64(2), np.int64(3)]),
    "number": (times_alpha, [0.9, 0.3, 1.7, 0.9]),
    "number of another type": (lambda c, h: h * 2 if c.alpha is True else h * c.alpha, [1, True, 3, 4.0]),
    "negative zero": (lambda c, h: h * (2.0 if str(c.alpha) == "-0.0" else 1.0), [0.0, -0.0, 0.0, -0.0]),
    "truth": (lambda c, h: torch.sin(h) if c.alpha else h, [True, False, True, False]),
    "word": (lambda c, h: getattr(torch, c.alpha)(h), ["sin", "sigmoid", "tanh"]),
    "nothing, then a number": (lambda c, h: h if c.alpha is None else h * c.alpha, [None, 2.0, None, 0.5]),
    "absent, then a number": (lambda c, h: h * getattr(c, "beta", c.alpha), [0.5, 0.3]),
    "enumeration": (lambda c, h: h * c.alpha.value, [Mode.SOFT, Mode.HARD, Mode.SOFT]),
    "function": (lambda c, h: c.alpha(h), [torch.sin, torch.sigmoid, F.softplus, softened]),
    "function with settings": (lambda c, h: c.alpha(h), [lambda h, s=s: h * s for s in (0.5, 1.5, 0.7)]),
    "tuple": (lambda c, h: h * c.alpha[1], [(0, 0.5), (0, 1.5), (0, 0.7)]),
    "tensor": (times_alpha, [vector(0.5), vector(1.5), vector(), vector(0.5)]),
    "tensor of one number": (lambda c, h: h * c.alpha.item(), [vector(v).sum() for v in (0.5, 1.5, 0.7)]),
    "random state's seed": (lambda c, h: h * random.Random(c.alpha).random(), [1, 2, 3]),
}


@pytest.mark.parametrize(("name", "use"), in_turn(ATTRIBUTES))
def test_an_attribute_may_be_replaced(name: str, use: str) -> None:
    middle, (first, *others) = ATTRIBUTES[name]
    critic = Critic(middle, alpha=first)
    changes = [lambda v=v: setattr(critic, "alpha", v) for v in others]
    if name.startswith("absent"):
        changes += [
            lambda: setattr(critic, "beta", 2.0),
            lambda: setattr(critic, "beta", 0.1),
            lambda: delattr(critic, "beta"),
        ]
    check_changes(SideBySide(use, critic), changes)


@dataclass
class Options:
    scale: float = 1.0
    more: dict[str, Any] = field(default_factory=lambda: {"k": [0, {"z": 1.0}]})


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Plain:
    """An object that is no module, with a method, a property and one more inside."""

    def __init__(self, depth: int = 1) -> None:
        self._scale, self.inner = 1.0, Plain(depth - 1) if depth else None

    @property
    def scale(self) -> float:
        return self._scale

    def apply(self, h: Tensor) -> Tensor:
        return h * self._scale


Pair = collections.namedtuple("Pair", "left right")


def into(path: Callable[[Any], Any], key: Any) -> Callable[[Any, float], None]:
    return lambda held, value: path(held).__setitem__(key, value)


# What is held, how forward reads a number from it, how the number is changed in it.
HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any, float], object]]] = {
    "nested": (
        lambda: {"k": [0, {"z": 1.0}]}, lambda held: held["k"][1]["z"], into(lambda held: held["k"][1], "z")
    ),
    "dictionary": (lambda: {"scale": 1.0}, lambda held: held["scale"], into(lambda held: held, "scale")),
    "dictionary that gains a key": (
        lambda: {}, lambda held: 3.0 if not held else held["scale"], into(lambda held: held, "scale")
    ),
    "default dictionary": (
        lambda: collections.defaultdict(lambda: 1.0), lambda held: held["k"], into(lambda held: held, "k")
    ),
    "ordered dictionary": (
        lambda: collections.OrderedDict(a=1.0), lambda held: next(iter(held.values())), into(lambda held: held, "a")
    ),
    "dictionary with integer keys": (lambda: {3: 1.0, 7: 2.0}, lambda held: held[3], into(lambda held: held, 3)),
    "list": (lambda: [0.0, 1.0], lambda held: held[1], into(lambda held: held, 1)),
    "list that grows": (lambda: [1.0], sum, lambda held, value: held.append(value)),
    "deque": (lambda: collections.deque([1.0]), lambda held: held[0], into(lambda held: held, 0)),
    "set": (lambda: set(), lambda held: 1.0 + len(held), lambda held, value: held.add(value)),
    "list in a tuple": (lambda: (0.0, [1.0]), lambda held: held[1][0], into(lambda held: held[1], 0)),
    "list in a named tuple": (lambda: Pair([1.0], 0), lambda held: held.left[0], into(lambda held: held.left, 0)),
    "namespace": (
        lambda: types.SimpleNamespace(scale=1.0), lambda held: held.scale, lambda held, v: setattr(held, "scale", v)
    ),
    "dataclass": (Options, lambda held: held.scale, lambda held, v: setattr(held, "scale", v)),
    "container in a dataclass": (
        Options, lambda held: held.more["k"][1]["z"], into(lambda held: held.more["k"][1], "z")
    ),
    "object with slots": (Slotted, lambda held: held.scale, lambda held, v: setattr(held, "scale", v)),
    "object with a property": (Plain, lambda held: held.scale, lambda held, v: setattr(held, "_scale", v)),
    "object in an object": (
        Plain, lambda held: held.inner.scale, lambda held, v: setattr(held.inner, "_scale", v)
    ),
    "objects in a list": (
        lambda: [Plain(), Plain()], lambda held: held[1].scale, lambda held, v: setattr(held[1], "_scale", v)
    ),
    "NumPy array": (lambda: np.array([1.0, 2.0]), lambda held: float(held[0]), into(lambda held: held, 0)),
    "NumPy array in a dictionary": (
        lambda: {"a": np.array([1.0])}, lambda held: float(held["a"][0]), into(lambda held: held["a"], 0)
    ),
    "tensor in a list": (lambda: [vector(1.0)], lambda held: held[0], lambda held, v: held[0].fill_(v)),
    "tensor in a list, replaced": (
        lambda: [vector(1.0)], lambda held: held[0], lambda held, v: held.__setitem__(0, vector(v))
    ),
    "tensor in a nested dictionary": (
        lambda: {"k": ({"z": vector(1.0)},)}, lambda held: held["k"][0]["z"], lambda held, v: held["k"][0]["z"].fill_(v)
    ),
    "tensor in a namespace": (
        lambda: types.SimpleNamespace(w=vector(1.0)), lambda held: held.w, lambda held, v: held.w.fill_(v)
    ),
    "tensor over NumPy's memory": (
        lambda: (array := np.ones(6), torch.from_numpy(array)),
        lambda held: held[1],
        lambda held, v: held[0].fill(v),  # behind the back of the tensor's version counter
    ),
    "tensor written through its data": (
        lambda: [vector(1.0)], lambda held: held[0], lambda held, v: held[0].data.fill_(v)
    ),
    "view of a tensor": (
        lambda: (base := torch.ones(2, 6, dtype=torch.float64), base[1]),
        lambda held: held[1],
        lambda held, v: held[0].fill_(v),
    ),
    "buffers of a module in a list": (
        lambda: [nn.BatchNorm1d(6).double().eval()],
        lambda held: held[0].running_var,
        lambda held, v: held[0].running_var.fill_(v),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "use"), in_turn(HELD))
def test_what_a_container_holds_may_change(name: str, use: str) -> None:
    make, read, write = HELD[name]
    held = make()
    critic = Critic(lambda critic, h: h * read(critic.held), held=held)
    check_changes(SideBySide(use, critic), [lambda v=v: write(held, v) for v in (5.0, 0.3, 1.7)])


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["nested", "namespace", "dataclass", "tensor in a list", "tensor over NumPy's memory"])
def test_what_a_closure_holds_may_change(name: str, use: str) -> None:
    make, read, write = HELD[name]
    held = make()
    critic = Critic(lambda critic, h: h * read(held))
    check_changes(SideBySide(use, critic), [lambda v=v: write(held, v) for v in (5.0, 0.3, 1.7)])


@pytest.mark.parametrize("use", USES)
def test_a_container_may_be_replaced(use: str) -> None:
    critic = Critic(lambda critic, h: h * critic.options.more["k"][1]["z"], options=Options())
    others = [replace(Options(), more={"k": (0, {"z": v})}) for v in (5.0, 0.3, 1.7)]
    check_changes(SideBySide(use, critic), [lambda o=o: setattr(critic, "options", o) for o in others])


def with_global_number(critic: Any, h: Tensor) -> Tensor:
    return h * SCALE


def with_global_table(critic: Any, h: Tensor) -> Tensor:
    return h * TABLE["scales"][1]


def with_global_namespace(critic: Any, h: Tensor) -> Tensor:
    return h * SETTINGS.scale


def with_global_tensor(critic: Any, h: Tensor) -> Tensor:
    return h * (MIX * 2).sigmoid()


def with_global_function(critic: Any, h: Tensor) -> Tensor:
    return softened(h)


def with_a_default(critic: Any, h: Tensor, scale: float = 1.0) -> Tensor:
    return h * scale


def with_a_keyword_default(critic: Any, h: Tensor, *, scale: float = 1.0) -> Tensor:
    return h * scale


GLOBALS: dict[str, tuple[Callable[..., Tensor], Callable[[pytest.MonkeyPatch, float], object]]] = {
    "number": (with_global_number, lambda patch, v: patch.setitem(globals(), "SCALE", v)),
    "table": (with_global_table, lambda patch, v: patch.setitem(TABLE["scales"], 1, v)),
    "table, replaced": (with_global_table, lambda patch, v: patch.setitem(globals(), "TABLE", {"scales": {1: v}})),
    "namespace": (with_global_namespace, lambda patch, v: patch.setattr(SETTINGS, "scale", v)),
    "tensor": (with_global_tensor, lambda patch, v: MIX.fill_(v)),
    "tensor, replaced": (with_global_tensor, lambda patch, v: patch.setitem(globals(), "MIX", vector(v))),
    "function": (with_global_function, lambda patch, v: patch.setitem(globals(), "softened", lambda h: h.sin() * v)),
    "default of a function": (with_a_default, lambda patch, v: patch.setattr(with_a_default, "__defaults__", (v,))),
    "keyword's default": (
        with_a_keyword_default, lambda patch, v: patch.setattr(with_a_keyword_default, "__kwdefaults__", {"scale": v})
    ),
    "attribute of a library": (
        lambda critic, h: F.leaky_relu(h), lambda patch, v: patch.setattr(F, "leaky_relu", lambda h: h.sin() * v)
    ),
    "variable of the environment": (
        lambda critic, h: h * float(os.environ.get("CRITIC_SCALE", "1")),
        lambda patch, v: patch.setenv("CRITIC_SCALE", str(v)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "use"), in_turn(GLOBALS))
def test_a_global_may_change(name: str, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    middle, write = GLOBALS[name]
    MIX.zero_()
    check_changes(SideBySide(use, Critic(middle)), [lambda v=v: write(monkeypatch, v) for v in (5.0, 0.3, 1.7)])


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "values",
    [(1.0, 5.0, 0.3, 1.7), (None, 2.0, None, 0.4), (vector(), vector(2.0), 0.5)],
    ids=["numbers", "nothing and numbers", "tensors and a number"],
)
def test_a_closure_cell_may_change(values: tuple[Any, ...], use: str) -> None:
    scale = values[0]

    def middle(critic: Any, h: Tensor) -> Tensor:
        return h if scale is None else h * scale

    def change(value: Any) -> None:
        nonlocal scale
        scale = value

    check_changes(SideBySide(use, Critic(middle)), [lambda v=v: change(v) for v in values[1:]])


@pytest.mark.parametrize("use", USES)
def test_a_buffer_may_be_none_then_a_mask_and_back(use: str) -> None:
    critic = Critic(lambda critic, h: h if critic.mask is None else h * critic.mask)
    critic.register_buffer("mask", None)
    masks = [vector(), None, vector(2.0), vector(), None]
    check_changes(SideBySide(use, critic), [lambda m=m: setattr(critic, "mask", m) for m in masks])


MIXES: dict[str, Callable[[Critic, float], object]] = {
    "filled": lambda critic, v: critic.mix.fill_(v),
    "filled through data": lambda critic, v: critic.mix.data.fill_(v),
    "copied into": lambda critic, v: critic.mix.copy_(v * vector()),
    "one element": lambda critic, v: critic.mix.__setitem__(2, v),
    "added to": lambda critic, v: critic.mix.add_(v),
    "loaded": lambda critic, v: critic.load_state_dict({"mix": v * vector()}, strict=False),
    "replaced": lambda critic, v: setattr(critic, "mix", vector(v)),
    "data replaced": lambda critic, v: setattr(critic.mix, "data", vector(v)),
}


@pytest.mark.parametrize(
    ("name", "kind", "use"),
    in_turn(
        (n, k) for n in MIXES for k in ("attribute", "buffer", "transient buffer") if n != "loaded" or k == "buffer"
    ),
)
def test_tensors_that_forward_computes_with_are_read_at_every_call(name: str, kind: str, use: str) -> None:
    critic = Critic(lambda critic, h: h * (critic.mix * 2).sigmoid())
    if kind == "attribute":
        critic.mix = vector(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    else:
        critic.register_buffer("mix", torch.zeros(6, dtype=torch.float64), persistent=kind == "buffer")
    check_changes(SideBySide(use, critic), [lambda v=v: MIXES[name](critic, v) for v in (2.0, -1.0, 0.7)])


FURTHER: dict[str, tuple[Callable[..., Tensor], list[Any]]] = {
    "1, then True": (lambda c, h, a: h * 2 if a is True else h, [1, True, 1, True]),
    "1, then 1.0": (lambda c, h, a: h * 2 if isinstance(a, float) else h, [1, 1.0, 1, 1.0]),
    "0.0, then -0.0": (lambda c, h, a: h * (2.0 if str(a) == "-0.0" else 1.0), [0.0, -0.0, 0.0, -0.0]),
    "numbers": (lambda c, h, a: h * a, [0.5, 2.0, 0.3, 1.0, 3]),
    "words": (lambda c, h, a: getattr(torch, a)(h), ["sin", "sigmoid", "tanh"]),
    "nothing": (lambda c, h, a: h if a is None else h * a, [None, 2.0, None]),
    "dictionaries": (lambda c, h, a: h * a["k"][0], [{"k": [v]} for v in (0.5, 2.0, 0.3)]),
    "functions": (lambda c, h, a: a(h), [torch.sin, torch.sigmoid, torch.tanh]),
    "tensors": (lambda c, h, a: h * a, [vector(), vector(2.0), vector(0.3)]),
    "tensors of another type": (lambda c, h, a: h * a.double(), [vector(2.0), torch.tensor([3]), torch.ones(6) * 0.5]),
    "tensors in a list": (lambda c, h, a: h * a[0][0], [[(vector(v),)] for v in (2.0, 0.5, 3.0)]),
    "NumPy numbers": (lambda c, h, a: h * a, [np.float64(v) for v in (2.0, 0.5, 3.0)]),
    "objects": (lambda c, h, a: h * a.scale, [Options(v) for v in (2.0, 0.5, 3.0)]),
}


@pytest.mark.parametrize(
    ("name", "how", "use"), in_turn((name, how) for name in FURTHER for how in ("positional", "keyword"))
)
def test_further_arguments_may_change_at_every_call(name: str, how: str, use: str) -> None:
    middle, values = FURTHER[name]
    pair = SideBySide(use, Critic(middle if how == "positional" else lambda c, h, **given: middle(c, h, given["a"])))
    seen = []
    for value in values:
        if how == "positional":
            seen.append(pair.check(args=lambda v=value: (v,)))
        else:
            seen.append(pair.check(kwargs=lambda v=value: {"a": v}))
    assert all(a != b for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize(
    "read",
    [
        lambda critic, h: h * critic.__dict__.get("late", 1.0),
        lambda critic, h: h * vars(critic).get("late", 1.0),
        lambda critic, h: h * (critic.late if "late" in critic.__dict__ else 1.0),
        lambda critic, h: h * getattr(critic, "late", 1.0),
    ],
)
def test_an_attribute_may_come_late(read: Any) -> None:
    critic = Critic(read)
    pair = SideBySide("penalty", critic)
    check_changes(pair, [lambda v=v: setattr(critic, "late", v) for v in (3.0, 0.5)])
