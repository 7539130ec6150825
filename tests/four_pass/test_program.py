"""Programs compute what their graphs do, on whatever instruction set, and by however many threads."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from wgan_fast import CriticStep, PenaltyConfig, gradient_penalty
from wgan_fast.four_pass.program import Program, program_of
from wgan_fast.four_pass.record import Recorder
from wgan_fast.ops.run_program import AVAILABLE, BF16
from wgan_fast.reference import gradient_norm, interpolate, penalty_from_norm

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the extension is not there")

aten = torch.ops.aten


def written(function: Callable[..., object], *examples: Tensor) -> tuple[Program | str, fx.GraphModule]:
    """Write down what a function of float32 tensors does, as a plan would."""
    recorder = Recorder()
    given = [recorder.input(f"x{i}", example) for i, example in enumerate(examples)]
    with recorder.fake, recorder, torch.no_grad():
        outputs = function(*given)
    recorder.output(outputs)
    root = nn.Module()
    for name, value in recorder.constants.items():
        root.register_buffer(name, value)
    module = fx.GraphModule(root, recorder.graph)
    end = recorder.graph.output_node()
    end.args = end.args[0]
    module.recompile()
    return program_of(module), module


def same(function: Callable[..., object], *examples: Tensor, rtol: float = 2e-6, atol: float = 2e-6) -> list[Tensor]:
    """Run a function as a program; returns what it gives, which is what PyTorch gives."""
    program, _ = written(function, *examples)
    assert isinstance(program, Program), program
    expected = function(*examples)
    made = program(list(examples))
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
    return made


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 13, 14, 15, 18, 20, 28, 29, 33, 52, 70, 100, 127, 128, 129, 150])
def test_products_of_every_shape(rows):
    generator = torch.Generator().manual_seed(rows)
    for columns, depth in product([1, 2, 8, 15, 16, 17, 31, 32, 33, 63, 97], (1, 2, 16, 33)):
        a = torch.randn(rows, depth, generator=generator)
        b = torch.randn(depth, columns, generator=generator)
        same(
            lambda a, b, at, bt: [a @ b, a @ bt.t(), at.t() @ b, at.t() @ bt.t()],
            a, b, a.t().contiguous(), b.t().contiguous(), rtol=2e-5, atol=2e-5,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(40, 4097, 50), (140, 17000, 33), (40, 9001, 33), (140, 700, 600), (51, 4102, 40)]
)
def test_deep_products_are_cut(rows, depth, columns):
    """Those that read their right side where it lies, and those that do not."""
    a, b = torch.randn(rows, depth), torch.randn(depth, columns)
    same(lambda a, b: [a @ b, (a @ b).relu() + 1], a, b, rtol=1e-4, atol=2e-3)
    same(lambda a, b: [a.t() @ b], a.t().contiguous(), b, rtol=1e-4, atol=2e-3)
    same(lambda a, b: [a @ b.t()], a, b.t().contiguous(), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (40, 33), (200, 2), (200, 33), (200, 300)])
def test_deep_products_gather_no_rounding(rows, columns):
    """Of numbers above zero, whose sums grow: as exact as PyTorch's."""
    a, b = torch.rand(20000, rows), torch.rand(20000, columns)
    turned = a.t().contiguous(), b.t().contiguous()
    exact = a.double().t() @ b.double()
    program, _ = written(lambda a, b, at, bt: [a.t() @ b, a.t() @ bt.t(), at @ b, at @ bt.t()], a, b, *turned)
    theirs = (a.t() @ b - exact).abs().max() / exact.max()
    for made in program([a, b, *turned]):
        assert (made - exact).abs().max() / exact.max() < max(2 * theirs, 6e-7)


