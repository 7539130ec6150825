"""Critics of every kind, objectives, and how exact four passes must be on them."""

import copy

import torch
import torch.nn.functional as F
from rounding import deviations
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wgan_fast.backends import switched_off
from wgan_fast.four_pass import Objective

L, C = nn.Linear, nn.Conv2d
VECTORS, IMAGES = (6, 30), (4, 3, 8, 8)


class Custom(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def convolutional(*middle, features=6 * 8 * 8):
    return nn.Sequential(C(3, 6, 3, 1, 1), *middle, nn.Flatten(), L(features, 1))


def minibatch_stddev(self, x):
    x = self.a(x)
    group = min(4, x.shape[0])
    y = x.reshape(group, -1, *x.shape[1:])
    y = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean([1, 2, 3]).reshape(-1, 1, 1, 1)
    return self.b(torch.tanh(torch.cat([x, y.repeat(group, 1, *x.shape[2:])], 1).flatten(1)))


def attention(self, x):
    x = x.view(x.shape[0], 5, 6)
    weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 6**0.5, -1)
    return self.o(x + weights @ self.v(x)).mean(1)


def fused_attention(self, x):
    heads = [layer(x.view(-1, 5, 6)).view(-1, 5, 2, 3).transpose(1, 2) for layer in (self.q, self.k, self.v)]
    return self.o(F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(-1, 5, 6)).mean(1)


def gates(self, x):
    value, gate = self.a(x).chunk(2, 1)
    return self.b(value * torch.sigmoid(gate))


def in_place(self, x):
    h = self.a(x)
    return self.b(F.leaky_relu_(h.add_(1.0), 0.2) * h)


def tied():
    first, second = L(30, 30), L(30, 30)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.LeakyReLU(), L(30, 1))


def frozen():
    critic = nn.Sequential(L(30, 30), nn.Tanh(), L(30, 30), nn.SiLU(), L(30, 1))
    critic[0].weight.requires_grad_(False)
    critic[2].bias.requires_grad_(False)
    return critic


def three_heads():
    return {name: L(6, 6) for name in "qkv"} | {"o": L(6, 1)}


spectral, weight_norm = nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm


def along_a_line(s, x):
    h = s.a(x.view(-1, 3, 10))
    h = h + 0.3 * s.c(torch.relu(s.n(s.b(torch.relu(h)))))
    h = h + s.d(torch.tanh(h)).flip(2)
    return s.l(torch.cat([s.e(h)[:, :5], h.view(-1, 8, 10)[:, 2:6]], 1).transpose(1, 2).reshape(-1, 90))


