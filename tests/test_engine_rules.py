"""Every fast rule gives what the generic rule, which asks autograd, gives for the same call."""

import pytest
import torch

from wgan_fast.four_pass.operators import Call, Slot, linear, structure
from wgan_fast.four_pass.operators.base import Rule, registered, rule_for

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

# One call of an overload on one tensor: what is left out above.
CALLS |= {
    f"{op.__name__}{arguments}": (lambda op=op, shape=shape, arguments=arguments: call(op, tensor(*shape), *arguments))
    for op, shape, *arguments in [
        (aten.clamp.default, x3, -0.5, 0.7),
        (aten.clamp_min.default, x3, 0.1),
        (aten.threshold.default, x3, 0.2, -1.0),
        (aten.hardsigmoid.default, x3),
        (aten.hardshrink.default, x3, 0.3),
        (aten.softshrink.default, x3, 0.3),
        (aten.log_sigmoid.default, x3),
        (aten.dropout.default, x3, 0.5, False),
        (aten.feature_dropout.default, x4, 0.5, False),
        (aten.alpha_dropout.default, x3, 0.5, False),
        (aten.feature_alpha_dropout.default, x4, 0.5, False),
        (aten.adaptive_max_pool2d.default, x4, [3, 2]),
        (aten.adaptive_max_pool3d.default, (2, 3, 4, 5, 6), [2, 2, 3]),
        (aten.reshape.default, x3, [3, -1]),
        (aten.view.default, x3, [3, 28]),
        (aten._unsafe_view.default, x3, [12, 7]),
        (aten.flatten.using_ints, x4, 1, 2),
        (aten.unflatten.int, x4, 1, [2, 3]),
        (aten.permute.default, x4, [0, 2, 3, 1]),
        (aten.transpose.int, x3, 1, 2),
        (aten.swapaxes.default, x3, 0, 2),
        (aten.movedim.int, x4, 1, 3),
        (aten.t.default, x2),
        (aten.numpy_T.default, x2),
        (aten.squeeze.default, (3, 1, 5)),
        (aten.squeeze.dim, (3, 1, 5), 1),
        (aten.squeeze.dims, (3, 1, 5, 1), [1, 3]),
        (aten.unsqueeze.default, x3, 1),
        (aten.expand.default, (3, 1, 7), [3, 4, 7]),
        (aten.repeat.default, x2, [1, 2]),
        (aten.slice.Tensor, x3, 1, 1, 4, 2),
        (aten.select.int, x3, 1, 2),
        (aten.narrow.default, x3, 1, 1, 2),
        (aten.contiguous.default, x3),
        (aten.clone.default, x3),
        (aten.alias.default, x3),
        (aten.neg.default, x3),
        (aten.flip.default, x3, [1]),
        (aten.roll.default, x3, [2], [1]),
        (aten.mean.default, x3),
        (aten.sum.default, x3),
        (aten.sum.dim_IntList, x3, [1], True),
        (aten.constant_pad_nd.default, x3, [1, 2], 0.5),
        (aten.pixel_unshuffle.default, (2, 2, 4, 6), 2),
        (aten.unfold.default, x3, 2, 3, 2),
        (aten.cumsum.default, x3, 1),
        (aten.to.dtype, x3, torch.float64),
        (aten._to_copy.default, x3),
        (aten.avg_pool1d.default, x3, [3], [2], [1]),
        (aten.avg_pool3d.default, (2, 3, 4, 5, 6), [2, 2, 3]),
        (aten.adaptive_avg_pool1d.default, x3, [3]),
        (aten.adaptive_avg_pool3d.default, (2, 3, 4, 5, 6), [2, 3, 2]),
        (aten.upsample_nearest1d.vec, x3, None, [2.0]),
        (aten.upsample_nearest2d.vec, x4, None, [2.0, 1.5]),
        (aten.upsample_nearest3d.vec, (2, 3, 2, 3, 4), None, [2.0, 1.0, 1.5]),
        (aten.upsample_linear1d.vec, x3, None, True, [2.0]),
        (aten.upsample_bicubic2d.vec, x4, None, False, [2.0, 1.5]),
        (aten.split.Tensor, x3, 3, 2),
        (aten.split.sizes, x3, [3, 4], 2),
        (aten.split_with_sizes.default, x3, [1, 2, 4], 2),
        (aten.chunk.default, x3, 3, 2),
        (aten.unbind.int, x3, 1),
    ]
}
CALLS |= {
    "avg_pool1d, tiled": lambda: call(aten.avg_pool1d.default, tensor(3, 4, 6), [3]),
    "avg_pool2d, tiled": lambda: call(aten.avg_pool2d.default, tensor(3, 6, 8, 6), [2, 3]),
    "avg_pool2d, tiled, channels last": lambda: call(
        aten.avg_pool2d.default, tensor(3, 6, 8, 6).to(memory_format=torch.channels_last), [2]
    ),
    "avg_pool3d, tiled": lambda: call(aten.avg_pool3d.default, tensor(2, 3, 4, 2, 6), [2, 1, 3]),
    "conv2d, channels last": lambda: call(
        aten.conv2d.default,
        tensor(*x4).to(memory_format=torch.channels_last),
        tensor(8, 6, 3, 2).to(memory_format=torch.channels_last),
        tensor(8),
    ),
    "view_as": lambda: call(aten.view_as.default, tensor(*x3), tensor(3, 28)),
    "concat": lambda: call(aten.concat.default, [tensor(*x2), tensor(3, 2)], 1),
    "conv_transpose3d": lambda: call(
        aten.conv_transpose3d.input, tensor(2, 3, 3, 4, 2), tensor(3, 2, 2, 3, 2), tensor(2), [2, 1, 1]
    ),
    "attention": lambda: call(
        aten.scaled_dot_product_attention.default, tensor(2, 3, 5, 4), tensor(2, 3, 6, 4), tensor(2, 3, 6, 7)
    ),
    **{
        name: lambda name=name, gates=gates: call(
            getattr(aten, name).input,
            tensor(3, 4, 5),
            [tensor(1, 3, 2)] * 2 if name == "lstm" else tensor(1, 3, 2),
            [tensor(2 * gates, 5), tensor(2 * gates, 2), tensor(2 * gates), tensor(2 * gates)],
            True,
            1,
            0.0,
            False,
            False,
            True,
        )
        for name, gates in {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}.items()
    },
}