def test_right_sides_that_are_kept_gather_no_rounding():
    a, b = torch.rand(200, 2560), torch.rand(2560, 40)
    program, _ = written(lambda a, b: [a @ b, (a + 1) @ b], a, b)
    for made, left in zip(program([a, b]), (a.double(), a.double() + 1)):
        assert (made / (left @ b.double()) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("columns", [1, 2, 4, 5, 17, 20, 31, 36, 40, 128])
@pytest.mark.parametrize("rows", [129, 300])
def test_products_of_few_columns_are_their_transposes(rows, columns):
    """Where rows lie side by side, in one part and in several, alone and with something after them."""
    generator = torch.Generator().manual_seed(0)
    d, a, t = (torch.randn(50, size, generator=generator) for size in (rows, columns, columns))
    same(
        lambda d, a, t: [d.t() @ a, d.t() @ torch.cat([a[:35], t[35:]]), (d.t() @ t).relu(), (d.t() @ a)[3:9] @ t.t()],
        d, a, t, rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("columns", [31, 32, 50, 400])
@pytest.mark.parametrize("rows", [1, 2, 60, 1000])
def test_a_column_times_a_row_is_a_product(rows, columns):
    v = EDGES.repeat(rows)[:rows, None].contiguous()
    row, x = EDGES.repeat_interleave(7).repeat(columns)[:columns].contiguous(), torch.randn(rows, columns)

    def function(v, row, x):
        gates = (x + row).relu()
        return [v * row, row * v, aten.threshold_backward(v * row, gates, 0), (row * v) + x, v * row[None]]

    same(function, v, row, x)


def test_right_sides_that_products_share_are_laid_out_once_and_right():
    a, c, w = torch.randn(40, 20), torch.randn(17, 20), torch.randn(33, 20)
    same(lambda a, c, w: [a @ w.t(), c @ w.t(), (a @ w.t())[3:9] @ w], a, c, w, rtol=1e-5, atol=1e-5)


def test_products_over_joined_rows_are_summed_part_by_part():
    d, a, t = torch.randn(50, 30), torch.randn(35, 45), torch.randn(15, 45)
    same(
        lambda d, a, t: [
            d.t() @ torch.cat([a, t]), d[:, :1].t() @ torch.cat([a, t]), d[:, 0][None] @ torch.cat([a, t]),
            torch.cat([d, d], 1).t() @ torch.cat([t, a]), d.t().contiguous() @ torch.cat([a, t]),
            d.t() @ torch.cat([a.t().contiguous().t(), t]), d.t().relu() @ torch.cat([a[:, :33], t[:, 2:35]]),
        ],
        d, a, t, rtol=1e-5, atol=2e-5,
    )  # fmt: skip


EDGES = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45, 3e38])


@pytest.mark.parametrize("columns", [1, 8, 32, 50])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: [x + y, x - y, x * y, x / y, torch.add(x, y, alpha=0.5), -x, x * 3.0, x + 2, x - 0.5],
        lambda x, y: [x.relu(), aten.leaky_relu(x, 0.2), aten.leaky_relu(x, 0.0)],
        lambda x, y: [aten.threshold_backward(x, y, 0), aten.threshold_backward(x, y, 1.0)],
        lambda x, y: [aten.leaky_relu_backward(x, y, 0.2, True), aten.leaky_relu_backward(x, y, 0.2, False)],
        lambda x, y: [(y + x).relu(), aten.threshold_backward(x, (y + x).relu(), 0)],
        lambda x, y: [aten.leaky_relu_backward(x, aten.leaky_relu(y + x, 0.1), 0.1, True)],
    ],
)
def test_elementwise_operators_on_values_at_the_edge(function, columns):
    x = EDGES.repeat_interleave(10).repeat(columns).view(-1, columns)
    y = EDGES.repeat(10).repeat(columns).view(-1, columns)
    same(function, x, y)


