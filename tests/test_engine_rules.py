"""Every fast rule gives what the generic rule, which asks autograd, gives for the same call."""

import pytest
import torch

from wgan_fast.double_backprop.rules import Call, Slot
from wgan_fast.double_backprop.rules.base import Rule, rule_for

aten = torch.ops.aten


def tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def call(op, *args, **kwargs):
    """A call with a slot for every tensor among the arguments."""
    operands = []

    def slot(value):
        if isinstance(value, torch.Tensor):
            operands.append(value)
            return Slot(len(operands) - 1)
        return [slot(v) for v in value] if isinstance(value, list) else value

    return Call(op, tuple(map(slot, args)), {k: slot(v) for k, v in kwargs.items()}, operands, [True] * len(operands))


x2, x3, x4 = (3, 5), (3, 4, 7), (3, 6, 7, 5)
ELEMENTWISE = [
    "relu",
    "tanh",
    "sigmoid",
    "exp",
    "silu",
    "gelu",
    "softplus",
    "elu",
    "mish",
    "hardswish",
    "abs",
    "relu6",
]
CALLS = {
    **{name: (lambda name=name: call(getattr(aten, name).default, tensor(*x3))) for name in ELEMENTWISE},
    "leaky_relu": lambda: call(aten.leaky_relu.default, tensor(*x3), 0.2),
    "leaky_relu, negative slope": lambda: call(aten.leaky_relu.default, tensor(*x3), -0.1),
    "hardtanh": lambda: call(aten.hardtanh.default, tensor(*x3), -0.5, 0.7),
    "prelu": lambda: call(aten.prelu.default, tensor(*x4), tensor(6)),
    "linear": lambda: call(aten.linear.default, tensor(*x3), tensor(5, 7), tensor(5)),
    "linear, no bias": lambda: call(aten.linear.default, tensor(*x2), tensor(1, 5)),
    "conv1d": lambda: call(aten.conv1d.default, tensor(*x3), tensor(6, 2, 3), tensor(6), [2], [1], [2], 2),
    "conv2d": lambda: call(aten.conv2d.default, tensor(*x4), tensor(4, 3, 3, 2), tensor(4), [2, 1], [1, 0], [1, 2], 2),
    "conv3d": lambda: call(aten.conv3d.default, tensor(2, 3, 4, 5, 6), tensor(2, 3, 2, 2, 3), tensor(2), [2, 1, 3]),
    "conv_transpose1d": lambda: call(
        aten.conv_transpose1d.default, tensor(*x3), tensor(4, 3, 3), tensor(3), [2], [1], [1]
    ),
    "conv_transpose2d": lambda: call(
        aten.conv_transpose2d.input,
        tensor(*x4),
        tensor(6, 2, 3, 3),
        tensor(4),
        [2, 2],
        [1, 0],
        [1, 0],
        2,
        [1, 2],
    ),
    "layer_norm": lambda: call(aten.layer_norm.default, tensor(*x4), [7, 5], tensor(7, 5), tensor(7, 5)),
    "layer_norm, plain": lambda: call(aten.layer_norm.default, tensor(*x2), [5]),
    "group_norm": lambda: call(aten.group_norm.default, tensor(*x4), 3, tensor(6), tensor(6)),
    "group_norm, channels last": lambda: call(
        aten.group_norm.default, tensor(*x4).to(memory_format=torch.channels_last), 2, tensor(6), tensor(6)
    ),
    "instance_norm": lambda: call(
        aten.instance_norm.default, tensor(*x4), tensor(6), tensor(6), None, None, True, 0.1, 1e-5, False
    ),
    "batch_norm": lambda: call(
        aten.batch_norm.default, tensor(*x4), tensor(6), tensor(6), None, None, True, 0.1, 1e-5, False
    ),
    "max_pool1d": lambda: call(aten.max_pool1d.default, tensor(*x3), [3], [2], [1]),
    "max_pool2d": lambda: call(aten.max_pool2d.default, tensor(*x4), [3, 2], [2, 1], [1, 0]),
    "max_pool3d": lambda: call(aten.max_pool3d.default, tensor(2, 3, 4, 5, 6), [2, 2, 2]),
    "avg_pool2d": lambda: call(aten.avg_pool2d.default, tensor(*x4), [3, 2], [2, 1], [1, 0]),
    "adaptive_avg_pool2d": lambda: call(aten.adaptive_avg_pool2d.default, tensor(*x4), [3, 2]),
    "upsample": lambda: call(aten.upsample_bilinear2d.vec, tensor(*x4), None, False, [2.0, 1.5]),
    "pixel_shuffle": lambda: call(aten.pixel_shuffle.default, tensor(2, 8, 3, 3), 2),
    "pad": lambda: call(aten.pad.default, tensor(*x4), [1, 2, 0, 1], "reflect"),
    "pad with a value": lambda: call(aten.pad.default, tensor(*x4), [1, 2], "constant", 3.0),
    "mean": lambda: call(aten.mean.dim, tensor(*x4), [2, 3]),
    "cat": lambda: call(aten.cat.default, [tensor(*x2), tensor(3, 2)], 1),
    "stack": lambda: call(aten.stack.default, [tensor(*x2), tensor(*x2)], 1),
    "add, broadcast": lambda: call(aten.add.Tensor, tensor(*x3), tensor(7), alpha=0.5),
    "sub": lambda: call(aten.sub.Tensor, tensor(*x3), tensor(*x3), alpha=2),
}


@pytest.mark.parametrize("name", CALLS)
def test_fast_rule_agrees_with_autograd(name):
    torch.manual_seed(3)
    made = CALLS[name]()
    rule, generic = rule_for(made.op), Rule()
    assert type(rule) is not Rule
    made.output = rule.forward(made)
    torch.testing.assert_close(made.output, made.run(), rtol=1e-12, atol=1e-12)
    wanted = list(range(len(made.operands)))
    cotangent = torch.randn_like(made.output)
    compare(rule.vjp(made, cotangent, wanted), generic.vjp(made, cotangent, wanted))
    for moving in ([0], wanted) if name in {"cat", "stack", "sub", "add, broadcast", "linear"} else ([0],):
        tangents = [torch.randn_like(x) if i in moving else None for i, x in enumerate(made.operands)]
        compare([rule.jvp(made, tangents)], [generic.jvp(made, tangents)])
        compare(rule.second(made, tangents, cotangent, wanted), generic.second(made, tangents, cotangent, wanted))


def compare(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        if mine is None or other is None:
            present = mine if other is None else other
            assert present is None or not present.any()
        else:
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
