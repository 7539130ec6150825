"""Random critics, penalties, losses and schedules: always what double backward gives, to 1e-10 in float64.

A critic is grown layer by layer: a layer that does not fit what came before is left out, so that every setting of
every operator may be drawn. None of these critics may fall back: the engine raises where it cannot capture. What it
is known to refuse is listed in ``REFUSED``.
"""

import copy
import random
import re

import pytest
import torch
import torch.nn.functional as F
from exact_critics import Custom, assert_exact, batches_of, perturbed, truth, wasserstein
from four_passes import FourPassEngine
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from wgan_fast.four_pass import CaptureError, Objective

MOST_VALUES = 400
"""Values of a sample in any layer; what grows beyond is left out."""

ACTIVATIONS = [
    nn.ReLU, lambda: nn.ReLU(True), lambda: nn.LeakyReLU(0.2), lambda: nn.LeakyReLU(0.1, True), nn.Tanh, nn.SiLU,
    lambda: nn.SiLU(True), nn.ELU, lambda: nn.ELU(0.7, True), nn.CELU, nn.SELU, lambda: nn.SELU(True), nn.GELU,
    lambda: nn.GELU("tanh"), nn.Softplus, lambda: nn.Softplus(2.0, 1.0), nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh,
    lambda: nn.Hardtanh(-0.3, 0.4, True), nn.ReLU6, nn.PReLU, nn.Mish, lambda: nn.Mish(True), nn.Hardswish,
    nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softsign, lambda: nn.Threshold(0.1, -0.2),
    lambda: nn.GLU(1), lambda: nn.Softmax(1), lambda: nn.LogSoftmax(1),
    lambda: Custom(lambda s, x: torch.sin(x) + x.abs()), lambda: Custom(lambda s, x: torch.exp(-x * x)),
    lambda: Custom(lambda s, x: torch.sqrt(x * x + 1.0)), lambda: Custom(lambda s, x: x.clamp(-0.4, 0.6)),
]  # fmt: skip
LOSSES = [
    None,
    wasserstein,
    lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
    lambda real, fake: 0.5 * ((real - 1).square().mean() + fake.square().mean()),
    lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
]
CONV = [None, nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
BATCH_NORM = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]
INSTANCE_NORM = [None, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d]
DROPOUT = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d]
POOLS = [
    (),
    (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
]
PADS = [
    (),
    (nn.ReflectionPad1d, nn.ReplicationPad1d, nn.ZeroPad1d, nn.CircularPad1d),
    (nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d, nn.CircularPad2d),
    (nn.ReflectionPad3d, nn.ReplicationPad3d, nn.ZeroPad3d, nn.CircularPad3d),
]
SIZES = [(), (9,), (7, 6), (4, 3, 5)]


class Combined(nn.Module):
    """A body beside its input: a residual, a gate, or a dense connection."""

    def __init__(self, body, mode):
        super().__init__()
        self.body, self.mode = body, mode

    def forward(self, x):
        y = self.body(x)
        return torch.cat([x, y], 1) if self.mode == "cat" else x * y if self.mode == "mul" else x + y


class SelfAttention(nn.Module):
    """Attention over the positions of ``[N, C, *]`` from matrix products and a softmax, with a learned gate."""

    def __init__(self, channels, fused):
        super().__init__()
        self.qkv, self.gate, self.fused = nn.Linear(channels, 3 * channels), nn.Parameter(torch.tensor(0.6)), fused

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v
        return x + self.gate * y.transpose(1, 2).reshape(x.shape)


HEADS = {
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.contiguous().view(x.size(0), -1),
    "view as": lambda x: x.contiguous().view_as(x).reshape(len(x), -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "permute": lambda x: x.permute(0, *range(2, x.dim()), 1).reshape(x.shape[0], -1),
    "mean": lambda x: x.flatten(2).mean(2) if x.dim() > 2 else x,
    "sum": lambda x: x.flatten(2).sum(-1) if x.dim() > 2 else x,
    "largest": lambda x: x.flatten(2).amax(2) if x.dim() > 2 else x,
    "statistics": lambda x: torch.cat([x.flatten(1), (x.flatten(1).square().mean(1, keepdim=True) + 0.1).sqrt()], 1),
}
CONDITIONS = ["none", "none", "none", "none", "projection", "concatenated", "modulated", "vector"]


class Critic(nn.Module):
    """Layers, a head that flattens, and a score; perhaps of packed samples, perhaps given a condition."""

    def __init__(self, layers, head, score, group_size, condition, embedding):
        super().__init__()
        self.layers, self.score, self.embedding = nn.Sequential(*layers), score, embedding
        self.head, self.group_size, self.condition = head, group_size, condition

    def forward(self, x, condition=None):
        if self.group_size > 1:
            x = x.reshape(x.shape[0] // self.group_size, -1, *x.shape[2:])
        x = HEADS[self.head](self.layers(x))
        if self.condition == "none":
            return self.score(x)
        given = self.embedding(condition)
        if self.condition == "projection":
            return self.score(x) + (x * given).sum(1, keepdim=True)
        if self.condition == "modulated":
            return self.score(x * given).squeeze(1)
        return self.score(torch.cat([x, given], 1)).squeeze(1)


class Grower:
    """Draws layers that fit."""

    def __init__(self, draw):
        self.draw, self.layers, self.random = draw, [], False
        self.dims = draw.choice([0, 0, 1, 2, 2, 2, 3])
        self.sample = (draw.randint(1, 3) if self.dims else draw.randint(2, 9), *SIZES[self.dims])
        self.group_size = 2 if draw.random() < 0.1 else 1
        self.shape = (self.sample[0] * self.group_size, *self.sample[1:])

    def chance(self, probability):
        return self.draw.random() < probability

    def add(self, make):
        """Append ``make()`` if it fits."""
        try:
            layer = make()
            with torch.no_grad():
                out = layer(torch.randn(3, *self.shape))
        except (RuntimeError, ValueError, TypeError):
            return
        if 0 < out[0].numel() <= MOST_VALUES and out.dim() == len(self.shape) + 1:
            self.layers.append(layer)
            self.shape = tuple(out.shape[1:])

    def each(self, *choices):
        """One setting for every spatial dimension, or one for all."""
        if self.chance(0.6):
            return self.draw.choice(choices)
        return tuple(self.draw.choice(choices) for _ in range(self.dims))

    def learned(self):
        """A linear layer or convolution from ``shape``."""
        draw, channels = self.draw, self.shape[0]
        bias = self.chance(0.8)
        if self.dims == 0:
            layer = nn.Linear(channels, draw.randint(1, 9), bias)
        else:
            groups = draw.choice([g for g in (1, 1, 2, 3) if channels % g == 0])
            out, kernel, dilation = groups * draw.randint(1, 3), self.each(1, 2, 3, 4), self.each(1, 1, 1, 2)
            if self.chance(0.25):
                layer = TRANSPOSED[self.dims](
                    channels, out, kernel, self.each(1, 2), self.each(0, 1), self.each(0, 0, 1), groups, bias, dilation
                )
            else:
                same = self.chance(0.2)
                stride, padding = (1, "same") if same else (self.each(1, 2, 3), self.each(0, 1, 2))
                mode = draw.choice(["zeros"] * 4 + ["reflect", "replicate", "circular"])
                layer = CONV[self.dims](channels, out, kernel, stride, padding, dilation, groups, bias, mode)
        if self.chance(0.12):
            layer = parametrizations.spectral_norm(layer)
        elif self.chance(0.1):
            layer = parametrizations.weight_norm(layer)
        return layer

    def norm(self):
        draw, channels = self.draw, self.shape[0]
        affine = self.chance(0.6)
        groups = draw.choice([g for g in (1, 2, 3, channels) if channels % g == 0])
        group = nn.GroupNorm(groups, channels, affine=affine)
        batch = BATCH_NORM[self.dims](channels, affine=affine, track_running_stats=self.chance(0.8))
        layer = nn.LayerNorm(self.shape[draw.randint(0, self.dims) :], elementwise_affine=affine)
        kinds = [group, batch, layer, nn.RMSNorm(self.shape[-1], elementwise_affine=affine)]
        if self.dims:
            kinds.append(INSTANCE_NORM[self.dims](channels, affine=affine))
        if self.dims == 2:
            kinds.append(nn.LocalResponseNorm(2))
        return draw.choice(kinds)

    def body(self):
        """Layers that keep the shape."""
        channels = self.shape[0]
        activation = self.draw.choice(ACTIVATIONS)()
        conv = nn.Linear(channels, channels) if self.dims == 0 else CONV[self.dims](channels, channels, 3, 1, "same")
        return nn.Sequential(*self.draw.choice([[conv, activation], [activation, conv], [conv]]))

    def resampled(self):
        draw = self.draw
        if self.dims == 0:
            return nn.Identity()
        largest, average, adaptive_average, adaptive_largest = POOLS[self.dims]
        made = [
            lambda: largest(self.each(2, 3), self.each(1, 2), draw.choice([0, 1]), ceil_mode=self.chance(0.3)),
            lambda: average(self.each(2, 3), self.each(1, 2), draw.choice([0, 1]), self.chance(0.3), self.chance(0.5)),
            lambda: adaptive_average(self.each(1, 2, 3)),
            lambda: adaptive_largest(self.each(1, 2, 3)),
            lambda: nn.Upsample(scale_factor=2),
            lambda: nn.Upsample(size=tuple(side + 2 for side in self.shape[1:])),
            lambda: nn.Upsample(scale_factor=1.5, mode=["linear", "bilinear", "trilinear"][self.dims - 1]),
            lambda: draw.choice(PADS[self.dims])(draw.choice([1, 2])),
            lambda: Custom(lambda s, x: F.pad(x, (1, 0), value=0.3)),
            lambda: Custom(lambda s, x: x.flip(-1).roll(1, -1)),
            lambda: Custom(lambda s, x: x[..., 1:]),
            lambda: Custom(lambda s, x: x.cumsum(-1) / x.shape[-1]),
        ]
        if self.dims == 2:
            made += [
                lambda: nn.PixelShuffle(2),
                lambda: nn.PixelUnshuffle(2),
                lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
                lambda: nn.ChannelShuffle(2),
            ]
        return draw.choice(made)()

    def dropout(self):
        kinds = [nn.Dropout(0.4), nn.AlphaDropout(0.3), DROPOUT[self.dims](0.4)]
        return self.draw.choice(kinds)

    def grow(self):
        draw = self.draw
        has_dropout = self.chance(0.12)
        for _ in range(draw.randint(0, 4)):
            self.add(self.learned)
            if self.chance(0.4):
                self.add(self.norm)
            for _ in range(draw.choice([1, 1, 1, 2])):
                self.add(lambda: draw.choice(ACTIVATIONS)())
            if has_dropout and self.chance(0.6):
                self.add(self.dropout)
            if self.chance(0.3):
                self.add(self.resampled)
            if self.chance(0.35):
                self.add(lambda: Combined(self.body(), draw.choice(["add", "cat", "mul"])))
            # Where an activation is not contiguous the mask's numbers lie elsewhere: as random, but not to be compared.
            if self.dims and not has_dropout and self.chance(0.1):
                self.add(lambda: SelfAttention(self.shape[0], self.chance(0.3)))
            if self.layers and self.chance(0.1):
                self.add(lambda: draw.choice(self.layers))  # tied: the same module once more
        return self.critic()

    def critic(self):
        draw = self.draw
        head, condition = draw.choice(list(HEADS)), draw.choice(CONDITIONS)
        if self.group_size > 1:
            condition = "none"
        with torch.no_grad():
            features = HEADS[head](torch.randn(2, *self.shape)).shape[1]
        embedding = None
        if condition != "none":
            embedding = nn.Linear(4, features) if condition == "vector" else nn.Embedding(5, features)
        joined = condition in ("concatenated", "vector")
        score = nn.Linear(2 * features if joined else features, 1)
        return Critic(self.layers, head, score, self.group_size, condition, embedding)


def random_problem(seed):
    """A critic, an objective, batches, further arguments and a schedule."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    grower = Grower(draw)
    critic = perturbed(grower.grow())
    critic.train(draw.random() < 0.7)
    for name, parameter in critic.named_parameters():
        # Spectral norm of a constant has no gradient at all; elsewhere any subset may be frozen.
        parameter.requires_grad_(draw.random() < 0.9 or name == "score.weight")
    N = grower.group_size * draw.randint(2, 5)
    channels_last = grower.dims == 2 and not draws_numbers(critic) and draw.random() < 0.3
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if channels_last and draw.random() < 0.5:
        critic = critic.to(memory_format=layout)
    batches = batches_of((N, *grower.sample), layout)
    arguments = ()
    if critic.condition != "none":
        labels = torch.randint(0, 5, (N,))
        arguments = (torch.randn(N, 4, dtype=torch.float64) if critic.condition == "vector" else labels,)
    loss, one_sided = draw.choice(LOSSES), draw.random() < 0.3
    at = draw.choice(["given", "real", "fake", "both", "given"])
    weight = None if loss and draw.random() < 0.05 else draw.uniform(0.1, 20)
    # Scales of the gradient vary with depth; a one-sided penalty far above every norm would compare nothing.
    target = draw.choice([0.0, 1e-4, 1e-2]) if one_sided else draw.choice([0.0, 1.0, 0.1])
    objective = Objective(loss, weight, target, one_sided, at, grower.group_size)
    try:
        truth(copy.deepcopy(critic), objective, batches, arguments)
    except RuntimeError as error:
        if not re.search("in-?place", str(error)):
            raise
        # Autograd too still needs what this critic overwrites, an exponential's output say.
        for module in critic.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
    return critic, objective, batches, arguments, draw.choice(["batched", "split"])


def draws_numbers(critic):
    return critic.training and any("Dropout" in type(module).__name__ for module in critic.modules())


def calls_of(plan):
    """Which batches go through the critic together, which is what a draw of random numbers depends on."""
    losses = ["real", "fake"] if plan.objective.loss else []
    points = plan.objective.points()
    if not plan.coupled:
        losses = [name for name in losses if name not in points]
    return [losses + points] if plan.schedule == "batched" else [[name] for name in losses + points]


def check(seed, strict=False):
    critic, objective, batches, arguments, schedule = random_problem(seed)
    engine = FourPassEngine(critic, objective, schedule=schedule)
    calls = calls_of(engine.plan(batches, arguments)) if draws_numbers(critic) else None
    plain = copy.deepcopy(critic)

    def double_backward(module):
        # Parametrised weights are computed once per step, as the engine does: spectral norm iterates once.
        with parametrize.cached():
            torch.manual_seed(seed)
            return truth(module, objective, batches, arguments, calls)

    torch.manual_seed(seed)
    output = engine(batches, arguments)
    assert_exact(output, double_backward, plain, strict)
    for ours, theirs in zip(critic.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


REFUSED = {
    "random slopes": lambda: nn.Sequential(nn.Linear(8, 6), nn.RReLU(), nn.Linear(6, 1)),
    "dropout between recurrent layers": lambda: Custom(
        lambda s, x: s.b(s.r(x.view(-1, 2, 4))[0][:, -1]),
        r=nn.LSTM(4, 3, num_layers=2, dropout=0.5, batch_first=True),
        b=nn.Linear(3, 1),
    ),
    "dropout of attention": lambda: Custom(
        lambda s, x: s.b(F.scaled_dot_product_attention(*[s.a(x).view(-1, 2, 4)] * 3, dropout_p=0.5).flatten(1)),
        a=nn.Linear(8, 8),
        b=nn.Linear(8, 1),
    ),
    "running statistics of instances": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(8, 1)
    ),
    "distances": lambda: Custom(
        lambda s, x: s.b(torch.cdist(s.a(x), s.a.weight)), a=nn.Linear(8, 8), b=nn.Linear(8, 1)
    ),
    "branches on data": lambda: Custom(lambda s, x: s.a(x) if x.sum() > 0 else s.a(-x), a=nn.Linear(8, 1)),
    "memory by strides": lambda: Custom(lambda s, x: s.a(s.a(x).as_strided(x.shape, x.stride())), a=nn.Linear(8, 8)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_by_name(name):
    critic = REFUSED[name]().double()
    with pytest.raises(CaptureError, match=r"aten\.\w+|torch\.compile"):
        FourPassEngine(critic, Objective(wasserstein))(batches_of((4, 8)))


@pytest.mark.parametrize("seed", range(30))
def test_random_critics_are_exact(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(400))
def test_many_random_critics_are_exact_to_rounding(seed):
    check(seed, strict=True)