@pytest.mark.parametrize("columns", [32, 48, 97, 400])
@pytest.mark.parametrize("rows", [1, 3, 48, 60])
def test_what_follows_a_product_on_values_at_the_edge(rows, columns):
    """Such as is applied to its tiles while they are in registers."""
    x = EDGES.repeat(rows)[:rows, None].contiguous()
    one, bias = torch.ones(1, columns), EDGES.repeat_interleave(7).repeat(columns)[:columns].contiguous()
    v = EDGES.flip(0).repeat(rows)[:rows, None].contiguous()

    def follows(activation, backward, *slope):
        def function(x, one, bias, v):
            a = activation(torch.addmm(bias, x, one), *slope)
            d = backward(v @ one, a, *(slope or (0,)), *[True] * len(slope))
            return [a, d, (v @ one) + 0.5 * bias, aten.threshold_backward(v @ one + bias, a, 0), v @ one + x]

        return function

    same(follows(aten.relu, aten.threshold_backward), x, one, bias, v)
    same(follows(aten.leaky_relu, aten.leaky_relu_backward, 0.2), x, one, bias, v)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 60])
def test_a_product_is_added_to_itself(rows, turned):
    def function(x, w):
        p = x @ (w.t() if turned else w)
        q = x @ (w.t() if turned else w)
        return [p + p, (q + q).relu(), aten.leaky_relu(torch.add(q, q, alpha=0.5), 0.2)]

    for _ in range(3):  # over memory that was used before
        same(function, torch.randn(rows, 64), torch.randn(64, 64), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("depth", [30, 2600])
def test_what_follows_products_in_several_parts(depth):
    """Depth that is cut, and joined rows: what follows is applied to the sum of all parts alone."""
    generator = torch.Generator().manual_seed(0)
    d, a, t, b = (torch.randn(size, generator=generator) for size in ((depth + 20, 60), (depth, 64), (20, 64), (64,)))

    def function(d, a, t, b):
        h = aten.leaky_relu((d.t() @ torch.cat([a, t])) + b, 0.2)
        k = torch.addmm(b, d[: a.shape[0]].t(), a).relu()
        return [h, k, aten.threshold_backward(d[: a.shape[0]].t() @ a, k, 0)]

    same(function, d, a, t, b, rtol=1e-4, atol=2e-3)


def test_rows_columns_and_numbers_are_broadcast():
    x, row, column, number = torch.randn(9, 40), torch.randn(40), torch.randn(9, 1), torch.randn(())
    same(lambda x, r, c, n: [x + r, x * c, x * n, c * r, (x * r) * c + n], x, row, column, number)


def test_sums_and_means():
    x = torch.randn(700, 130)
    same(
        lambda x: [x.sum(0), x[:300].sum(0), x.sum([1]), x[:, 0].contiguous().sum(), x.mean(), x.sum()],
        x, rtol=1e-4, atol=1e-3,
    )  # fmt: skip


def test_samples_of_any_layout():
    x = torch.randn(40, 30).t()
    same(lambda x, y: [(x + y) @ y.t(), x.t() @ y, x.reshape(-1, 10) * 2], x, torch.randn(30, 40), rtol=1e-5, atol=1e-4)


def test_inputs_that_are_not_laid_out_as_planned_are_copied():
    x = torch.randn(6, 8)
    program, _ = written(lambda x: [x * 2], x)
    torch.testing.assert_close(program([x.t().contiguous().t()])[0], x * 2)


def test_outputs_have_memory_of_their_own():
    x, w = torch.randn(40, 60), torch.randn(60, 500)
    program, _ = written(lambda x, w: [x, x @ w, (x @ w)[:20], x @ w], x, w)
    first = program([x, w])
    kept = [tensor.clone() for tensor in first]
    assert len({tensor.untyped_storage().data_ptr() for tensor in [*first, x, w]}) == 6
    for tensor in program([x + 1, w]):
        tensor.zero_()
    for tensor, copy in zip(first, kept):
        assert torch.equal(tensor, copy)


def test_what_has_no_place_in_programs_is_left_to_pytorch():
    x = torch.randn(4, 4)
    for function in (lambda x: [x.cumsum(0)], lambda x: [x.double()], lambda x: [x.unfold(0, 2, 1) + 1]):
        program, _ = written(function, x)
        assert isinstance(program, str)
    program, _ = written(lambda x: [x + 1], x.double())
    assert isinstance(program, str)


# Random masks


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.9, 0.1, 1 / 3, 1 - 2**-12])
def test_random_masks_keep_the_share_that_they_are_to(keep):
    x = torch.randn(700, 333)

    def function(x):
        mask = aten.bernoulli_.float(aten.new_empty(x, [700, 333]), keep)
        mask = aten.div_(mask, keep)
        return [x * mask, (x + 1) * mask]

    program, _ = written(function, x)
    assert isinstance(program, Program), program
    first, second = program([x])
    kept = first != 0
    assert torch.equal(kept, second != 0)
    torch.testing.assert_close(first[kept], x[kept] / keep)
    share, spread = kept.double().mean().item(), (keep * (1 - keep) / x.numel()) ** 0.5
    assert abs(share - keep) < 5 * spread
    if keep > 0.99:
        return
    # Neither rows nor columns share their masks.
    centred = kept.double() - keep
    assert centred.mean(0).abs().max() < 6 * (keep * (1 - keep) / 700) ** 0.5 + 1e-9
    assert centred.mean(1).abs().max() < 6 * (keep * (1 - keep) / 333) ** 0.5 + 1e-9
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 5 * keep * (1 - keep) / x.numel() ** 0.5
    assert not torch.equal(program([x])[0] != 0, kept)
    torch.manual_seed(5)
    again = program([x])[0]
    torch.manual_seed(5)
    assert torch.equal(program([x])[0], again)


