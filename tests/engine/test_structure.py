"""A critic's layers, methods and hooks may change between calls, and the next call is right."""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from side_by_side import USES, Critic, SideBySide, check_changes, in_turn, linear, mlp, vector
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # to leave a critic to autograd is right, too


def sequence_of(*modules: nn.Module) -> Critic:
    critic = Critic(lambda critic, h: critic.body(h))
    critic.body = nn.Sequential(*modules)
    return critic


def replaced_in(kind: str) -> tuple[Critic, Callable[[nn.Module], object]]:
    """A critic that holds a module in a container of a kind, and a function that puts another in its place."""
    first = linear(3)
    containers: dict[str, tuple[Any, Callable[[Any], nn.Module], Callable[[Critic, nn.Module], object]]] = {
        "attribute": (first, lambda held: held, lambda c, m: setattr(c, "held", m)),
        "tuple": ((first,), lambda held: held[0], lambda c, m: setattr(c, "held", (m,))),
        "list": ([first], lambda held: held[0], lambda c, m: c.held.__setitem__(0, m)),
        "dictionary": ({"k": first}, lambda held: held["k"], lambda c, m: c.held.update(k=m)),
        "tuple in a list": ([(first,)], lambda held: held[0][0], lambda c, m: c.held.__setitem__(0, (m,))),
        "namespace": (
            types.SimpleNamespace(m=first), lambda held: held.m, lambda c, m: setattr(c.held, "m", m)
        ),
        "ModuleList": (nn.ModuleList([first]), lambda held: held[0], lambda c, m: c.held.__setitem__(0, m)),
        "ModuleDict": (nn.ModuleDict({"k": first}), lambda held: held["k"], lambda c, m: c.held.update({"k": m})),
        "Sequential": (nn.Sequential(first), lambda held: held, lambda c, m: c.held.__setitem__(0, m)),
    }  # fmt: skip
    held, get, put = containers[kind]
    critic = Critic(lambda critic, h: get(critic.held)(h), held=held)
    return critic, lambda module: put(critic, module)


MODULE_HOLDERS = [
    "attribute", "tuple", "list", "dictionary", "tuple in a list", "namespace", "ModuleList", "ModuleDict", "Sequential"
]  # fmt: skip


@pytest.mark.parametrize(("kind", "use"), in_turn(MODULE_HOLDERS))
def test_a_module_may_be_replaced_wherever_it_is_held(kind: str, use: str) -> None:
    critic, put = replaced_in(kind)
    held = [linear(4), nn.Sequential(nn.Tanh(), linear(5)), nn.Softplus(), linear(6)]

    def leaves() -> list[Tensor]:
        return [*{id(p): p for module in (critic, *held) for p in module.parameters()}.values()]

    check_changes(SideBySide(use, critic, leaves), [lambda m=m: put(m) for m in held])


