"""Every entry of the registry by its own examples: derivatives, rows, and the forms that overwrite."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from wgan_fast.four_pass.operators import IN_PLACE, OPERATORS, OUT, ROWS, Call, Slot, linear, structure
from wgan_fast.four_pass.operators.base import Rule, W, X, overload, rule_for
from wgan_fast.four_pass.operators.rows import Placed, aligned, view
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
    # A layer's bias may be asked for alone.
    alone = [[i] for i in wanted] if name_of(example[0]).startswith(("linear", "conv")) else []
    for asked in (wanted, *alone):
        compare(rule.vjp(call, cotangent, asked), generic.vjp(call, cotangent, asked))
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


def tensors(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


SQUARE = torch.randn(5, 5, dtype=torch.float64)
# What the generic rule differentiates: arguments besides x [4, 6, 6, 5]; None for what is tried below.
FOLLOWING = {
    **dict.fromkeys(["bernoulli", "rand_like", "randn_like", "rrelu"]),  # draw
    **dict.fromkeys(["zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full"]),
    **dict.fromkeys(["one_hot", "embedding", "bmm", "mm", "einsum", "index", "index_select"]),
    "celu": ("celu",), "detach": ("detach",), "fill": ("fill.Scalar", 2.0), "full_like": ("full_like", 2.0),
    "copy": ("copy", "x"), "lerp": ("lerp.Scalar", "x", 0.3), "masked_fill": ("masked_fill.Scalar", "mask", 2.0),
    "ones_like": ("ones_like",), "zeros_like": ("zeros_like",), "selu": ("selu",), "square": ("square",),
    "expand_as": ("expand_as", "x"), "type_as": ("type_as", "x"), "where": ("where.ScalarOther", 2.0),
    "amax": ("amax", [1]), "amin": ("amin", [1]), "linalg_vector_norm": ("linalg_vector_norm", 2, [1]),
    "logsumexp": ("logsumexp", [1]), "max": ("max.dim", 1), "min": ("min.dim", 1), "prod": ("prod.dim_int", 1),
    "norm": ("norm.ScalarOpt_dim", 2, [1]), "std": ("std.dim", [1]), "var": ("var.dim", [1]), "glu": ("glu", 1),
    "log_softmax": ("log_softmax.int", 1), "softmax": ("softmax.int", 1), "sort": ("sort", 1), "topk": ("topk", 2, 1),
    "channel_shuffle": ("channel_shuffle", 2), "rms_norm": ("rms_norm", [5]), "matmul": ("matmul", "square"),
}  # fmt: skip


def following(name):
    """Return an operator without an entry, and its arguments from x."""
    op, given = overload(FOLLOWING[name][0]), FOLLOWING[name][1:]

    def arguments(x):
        if name == "where":
            return [x > 0, x, *given]
        fillers = {"x": x.neg(), "mask": x > 0, "square": SQUARE}
        return [x, *[fillers[value] if isinstance(value, str) else value for value in given]]

    return op, arguments


def assert_apart(rows, op, arguments_of, x, dim, strict):
    """Fail unless samples along ``dim`` of x are apart where ``rows`` places them; ``strict`` asks that it does."""
    twice = torch.cat([x, torch.randn_like(x)], dim)
    outputs = []
    try:
        for part in (twice, *twice.chunk(2, dim)):
            out = op(*arguments_of(part))
            outputs.append(out if isinstance(out, Tensor) else out[0])
    except RuntimeError:
        assert not strict
        return
    whole, first, second = outputs
    grown = [d for d in range(whole.dim()) if whole.shape[d] != first.shape[d]] if whole.dim() == first.dim() else []
    if not grown:
        assert not strict
        return  # all of the batch goes into what there is: the walk refuses it without asking
    leaves, spec = tree_flatten(arguments_of(x))
    operands = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    slots = iter(range(len(operands)))
    leaves = [Slot(next(slots)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    made = Call(op, tuple(tree_unflatten(leaves, spec)), {}, operands, [True] * len(operands))
    where = [dim if operand.shape == x.shape else None for operand in operands]
    # A view asks which dimension grew; the others must not believe what is not so.
    for claimed in grown if rows is view else range(first.dim()):
        found = rows(made, Placed(where, [operand.shape for operand in operands], first, claimed))
        if found != claimed:
            assert not (strict and [claimed] == grown), "samples are apart, and are not shown to be"
            continue
        assert [found] == grown, "rows are said to lie where they do not"
        for part, alone in zip(whole.chunk(2, found), (first, second)):
            torch.testing.assert_close(part, alone, rtol=1e-10, atol=1e-12)


def has_rows(op):
    return is_elementwise(op) or name_of(op) in ROWS


def rows_of(op):
    return aligned if is_elementwise(op) else ROWS[name_of(op)]


@pytest.mark.parametrize("example", [e for e in EXAMPLES if has_rows(e[0])], ids=ids)
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
    if not grown:
        return
    (dim,) = grown
    where = [0 if sampled else None for sampled in small.sampled]
    found = rows_of(example[0])(small, Placed(where, [x.shape for x in small.operands], first, dim))
    assert found == (None if name_of(example[0]) in COUPLED else dim)
    if found is not None:
        torch.testing.assert_close(whole.narrow(dim, 0, first.shape[dim]), first, rtol=1e-12, atol=1e-12)


COUPLED = {"batch_norm"}
"""Operators whose samples are not apart in their examples."""


def operands_of(example):
    return [leaf for leaf in tree_flatten(OPERATORS[example[0]].examples[example[1]])[0] if isinstance(leaf, X)]


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("example", [e for e in EXAMPLES if has_rows(e[0]) and len(operands_of(e)) == 1], ids=ids)
def test_samples_in_any_dimension_are_apart_where_that_is_said(example, dim):
    torch.manual_seed(3)
    call = make(example)
    (x,) = call.operands
    if dim < x.dim():
        filled = lambda part: [part if isinstance(value, Slot) else value for value in call.args]  # noqa: E731
        assert_apart(rows_of(call.op), call.op, filled, x, dim, strict=False)


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("name", [name for name, given in FOLLOWING.items() if given])
def test_rows_of_what_the_generic_rule_differentiates_are_apart(name, dim):
    torch.manual_seed(3)
    op, arguments = following(name)
    assert_apart(rows_of(op), op, arguments, tensors((4, 6, 6, 5))[0], dim, strict=dim == 0)


def test_every_operator_whose_rows_are_known_is_tried():
    entries = {name_of(op) for op in OPERATORS}
    assert ROWS.keys() - entries == FOLLOWING.keys()
    assert all(hasattr(aten, name) for name in ROWS)


@pytest.mark.parametrize(
    ("op", "shapes", "dims", "apart"),
    [
        (aten.bmm.default, [(4, 3, 5), (4, 5, 2)], [0, 0], True),
        (aten.mm.default, [(4, 3), (3, 2)], [0, None], True),
        (aten.mm.default, [(4, 3), (3, 2)], [1, 0], False),
        (aten.mm.default, [(4, 3), (3, 2)], [None, 1], False),
        (aten.matmul.default, [(4, 3), (3, 4)], [0, 1], False),
    ],
)
def test_products_keep_samples_apart_along_rows_of_the_left_alone(op, shapes, dims, apart):
    operands = tensors(*shapes)
    call, out = Call(op, (Slot(0), Slot(1)), {}, operands, [True, True]), op(*operands)
    found = [ROWS[name_of(op)](call, Placed(dims, [x.shape for x in operands], out, d)) for d in range(out.dim())]
    assert any(place == d for d, place in enumerate(found)) is apart


@pytest.mark.parametrize(
    ("equation", "dims", "place"),
    [
        ("nij,njk->nik", [0, 0], 0),
        ("ni,nj->nij", [0, 0], 0),
        ("ni,mi->nm", [0, 0], None),
        ("ni,ij->nj", [0, None], 0),
        ("ni,ij->j", [0, None], None),
        ("nn->n", [0], None),
    ],
)
def test_einsum_keeps_samples_apart_along_one_letter(equation, dims, place):
    operands = tensors(*[(3,) * len(term) for term in equation.partition("->")[0].split(",")])
    call = Call(aten.einsum.default, (equation, [Slot(i) for i in range(len(operands))]), {}, operands, [True])
    assert ROWS["einsum"](call, Placed(dims, [x.shape for x in operands], operands[0], 0)) == place


def test_a_table_is_looked_up_by_samples():
    table, index = torch.randn(5, 2), torch.tensor([[1, 2], [3, 4], [0, 1]])
    call = Call(aten.embedding.default, (Slot(0), Slot(1)), {}, [table, index], [False, True])
    out = aten.embedding.default(table, index)
    assert ROWS["embedding"](call, Placed([None, 0], [table.shape, index.shape], out, 0)) == 0
    assert ROWS["embedding"](call, Placed([0, None], [table.shape, index.shape], out, 0)) is None
    one_hot = Call(aten.one_hot.default, (Slot(0), 5), {}, [index], [True])
    assert ROWS["one_hot"](one_hot, Placed([0], [index.shape], aten.one_hot.default(index, 5), 0)) == 0


@pytest.mark.parametrize(
    ("positions", "dim", "place"),
    [
        ([None, 0], 0, 0),  # x[:, i]
        ([None, 0, 0], 0, 0),
        ([None, 0, None, 0], 0, 1),  # x[:, i, :, i]: what is indexed apart comes first
        ([0], 1, 1),
        ([0], 0, None),  # x[i]: samples chosen
        ([None, 0], 1, None),
        ([0, None, 0], 1, 1),
    ],
)
def test_rows_lie_beside_what_is_indexed(positions, dim, place):
    """On one batch and on two: the dimension that grows is the samples', or they are not told apart."""
    index = torch.tensor([1, 0, 1])
    outs = []
    for n in (4, 8):
        x = torch.randn([n if d == dim else 4 for d in range(4)])
        outs.append(x[tuple(slice(None) if p is None else index for p in positions)])
    changed = [d for d in range(outs[0].dim()) if outs[0].shape[d] != outs[1].shape[d]]
    slots = [None if p is None else Slot(1) for p in positions]
    call = Call(aten.index.Tensor, (Slot(0), slots), {}, [torch.randn(4, 4, 4, 4), index], [True, False])
    grown = changed[0] if changed else 0
    shapes = [torch.Size([4] * 4), index.shape]
    assert ROWS["index"](call, Placed([dim, None], shapes, outs[0], grown)) == place
    assert ROWS["index"](call, Placed([dim, 0], shapes, outs[0], grown)) is None