def test_the_same_draws_as_pytorchs_where_they_are_asked_for(monkeypatch):
    critic = nn.Sequential(nn.Linear(5, 40), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(40, 1))
    real, fake = torch.randn(2, 30, 5)
    monkeypatch.setenv("WGAN_FAST_SAME_DRAWS", "1")
    step = CriticStep(critic, engine="four_pass")
    step(real, fake)
    assert programs(step) == [False]
    monkeypatch.delenv("WGAN_FAST_SAME_DRAWS")
    step = CriticStep(critic, engine="four_pass")
    step(real, fake)
    assert programs(step) == [True]


# Critic steps


def programs(step: CriticStep) -> list[bool]:
    """For every plan that a step has, whether all its pieces are programs."""
    plans = [plan for choice, _ in step._choices.values() for plan in choice.four_pass.plans.values()]
    return [all(isinstance(program, Program) for program in plan.programs) for plan in plans]


@contextmanager
def without_programs(step: CriticStep) -> Iterator[None]:
    plans = [plan for choice, _ in step._choices.values() for plan in choice.four_pass.plans.values()]
    kept = [plan.programs for plan in plans]
    for plan in plans:
        plan.programs = ["not now"] * len(plan.pieces)
    yield
    for plan, programs_of in zip(plans, kept):
        plan.programs = programs_of


def layers(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU, flat: bool = True) -> nn.Sequential:
    found: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        found += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*found, nn.Linear(sizes[-1], 1), *([nn.Flatten(0)] if flat else []))


