"""Critics with an ``autograd.Function`` in them: four passes follow its backward as double backward does."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from side_by_side import ALPHA, FAKE, REAL, USES, Critic, SideBySide, linear
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from wgan_fast import explain, gradient_penalty
from wgan_fast.four_pass import CaptureError

Context = Any


class SquaredReLU(Function):
    """Smooth; saves its input."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu().square()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradient * x.relu()


class Exponential(Function):
    """Saves its output."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * y


class TransposedSigmoid(Function):
    """Saves its output, and looks at an attribute of that which is a tensor."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        y = x.sigmoid()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return (gradient.T * y.T * (1 - y.T)).T


class OfSetup(Function):
    """In the newer form, with a context apart."""

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return scale * x.sin()

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.scale = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0].cos() * ctx.scale, None


class KeptInput(Function):
    """Keeps its input without saving it: to autograd that is the input all the same."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.x = x
        return x.sin()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return gradient * ctx.x.cos()


class SavedIntermediate(Function):
    """Saves what it computed in between, through which no second derivative passes."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        half = (x / 2).exp()
        ctx.save_for_backward(half)
        ctx.sine = x.sin()
        return half.square() - ctx.sine

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        (half,) = ctx.saved_tensors
        return gradient * half.square() - gradient * (1 - ctx.sine.square()).sqrt()