def test_rows_lie_beside_what_is_selected():
    x, index = torch.randn(4, 5, 6), torch.tensor([1, 0])
    call = Call(aten.index_select.default, (Slot(0), 1, Slot(1)), {}, [x, index], [True, False])
    out = x.index_select(1, index)
    assert ROWS["index_select"](call, Placed([0, None], [x.shape, index.shape], out, 0)) == 0
    assert ROWS["index_select"](call, Placed([2, None], [x.shape, index.shape], out, 2)) == 2
    assert ROWS["index_select"](call, Placed([1, None], [x.shape, index.shape], out, 1)) is None
    assert ROWS["index_select"](call, Placed([0, 0], [x.shape, index.shape], out, 0)) is None


def test_what_is_expanded_to_the_batch_is_equal_in_every_row():
    constant = torch.randn(1, 5)
    call = Call(aten.expand.default, (Slot(0), [4, 5]), {}, [constant], [False])
    assert ROWS["expand"](call, Placed([None], [constant.shape], constant.expand(4, 5), 0)) == 0


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_over_rows_are_products_with_ones_on_cuda(dtype):
    rows = torch.randn(1003, 37, device="cuda").to(dtype)
    summed = linear._sum(rows)
    assert summed.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
    rtol = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(summed.double(), rows.double().sum(0), rtol=rtol, atol=rtol * 30)