STRUCTURES: dict[str, tuple[Callable[[], Critic], list[Callable[[Critic], object]]]] = {
    "layers appended and removed": (
        lambda: sequence_of(linear(3), nn.Tanh()),
        [lambda c: c.body.append(linear(4)), lambda c: c.body.insert(0, nn.Softplus()), lambda c: c.body.pop(1)],
    ),
    "order of layers": (
        lambda: sequence_of(linear(3), nn.Softplus(), linear(4)),
        [lambda c: setattr(c, "body", nn.Sequential(*reversed(c.body)))] * 3,
    ),
    "slope of an activation": (
        lambda: sequence_of(linear(3), nn.LeakyReLU(0.1)),
        [lambda c, v=v: setattr(c.body[1], "negative_slope", v) for v in (0.7, 0.3, 0.1)],
    ),
    "activation in place or not, then another": (
        lambda: sequence_of(linear(3), nn.ELU()),
        [lambda c: setattr(c.body[1], "alpha", 0.3), lambda c: c.body.__setitem__(1, nn.ELU(0.7, inplace=True))],
    ),
    "epsilon of a normalisation": (
        lambda: sequence_of(linear(3), nn.LayerNorm(6).double()),
        [lambda c, v=v: setattr(c.body[1], "eps", v) for v in (0.5, 1.0, 0.1)],
    ),
    "bias removed and put back": (
        lambda: sequence_of(linear(3)),
        [
            lambda c: setattr(c.body[0], "bias", None),
            lambda c: setattr(c.body[0], "bias", nn.Parameter(vector())),
            lambda c: setattr(c.body[0], "bias", None),
        ],
    ),
    "width": (
        lambda: sequence_of(linear(3), nn.Tanh(), linear(4)),
        [
            lambda c, width=width: setattr(
                c, "body", nn.Sequential(linear(3, width), nn.Tanh(), nn.Linear(width, 6).double())
            )
            for width in (3, 9, 6)
        ],
    ),
    "training and evaluation": (
        lambda: sequence_of(linear(3), nn.BatchNorm1d(6).double(), nn.Tanh()),
        [lambda c: c.eval(), lambda c: c.train(), lambda c: c.body[1].eval(), lambda c: c.train()],
    ),
    "evaluation of one layer that is not a child": (
        lambda: Critic(lambda c, h: c.held[0](h), held=(nn.BatchNorm1d(6).double(),)),
        [lambda c: c.held[0].eval(), lambda c: c.held[0].train(), lambda c: c.held[0].eval()],
    ),
    "parameters replaced": (
        lambda: sequence_of(linear(3)),
        [
            lambda c: setattr(c.body[0], "weight", nn.Parameter(2 * c.body[0].weight.detach())),
            lambda c: setattr(c.body[0].weight, "data", c.body[0].weight.data + 0.5),
            lambda c: c.body[0].weight.data.mul_(0.5),
            lambda c: c.load_state_dict({k: 1.5 * p for k, p in c.state_dict().items()}, assign=True),
            lambda c: torch.nn.utils.vector_to_parameters(torch.linspace(-1, 1, 97).double(), c.parameters()),
        ],
    ),
    "weights tied and untied": (
        lambda: sequence_of(linear(3), nn.Tanh(), linear(4)),
        [
            lambda c: setattr(c.body[2], "weight", c.body[0].weight),
            lambda c: setattr(c.body[2], "weight", nn.Parameter(c.body[0].weight.detach() * 0.5)),
            lambda c: c.body.__setitem__(2, c.body[0]),
        ],
    ),
    "parametrisation put on and taken off": (
        lambda: sequence_of(linear(3)),
        [
            lambda c: nn.utils.parametrize.register_parametrization(c.body[0], "weight", Doubled()),
            lambda c: nn.utils.parametrize.remove_parametrizations(c.body[0], "weight", leave_parametrized=False),
            lambda c: nn.utils.parametrizations.weight_norm(c.body[0]) and c.body[0].bias.data.mul_(2),
        ],
    ),
    "parametrisation's own setting": (
        lambda: (
            c := sequence_of(linear(3)),
            nn.utils.parametrize.register_parametrization(c.body[0], "weight", Doubled()),
        )[0],
        [lambda c, v=v: setattr(c.body[0].parametrizations.weight[0], "by", v) for v in (0.5, 3.0, 1.0)],
    ),
}


class Doubled(nn.Module):
    by = 2.0

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.by


@pytest.mark.parametrize(("name", "use"), in_turn(STRUCTURES))
def test_the_structure_may_change(name: str, use: str) -> None:
    make, changes = STRUCTURES[name]
    critic = make()
    check_changes(SideBySide(use, critic), [lambda change=change: change(critic) for change in changes])


@pytest.mark.parametrize("use", USES)
def test_freezing_and_thawing_moves_where_gradients_are(use: str) -> None:
    critic = mlp()
    pair = SideBySide(use, critic)
    for frozen in ([], [0], [0, 2], [], [2], [0]):
        critic.requires_grad_(True)
        for i in frozen:
            critic[i].requires_grad_(False)
        pair.check()
        critic[4].weight.data.mul_(1.1)
        pair.check()


@pytest.mark.parametrize("use", USES)
def test_layers_in_a_plain_list_may_be_trained(use: str) -> None:
    critic = Critic(lambda critic, h: critic.layers[1](torch.tanh(critic.layers[0](h))), layers=[linear(3), linear(4)])

    def leaves() -> list[Tensor]:
        return [*critic.parameters(), *(p for layer in critic.layers for p in layer.parameters())]

    optimizer = torch.optim.SGD(leaves(), lr=0.3)
    check_changes(SideBySide(use, critic, leaves), [optimizer.step] * 4)


