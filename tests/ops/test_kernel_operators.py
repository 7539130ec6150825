"""The operators behind interpolate and penalty_from_gradient: compiled code and plain PyTorch against float64."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from textbook import LAYOUTS
from torch import Tensor

from wgan_fast import penalty_from_gradient, reference
from wgan_fast.ops import samples
from wgan_fast.ops.gradient_norm_penalty import gradient_norm_penalty_backward_plain, gradient_norm_penalty_plain
from wgan_fast.ops.interpolate import _clash, interpolate_into_plain
from wgan_fast.precision import accumulation_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
wgan_fast = torch.ops.wgan_fast

# What the dispatcher runs here, and what it runs where the extension or Triton is missing.
MIXERS = [
    pytest.param(wgan_fast.interpolate_into.default, id="operator"),
    pytest.param(interpolate_into_plain, id="plain"),
]
PENALTIES = [
    pytest.param((wgan_fast.gradient_norm_penalty, wgan_fast.gradient_norm_penalty_backward), id="operator"),
    pytest.param((gradient_norm_penalty_plain, gradient_norm_penalty_backward_plain), id="plain"),
]
# Short samples, several to a vector; whole blocks and not; more than one thread's grain.
SHAPES = [(1, 1), (3, 5), (63, 7), (100, 63), (65, 64), (7, 2, 6, 8), (5, 1025), (3, 40_003)]


def batch(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(shape).to(device, dtype)


def mixed(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    alpha = alpha.double().repeat_interleave(real.shape[0] // alpha.shape[0])
    return reference.interpolate(real.double(), fake.double(), alpha)


def assert_rounded(actual: Tensor, exact: Tensor, compute: torch.dtype) -> None:
    """Within half a unit of the output's dtype, and 8 of what is computed in (values are of order 4)."""
    rtol = 0.5 * torch.finfo(actual.dtype).eps
    # float16 is exact to a fixed distance where it is subnormal.
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    atol = 32 * torch.finfo(compute).eps + smallest
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("into", MIXERS)
def test_interpolates(into: Callable, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    real, fake = batch(shape, dtype, device), batch(shape, dtype, device)
    alpha = torch.rand(shape[0], dtype=accumulation_dtype(dtype), device=device)
    out = torch.full_like(real, torch.nan)
    into(out, real, fake, alpha)
    assert_rounded(out, mixed(real, fake, alpha), alpha.dtype)


@pytest.mark.parametrize("fake_dtype", DTYPES)
@pytest.mark.parametrize("real_dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, 3])
def test_every_pair_of_dtypes_is_computed_in_that_of_alpha(
    real_dtype: torch.dtype, fake_dtype: torch.dtype, group_size: int
) -> None:
    compute = accumulation_dtype(fake_dtype)
    if accumulation_dtype(real_dtype) != compute:
        return  # float64 is mixed with float64 alone
    real, fake = batch((6, 7), real_dtype), batch((6, 7), fake_dtype)
    alpha = torch.rand(6 // group_size, dtype=compute)
    out = wgan_fast.interpolate(real, fake, alpha)
    assert out.dtype == fake_dtype
    assert_rounded(out, mixed(real, fake, alpha), compute)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fake_layout", LAYOUTS)
@pytest.mark.parametrize("real_layout", LAYOUTS)
def test_every_layout_is_read_and_written(real_layout: str, fake_layout: str, device: str) -> None:
    real, fake = (
        LAYOUTS[real_layout](batch((3, 2, 6, 8), torch.float32, device)),
        batch((3, 2, 6, 8), torch.float32, device),
    )
    fake, alpha = LAYOUTS[fake_layout](fake), torch.rand(3, device=device)
    exact = mixed(real, fake, alpha)
    assert_rounded(wgan_fast.interpolate(real, fake, alpha), exact, torch.float32)
    out = LAYOUTS[fake_layout](torch.full_like(real, torch.nan))
    wgan_fast.interpolate_into(out, real, fake, alpha)
    assert_rounded(out, exact, torch.float32)


def test_the_reason_for_a_copy_is_told() -> None:
    last = torch.randn(3, 2, 6, 8).contiguous(memory_format=torch.channels_last)
    first = torch.randn(3, 2, 6, 8)
    assert samples.layout_reason(last, last) is None
    assert samples.layout_reason(last[1:2], last) is None
    assert "order" in samples.layout_reason(first, last)
    assert "gaps" in samples.layout_reason(first[..., ::2], first)
    assert "gaps" in samples.layout_reason(first.transpose(0, 1), first)


@pytest.mark.parametrize("into", MIXERS)
def test_the_output_may_be_an_input_or_overlap_one(into: Callable) -> None:
    alpha = torch.rand(5)
    for start in (0, 1, 2):
        memory = torch.randn(9, 40)
        real, fake, out = memory[1:6], torch.randn(5, 40), memory[start : start + 5]
        exact = mixed(real, fake, alpha)
        if into is interpolate_into_plain and start != 1:
            continue  # torch.lerp refuses it
        into(out, real, fake, alpha)
        assert_rounded(out, exact, torch.float32)


def test_a_kernel_that_writes_blocks_in_any_order_never_writes_what_it_still_reads() -> None:
    memory = torch.randn(9, 40)
    given = memory[1:6]
    assert not _clash(given, given), "element for element"
    assert not _clash(memory[6:], given)
    assert not _clash(memory[:1], given)
    for start in (0, 2, 5):
        assert _clash(memory[start : start + 4], given)
    assert _clash(memory.flatten()[40:50].view(torch.bfloat16), memory.flatten()[40:50])
    assert _clash(memory, memory[:3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_converted_as_pytorch_converts_it(dtype: torch.dtype) -> None:
    values = torch.arange(2**16).to(torch.int16).view(dtype)[None]
    out = torch.full_like(values, torch.nan)
    for alpha in (0.0, 1.0):
        wgan_fast.interpolate_into(out, values, values, torch.tensor([alpha]))
        finite = values.isfinite()
        assert torch.equal(out[finite], values[finite])
    # Two parts and an end of a vector that is not full; to the nearest, ties to even.
    real = torch.randn(1, 1027) * torch.logspace(-9, 6, 1027)
    rounded = wgan_fast.interpolate(real, (0 * real).to(dtype), torch.ones(1))
    assert torch.equal(rounded, real.to(dtype))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work_and_do_not_change_the_result(threads: int) -> None:
    real, fake, alpha = torch.randn(5, 40_001), torch.randn(5, 40_001), torch.rand(5)
    expected = wgan_fast.interpolate(real, fake, alpha), *wgan_fast.gradient_norm_penalty(real, 10.0, 1.0, False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = wgan_fast.interpolate(real, fake, alpha), *wgan_fast.gradient_norm_penalty(real, 10.0, 1.0, False)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(actual, expected):
        assert torch.equal(a, b)


SETTINGS = [(10.0, 1.0, False), (3.5, 0.75, True), (5.0, 0.0, False), (5.0, 0.0, True)]


def gradients(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Norms on both sides of 1."""
    gradient = torch.randn(shape, dtype=torch.float64)
    lengths = torch.linspace(0.4, 1.7, shape[0], dtype=torch.float64)
    scaled = gradient * reference.per_sample(lengths / gradient.flatten(1).norm(dim=1), gradient)
    return scaled.to(device, dtype)


def close(actual: Tensor, exact: Tensor, terms: int, scale: float, roundings: float = 1.5) -> None:
    """Within the rounding of sums of ``terms`` in random order, √terms units, and ``roundings`` of the output."""
    compute = accumulation_dtype(actual.dtype)
    units = (16 + math.sqrt(terms)) * torch.finfo(compute).eps
    rtol = units if actual.dtype == compute else roundings * torch.finfo(actual.dtype).eps + units
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=units * scale + smallest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", SETTINGS[:3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalty_norms_seed_and_second_derivative(
    penalty: tuple[Callable, Callable], dtype: torch.dtype, shape: tuple[int, ...], settings: tuple, device: str
) -> None:
    weight, target, one_sided = settings
    gradient, cotangent = gradients(shape, dtype, device), batch(shape, dtype, device)
    x = gradient.double().clone().requires_grad_()
    norm = reference.gradient_norm(x)
    value = reference.penalty_from_norm(norm, weight=weight, target=target, one_sided=one_sided)
    (seed,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(seed, x, cotangent.double())

    forward, backward = penalty
    outputs = forward(gradient, *settings)
    for actual, exact in zip(outputs, (value, norm.mean(), norm, seed)):
        assert actual.dtype == (dtype if actual.shape == gradient.shape else accumulation_dtype(dtype))
        # Rounded once: half a unit.
        close(actual, exact.detach(), gradient.numel(), exact.abs().max().item(), roundings=0.5)
    # Its two summands may cancel: of the size of the larger.
    scale = 4 * weight / shape[0] * cotangent.double().flatten(1).norm(dim=1).max().item()
    close(backward(gradient, outputs[2], cotangent, *settings), second, gradient.numel(), scale)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_seed_of_every_layout(layout: str, penalty: tuple[Callable, Callable]) -> None:
    gradient, cotangent = gradients((3, 2, 6, 8), torch.float64), batch((3, 2, 6, 8), torch.float64)
    expected = penalty[0](gradient, 10.0, 1.0, False)
    actual = penalty[0](LAYOUTS[layout](gradient), 10.0, 1.0, False)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    for c in (cotangent, LAYOUTS[layout](cotangent)):
        torch.testing.assert_close(
            penalty[1](LAYOUTS[layout](gradient), actual[2], c, 10.0, 1.0, False),
            penalty[1](gradient, expected[2], cotangent, 10.0, 1.0, False),
            rtol=1e-13,
            atol=1e-14,
        )


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("group_size", [2, 3])
def test_a_group_shares_one_norm(group_size: int, penalty: tuple[Callable, Callable]) -> None:
    gradient = gradients((6, 5), torch.float64)
    packed = penalty[0](gradient.view(6 // group_size, -1), 10.0, 1.0, True)
    for a, b in zip(penalty[0](gradient, 10.0, 1.0, True, group_size), packed):
        assert torch.equal(a, b.view_as(a))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_zero_stays_zero_nan_stays_in_its_row_and_infinity_shows(settings: tuple, penalty: tuple) -> None:
    gradient = torch.ones(5, 70)
    gradient[0] = 0
    gradient[1, 2] = torch.nan
    gradient[2, 3] = torch.inf
    value, mean_norm, norm, seed = penalty[0](gradient, *settings)
    assert value.isnan()
    assert mean_norm.isnan()
    assert norm[0] == 0
    assert norm[1].isnan()
    assert norm[2] == torch.inf
    assert (seed[0] == 0).all()
    assert seed[1, 2].isnan()
    assert not seed[2, 3].isfinite()
    assert seed[3:].isfinite().all()
    assert penalty[0](gradient[2:], *settings)[0] == torch.inf
    second = penalty[1](gradient, norm, torch.ones_like(gradient), *settings)
    assert second[[0, 3, 4]].isfinite().all()


def test_a_third_derivative_is_refused() -> None:
    x = gradients((3, 5), torch.float64).requires_grad_()
    for _ in range(2):
        (y,) = torch.autograd.grad(penalty_from_gradient(x), x, create_graph=True)
        (z,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice differentiable"):
        torch.autograd.grad(z.sum(), x)


def test_torch_func_differentiates_twice() -> None:
    g = gradients((3, 5), torch.float64)
    x = g.clone().requires_grad_()
    (first,) = torch.autograd.grad(penalty_from_gradient(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    grad = torch.func.grad
    assert torch.equal(grad(penalty_from_gradient)(g), first)
    assert torch.equal(grad(lambda y: grad(penalty_from_gradient)(y).square().sum())(g), second)


def operator_samples(device: str) -> list[tuple[str, tuple]]:
    def make(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=grad)

    last = make(4, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    norm = make(6).abs() + 1
    return [
        ("interpolate", (make(6, 5), make(6, 5), torch.rand(6, device=device))),
        ("interpolate", (make(6, 5, grad=True), make(6, 5, grad=True), torch.rand(6, device=device).requires_grad_())),
        ("interpolate", (last, make(4, 3, 5, 6), torch.rand(2, device=device))),
        ("interpolate", (last.half(), last.bfloat16(), torch.rand(4, device=device))),
        ("interpolate", (make(6, 10)[:, ::2], make(6, 5), torch.rand(6, device=device))),
        ("interpolate_into", (make(6, 5), make(6, 5), make(6, 5), torch.rand(6, device=device))),
        ("gradient_norm_penalty", (make(6, 5), 10.0, 1.0, False)),
        ("gradient_norm_penalty", (make(6, 5, dtype=torch.float64, grad=True), 10.0, 0.5, True)),
        ("gradient_norm_penalty", (last.half(), 10.0, 1.0, False, 2)),
        ("gradient_norm_penalty_backward", (make(6, 5), norm, make(6, 5), 10.0, 1.0, False)),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample", range(len(operator_samples("cpu"))))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operators_are_registered_correctly(sample: int, device: str) -> None:
    name, arguments = operator_samples(device)[sample]
    torch.library.opcheck(getattr(wgan_fast, name).default, arguments)


def test_no_operator_is_registered_without_an_opcheck() -> None:
    registered = {name.removeprefix("wgan_fast::") for name in torch._C._dispatch_get_all_op_names()}
    registered = {name for name in registered if "::" not in name}
    checked = {name for name, _ in operator_samples("cpu")}
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        checked.update(re.findall(r"opcheck\((?:torch\.ops\.wgan_fast|ops)\.(\w+)", path.read_text()))
    assert registered
    assert registered == checked


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_operators_compile_into_one_graph(backend: str) -> None:
    def step(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
        points = wgan_fast.interpolate(real, fake, alpha)
        value, _, _, seed = wgan_fast.gradient_norm_penalty(points, 10.0, 1.0, False)
        return value + seed.square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for rows in (7, 9):
        real, fake, alpha = (torch.rand(rows, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
        actual, expected = (f(real, fake, alpha[:, 0]) for f in (compiled, step))
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
        for a, b in zip(*(torch.autograd.grad(y, (real, fake, alpha)) for y in (actual, expected))):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("arguments", [(torch.ones(0, 5), 1.0, 1.0, False), (torch.ones(5, 3), 1.0, 1.0, False, 2)])
def test_the_compiled_penalty_refuses_what_it_cannot_group(arguments: tuple) -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("wgan_fast::gradient_norm_penalty", "CPU"):
        pytest.skip("no extension")
    with pytest.raises(RuntimeError, match="expected"):
        wgan_fast.gradient_norm_penalty(*arguments)
