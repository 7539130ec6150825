"""What the four-pass step costs: FLOPs in critic forwards over one batch, and operators dispatched."""

import time
import weakref

import pytest
import torch
from exact_critics import CRITICS
from four_passes import FourPassEngine
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from wgan_fast import CriticStep, reference
from wgan_fast.four_pass import Objective
from wgan_fast.training import models


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
    batches = {"real": torch.randn(shape), "fake": torch.randn(shape), "points": torch.randn(shape)}
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


@pytest.mark.parametrize(
    ("make", "batch", "schedule"), [(mlp, 256, "batched"), (dcgan_28, 64, "batched"), (dcgan_64, 64, "split")]
)
def test_batches_are_joined_unless_their_activations_are_large(make, batch, schedule):
    critic, (_, *sample) = make()
    batches = {
        "real": torch.randn(batch, *sample),
        "fake": torch.randn(batch, *sample),
        "points": torch.randn(batch, *sample),
    }
    for _ in range(3):
        assert FourPassEngine(critic, Objective(wasserstein)).plan(batches).schedule == schedule


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of every storage that an operator made, from then until it is freed."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._known:
                storage = leaf.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key, size):
        self.now -= size
        self._known.remove(key)


@pytest.mark.slow
def test_a_dcgan_step_keeps_at_most_0_6_of_the_memory_of_double_backward():
    critic = models.build("dcgan64", (3, 64, 64))[1]
    real, fake, alpha = torch.randn(64, 3, 64, 64), torch.randn(64, 3, 64, 64), torch.rand(64)
    with LiveBytes() as plain:
        reference.critic_step(critic, real, fake, [reference.interpolate(real, fake, alpha)], loss=wasserstein)
    points = reference.interpolate(real, fake, alpha)
    engine, batches = FourPassEngine(critic, Objective(wasserstein)), {"real": real, "fake": fake, "points": points}
    engine.plan(batches)
    with LiveBytes() as four_passes:
        engine(batches)
    assert four_passes.peak <= 0.6 * plain.peak


def test_planning_takes_at_most_three_seconds():
    critic, shape = dcgan_64()
    start = time.perf_counter()
    step(critic, shape, "auto")
    assert time.perf_counter() - start < 3


class Layouts(TorchDispatchMode):
    """Counts copies that are made to be channels last."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += (kwargs or {}).get("memory_format") is torch.channels_last
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "lays_out"), [("attention", False), ("1d, many channels", True)])
def test_three_dimensions_are_laid_out_for_convolutions_alone(name, lays_out):
    make, shape = CRITICS[name]
    step, samples = CriticStep(make()), (torch.randn(shape), torch.randn(shape))
    step(*samples)
    with Layouts() as layouts:
        step(*samples)
    assert (layouts.count > 0) == lays_out