def test_every_registered_rule_is_compared():
    compared = {make().op for make in CALLS.values()}
    refused = {aten.as_strided.default}
    missing = sorted(str(op) for op in registered() if op not in compared | refused)
    assert not missing, "these rules have no call in CALLS"


def test_what_reads_memory_by_strides_is_refused():
    made = call(aten.as_strided.default, tensor(*x3), [3, 5], [28, 2], 1)
    with pytest.raises(NotImplementedError, match="reads memory by strides"):
        rule_for(made.op).forward(made)


@pytest.mark.parametrize("name", CALLS)
def test_fast_rule_agrees_with_autograd(name):
    check(name)


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith(("linear", "conv", "avg_pool"))])
def test_what_is_written_for_a_gpu_agrees_with_autograd(name, monkeypatch):
    for module in (linear, structure):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    check(name)


def check(name):
    torch.manual_seed(3)
    made = CALLS[name]()
    rule, generic = rule_for(made.op), Rule()
    assert type(rule) is not Rule
    made.output = rule.forward(made)
    torch.testing.assert_close(made.output, made.run(), rtol=1e-12, atol=1e-12)
    wanted = list(range(len(made.operands)))
    several = not isinstance(made.output, torch.Tensor)
    parts = made.output if several else [made.output]
    # Indices have no cotangent.
    cotangent = [torch.randn_like(part) if part.is_floating_point() else None for part in parts]
    cotangent = cotangent if several else cotangent[0]
    compare(rule.vjp(made, cotangent, wanted), generic.vjp(made, cotangent, wanted))
    for moving in ([0], wanted) if name in MOVING else ([0],):
        tangents = [torch.randn_like(x) if i in moving else None for i, x in enumerate(made.operands)]
        if made.op is aten.hardsigmoid.default:
            # PyTorch differentiates it once; its Jacobian is diagonal, and constant almost everywhere.
            compare([rule.jvp(made, tangents)], generic.vjp(made, tangents[0], wanted))
            assert rule.second(made, tangents, cotangent, wanted) == [None]
            continue
        ours, theirs = rule.jvp(made, tangents), generic.jvp(made, tangents)
        compare(ours if several else [ours], theirs if several else [theirs])
        compare(rule.second(made, tangents, cotangent, wanted), generic.second(made, tangents, cotangent, wanted))


MOVING = {"cat", "concat", "stack", "sub", "add, broadcast", "linear", "attention"}
"""Calls in which every operand may have a tangent."""


def compare(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        if mine is None or other is None:
            present = mine if other is None else other
            assert present is None or not present.any()
        else:
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
