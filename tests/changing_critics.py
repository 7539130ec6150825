"""Random critics that read state of every kind, and the random changes of it."""

import functools
import random
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from side_by_side import USES, SideBySide
from torch import Tensor, nn

SCALES: dict[int, float] = {}
"""Read by the blocks that read a global, each under a key of its own."""


SHIFT = 0.0


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.Tanh,
    nn.ReLU,
    lambda: nn.LeakyReLU(0.2),
    nn.SiLU,
    nn.Softplus,
    nn.GELU,
    nn.Sigmoid,
    lambda: nn.ELU(0.7),
    nn.PReLU,
    lambda: nn.Hardtanh(-1.3, 1.1),
]


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [torch.tanh, torch.sin, F.softplus, F.leaky_relu, torch.sigmoid]


@dataclass
class Options:
    scale: float = 1.0
    more: dict[str, Any] = field(default_factory=lambda: {"k": [0, {"z": 1.0}]})


class Block(nn.Module):
    """A layer, something that reads a state that parameters and modules do not show, an activation."""

    factor = 1.0

    def __init__(self, layer: nn.Module, norm: nn.Module, activation: nn.Module, read: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.norm, self.activation, self.read = layer, norm, activation, read

    def forward(self, h: Tensor) -> Tensor:
        return self.activation(self.stated(self.layer(self.norm(h)))) * self.factor

    def stated(self, h: Tensor) -> Tensor:
        return self.read(self, h)


HOLDERS: dict[str, Callable[[list[nn.Module]], Any]] = {
    "Sequential": lambda blocks: nn.Sequential(*blocks),
    "ModuleList": nn.ModuleList,
    "ModuleDict": lambda blocks: nn.ModuleDict({str(i): block for i, block in enumerate(blocks)}),
    "list": list,
    "tuple": tuple,
    "dictionary": lambda blocks: dict(enumerate(blocks)),
    "namespace": lambda blocks: types.SimpleNamespace(blocks=blocks),
}


class RandomCritic(nn.Module):
    """Blocks in a holder of a kind, a head, and perhaps a condition."""

    def __init__(self, blocks: list[nn.Module], holder: str, head: nn.Module, keeps: bool) -> None:
        super().__init__()
        self.holder, self.head, self.keeps = holder, head, keeps
        self.held = HOLDERS[holder](blocks)
        self.calls, self.kept = 0, None

    def blocks(self) -> list[nn.Module]:
        if self.holder == "namespace":
            return self.held.blocks
        return list(self.held.values()) if self.holder in ("ModuleDict", "dictionary") else list(self.held)

    def put(self, blocks: list[nn.Module]) -> None:
        self.held = HOLDERS[self.holder](blocks)

    def forward(self, x: Tensor, condition: Any = None) -> Tensor:
        for block in self.blocks():
            x = block(x)
        h = x.flatten(1)
        if condition is not None:
            h = h * condition
        if self.keeps:
            self.kept = h.detach()
        return self.head(h) + SHIFT * h.mean(1, keepdim=True)


def read_attribute(block: Any, h: Tensor) -> Tensor:
    return h if block.scale is None else h * block.scale


def read_nested(block: Any, h: Tensor) -> Tensor:
    return h * block.options["k"][1]["z"]


def read_dataclass(block: Any, h: Tensor) -> Tensor:
    return h * block.options.scale * block.options.more["k"][1]["z"]


def read_namespace(block: Any, h: Tensor) -> Tensor:
    return h * block.options.scale


def read_buffer(block: Any, h: Tensor) -> Tensor:
    return h if block.mask is None else h * (block.mask * 2).sigmoid()


def read_tensor_in_list(block: Any, h: Tensor) -> Tensor:
    return h * block.tensors[0]["w"]


def read_array(block: Any, h: Tensor) -> Tensor:
    return h * float(block.array[1])


def read_global(block: Any, h: Tensor) -> Tensor:
    return h * SCALES[block.key]


def read_layers(block: Any, h: Tensor) -> Tensor:
    for layer in block.layers:
        h = torch.tanh(layer(h.movedim(1, -1)).movedim(-1, 1))
    return h


def read_function(block: Any, h: Tensor) -> Tensor:
    return block.function(h)


def read_flags(block: Any, h: Tensor) -> Tensor:
    return h.sin() if "sine" in block.flags else h


def read_sign(block: Any, h: Tensor) -> Tensor:
    return h * block.scale if h.detach().sum() > 0 else h


class Subject:
    """A random critic with what is about it: how each part may be changed."""

    def __init__(self, seed: int) -> None:
        self.seed, self.draw = seed, random.Random(seed)
        torch.manual_seed(seed)
        draw = self.draw
        self.dims = draw.choice([0, 0, 2])
        self.width = draw.randint(3, 6)
        self.sample = (self.width, 4, 4) if self.dims else (self.width,)
        self.block_class = type("OwnBlock", (Block,), {})
        # Changes by the block that they belong to; those of a block that was taken out do nothing.
        self.own: list[tuple[nn.Module, Callable[[], object]]] = []
        self.handles: list[Any] = []
        blocks = [self.block() for _ in range(draw.randint(1, 3))]
        features = self.width * (16 if self.dims else 1)
        head, keeps = nn.Linear(features, 1).double(), draw.random() < 0.1
        self.critic = RandomCritic(blocks, draw.choice(list(HOLDERS)), head, keeps)
        self.condition = draw.choice(["none", "none", "number", "tensor", "embedding"])
        self.table = nn.Embedding(3, features).double()
        self.number = 1.2
        self.condition_tensor = torch.randn(features, dtype=torch.float64)
        self.critic.train(draw.random() < 0.6)
        for parameter in self.critic.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        # A normalisation takes what comes before it out again: gradients there are sums that cancel.
        self.pairs = {use: SideBySide(use, self.critic, self.leaves, slack=1e-12) for use in USES}

    def value(self) -> float:
        return self.draw.uniform(0.5, 1.6)

    def vector(self) -> Tensor:
        shape = (self.width, 1, 1) if self.dims else (self.width,)
        return 1 + 0.5 * torch.randn(shape, dtype=torch.float64)

    def layer(self) -> nn.Module:
        if self.dims:
            return nn.Conv2d(self.width, self.width, 3, padding=1).double()
        return nn.Linear(self.width, self.width).double()

    def norm(self) -> nn.Module:
        if self.draw.random() < 0.7:
            return nn.Identity()
        if self.dims:
            return self.draw.choice([nn.BatchNorm2d(self.width), nn.GroupNorm(1, self.width)]).double()
        return self.draw.choice([nn.BatchNorm1d(self.width), nn.LayerNorm(self.width)]).double()

    def block(self) -> nn.Module:
        draw = self.draw
        # A branch on data leaves the whole critic to autograd, which other kinds should not all be spared by.
        kind = "branch" if draw.random() < 0.02 else draw.choice([kind for kind in KINDS if kind != "branch"])
        block = self.block_class(self.layer(), self.norm(), draw.choice(ACTIVATIONS)().double(), READS.get(kind))
        self.own += [(block, functools.partial(change, self, block)) for change in KINDS[kind](self, block)]
        return block

    def blocks(self) -> list[Any]:
        return self.critic.blocks()

    def leaves(self) -> list[Tensor]:
        modules = [self.critic, self.table, *self.blocks()]
        modules += [layer for block in self.blocks() for layer in getattr(block, "layers", [])]
        return list({id(p): p for module in modules for p in module.parameters()}.values())

    def arguments(self, batch: int) -> tuple[Any, ...]:
        if self.condition == "none":
            return ()
        if self.condition == "number":
            return (self.number,)
        return (self.condition_tensor,) if self.condition == "tensor" else (self.table(torch.arange(batch) % 3),)

    def check(self) -> None:
        batch = self.draw.choice([5, 5, 5, 3])
        shape = (batch, *self.sample)
        real, fake = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
        alpha = torch.rand(batch, dtype=torch.float64)
        self.pairs[self.draw.choice(USES)].check(real, fake, alpha, args=lambda: self.arguments(batch))

    def remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


Change = Callable[[Subject, Any], object]


def attribute(subject: Subject, block: Any) -> list[Change]:
    make = subject.draw.choice([lambda s: s.value(), lambda s: np.float64(s.value()), lambda s: s.vector()])
    block.scale = make(subject)
    return [
        lambda s, b: setattr(b, "scale", make(s)),
        lambda s, b: setattr(b, "scale", None),
        lambda s, b: setattr(b, "scale", np.float64(s.value())),
        lambda s, b: b.scale.mul_(1.2) if isinstance(b.scale, Tensor) else setattr(b, "scale", s.vector()),
    ]


def nested(subject: Subject, block: Any) -> list[Change]:
    block.options = {"k": [0, {"z": subject.value()}]}
    return [
        lambda s, b: b.options["k"][1].update(z=s.value()),
        lambda s, b: setattr(b, "options", {"k": (0, {"z": s.value()})}),
        lambda s, b: b.options.update(k=[0, {"z": s.vector()}]),
    ]


def in_a_dataclass(subject: Subject, block: Any) -> list[Change]:
    block.options = Options(subject.value())
    return [
        lambda s, b: setattr(b.options, "scale", s.value()),
        lambda s, b: b.options.more["k"][1].update(z=s.value()),
        lambda s, b: setattr(b, "options", Options(s.value())),
    ]


def in_a_namespace(subject: Subject, block: Any) -> list[Change]:
    block.options = types.SimpleNamespace(scale=subject.value())
    return [lambda s, b: setattr(b.options, "scale", s.draw.choice([s.value(), s.vector()]))]


def buffer(subject: Subject, block: Any) -> list[Change]:
    first = subject.vector() if subject.draw.random() < 0.5 else None
    block.register_buffer("mask", first, persistent=subject.draw.random() < 0.5)
    return [
        lambda s, b: setattr(b, "mask", s.vector()),
        lambda s, b: setattr(b, "mask", None),
        lambda s, b: setattr(b, "mask", s.vector()) if b.mask is None else b.mask.fill_(s.value()),
    ]


def tensor_in_list(subject: Subject, block: Any) -> list[Change]:
    block.tensors = [{"w": subject.vector()}]
    return [
        lambda s, b: b.tensors[0]["w"].mul_(1.3),
        lambda s, b: b.tensors[0].update(w=s.vector()),
        lambda s, b: setattr(b.tensors[0]["w"], "data", s.vector()),
    ]


def array(subject: Subject, block: Any) -> list[Change]:
    block.array = np.array([0.0, subject.value()])
    return [lambda s, b: b.array.__setitem__(1, s.value()), lambda s, b: setattr(b, "array", np.full(2, s.value()))]


def of_a_global(subject: Subject, block: Any) -> list[Change]:
    block.key = len(SCALES)
    SCALES[block.key] = subject.value()
    return [lambda s, b: SCALES.update({b.key: s.draw.choice([s.value(), np.float64(s.value()), s.vector()])})]


def of_a_closure(subject: Subject, block: Any) -> list[Change]:
    scale: Any = subject.value()

    def read(block: Any, h: Tensor) -> Tensor:
        return h if scale is None else h * scale

    def change(subject: Subject, block: Any) -> None:
        nonlocal scale
        scale = subject.draw.choice([subject.value(), subject.vector(), None])

    block.read = read
    return [change]


def sublayers(subject: Subject, block: Any) -> list[Change]:
    width = subject.width
    block.layers = [nn.Linear(width, width).double() for _ in range(subject.draw.randint(1, 2))]
    return [
        lambda s, b: b.layers[0].weight.data.mul_(1.2),
        lambda s, b: b.layers.__setitem__(0, nn.Linear(width, width).double()),
        lambda s, b: b.layers.append(nn.Linear(width, width).double()),
        lambda s, b: b.layers[0].requires_grad_(not b.layers[0].weight.requires_grad),
        lambda s, b: setattr(b, "layers", tuple(b.layers[:1])) if len(b.layers) > 1 else b.layers[0].bias.data.add_(1),
    ]


def function(subject: Subject, block: Any) -> list[Change]:
    block.function = subject.draw.choice(FUNCTIONS)
    return [
        lambda s, b: setattr(b, "function", s.draw.choice(FUNCTIONS)),
        lambda s, b: setattr(b, "function", (lambda v: lambda h: h * v)(s.value())),
        lambda s, b: setattr(b, "function", functools.partial(F.leaky_relu, negative_slope=s.value())),
    ]


def flags(subject: Subject, block: Any) -> list[Change]:
    block.flags = set()
    return [
        lambda s, b: b.flags.discard("sine") if "sine" in b.flags else b.flags.add("sine"),
        lambda s, b: setattr(b, "flags", {"sine", "other"}),
    ]


def sign(subject: Subject, block: Any) -> list[Change]:
    block.scale = subject.value()
    return [lambda s, b: setattr(b, "scale", s.value())]


KINDS: dict[str, Callable[[Subject, Any], list[Change]]] = {
    "attribute": attribute,
    "nested": nested,
    "dataclass": in_a_dataclass,
    "namespace": in_a_namespace,
    "buffer": buffer,
    "tensor in a list": tensor_in_list,
    "array": array,
    "global": of_a_global,
    "closure": of_a_closure,
    "layers": sublayers,
    "function": function,
    "flags": flags,
    "branch": sign,
}


READS: dict[str, Callable[..., Tensor]] = {
    "attribute": read_attribute,
    "nested": read_nested,
    "dataclass": read_dataclass,
    "namespace": read_namespace,
    "buffer": read_buffer,
    "tensor in a list": read_tensor_in_list,
    "array": read_array,
    "global": read_global,
    "layers": read_layers,
    "function": read_function,
    "flags": read_flags,
    "branch": read_sign,
}


def a_block(subject: Subject) -> Any:
    return subject.draw.choice(subject.blocks())


def own_state(subject: Subject) -> None:
    present = {id(block) for block in subject.blocks()}
    subject.draw.choice([change for block, change in subject.own if id(block) in present])()


def weights_in_place(subject: Subject) -> None:
    subject.draw.choice(subject.leaves()).data.mul_(1.2)


def optimizer_step(subject: Subject) -> None:
    torch.optim.SGD(subject.leaves(), lr=1e-3).step()


def parameter_replaced(subject: Subject) -> None:
    layer = a_block(subject).layer
    layer.weight = nn.Parameter(layer.weight.detach() * 1.2, requires_grad=layer.weight.requires_grad)


def data_replaced(subject: Subject) -> None:
    layer = a_block(subject).layer
    layer.weight.data = layer.weight.data * 0.8


def bias_toggled(subject: Subject) -> None:
    layer = a_block(subject).layer
    layer.bias = None if layer.bias is not None else nn.Parameter(0.1 * torch.randn(subject.width).double())


def frozen_or_thawed(subject: Subject) -> None:
    part = subject.draw.choice([a_block(subject), a_block(subject).layer, subject.critic.head.bias])
    now = part.requires_grad if isinstance(part, Tensor) else next(part.parameters()).requires_grad
    part.requires_grad_(not now)


def mode(subject: Subject) -> None:
    part = subject.draw.choice([subject.critic, a_block(subject), a_block(subject).norm])
    part.train(not part.training)


def layer_replaced(subject: Subject) -> None:
    a_block(subject).layer = subject.layer()


def activation_replaced(subject: Subject) -> None:
    a_block(subject).activation = subject.draw.choice(ACTIVATIONS)().double()


def slope_changed(subject: Subject) -> None:
    for block in subject.blocks():
        for name in ("negative_slope", "alpha", "beta", "max_val"):
            if hasattr(block.activation, name):
                setattr(block.activation, name, subject.value())


def blocks_rearranged(subject: Subject) -> None:
    blocks = subject.blocks()
    how = subject.draw.choice(["add", "reverse", "replace", "twice"])
    if how == "add":
        blocks = [*blocks, subject.block()] if len(blocks) < 4 else blocks[:2]
    elif how == "reverse":
        blocks = blocks[::-1]
    elif how == "replace":
        blocks = [*blocks[:-1], subject.block()]
    elif subject.critic.holder in ("list", "tuple", "dictionary", "namespace") and len(blocks) < 4:
        blocks = [*blocks, blocks[0]]
    subject.critic.put(blocks)


def forward_hook(subject: Subject) -> None:
    part, v = subject.draw.choice([a_block(subject), a_block(subject).activation, subject.critic]), subject.value()
    subject.handles.append(part.register_forward_hook(lambda module, given, out: out * v))


def forward_pre_hook(subject: Subject) -> None:
    v = subject.value()
    subject.handles.append(a_block(subject).register_forward_pre_hook(lambda module, given: (given[0] * v,)))


def counting_hook(subject: Subject) -> None:
    seen: list[Tensor] = []
    subject.handles.append(a_block(subject).register_forward_hook(lambda module, given, out: seen.append(out)))


def global_hook(subject: Subject) -> None:
    v = subject.value()
    subject.handles.append(
        torch.nn.modules.module.register_module_forward_hook(
            lambda module, given, out: out * v if isinstance(module, Block) else None
        )
    )


def parameter_hook(subject: Subject) -> None:
    leaf, v = subject.draw.choice(subject.leaves()), subject.value()
    if leaf.requires_grad:
        subject.handles.append(leaf.register_hook(lambda g: g * v))


def hook_removed(subject: Subject) -> None:
    if subject.handles:
        subject.handles.pop(subject.draw.randrange(len(subject.handles))).remove()


def forward_patched(subject: Subject) -> None:
    block, v = a_block(subject), subject.value()
    block.forward = lambda h: block.activation(block.layer(h)) * v


def forward_restored(subject: Subject) -> None:
    for block in subject.blocks():
        vars(block).pop("forward", None)


def method_patched_on_the_class(subject: Subject) -> None:
    v = subject.value()
    subject.block_class.stated = lambda self, h: self.read(self, h) * v


def class_attribute(subject: Subject) -> None:
    subject.block_class.factor = subject.value()


def global_number(subject: Subject) -> None:
    global SHIFT
    SHIFT = subject.value()


def condition_changed(subject: Subject) -> None:
    subject.number = subject.draw.choice([subject.value(), 2, True, np.float64(subject.value())])
    subject.condition_tensor.mul_(1.1)
    subject.table.weight.data.mul_(1.1)


def called_by_others(subject: Subject) -> None:
    with torch.no_grad():
        subject.critic(torch.randn(4, *subject.sample, dtype=torch.float64), *subject.arguments(4))


def attribute_nobody_reads(subject: Subject) -> None:
    subject.critic.calls += 1


CHANGES: list[Callable[[Subject], None]] = [
    *3 * [own_state],
    weights_in_place,
    optimizer_step,
    parameter_replaced,
    data_replaced,
    bias_toggled,
    frozen_or_thawed,
    mode,
    layer_replaced,
    activation_replaced,
    slope_changed,
    blocks_rearranged,
    forward_hook,
    forward_pre_hook,
    counting_hook,
    global_hook,
    parameter_hook,
    hook_removed,
    forward_patched,
    forward_restored,
    method_patched_on_the_class,
    class_attribute,
    global_number,
    condition_changed,
    called_by_others,
    attribute_nobody_reads,
]