CRITICS = {
    "linear": (lambda: L(30, 1), VECTORS),
    "relu": (lambda: nn.Sequential(L(30, 17), nn.ReLU(True), L(17, 9), nn.ReLU(), L(9, 1)), VECTORS),
    "silu": (lambda: nn.Sequential(L(30, 16), nn.SiLU(), L(16, 16), nn.SiLU(), L(16, 1)), VECTORS),
    "activations": (
        lambda: nn.Sequential(L(30, 16), nn.Hardtanh(), L(16, 16), nn.ELU(), L(16, 8), nn.ReLU6(), L(8, 8), nn.Mish(),
                              L(8, 8), nn.Hardswish(), L(8, 8), nn.GELU(), L(8, 8), nn.Softplus(), L(8, 1)),
        VECTORS,
    ),
    "softmax": (lambda: nn.Sequential(L(30, 16), nn.Softmax(-1), L(16, 1)), VECTORS),
    "glu": (lambda: nn.Sequential(L(30, 16), nn.GLU(), L(8, 1)), VECTORS),
    "abs and exp": (lambda: Custom(lambda s, x: s.b(s.a(x).abs() + s.a(x).exp() / 9), a=L(30, 5), b=L(5, 1)), VECTORS),
    "layer norm": (
        lambda: nn.Sequential(L(30, 16), nn.LayerNorm(16), nn.ReLU(), L(16, 9), nn.LayerNorm(9), nn.Tanh(), L(9, 1)),
        VECTORS,
    ),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(30), L(30, 1)), VECTORS),
    "group norm": (
        lambda: convolutional(nn.GroupNorm(2, 6), nn.ReLU(), C(6, 6, 3, 1, 1), nn.GroupNorm(3, 6), nn.SiLU()), IMAGES
    ),
    "channels last": (
        lambda: convolutional(nn.GroupNorm(2, 6), nn.ReLU(), C(6, 6, 3, 2, 1), features=96).to(
            memory_format=torch.channels_last
        ),
        IMAGES,
    ),
    "instance norm": (
        lambda: convolutional(nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.InstanceNorm2d(6)), IMAGES
    ),
    "batch norm": (lambda: convolutional(nn.BatchNorm2d(6), nn.Tanh(), C(6, 6, 1), nn.BatchNorm2d(6)), IMAGES),
    "batch norm, evaluation": (lambda: convolutional(nn.BatchNorm2d(6), nn.Tanh()).eval(), IMAGES),
    "max pooling": (lambda: convolutional(nn.Tanh(), nn.MaxPool2d(2), features=96), IMAGES),
    "max pooling 1d": (
        lambda: nn.Sequential(L(30, 30), nn.Tanh(), nn.Unflatten(1, (3, 10)), nn.MaxPool1d(3, 2), nn.Flatten(),
                              L(12, 1)),
        VECTORS,
    ),
    "average pooling": (lambda: convolutional(nn.Softplus(), nn.AvgPool2d(2), features=96), IMAGES),
    "adaptive pooling": (
        lambda: convolutional(nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(1), features=6), IMAGES
    ),
    "upsampling": (
        lambda: convolutional(nn.Sigmoid(), nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2), features=24 * 64), IMAGES
    ),
    "bilinear upsampling": (
        lambda: convolutional(nn.Tanh(), nn.Upsample(scale_factor=2, mode="bilinear"), C(6, 6, 3, 2, 1)), IMAGES
    ),
    "prelu": (lambda: convolutional(nn.PReLU(), C(6, 6, 3, 1, 1), nn.PReLU(6)), IMAGES),
    "grouped and padded": (
        lambda: convolutional(nn.ReLU(), C(6, 6, 3, 2, 1, groups=3), nn.ReLU(), C(6, 6, 3, padding="same"),
                              C(6, 6, 3, padding=1, padding_mode="reflect"), nn.Tanh(), features=96),
        IMAGES,
    ),
    "1d": (
        lambda: nn.Sequential(nn.Unflatten(1, (3, 10)), nn.Conv1d(3, 4, 3, 2, 2, 2), nn.ReLU(),
                              nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), nn.ELU(), nn.Flatten(), L(60, 1)),
        VECTORS,
    ),
    "1d, many channels": (
        lambda: Custom(along_a_line, a=nn.Conv1d(3, 8, 3, 1, 1), b=nn.Conv1d(8, 16, 5, 2, 2), n=nn.InstanceNorm1d(16),
                       c=nn.ConvTranspose1d(16, 8, 3, 2, 1, 1), d=nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2),
                       e=nn.Conv1d(8, 9, 1), l=L(90, 1)),
        VECTORS,
    ),
    "1d, many channels and one place": (
        lambda: nn.Sequential(nn.Unflatten(1, (30, 1)), nn.Conv1d(30, 9, 1), nn.LeakyReLU(), nn.Conv1d(9, 8, 3, 1, 1),
                              nn.Softplus(), nn.Flatten(), L(8, 1)),
        VECTORS,
    ),
    "3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3, 2, 1), nn.LeakyReLU(), nn.ConvTranspose3d(4, 2, 3, 2, 1, 1), nn.Tanh(),
                              nn.Flatten(), L(128, 1)),
        (3, 2, 4, 4, 4),
    ),
    "attention": (lambda: Custom(attention, **three_heads()), VECTORS),
    "fused attention": (lambda: Custom(fused_attention, **three_heads()), VECTORS),
    "multi-head attention": (
        lambda: Custom(lambda s, x: s.b(s.m(*[x.view(-1, 5, 6)] * 3, need_weights=False)[0].mean(1)),
                       m=nn.MultiheadAttention(6, 2, batch_first=True), b=L(6, 1)),
        VECTORS,
    ),
    "dense connections": (
        lambda: Custom(lambda s, x: s.b(torch.cat([x, torch.tanh(s.a(x)), x * s.a(x)], 1)), a=L(30, 30), b=L(90, 1)),
        VECTORS,
    ),
    "gates": (lambda: Custom(gates, a=L(30, 16), b=L(8, 1)), VECTORS),
    "unbind and stack": (
        lambda: Custom(lambda s, x: s.b(torch.stack(s.a(x).view(-1, 4, 4).unbind(1)[1:3], 1).flatten(1).relu()),
                       a=L(30, 16), b=L(8, 1)),
        VECTORS,
    ),
    "sequence first": (
        lambda: Custom(lambda s, x: s.b(torch.tanh(s.a(x.view(-1, 5, 6).transpose(0, 1)))).mean(0),
                       a=L(6, 6), b=L(6, 1)),
        VECTORS,
    ),
    "einsum": (
        lambda: Custom(lambda s, x: torch.einsum("bi,ij,bj->b", s.a(x), s.w, s.a(x)), a=L(30, 5),
                       w=nn.Parameter(torch.randn(5, 5))),
        VECTORS,
    ),
    "bilinear": (lambda: Custom(lambda s, x: s.m(x[:, :10], x[:, 10:20]), m=nn.Bilinear(10, 10, 1)), VECTORS),
    "values beside integers": (
        lambda: Custom(lambda s, x: s.b((h := torch.tanh(s.a(x))).topk(3, 1)[0] * h.max(1, keepdim=True)[0]),
                       a=L(30, 9), b=L(3, 1)),
        VECTORS,
    ),
    "written numbers": (
        lambda: Custom(lambda s, x: s.b(s.a(x)[:, [2, 0, 1]].tanh() * torch.tensor([0.5, 2.0, 3.0])), a=L(30, 3),
                       b=L(3, 1)),
        VECTORS,
    ),
    "view as itself": (
        lambda: Custom(lambda s, x: s.b((h := s.a(x).tanh()).view_as(h) + h.flatten().view_as(h)), a=L(30, 3),
                       b=L(3, 1)),
        VECTORS,
    ),
    "strides that stand-ins misstate": (
        lambda: nn.Sequential(C(3, 6, 3, 1, 1), nn.LogSigmoid(), Custom(lambda s, x: x.permute(0, 2, 3, 1)), L(6, 2),
                              nn.Flatten(), L(128, 1)).to(memory_format=torch.channels_last),
        IMAGES,
    ),
    "maxima": (lambda: Custom(lambda s, x: s.b(torch.maximum(s.a(x), x)).amax(1), a=L(30, 30), b=L(30, 3)), VECTORS),
    "recurrent": (
        lambda: Custom(lambda s, x: s.b(s.r(x.view(-1, 5, 6))[0][:, -1]), r=nn.LSTM(6, 4, batch_first=True), b=L(4, 1)),
        VECTORS,
    ),
    "in place": (lambda: Custom(in_place, a=L(30, 8), b=L(8, 1)), VECTORS),
    "scalar parameter": (
        lambda: Custom(lambda s, x: s.b(x + s.g * torch.tanh(s.a(x))) * s.g, a=L(30, 30), b=L(30, 1),
                       g=nn.Parameter(torch.tensor(0.7))),
        VECTORS,
    ),
    "spectral norm": (lambda: nn.Sequential(spectral(L(30, 8)), nn.LeakyReLU(), spectral(L(8, 1))).eval(), VECTORS),
    "weight norm": (lambda: nn.Sequential(weight_norm(L(30, 8)), nn.Tanh(), weight_norm(L(8, 1))), VECTORS),
    "tied weights": (tied, VECTORS),
    "frozen parameters": (frozen, VECTORS),
    "minibatch stddev": (lambda: Custom(minibatch_stddev, a=C(3, 4, 3), b=L(180, 1)), IMAGES),
}  # fmt: skip
CHANNELS_LAST = {"channels last", "strides that stand-ins misstate"}
COUPLED = {"batch norm", "minibatch stddev"}
UNPROVEN = {"recurrent", "bilinear"}