class Methodical(nn.Module):
    """A critic with methods, a class attribute and a static method, all of which people patch."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.last = nn.Linear(5, 6).double(), nn.Linear(6, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.squash(self.features(x)) * self.scale * self.factor)

    def features(self, x: Tensor) -> Tensor:
        return self.inner(x)

    @staticmethod
    def squash(h: Tensor) -> Tensor:
        return torch.tanh(h)

    @property
    def factor(self) -> float:
        return 1.0


class Louder(Methodical):
    def features(self, x: Tensor) -> Tensor:
        return 3 * super().features(x)


def forwards(v: float) -> Callable[..., Tensor]:
    return lambda self, x: self.last(torch.sin(v * self.inner(x)))


PATCHES: dict[str, Callable[[pytest.MonkeyPatch, Methodical, float], object]] = {
    "forward on the class": lambda patch, critic, v: patch.setattr(Methodical, "forward", forwards(v)),
    "forward on the instance": lambda patch, critic, v: setattr(
        critic, "forward", types.MethodType(forwards(v), critic)
    ),
    "method on the class": lambda patch, critic, v: patch.setattr(
        Methodical, "features", lambda self, x: self.inner(x) * v
    ),
    "method on the instance": lambda patch, critic, v: setattr(critic, "features", lambda x: critic.inner(x) * v),
    "static method": lambda patch, critic, v: patch.setattr(
        Methodical, "squash", staticmethod(lambda h: torch.sin(h * v))
    ),
    "class attribute": lambda patch, critic, v: patch.setattr(Methodical, "scale", v),
    "instance attribute over the class's": lambda patch, critic, v: setattr(critic, "scale", v),
    "property": lambda patch, critic, v: patch.setattr(Methodical, "factor", property(lambda self: v)),
    "forward of a layer": lambda patch, critic, v: setattr(
        critic.inner, "forward", lambda x: F.linear(x, critic.inner.weight) * v
    ),
    "forward of a layer's class": lambda patch, critic, v: patch.setattr(
        nn.Linear, "forward", lambda self, x: F.linear(x, self.weight) * v
    ),
    "call of the class": lambda patch, critic, v: patch.setattr(
        Methodical, "__call__", lambda self, x: self.forward(x * v), raising=False
    ),
}


@pytest.mark.parametrize(("name", "use"), in_turn(PATCHES))
def test_methods_may_be_patched(name: str, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    critic = Methodical()
    changes = [lambda v=v: PATCHES[name](monkeypatch, critic, v) for v in (2.0, 0.3, 1.7)]
    check_changes(SideBySide(use, critic), [*changes, monkeypatch.undo][: 4 if name.endswith("class") else 3])


class Layer(nn.Module):
    """One of a critic's layers, with what people patch on its class."""

    factor = 1.0

    def forward(self, h: Tensor) -> Tensor:
        return self.squash(h) * self.factor

    def squash(self, h: Tensor) -> Tensor:
        return torch.tanh(h)


class Same(Layer):
    """Inherits what is patched."""


LAYER_PATCHES: dict[str, Callable[[float], tuple[str, Any]]] = {
    "class attribute": lambda v: ("factor", v),
    "method": lambda v: ("squash", lambda self, h: torch.sin(h * v)),
    "forward": lambda v: ("forward", lambda self, h: torch.sin(h * v)),
}


