"""What the four-pass step costs: FLOPs in critic forwards over one batch, and operators dispatched."""

import time

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wgan_fast.double_backprop import FourPassEngine, Objective


def mlp():
    hidden = [layer for _ in range(2) for layer in (nn.Linear(512, 512), nn.ReLU(True))]
    return nn.Sequential(nn.Linear(2, 512), nn.ReLU(True), *hidden, nn.Linear(512, 1)), (256, 2)


def dcgan_28():
    layers = [(1, 64), (64, 128), (128, 256)]
    blocks = [m for i, o in layers for m in (nn.Conv2d(i, o, 5, 2, 2), nn.LeakyReLU(0.2, True))]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4096, 1)), (8, 1, 28, 28)


def dcgan_64():
    layers = [(3, 64), (64, 128), (128, 256), (256, 512)]
    blocks = [m for i, o in layers for m in (nn.Conv2d(i, o, 4, 2, 1), nn.LeakyReLU(0.2, True))]
    return nn.Sequential(*blocks, nn.Conv2d(512, 1, 4), nn.Flatten(0)), (4, 3, 64, 64)


class Dispatched(TorchDispatchMode):
    """Counts operators whose result is not a view of an argument."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        return func(*args, **(kwargs or {}))


def addmm_flops(bias, a, b, *args, **kwargs):
    return 2 * a[0] * a[1] * b[1]


def flops(function):
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._addmm_activation: addmm_flops}) as counter:
        function()
    return counter.get_total_flops()


def wasserstein(real, fake):
    return fake.mean() - real.mean()


def step(critic, shape, schedule, **objective):
    batches = {"real": torch.randn(shape), "fake": torch.randn(shape), "alpha": torch.rand(shape[0])}
    engine = FourPassEngine(critic, Objective(wasserstein, **objective), schedule=schedule)
    engine(batches)
    return engine, batches


@pytest.mark.parametrize("schedule", ["batched", "split"])
@pytest.mark.parametrize(("objective", "units"), [({}, 10.05), ({"at": "both", "target": 0.0}, 8.05)])
@pytest.mark.parametrize("make", [mlp, dcgan_28, dcgan_64])
def test_a_step_costs_no_more_than_its_passes(make, objective, units, schedule):
    critic, shape = make()
    engine, batches = step(critic, shape, schedule, **objective)
    with torch.no_grad():
        forward = flops(lambda: critic(batches["real"]))
    measured = flops(lambda: engine(batches)) / forward
    assert measured <= units
    assert engine.plan(batches).units() == pytest.approx(measured)


def test_mlp_step_dispatches_at_most_40_operators():
    critic, shape = mlp()
    engine, batches = step(critic, shape, "batched")
    with Dispatched() as counter:
        engine(batches)
    assert counter.count <= 40
    assert engine.plan(batches).launches() == counter.count


def test_piecewise_linear_critics_have_no_curvature_pass():
    critic, shape = dcgan_28()
    engine, batches = step(critic, shape, "batched")
    assert not engine.plan(batches).curved
    assert "beta" not in engine.plan(batches).code


def test_planning_takes_at_most_three_seconds():
    critic, shape = dcgan_64()
    start = time.perf_counter()
    step(critic, shape, "auto")
    assert time.perf_counter() - start < 3