def wasserstein(real, fake):
    return fake.mean() - real.mean()


def cross_entropy(real, fake):
    return F.softplus(-real).mean() + F.softplus(fake).mean()


OBJECTIVES = {
    "wgan-gp": Objective(wasserstein),
    "one-sided at both": Objective(cross_entropy, target=0.01, one_sided=True, at="both"),
    "r1": Objective(cross_entropy, weight=5.0, target=0.0, at="real"),
    "penalty alone": Objective(None, at="given"),
    "loss alone": Objective(cross_entropy, weight=None),
}


def truth(critic, objective, batches, arguments=(), calls=None):
    """Plain double backward.

    ``calls`` lists the batches that go through the critic together, call by call. None means real, fake and the points,
    each by itself, in this order; only random numbers make a difference.
    """
    points = objective.points()
    losses = ["real", "fake"] if objective.loss else []
    scores, penalised = {}, {}
    for names in calls or [[name] for name in losses + points]:
        inputs = [batches[name].clone().requires_grad_() for name in names]
        given = [torch.cat([argument] * len(names)) for argument in arguments]
        # What can be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH), switched_off(torch.backends.cudnn):
            parts = critic(torch.cat(inputs) if len(inputs) > 1 else inputs[0], *given).chunk(len(names))
        scores = dict(zip(names, parts)) | scores
        penalised |= {name: pair for name, *pair in zip(names, inputs, parts) if name in points}
    total = torch.zeros((), dtype=torch.float64)
    if losses:
        total = total + objective.loss(scores["real"], scores["fake"])
    for x, score in penalised.values():
        (g,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        excess = g.reshape(len(x) // objective.group_size, -1).norm(dim=1) - objective.target
        total = total + objective.weight * (excess.clamp(min=0) if objective.one_sided else excess).square().mean()
    parameters = [p for p in critic.parameters() if p.requires_grad]
    return total.detach(), torch.autograd.grad(total, parameters, allow_unused=True)


def batches_of(shape, memory_format=torch.contiguous_format):
    real, fake = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    if len(shape) == 4:
        real, fake = real.to(memory_format=memory_format), fake.to(memory_format=memory_format)
    alpha = torch.rand(shape[0], dtype=torch.float64)
    points = torch.lerp(fake, real, alpha.view(-1, *[1] * (len(shape) - 1)))
    return {"real": real, "fake": fake, "points": points}


def assert_exact(output, double_backward, critic, strict=False):
    """The value and every gradient of ``double_backward(critic)``, to 1e-10 of its norm or to what rounding does to it.

    A gradient that is 0, or small because its summands cancel, has no relative accuracy in any implementation: that of
    a bias before a normalisation is pure rounding. Its scale is that of its summands: ``rounding.deviations`` says
    how far it moves per unit of relative error in every number that double backward rounds, so that 2⁻⁵³ of that is
    the error of an implementation that rounds each result correctly. Within an operator sums are rounded too: at most
    about 1,000 summands here, whose roundings add up like a random walk to √1000 = 32 times as much, in ours and in
    theirs, 64 in all. ``strict`` asks for this bound alone, which mostly is the narrower one by far.
    """
    before = copy.deepcopy(critic)

    def results(module):
        value, gradients = double_backward(module)
        return [value, *[torch.zeros(()) if g is None else g for g in gradients]]

    theirs = results(critic)
    ours = [output.loss, *output.gradients]
    ours = [torch.zeros_like(t) if o is None else o for o, t in zip(ours, theirs, strict=True)]
    errors, norms = [(o - t).norm().item() for o, t in zip(ours, theirs)], [t.norm().item() for t in theirs]
    bounds = [1e-10 * norm for norm in norms]
    if strict or not all(error <= bound for error, bound in zip(errors, bounds)):
        # The result's own last rounding counts besides.
        rounding = [64 * 2.0**-53 * (deviation + norm) for deviation, norm in zip(deviations(results, before), norms)]
        bounds = rounding if strict else list(map(max, bounds, rounding))
    for name, error, norm, bound in zip(["the value", *map(str, range(len(norms)))], errors, norms, bounds):
        assert error <= bound, f"{name}: error {error} of {norm}, bound {bound}"


def perturbed(critic):
    """In float64, with weights of normalisations and biases off their special initial values."""
    critic = critic.double()
    with torch.no_grad():
        for parameter in critic.parameters():
            if parameter.dim() == 1 and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return critic