@pytest.mark.parametrize(
    ("kind", "patched"), [(Layer, Layer), (Same, Layer), (Same, Same)], ids=["its own", "its base", "over its base"]
)
@pytest.mark.parametrize(
    ("name", "held", "use"), in_turn((name, held) for name in LAYER_PATCHES for held in ("child", "tuple", "namespace"))
)
def test_the_class_of_a_layer_may_be_patched(
    name: str, held: str, use: str, kind: type[Layer], patched: type[Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = kind()
    critic = {
        "child": lambda: sequence_of(linear(3), layer),
        "tuple": lambda: Critic(lambda critic, h: critic.held[0](h), held=(layer,)),
        "namespace": lambda: Critic(lambda critic, h: critic.held.m(h), held=types.SimpleNamespace(m=layer)),
    }[held]()
    changes = [lambda v=v: monkeypatch.setattr(patched, *LAYER_PATCHES[name](v)) for v in (2.0, 0.3, 1.7)]
    check_changes(SideBySide(use, critic), [*changes, monkeypatch.undo])


@pytest.mark.parametrize("use", USES)
def test_the_class_of_a_critic_may_change(use: str) -> None:
    critic = Methodical()
    check_changes(
        SideBySide(use, critic),
        [lambda kind=kind: setattr(critic, "__class__", kind) for kind in (Louder, Methodical, Louder)],
    )


@pytest.mark.parametrize(
    ("name", "holds", "use"),
    in_turn((name, holds) for name in ("forward", "features", "layer") for holds in ("default", "closure")),
)
def test_a_function_assigned_anew_thirty_times_is_the_present_one(name: str, holds: str, use: str) -> None:
    """Freed objects leave their addresses to new ones."""
    critic = Methodical()
    pair = SideBySide(use, critic)

    def layer(function: Callable[..., Tensor], v: float) -> Callable[..., Tensor]:
        if holds == "default":
            return lambda x, v=v: function(x, v)
        return lambda x: function(x, v)

    def whole(x: Tensor, v: float) -> Tensor:
        return critic.last(torch.tanh(critic.inner(x) * v))

    def features(x: Tensor, v: float) -> Tensor:
        return critic.inner(x) * v

    def within(x: Tensor, v: float) -> Tensor:
        return F.linear(x, critic.inner.weight) * v

    owner, attribute, function = {
        "forward": (critic, "forward", whole),
        "features": (critic, "features", features),
        "layer": (critic.inner, "forward", within),
    }[name]
    for i in range(30):
        setattr(owner, attribute, layer(function, 0.1 + 0.05 * i))
        pair.check()


@pytest.mark.parametrize("use", USES)
def test_modules_and_tensors_made_anew_thirty_times_are_the_present_ones(use: str) -> None:
    critic = Critic(lambda critic, h: critic.held[0](h) * critic.mix, held=[None], mix=None)
    pair = SideBySide(use, critic)
    for i in range(30):
        critic.held = (linear(i),)
        critic.mix = vector() + i
        pair.check()


def layer_of(critic: Critic) -> nn.Linear:
    return critic.body[0]


HOOKS: dict[str, Callable[[Critic, float], Any]] = {
    "forward": lambda c, v: layer_of(c).register_forward_hook(lambda module, given, out: out * v),
    "forward, with keywords": lambda c, v: layer_of(c).register_forward_hook(
        lambda module, args, kwargs, out: out * v, with_kwargs=True
    ),
    "before forward": lambda c, v: layer_of(c).register_forward_pre_hook(lambda module, given: (given[0] * v,)),
    "on the critic itself": lambda c, v: c.register_forward_hook(lambda module, given, out: (out * v).sin()),
    "before the critic itself": lambda c, v: c.register_forward_pre_hook(lambda module, given: (given[0] * v,)),
    "prepended": lambda c, v: layer_of(c).register_forward_hook(lambda module, given, out: out * v, prepend=True),
    "of every module": lambda c, v: torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, out: out * v if isinstance(module, nn.Tanh) else None
    ),
    "before every module": lambda c, v: torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: (given[0] * v,) if isinstance(module, nn.Tanh) else None
    ),
    "of a layer that is not a child": lambda c, v: c.held[0].register_forward_hook(lambda module, given, out: out * v),
    "backward": lambda c, v: layer_of(c).register_full_backward_hook(lambda module, inputs, outputs: (v * inputs[0],)),
    "before backward": lambda c, v: layer_of(c).register_full_backward_pre_hook(
        lambda module, outputs: (v * outputs[0],)
    ),
}


@pytest.mark.parametrize(("name", "use"), in_turn(HOOKS))
def test_hooks_of_modules_come_and_go(name: str, use: str) -> None:
    critic = sequence_of(linear(3), nn.Tanh(), linear(4))
    if name == "of a layer that is not a child":
        critic = Critic(lambda critic, h: critic.held[0](h), held=(nn.Sequential(linear(3), nn.Tanh()),))
    pair = SideBySide(
        use, critic, lambda: [*critic.parameters(), *getattr(critic, "held", [nn.Identity()])[0].parameters()]
    )
    handles: list[Any] = []
    try:
        check_changes(
            pair,
            [
                lambda: handles.append(HOOKS[name](critic, 2.0)),
                lambda: handles.append(HOOKS[name](critic, 0.3)),
                lambda: handles.pop(0).remove(),
                lambda: handles.pop().remove(),
                lambda: handles.append(HOOKS[name](critic, 1.7)),
            ],
        )
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("whole", [False, True], ids=["one", "all"])
def test_parameters_may_be_swapped_after_use(whole: bool, use: str) -> None:
    critic = mlp()

    def swap(seed: int) -> None:
        other = copy.deepcopy(critic)
        for i, (p, q) in enumerate(zip(critic.parameters(), other.parameters())):
            if whole or i == 0:
                q.data.mul_(1 + seed / 2)
                p.grad = q.grad = None
                torch.utils.swap_tensors(p, q)

    check_changes(SideBySide(use, critic), [lambda s=s: swap(s) for s in (1, 2, 3)])


@pytest.mark.parametrize("use", USES)
def test_a_module_may_be_converted_by_swapping_after_use(use: str) -> None:
    critic = mlp()
    critic[0].weight.data.div_(3)
    pair = SideBySide(use, critic)
    before = pair.check()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        critic.zero_grad()
        critic.float()
        critic.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert pair.check() != before  # rounded to float32
