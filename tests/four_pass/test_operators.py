"""Every entry of the registry by its own examples: derivatives, rows, and the forms that overwrite."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from wgan_fast.four_pass.operators import IN_PLACE, OPERATORS, OUT, ROWS, Call, Slot, linear, structure
from wgan_fast.four_pass.operators.base import Rule, W, X, overload, rule_for
from wgan_fast.four_pass.operators.rows import Placed, aligned
from wgan_fast.four_pass.stand_ins import is_elementwise

aten = torch.ops.aten
REFUSED = {aten.as_strided.default}
EXAMPLES = [(op, index) for op, entry in OPERATORS.items() for index in range(len(entry.examples))]
MOVING = {"cat", "concat", "stack", "sub", "add", "linear", "scaled_dot_product_attention"}
"""Operators in whose examples every operand may have a tangent."""


def name_of(op) -> str:
    return op._schema.name.removeprefix("aten::")


def ids(case) -> str:
    return f"{name_of(case[0])}.{case[0]._overloadname}-{case[1]}"


def make(example, batches: int = 1):
    """A call of an example: its tensors drawn, samples ``batches`` times as many."""
    op, index = example
    leaves, spec = tree_flatten(OPERATORS[op].examples[index])
    operands, sampled = [], []

    def slot(leaf):
        if not isinstance(leaf, X):
            return leaf
        shape = list(leaf.shape)
        if not isinstance(leaf, W):
            shape[0] *= batches
        operands.append(torch.randn(shape, dtype=torch.float64).to(memory_format=leaf.layout))
        sampled.append(not isinstance(leaf, W))
        return Slot(len(operands) - 1)

    *arguments, last = tree_unflatten([slot(leaf) for leaf in leaves], spec)
    kwargs = last if isinstance(last, dict) else {}
    args = arguments if isinstance(last, dict) else [*arguments, last]
    return Call(op, tuple(args), kwargs, operands, sampled)


def test_every_entry_has_an_example():
    missing = [str(op) for op, entry in OPERATORS.items() if not entry.examples and op not in REFUSED]
    assert not missing


def test_what_reads_memory_by_strides_is_refused():
    op = aten.as_strided.default
    call = Call(op, (Slot(0), [3, 5], [28, 2], 1), {}, [torch.randn(3, 4, 7)], [True])
    with pytest.raises(NotImplementedError, match="reads memory by strides"):
        rule_for(op).forward(call)


@pytest.mark.parametrize("example", EXAMPLES, ids=ids)
def test_derivatives_are_those_that_autograd_finds(example):
    check(example)


@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if name_of(e[0]).startswith(("linear", "conv", "avg_pool"))], ids=ids
)
def test_what_is_written_for_a_gpu_has_the_same_derivatives(example, monkeypatch):
    for module in (linear, structure):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)
    check(example)


def check(example):
    torch.manual_seed(3)
    call = make(example)
    rule, generic = rule_for(call.op), Rule()
    assert type(rule) is not Rule
    call.output = rule.forward(call)
    torch.testing.assert_close(call.output, make_again(call).run(), rtol=1e-12, atol=1e-12)
    wanted = list(range(len(call.operands)))
    several = not isinstance(call.output, Tensor)
    parts = call.output if several else [call.output]
    # Indices have no cotangent.
    cotangent = [torch.randn_like(part) if part.is_floating_point() else None for part in parts]
    cotangent = cotangent if several else cotangent[0]
    compare(rule.vjp(call, cotangent, wanted), generic.vjp(call, cotangent, wanted))
    for moving in (
        ([0], wanted) if name_of(call.op if hasattr(call.op, "_schema") else example[0]) in MOVING else ([0],)
    ):
        tangents = [torch.randn_like(x) if i in moving else None for i, x in enumerate(call.operands)]
        if example[0] is aten.hardsigmoid.default:
            # PyTorch differentiates it once; its Jacobian is diagonal, and constant almost everywhere.
            compare([rule.jvp(call, tangents)], generic.vjp(call, tangents[0], wanted))
            assert rule.second(call, tangents, cotangent, wanted) == [None]
            continue
        ours, theirs = rule.jvp(call, tangents), generic.jvp(call, tangents)
        compare(ours if several else [ours], theirs if several else [theirs])
        compare(rule.second(call, tangents, cotangent, wanted), generic.second(call, tangents, cotangent, wanted))


def make_again(call: Call) -> Call:
    return Call(call.op, call.args, call.kwargs, call.operands, call.sampled)


def compare(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        if mine is None or other is None:
            present = mine if other is None else other
            assert present is None or not present.any()
        else:
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


ROWED = [e for e in EXAMPLES if is_elementwise(e[0]) or name_of(e[0]) in ROWS]


@pytest.mark.parametrize("example", ROWED, ids=ids)
def test_rows_lie_where_a_rehearsal_on_two_batches_finds_them(example):
    torch.manual_seed(3)
    small, large = make(example), make(example, 2)
    # The small batch is the first half of the large one; what is shared is shared.
    small.operands = [
        x.narrow(0, 0, s.shape[0]) if rows else x for x, s, rows in zip(large.operands, small.operands, small.sampled)
    ]
    first, whole = (call.run() for call in (small, large))
    first, whole = (out if isinstance(out, Tensor) else out[0] for out in (first, whole))
    grown = [d for d in range(whole.dim()) if whole.shape[d] != first.shape[d]] if whole.dim() == first.dim() else []
    rows = aligned if is_elementwise(example[0]) else ROWS[name_of(example[0])]
    where = [0 if sampled else None for sampled in small.sampled]
    if not grown:
        return  # all of the batch goes into what there is: the walk refuses it without asking
    (dim,) = grown
    found = rows(small, Placed(where, [x.shape for x in small.operands], first, dim))
    assert found == (None if name_of(example[0]) in COUPLED else dim)
    if found is not None:
        torch.testing.assert_close(whole.narrow(dim, 0, first.shape[dim]), first, rtol=1e-12, atol=1e-12)


COUPLED = {"batch_norm"}
"""Operators whose samples are not apart in their examples."""


def test_rows_of_a_part_of_the_batch_are_not_rows_of_samples():
    call = Call(aten.slice.Tensor, (Slot(0), 0, 0, 2), {}, [torch.randn(3, 4)], [True])
    assert ROWS["slice"](call, Placed([0], [torch.Size([3, 4])], torch.randn(2, 4), 0)) is None


def backward_arguments(name: str, x: Tensor, v: Tensor):
    return {
        "threshold_backward": (v, x, 0.0),
        "leaky_relu_backward": (v, x, 0.2, True),
        "tanh_backward": (v, x.tanh()),
        "sigmoid_backward": (v, x.sigmoid()),
        "silu_backward": (v, x),
        "mul": (v, x),
    }[name]


@pytest.mark.parametrize("op", IN_PLACE, ids=str)
def test_the_form_that_overwrites_gives_the_same(op):
    x, y = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    others = (y,) if len([a for a in op._schema.arguments if "Tensor" in str(a.type)]) > 1 else ()
    expected, given = op(x, *others), x.clone()
    assert IN_PLACE[op](given, *others) is given
    assert torch.equal(given, expected)


@pytest.mark.parametrize("op", OUT, ids=str)
def test_the_form_that_fills_memory_gives_the_same(op):
    x, v = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    form, argument = OUT[op]
    arguments = backward_arguments(name_of(op), x, v)
    out = torch.full_like(x, torch.nan)
    form(*arguments, **{argument: out})
    assert torch.equal(out, op(*arguments))


def test_overloads_are_looked_up_by_name():
    assert overload("mean.dim") is aten.mean.dim
    assert overload("relu") is aten.relu.default
