"""Random critics, penalties, losses and schedules: always what double backward gives, to 1e-10 in float64."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from test_engine_exactness import assert_exact, batches_of, perturbed, truth, wasserstein
from torch import nn

from wgan_fast.double_backprop import FourPassEngine, Objective

ACTIVATIONS = [
    nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.SiLU, nn.ELU, nn.GELU, nn.Softplus, nn.Sigmoid, nn.Hardtanh, nn.PReLU, nn.Mish
]  # fmt: skip
LOSSES = [
    None,
    wasserstein,
    lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
    lambda real, fake: 0.5 * ((real - 1).square().mean() + fake.square().mean()),
    lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
]


class Residual(nn.Module):
    def __init__(self, body, mode):
        super().__init__()
        self.body, self.mode = body, mode

    def forward(self, x):
        y = self.body(x)
        return torch.cat([x, y], 1) if self.mode == "cat" else x * y if self.mode == "mul" else x + y


def random_mlp(draw):
    width = features = draw.randint(2, 9)
    layers = []
    for _ in range(draw.randint(0, 4)):
        out = draw.randint(1, 9)
        layers.append(nn.Linear(width, out, bias=draw.random() < 0.8))
        width = out
        if draw.random() < 0.4 and width > 1:
            layers.append(draw.choice([nn.LayerNorm(width), nn.BatchNorm1d(width), nn.GroupNorm(1, width)]))
        layers.append(draw.choice(ACTIVATIONS)())
        if draw.random() < 0.4:
            mode = draw.choice(["add", "cat", "mul"])
            layers.append(Residual(nn.Sequential(nn.Linear(width, width), draw.choice(ACTIVATIONS)()), mode))
            width *= 2 if mode == "cat" else 1
    return nn.Sequential(*layers, nn.Linear(width, 1)), (features,)


def random_conv(draw):
    channels, size = draw.randint(1, 3), draw.choice([7, 8, 11])
    shape, width = (channels, size, size), channels
    layers = []
    for _ in range(draw.randint(1, 3)):
        out, kernel = draw.choice([2, 4, 6]), draw.choice([1, 2, 3])
        if draw.random() < 0.2:
            layers.append(nn.ConvTranspose2d(width, out, kernel, draw.choice([1, 2]), kernel // 2))
        else:
            groups = 2 if width % 2 == 0 and draw.random() < 0.3 else 1
            padding = draw.choice([kernel // 2, kernel // 2 + 1])
            layers.append(nn.Conv2d(width, out, kernel, draw.choice([1, 2]), padding, groups=groups))
        width = out
        if draw.random() < 0.5:
            norm = draw.choice([nn.GroupNorm(2, width), nn.BatchNorm2d(width), nn.GroupNorm(width, width)])
            layers.append(norm)
        layers.append(draw.choice(ACTIVATIONS)())
        if draw.random() < 0.3:
            mode = draw.choice(["add", "cat", "mul"])
            layers.append(Residual(nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), draw.choice(ACTIVATIONS)()), mode))
            width *= 2 if mode == "cat" else 1
        if draw.random() < 0.3:
            layers.append(draw.choice([nn.AvgPool2d(2, 1, 1), nn.MaxPool2d(2, 1, 1), nn.Upsample(scale_factor=2)]))
    layers += [nn.AdaptiveAvgPool2d(draw.choice([1, 2])), nn.Flatten(), nn.LazyLinear(1)]
    critic = nn.Sequential(*layers)
    critic(torch.randn(2, *shape))
    return critic, shape


def check(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    make = draw.choice([random_mlp, random_conv])
    critic, shape = make(draw)
    critic = perturbed(critic)
    critic.train(draw.random() < 0.7)
    for parameter in critic.parameters():
        parameter.requires_grad_(draw.random() < 0.9)
    critic[-1].weight.requires_grad_(True)
    loss = draw.choice(LOSSES)
    at = draw.choice(["interpolates", "real", "fake", "both", "given"])
    weight = None if loss and draw.random() < 0.05 else draw.uniform(0.1, 20)
    objective = Objective(loss, weight, draw.choice([0.0, 1.0, 0.1]), draw.random() < 0.3, at)
    plain = copy.deepcopy(critic)
    batches = batches_of((draw.randint(2, 6), *shape))
    output = FourPassEngine(critic, objective, schedule=draw.choice(["batched", "split"]))(batches)
    expected = truth(plain, objective, batches)
    if output.loss.abs() > 1e-8:
        assert_exact(output, expected)


@pytest.mark.parametrize("seed", range(30))
def test_random_critics_are_exact(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30, 400))
def test_many_random_critics_are_exact(seed):
    check(seed)
