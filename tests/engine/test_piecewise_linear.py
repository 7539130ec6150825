"""The autograd engine leaves the dead pass out, and nothing else."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from wgan_fast import gradient_penalty, reference
from wgan_fast.engine.piecewise_linear import PiecewiseLinear

pytestmark = pytest.mark.usefixtures("replaced_however_small")


class Products(TorchDispatchMode):
    """Counts multiply-adds of matrix products and of convolutions' calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.calls += name in ("aten::mm", "aten::addmm", "aten::convolution")
        self.calls += sum(args[-1][:2]) if name == "aten::convolution_backward" else 0
        return func(*args, **(kwargs or {}))


class Activated(nn.Module):
    """Layers with one way to call an activation between them."""

    def __init__(self, activate, conv=False):
        super().__init__()
        self.activate = activate
        widths = [3, 7, 5, 1]
        make = (lambda i, o: nn.Conv2d(i, o, 3, padding=1)) if conv else nn.Linear
        self.layers = nn.ModuleList(make(i, o) for i, o in itertools.pairwise(widths))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.activate(layer(x))
        return self.layers[-1](x).flatten(1).mean(1)


WAYS = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "relu_": lambda x: x.relu_(),
    "torch.relu": torch.relu,
    "Tensor.relu": lambda x: x.relu(),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "nn.LeakyReLU in place": nn.LeakyReLU(0.1, inplace=True),
    "slope 0": nn.LeakyReLU(0.0),
    "falling": lambda x: F.leaky_relu(x, -0.5),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_value_and_gradients_are_those_of_plain_double_backward(way, conv):
    torch.manual_seed(0)
    critic = Activated(WAYS[way], conv).double()
    plain = copy.deepcopy(critic)
    x = torch.randn(4, 3, *([5, 6] if conv else []), dtype=torch.float64)
    ours = gradient_penalty(critic, x, x, alpha=torch.ones(4, dtype=torch.float64), engine="autograd")
    ours.backward()
    expected, _ = reference.gradient_penalty(plain, [x])
    expected.backward()
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    # What the penalty does not reach has no gradient here and a gradient of zeros there.
    found, wanted = (
        [torch.zeros_like(p) if p.grad is None else p.grad for p in c.parameters()] for c in (critic, plain)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "falling"])
def test_no_product_is_computed_for_a_second_derivative_that_is_zero(way):
    """Per layer: 1 forward, 1 input gradient, and behind the penalty 1 tangent and 1 weight gradient.

    The first layer's forward needs no tangent of anything before it, and the last layer's tangent is not needed: with
    three layers 3 + 3 + 2 + 3. Double backward as PyTorch has it adds what the zeros are carried through.
    """
    critic = Activated(WAYS[way])
    x = torch.randn(4, 3)

    def count(penalty):
        with Products() as products:
            penalty().backward()
        return products.calls

    ours = count(lambda: gradient_penalty(critic, x, x, engine="autograd"))
    plain = count(lambda: reference.gradient_penalty(critic, [x])[0])
    assert ours == 11
    assert plain > ours


def test_small_activations_stay_pytorchs_own(monkeypatch):
    monkeypatch.undo()
    critic = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))
    with PiecewiseLinear() as small:
        critic(torch.randn(4, 512))
    with PiecewiseLinear() as large:
        critic(torch.randn(8, 512))
    assert small.used
    assert not small.before
    assert large.used
    assert large.before


def test_extreme_values_behave_as_in_relu():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0], requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    with PiecewiseLinear():
        y = F.relu(x)
    torch.testing.assert_close(y, F.relu(plain), equal_nan=True)
    y.sum().backward()
    F.relu(plain).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, equal_nan=True)


def test_it_works_inside_functional_transforms():
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 3, dtype=torch.float64)

    def gradients():
        return torch.func.vmap(torch.func.grad(lambda row: F.relu(weight @ row).sum()))(x)

    with PiecewiseLinear():
        found = gradients()
    torch.testing.assert_close(found, gradients())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, lambda *sizes: nn.RNN(*sizes, nonlinearity="relu")])
def test_recurrent_layers_off_the_cpu_run_without_cudnn(kind, monkeypatch):
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(torch.backends.cudnn.enabled)
            return func(*args, **(kwargs or {}))

    layer, x = kind(3, 4).to("meta"), torch.empty(5, 2, 3, device="meta")
    with PiecewiseLinear() as mode, Watch():
        layer(x)
    assert mode.used
    assert seen.count(False) > 5
    assert torch.backends.cudnn.enabled