class StraightThrough(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return gradient


class Reversal(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


class TutorialReLU(Function):
    """Writes to a copy of what it is given."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient = gradient.clone()
        gradient[x < 0] = 0
        return gradient


class Affine(Function):
    """A layer that computes only the gradients that are asked for."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (
            gradient @ weight if ctx.needs_input_grad[0] else None,
            gradient.T @ x if ctx.needs_input_grad[1] else None,
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )


class Several(Function):
    """Several inputs, a number among them, several outputs, one without a gradient, and one that is no tensor."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, power: int, frozen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, str]:
        ctx.save_for_backward(x, weight, frozen)
        ctx.power = power
        sign = (x > 0).to(x.dtype)
        ctx.mark_non_differentiable(sign)
        return x * weight, sign, frozen * x.pow(power), "and a word"

    @staticmethod
    def backward(ctx: Context, first: Tensor, sign: Tensor, third: Tensor, word: None) -> tuple[Tensor | None, ...]:
        x, weight, frozen = ctx.saved_tensors
        slope = frozen * ctx.power * x.pow(ctx.power - 1)
        return first * weight + third * slope, (first * x).sum(0), None, None


class BlockedBackward(Function):
    """Passes no gradient on."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> None:
        return None


class UntruthBackward(Function):
    @staticmethod
    def forward(ctx: Context, gradient: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, x)
        return gradient * x.cos()

    @staticmethod
    def backward(ctx: Context, tangent: Tensor) -> tuple[Tensor, Tensor]:
        gradient, x = ctx.saved_tensors
        return 3 * tangent * x, tangent * gradient * x.square()


class Untruth(Function):
    """Neither derivative of its backward is what the operators in there say."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return UntruthBackward.apply(gradient, *ctx.saved_tensors)


class Unlinked(Function):
    """Part of its backward is not to be differentiated."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with torch.enable_grad():
            return x.detach().sin().detach()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            slope = x.cos()
        return gradient * slope + gradient.detach() * x


class FusedLeakyReLUBackward(Function):
    @staticmethod
    def forward(ctx: Context, gradient: Tensor, out: Tensor, slope: float, scale: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(out)
        ctx.slope, ctx.scale = slope, scale
        of_x = torch.where(out > 0, gradient, gradient * slope) * scale
        return of_x, of_x.sum([0, *range(2, of_x.dim())])

    @staticmethod
    def backward(ctx: Context, of_x: Tensor, of_bias: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        tangent = of_x + of_bias.view(1, -1, *[1] * (of_x.dim() - 2))
        return torch.where(out > 0, tangent, tangent * ctx.slope) * ctx.scale, None, None, None


class FusedLeakyReLU(Function):
    """Bias, slope and scale in one, as StyleGAN2 has it."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, bias: Tensor, slope: float, scale: float) -> Tensor:
        out = F.leaky_relu(x + bias.view(1, -1, *[1] * (x.dim() - 2)), slope) * scale
        ctx.save_for_backward(out)
        ctx.slope, ctx.scale = slope, scale
        return out

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        return (*FusedLeakyReLUBackward.apply(gradient, out, ctx.slope, ctx.scale), None, None)


def filtered(x: Tensor, kernel: Tensor, up: int, down: int, pad: tuple[int, int]) -> Tensor:
    """Put zeros between pixels and around them, filter, and leave pixels out."""
    n, c, h, w = x.shape
    x = F.pad(x.view(n * c, h, 1, w, 1), [0, up - 1, 0, 0, 0, up - 1]).reshape(n * c, 1, h * up, w * up)
    x = F.conv2d(F.pad(x, [*pad, *pad]), kernel.flip([0, 1])[None, None])
    return x.reshape(n, c, *x.shape[2:])[:, :, ::down, ::down]


class UpFirDnBackward(Function):
    @staticmethod
    def forward(
        ctx: Context, gradient: Tensor, kernel: Tensor, up: int, down: int, pad: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.settings = up, down, pad
        length = kernel.shape[0]
        first = length - pad[0] - 1
        behind = size[0] * up - gradient.shape[2] * down + pad[0] - up + 1
        return filtered(gradient, kernel.flip([0, 1]), down, up, (first, behind))

    @staticmethod
    def backward(ctx: Context, tangent: Tensor) -> tuple[Tensor | None, ...]:
        (kernel,) = ctx.saved_tensors
        return UpFirDn.apply(tangent, kernel, *ctx.settings), None, None, None, None, None


class UpFirDn(Function):
    """StyleGAN's resampling: its backward is another function, whose backward is this one."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, kernel: Tensor, up: int, down: int, pad: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.settings, ctx.size = (up, down, pad), (x.shape[2], x.shape[3])
        return filtered(x, kernel, up, down, pad)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (kernel,) = ctx.saved_tensors
        return UpFirDnBackward.apply(gradient, kernel, *ctx.settings, ctx.size), None, None, None, None


def several(critic: Any, h: Tensor) -> Tensor:
    first, sign, third, word = Several.apply(h, critic.weight, 3, critic.frozen)
    return first * third if word else first + sign


def weighted(middle: Callable[..., Tensor]) -> Critic:
    critic = Critic(middle)
    torch.manual_seed(3)
    critic.weight = nn.Parameter(torch.randn(6).double())
    critic.matrix = nn.Parameter(torch.randn(6, 6).double())
    critic.register_buffer("frozen", torch.randn(6).double())
    return critic


class StyleGAN2(nn.Module):
    """Layers of StyleGAN2's discriminator on images of 3 × 8 × 8 pixels, wide enough to be laid out anew."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 9, 3, bias=False)
        self.biases = nn.ParameterList([torch.randn(8), torch.randn(9)])
        self.skip, self.last = nn.Conv2d(8, 9, 1, bias=False), nn.Linear(9 * 9, 1)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", torch.outer(taps, taps) / 64)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = FusedLeakyReLU.apply(self.first(x), self.biases[0], 0.2, 2**0.5)
        skip = self.skip(UpFirDn.apply(h, self.blur, 1, 2, (1, 1)))[:, :, :3, :3]
        h = UpFirDn.apply(self.second(h), self.blur, 1, 2, (2, 1))
        h = FusedLeakyReLU.apply(h, self.biases[1], 0.2, 2**0.5)
        h = UpFirDn.apply(h + skip, self.blur * 4, 2, 1, (2, 1))
        return self.last(h[:, :, ::2, ::2].flatten(1))


RUN: dict[str, Callable[[], nn.Module]] = {
    "saved input": lambda: Critic(lambda critic, h: SquaredReLU.apply(h)),
    "saved output": lambda: Critic(lambda critic, h: Exponential.apply(h)),
    "attribute of a saved output": lambda: Critic(lambda critic, h: TransposedSigmoid.apply(h)),
    "context set up apart": lambda: Critic(lambda critic, h: OfSetup.apply(h, 0.7)),
    "kept input": lambda: Critic(lambda critic, h: KeptInput.apply(h)),
    "saved intermediate": lambda: Critic(lambda critic, h: SavedIntermediate.apply(h)),
    "straight through": lambda: Critic(lambda critic, h: StraightThrough.apply(3 * h) * h),
    "reversal": lambda: Critic(lambda critic, h: Reversal.apply(h.sin(), 0.3)),
    "writes to a copy": lambda: Critic(lambda critic, h: TutorialReLU.apply(h)),
    "layer": lambda: weighted(lambda critic, h: Affine.apply(h, critic.matrix, critic.weight)),
    "frozen layer": lambda: weighted(lambda critic, h: Affine.apply(h, critic.matrix.detach(), critic.weight)),
    "several": lambda: weighted(several),
    "blocked": lambda: Critic(lambda critic, h: h * BlockedBackward.apply(h)),
    "untruth": lambda: Critic(lambda critic, h: Untruth.apply(h)),
    "unlinked": lambda: Critic(lambda critic, h: Unlinked.apply(h)),
    "one after the other": lambda: Critic(lambda critic, h: SquaredReLU.apply(Untruth.apply(Exponential.apply(h)))),
    "of the weight alone": lambda: weighted(lambda critic, h: h @ Exponential.apply(critic.matrix)),
    "of the samples": lambda: Around(lambda x: Exponential.apply(x)),
    "of the samples, asking": lambda: Around(lambda x: Affine.apply(x, torch.eye(5).double(), torch.ones(5).double())),
    "last": lambda: Around(lambda x: x, lambda scores: Exponential.apply(scores)),
}


class Around(nn.Module):
    """A critic with a function of the samples themselves, or of the scores."""

    def __init__(self, before: Callable[[Tensor], Tensor], behind: Callable[[Tensor], Tensor] = lambda s: s) -> None:
        super().__init__()
        self.first, self.last = linear(1), linear(2, 1)
        self.before, self.behind = before, behind

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.before(x), x[:, :1]], 1)
        return self.behind(self.last(self.first(h).tanh()))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", RUN)
def test_a_function_runs_in_four_passes(name: str, use: str) -> None:
    critic = RUN[name]()
    pair = SideBySide(use, critic, engine="four_pass")
    for _ in range(2):
        pair.check()
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.mul_(1.1)
    SideBySide(use, RUN[name](), at="both", engine="four_pass").check()


def images(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(4, 3, 8, 8).double()


@pytest.mark.parametrize("engine", ["four_pass", "auto"])
@pytest.mark.parametrize("use", USES)
def test_the_operators_of_stylegan2(use: str, engine: str) -> None:
    pair = SideBySide(use, StyleGAN2(), loss="non_saturating", engine=engine)
    for seed in range(2):
        pair.check(images(seed), images(seed + 7), torch.rand(4, 1, 1, 1).double())


def test_no_second_derivative_is_computed_where_autograd_would_have_zeros() -> None:
    report = explain(StyleGAN2(), images(0))
    assert (report.engine, report.curved) == ("four_pass", ())
    assert report.units < report.autograd_units - 1


@pytest.mark.parametrize(("up", "down", "pad"), [(1, 2, (1, 1)), (2, 1, (2, 1)), (1, 1, (2, 1))])
def test_resampling_is_what_its_backward_says(up: int, down: int, pad: tuple[int, int]) -> None:
    x, kernel = images(0)[:1, :1].requires_grad_(), torch.rand(4, 4).double()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: UpFirDn.apply(x, kernel, up, down, pad), x, fast_mode=True)


class Clipped(Function):
    """Not linear in the gradient."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return gradient.clamp(-0.01, 0.01)


class Sparse(Function):
    """Adds the gradient of a term of its own."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return gradient + 0.1 * ctx.saved_tensors[0].sign()


class Normalized(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return gradient / (gradient.norm() + 1)


class RoundedBackward(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return gradient + (gradient * 10).round()


class CurvedBackward(UntruthBackward):
    @staticmethod
    def backward(ctx: Context, tangent: Tensor) -> tuple[Tensor, Tensor]:
        gradient, x = ctx.saved_tensors
        return tangent * gradient, tangent * x


class Curved(Untruth):
    """Linear in the gradient, with a derivative that is said to depend on it."""

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return CurvedBackward.apply(gradient, *ctx.saved_tensors)


class Asking(Untruth):
    """Another function where it is to be differentiated."""

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x if torch.is_grad_enabled() else gradient * x.cos()


class Dirty(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Overwriting(Dirty):
    """Writes to its argument and does not say so."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return x.mul_(2).clone()


class Masked(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.mask = torch.full_like(x, 0.5).bernoulli()
        return x * ctx.mask

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return gradient * ctx.mask


HELD = torch.tensor([0.5, -1.0, 2.0, 1.5, 0.3, -0.7], dtype=torch.float64)
CALLS: list[int] = []
TABLE = {"slope": 2.0}


class Holding(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return x * HELD

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return gradient * HELD


class Counting(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        CALLS.append(1)
        return 2 * x

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return 2 * gradient


class TabledBackward(UntruthBackward):
    @staticmethod
    def backward(ctx: Context, tangent: Tensor) -> tuple[Tensor, Tensor]:
        gradient, x = ctx.saved_tensors
        return TABLE["slope"] * tangent * x, tangent * gradient


class Tabled(Untruth):
    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return TabledBackward.apply(gradient, *ctx.saved_tensors)


class Inner(Function):
    """Runs autograd itself, as re-entrant checkpoints do."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = x.sin()
        return torch.autograd.grad(y, x, gradient)[0]


class Hidden(Untruth):
    """One that torch.compile is told not to look into."""


torch.compiler.allow_in_graph(Hidden)


@torch.compiler.allow_in_graph
def hidden_deeper(h: Tensor) -> Tensor:
    return 2 * Untruth.apply(h)


def in_a_checkpoint(h: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(Untruth.apply, h, use_reentrant=False)


LEFT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "clipped": (Clipped.apply, "not shown to be linear in the gradient, by aten.clamp"),
    "sparse": (Sparse.apply, "not shown to be linear in the gradient, by aten.add"),
    "normalized": (Normalized.apply, "not shown to be linear"),
    "rounded": (RoundedBackward.apply, "not shown to be linear in the gradient, by aten.round"),
    "curved": (Curved.apply, "depends on the gradient"),
    "asking": (Asking.apply, "which others are asked for"),
    "dirty": (lambda h: Dirty.apply(1 * h), "a backward of its own"),
    "overwriting": (lambda h: Overwriting.apply(1 * h), "writes to a tensor"),
    "masked": (Masked.apply, "draws random numbers"),
    "holding": (Holding.apply, "reads a tensor which it is not given"),
    "counting": (Counting.apply, "changes what is not its own"),
    "tabled": (Tabled.apply, "may change unnoticed"),
    "inner": (Inner.apply, "could not capture"),
    "hidden": (lambda h: Hidden.apply(h), "hidden by allow_in_graph"),
    "hidden deeper": (hidden_deeper, "hidden by allow_in_graph"),
    "in a checkpoint": (in_a_checkpoint, "in a checkpoint"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_function_that_four_passes_do_not_fit_is_left_to_autograd(name: str) -> None:
    middle, said = LEFT[name]
    with pytest.raises(CaptureError, match=said):
        gradient_penalty(Critic(lambda critic, h: middle(h)), REAL, FAKE, engine="four_pass")
    for use in USES:
        pair = SideBySide(use, Critic(lambda critic, h: middle(h)))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for _ in range(3):
                if name != "masked":
                    pair.check()
                else:
                    pair.ours(REAL, FAKE, ALPHA, (), None)
        (message,) = [str(warning.message) for warning in warned if "wgan_fast" in str(warning.message)]
        assert said in message


class Once(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.mark.filterwarnings("ignore:wgan_fast differentiates with autograd")
@pytest.mark.parametrize("use", USES)
def test_a_backward_that_cannot_be_differentiated_fails_as_it_does_in_autograd(use: str) -> None:
    pair = SideBySide(use, Critic(lambda critic, h: Once.apply(h)))
    for run in (pair.plain, pair.ours):
        with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
            run(REAL, FAKE, ALPHA, (), None)


SLOPE = 2.0


class SteepBackward(UntruthBackward):
    @staticmethod
    def backward(ctx: Context, tangent: Tensor) -> tuple[Tensor, Tensor]:
        gradient, x = ctx.saved_tensors
        return SLOPE * tangent * x, tangent * gradient


class Steep(Untruth):
    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return SteepBackward.apply(gradient, *ctx.saved_tensors)


def test_what_only_the_second_derivative_reads_is_noticed_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = SideBySide("step", Critic(lambda critic, h: Steep.apply(h)), engine="four_pass")
    for change in (
        lambda: None,
        lambda: monkeypatch.setitem(globals(), "SLOPE", 5.0),
        lambda: monkeypatch.setattr(SteepBackward, "backward", UntruthBackward.backward),
        lambda: monkeypatch.setattr(Steep, "backward", Untruth.backward),
    ):
        change()
        for _ in range(2):
            pair.check()


@pytest.mark.filterwarnings("ignore:wgan_fast differentiates" if torch.__version__ < "2.13" else "error")
def test_a_number_that_changes_is_followed() -> None:
    critic = Critic(lambda critic, h: Reversal.apply(h.sin(), critic.factor), factor=0.3)
    pair = SideBySide("step", critic, engine="four_pass" if torch.__version__ >= "2.13" else "auto")
    for critic.factor in (0.3, 0.5, 0.7, 0.3):
        pair.check()


def test_functions_of_one_name_are_told_apart() -> None:
    def scaled(factor: float) -> Any:
        class Scaled(Function):
            @staticmethod
            def forward(ctx: Context, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return factor * x.sin()

            @staticmethod
            def backward(ctx: Context, gradient: Tensor) -> Tensor:
                return factor * gradient * ctx.saved_tensors[0].cos()

        return Scaled

    critic = Critic(lambda critic, h: critic.scaled.apply(h), scaled=scaled(0.3))
    pair = SideBySide("step", critic, engine="four_pass")
    pair.check()
    for critic.scaled in map(scaled, (3.0, 0.7, 0.3)):
        for _ in range(2):
            pair.check()


def test_a_function_under_autocast_is_left_to_autograd() -> None:
    critic = Critic(lambda critic, h: Exponential.apply(h))
    with (
        torch.autocast(torch.get_default_device().type, torch.bfloat16),
        pytest.warns(RuntimeWarning, match="autocast"),
    ):
        gradient_penalty(critic, REAL, FAKE)