class Packed(nn.Module):
    def __init__(self, pack: int, width: int) -> None:
        super().__init__()
        self.pack, self.layers = pack, layers(pack * width, 40, 24, activation=lambda: nn.LeakyReLU(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.reshape(-1, x[0].numel() * self.pack))


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 20), nn.Linear(20, 20), nn.Linear(20, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.c(torch.nn.functional.leaky_relu(self.b(h), 0.1) + 0.5 * h)


CRITICS: dict[str, tuple[Callable[[], nn.Module], int, PenaltyConfig]] = {
    "relu": (lambda: layers(6, 33, 17), 6, PenaltyConfig.wgan_gp()),
    "wide first layer": (lambda: layers(700, 40, 17), 700, PenaltyConfig.wgan_gp()),
    "leaky": (lambda: layers(6, 33, 17, activation=lambda: nn.LeakyReLU(0.2)), 6, PenaltyConfig.wgan_lp()),
    "leaky downwards": (lambda: layers(6, 33, activation=lambda: nn.LeakyReLU(-0.2)), 6, PenaltyConfig.wgan_gp()),
    "scores in a column": (lambda: layers(6, 33, flat=False), 6, PenaltyConfig.wgan_gp()),
    "one layer": (lambda: layers(6), 6, PenaltyConfig.wgan_gp()),
    "r1": (lambda: layers(6, 33, 17), 6, PenaltyConfig.r1()),
    "r1 and r2": (lambda: layers(6, 33, 17), 6, PenaltyConfig(weight=5.0, target=0.0, at="both")),
    "dragan": (lambda: layers(6, 33, 17), 6, PenaltyConfig.dragan()),
    "packed": (lambda: Packed(3, 50), 50, PenaltyConfig(group_size=3)),
    "packed wide": (lambda: Packed(3, 300), 300, PenaltyConfig(group_size=3)),
    "skipping": (Skipping, 6, PenaltyConfig.wgan_gp()),
    "without bias": (
        lambda: nn.Sequential(nn.Linear(6, 20, bias=False), nn.ReLU(), nn.Linear(20, 1, bias=False)),
        6, PenaltyConfig.wgan_gp(),
    ),
    "a function of the norms": (lambda: layers(6, 33), 6, PenaltyConfig(penalty=lambda g: g.norm(dim=1) ** 6)),
}  # fmt: skip


def expected(critic: nn.Module, config: PenaltyConfig, loss: str, real: Tensor, fake: Tensor, alpha: Tensor) -> list:
    from wgan_fast import losses

    for parameter in critic.parameters():
        parameter.grad = None
    value = getattr(losses, loss).critic(critic(real).flatten(), critic(fake).flatten())
    sets = {"interpolates": [interpolate(real, fake, alpha)], "real": [real], "fake": [fake], "both": [real, fake]}
    for points in sets[config.at]:
        points = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
        if config.penalty:
            value = value + config.weight * config.penalty(gradient).mean()
        else:
            norm = gradient_norm(gradient, config.group_size)
            value = value + penalty_from_norm(
                norm, weight=config.weight, target=config.target, one_sided=config.one_sided
            )
    value.backward()
    return [parameter.grad.clone() for parameter in critic.parameters()]


@pytest.mark.parametrize(
    ("loss", "N"), [("wasserstein", 3), ("wasserstein", 150), ("hinge", 150), ("least_squares", 150)]
)
@pytest.mark.parametrize("name", [name for name in CRITICS if name != "dragan"])
def test_gradients_are_as_good_as_autograds(name, loss, N):
    make, width, config = CRITICS[name]
    critic = make()
    real, fake = torch.randn(2, N, width) + torch.tensor([[[0.5]], [[-0.5]]])
    alpha = torch.rand(N // config.group_size)
    step = CriticStep(critic, loss=loss, penalty=config, engine="four_pass")
    step(real, fake, alpha if config.at == "interpolates" else None)
    ours = [parameter.grad.clone() for parameter in critic.parameters()]
    alpha = alpha.repeat_interleave(config.group_size)
    plain = expected(critic, config, loss, real, fake, alpha)
    truth = expected(critic.double(), config, loss, real.double(), fake.double(), alpha.double())
    own, theirs, size = (
        sum((g.double() - t).square().sum().item() for g, t in zip(found, truth)) ** 0.5
        for found in (ours, plain, [torch.zeros_like(t) for t in truth])
    )
    assert own <= 4 * theirs + 2e-7 * size
    # A penalty of one's own is computed in between, from pieces that are programs too.
    assert programs(step) == [True]


@pytest.mark.parametrize("name", CRITICS)
def test_programs_and_operators_agree(name):
    make, width, config = CRITICS[name]
    critic = make()
    real, fake = torch.randn(2, 60, width)
    step = CriticStep(critic, penalty=config, engine="four_pass")

    def run() -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(3)
        result = step(real, fake)
        return [parameter.grad.clone() for parameter in critic.parameters()], list(result)

    (gradients, figures) = run()
    with without_programs(step):
        others, their_figures = run()
    torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(figures, their_figures, rtol=1e-4, atol=1e-5)


def test_a_penalty_alone_is_a_program():
    critic, points = layers(6, 33, 17), torch.randn(40, 6)
    gradient_penalty(critic, points=points, engine="four_pass").backward()
    ours = [parameter.grad for parameter in critic.parameters()]
    critic.zero_grad(set_to_none=True)
    gradient_penalty(critic, points=points, engine="autograd").backward()
    for mine, parameter in zip(ours, critic.parameters()):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


def test_dropout_is_the_same_in_every_pass():
    critic = nn.Sequential(nn.Linear(8, 64), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(64, 1))
    real, fake = torch.randn(2, 50, 8)
    step = CriticStep(critic, penalty=PenaltyConfig(weight=0.0), engine="four_pass")
    step(real, fake)
    assert programs(step) == [True]
    # The Wasserstein loss's gradient of the last weight is a difference of means of what dropout let through: of real
    # and fake alike half, doubled.
    samples = []
    for _ in range(100):
        step(real, fake)
        samples.append(critic[3].weight.grad.clone())
    with torch.no_grad():
        critic.eval()
        hidden = critic[:2]
        mean = hidden(fake).mean(0) - hidden(real).mean(0)
    found = torch.stack(samples)
    deviation = found.std(0) / 100**0.5
    assert ((found.mean(0) - mean).abs() < 5 * deviation).all()


@pytest.mark.skipif(not BF16, reason="this processor has no products of bfloat16, or PyTorch's are better")
@pytest.mark.parametrize("name", ["relu", "wide first layer", "leaky", "packed", "skipping", "r1"])
@pytest.mark.parametrize("N", [3, 75])
def test_products_in_bfloat16_are_as_good_as_autocasts(name, N):
    make, width, config = CRITICS[name]
    critic = make()
    real, fake = torch.randn(2, N, width) + torch.tensor([[[0.5]], [[-0.5]]])
    alpha = torch.rand(N // config.group_size)
    step = CriticStep(critic, penalty=config, engine="four_pass", precision="bf16")

    def run() -> list[Tensor]:
        step(real, fake, alpha if config.at == "interpolates" else None)
        return [parameter.grad.clone() for parameter in critic.parameters()]

    ours = run()
    assert programs(step) == [True]
    with without_programs(step):
        autocast = run()
    alpha = alpha.repeat_interleave(config.group_size).double()
    truth = expected(critic.double(), config, "wasserstein", real.double(), fake.double(), alpha)
    own, theirs = (
        sum((g.double() - t).square().sum().item() for g, t in zip(found, truth)) ** 0.5 for found in (ours, autocast)
    )
    size = sum(t.square().sum().item() for t in truth) ** 0.5
    assert own <= 2 * theirs + 0.01 * size
    assert own > 1e-5 * size  # it is rounded


def test_threads_change_nothing():
    critic, (real, fake), alpha = layers(40, 200, 100), torch.randn(2, 300, 40), torch.rand(300)
    step = CriticStep(critic, engine="four_pass")
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for _ in range(5):
                step(real, fake, alpha)
                found.append([parameter.grad.clone() for parameter in critic.parameters()])
    finally:
        torch.set_num_threads(1)
    for gradients in found[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(gradients, found[0]))


def test_several_threads_run_one_program_at_a_time():
    x, w = torch.randn(100, 64), torch.randn(64, 300)
    program, _ = written(lambda x, w: [(x @ w).relu() @ w.t()], x, w)
    truth = (x @ w).relu() @ w.t()
    wrong: list[int] = []

    def run() -> None:
        found = [program([x, w])[0] for _ in range(100)]
        wrong.extend(i for i, y in enumerate(found) if not torch.allclose(y, truth, rtol=1e-3, atol=1e-3))

    torch.set_num_threads(2)
    workers = [threading.Thread(target=run) for _ in range(4)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(1)
    assert wrong == []


def test_parameters_of_any_layout_and_place():
    critic = layers(6, 20)
    whole = torch.randn(20, 50)
    critic[0].weight = nn.Parameter(whole[:, 7:13])
    critic[2].weight = nn.Parameter(torch.randn(20, 1).t())
    real, fake, alpha = *torch.randn(2, 30, 6), torch.rand(30)
    step = CriticStep(critic, engine="four_pass")
    step(real, fake, alpha)
    ours = [parameter.grad.clone() for parameter in critic.parameters()]
    for mine, theirs in zip(ours, expected(critic, PenaltyConfig.wgan_gp(), "wasserstein", real, fake, alpha)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_who_watches_operators_is_shown_those_of_the_graph():
    from torch.utils.flop_counter import FlopCounterMode

    critic, (real, fake) = layers(6, 20), torch.randn(2, 30, 6)
    step = CriticStep(critic, engine="four_pass")
    step(real, fake)
    with FlopCounterMode(display=False) as counter:
        step(real, fake)
    assert counter.get_total_flops() > 0


def test_wrong_programs_are_refused():
    x = torch.randn(3, 4)
    program, _ = written(lambda x: [x * 2], x)
    with pytest.raises(RuntimeError, match="sizes that were planned"):
        program([torch.randn(3, 5)[:, :5].as_strided((3, 5), (4, 1))])
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.wgan_fast.run_program(program._words, [x.double()], 0.0, 0.0, 0)


@pytest.mark.parametrize("tiles", ["AVX2", "plain"])
def test_every_instruction_set(tiles):
    """In a process of its own: it is chosen once."""
    tests = [
        "test_products_of_every_shape", "test_deep_products", "test_elementwise", "test_random_masks_keep",
        "test_programs_and_operators_agree", "test_sums_and_means",
    ]  # fmt: skip
    if os.environ.get("WGAN_FAST_TILES"):
        pytest.skip("is such a process")
    code = f"import wgan_fast; raise SystemExit(wgan_fast.build_info()['extension']['products'] != {tiles!r})"
    environment = {**os.environ, "WGAN_FAST_TILES": tiles}
    if subprocess.run([sys.executable, "-c", code], env=environment).returncode != 0:
        pytest.skip(f"this processor has no {tiles}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", " or ".join(tests)]
    done = subprocess.run([*command, str(Path(__file__))], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# What was wrong once


class Of(nn.Module):
    """A critic that is a function of layers a, b and c."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


L = nn.Linear
MIXED = {
    "a smooth critic that starts wide": (lambda: nn.Sequential(L(784, 512), nn.Tanh(), L(512, 1)), 784),
    "a norm behind a wide start": (lambda: nn.Sequential(L(784, 128), nn.LayerNorm(128), nn.ReLU(), L(128, 1)), 784),
    "scores that are sums": (lambda: Of(lambda s, x: s.a(x).relu().sum(1), a=L(20, 40)), 20),
    "a sum kept": (lambda: Of(lambda s, x: nn.functional.leaky_relu(s.a(x), 0.2).sum(1, True), a=L(20, 40)), 20),
    "an activation reshaped": (
        lambda: Of(
            lambda s, x: s.b(nn.functional.leaky_relu(s.a(x).relu().view(-1, 20), -0.1).view(-1, 40)),
            a=L(20, 40), b=L(40, 1),
        ), 20,
    ),
    "a step in the samples": (
        lambda: Of(lambda s, x: s.b(torch.tanh(s.a(x) + s.c(x.int().float()))), a=L(700, 90), b=L(90, 1), c=L(700, 90)),
        700,
    ),
    "integers of the samples": (
        lambda: Of(lambda s, x: s.b(s.a(x).relu()) + x[:, :1].long(), a=L(700, 90), b=L(90, 1)), 700,
    ),
    "a start in another precision": (
        lambda: Of(lambda s, x: s.b(s.a(x.double()).float().relu()), a=L(700, 90).double(), b=L(90, 1)), 700,
    ),
    "one more dimension": (
        lambda: Of(lambda s, x: s.b((s.a(x).relu() + s.p).view(-1, 40)).flatten(), a=L(20, 40), b=L(40, 1)), 20,
    ),
    "two heads behind a wide start": (
        lambda: Of(lambda s, x: s.b((h := s.a(x)).relu()) + s.c(h.tanh()), a=L(784, 60), b=L(60, 1), c=L(60, 1)), 784,
    ),
    "a frozen start": (
        lambda: nn.Sequential(L(784, 200).requires_grad_(False), nn.ReLU(), L(200, 1)), 784,
    ),
}  # fmt: skip


@pytest.mark.parametrize("loss", ["wasserstein", "hinge"])
@pytest.mark.parametrize("name", MIXED)
def test_critics_that_were_wrong_once(name, loss):
    make, width = MIXED[name]
    critic = make()
    if name == "one more dimension":
        critic.p = nn.Parameter(torch.randn(1, 1, 40))
    real, fake = torch.randn(2, 64, width)
    alpha = torch.rand(64)
    step = CriticStep(critic, loss=loss)
    step(real, fake, alpha)
    ours = [parameter.grad for parameter in critic.parameters()]
    for parameter in critic.parameters():
        parameter.grad = None
    CriticStep(critic, loss=loss, engine="autograd")(real, fake, alpha)
    for mine, parameter in zip(ours, critic.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("N", [1, 2, 64])
@pytest.mark.parametrize("before", [True, False], ids=["before the activation", "after it"])
def test_a_layer_added_to_itself_is_planned(before, N):
    """One cotangent is the sum of a product with itself, which used to be accumulated into itself."""

    def forward(s, x):
        h = s.a(x)
        h = nn.functional.leaky_relu(h + h, 0.2) if before else (a := nn.functional.leaky_relu(h, 0.2)) + a
        return s.c(nn.functional.leaky_relu(s.b(h), 0.2))

    critic = Of(forward, a=L(32, 64), b=L(64, 64), c=L(64, 1))
    real, fake, alpha = torch.randn(N, 32), torch.randn(N, 32), torch.rand(N)
    made = []
    for engine in ("four_pass", "autograd"):
        CriticStep(critic, engine=engine)(real, fake, alpha)
        made.append([parameter.grad.clone() for parameter in critic.parameters()])
    for ours, theirs in zip(*made):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dropout_of_what_is_summed():
    critic = Of(lambda s, x: nn.functional.dropout(s.a(x), 0.5).sum(1), a=L(20, 40))
    CriticStep(critic, loss="hinge", penalty=None)(*torch.randn(2, 8, 20))
    shares = critic.a.bias.grad * 8 * 0.5
    torch.testing.assert_close(shares, shares.round(), rtol=0, atol=1e-5)


def test_samples_in_double_precision_before_a_start_in_single():
    critic = Of(lambda s, x: s.b(s.a(x.float()).relu()), a=L(784, 512), b=L(512, 1))
    real, fake = torch.randn(2, 64, 784, dtype=torch.float64)
    assert CriticStep(critic)(real, fake).loss.isfinite()


def test_empty_parts_and_division_by_nothing_are_left_to_pytorch():
    x, y = torch.randn(8, 4), torch.randn(8, 5)
    for function in (lambda x, y: [torch.cat([x, y[:, 5:]], 1)], lambda x, y: [x / 0.0, y]):
        program, _ = written(function, x, y)
        assert isinstance(program, str)


def test_what_dropout_drops_stays_not_a_number():
    x = torch.full((50, 40), float("nan"))
    program, _ = written(lambda x: [x * aten.bernoulli_.float(aten.new_empty(x, [50, 40]), 0.5)], x)
    assert isinstance(program, Program)
    assert program([x])[0].isnan().all()


def test_programs_live_on_the_cpu_whatever_the_default_device():
    x = torch.randn(3, 4)
    torch.set_default_device("meta")
    try:
        program, _ = written(lambda x: [x * 2], x)
    finally:
        torch.set_default_device(None)
    assert isinstance(program, Program)
    assert torch.equal(program([x])[0], x * 2)
