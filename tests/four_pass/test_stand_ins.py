"""What planning asks of tensors without data is what PyTorch's own mode says of them."""

import pytest
import torch
from exact_critics import CRITICS
from four_passes import FourPassEngine
from torch import Tensor
from torch.utils._pytree import tree_leaves

from wgan_fast import losses
from wgan_fast.engine.guarded import Called
from wgan_fast.four_pass import Objective, counting, record, stand_ins


def looks(value):
    return [
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in tree_leaves(value)
    ]


@pytest.mark.parametrize("name", CRITICS)
def test_every_operator_gives_what_the_fake_mode_gives(name, monkeypatch):
    asked = []

    def compared(mode, func, args, kwargs):
        out = stand_ins.evaluate(mode, func, args, kwargs)
        if not func._schema.is_mutable and func is not torch.ops.prim.device.default:
            asked.append(func)
            with mode:
                assert looks(out) == looks(func(*args, **kwargs)), func
        return out

    for module in (record, counting):
        monkeypatch.setattr(module, "evaluate", compared)
    make, shape = CRITICS[name]
    critic = make()
    engine = FourPassEngine(critic, Objective(losses.wasserstein.critic, at="given"))
    engine.planned(Called(critic, torch.randn(8, *shape[1:])))
    assert asked


def test_broadcast_operands_in_another_order_are_left_to_the_fake_mode():
    mode = stand_ins.FakeTensorMode()
    with mode:
        x, transposed = torch.empty(4, 5, 6), torch.empty(5, 4).t().unsqueeze(2)
        row = torch.empty(6)
        for _ in range(2):
            for args in ((x, row), (row, x), (x, transposed), (transposed, x), (x.permute(2, 0, 1), row[:1])):
                made = stand_ins.evaluate(mode, torch.ops.aten.mul.Tensor, args, {})
                assert looks(made) == looks(torch.mul(*args))


def test_a_memory_format_that_is_asked_for_is_given():
    mode = stand_ins.FakeTensorMode()
    clone = torch.ops.aten.clone.default
    for layout in (torch.contiguous_format, torch.channels_last):
        with mode:
            x = torch.empty(2, 3, 4, 5).contiguous(memory_format=layout)
            made = stand_ins.evaluate(mode, clone, (x,), {"memory_format": torch.contiguous_format})
        assert made.stride() == (60, 20, 5, 1)


def test_what_was_learned_holds_for_its_layout_and_default_dtype_alone():
    mode = stand_ins.FakeTensorMode()
    x, mask = torch.empty(2, 3, 4, 5), torch.empty(2, 3, dtype=torch.int64)
    one_channel = torch.empty(280).as_strided((2, 1, 4, 5), (20, 7, 5, 1))
    column = torch.empty(40).as_strided((4, 1), (1, 9))
    calls = [
        (torch.ops.aten.mvlgamma.default, (x, 2)),
        (torch.ops.aten.mvlgamma.default, (x.contiguous(memory_format=torch.channels_last), 2)),
        (torch.ops.aten.mul.Scalar, (one_channel, 2.0)),
        (torch.ops.aten.mul.Scalar, (column, 2.0)),
        (torch.ops.aten.mul.Scalar, (x[:, :1].contiguous(memory_format=torch.channels_last), 2.0)),
        (torch.ops.aten.mul.Tensor, (mask, 0.5)),
    ]
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            for func, args in [*calls, *reversed(calls)]:
                with mode:
                    args = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
                    assert looks(stand_ins.evaluate(mode, func, args, {})) == looks(func(*args)), func
    finally:
        torch.set_default_dtype(torch.float32)
