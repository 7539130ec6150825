from collections.abc import Callable
from typing import Any

import pytest
import textbook
import torch
from bad_arguments import SAMPLE_ERRORS, Row, assert_says, rows
from textbook import LAYOUTS, random_pair
from torch import Tensor

from wgan_fast import interpolate, reference

SHAPES = [(1, 1), (3, 5), (63, 7), (7, 2, 6, 8), (3, 2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(shape: tuple[int, ...]) -> None:
    real, fake = random_pair(*shape)
    alpha = torch.rand(shape[0], dtype=torch.float64)
    # One rounding per operation: 4 units in the last place of the operands, which are of order 1.
    for form in (alpha, alpha.view(-1, *[1] * (len(shape) - 1))):
        mixed = interpolate(real, fake, form)
        torch.testing.assert_close(mixed, textbook.interpolates(real, fake, alpha), rtol=1e-15, atol=4e-15)
    torch.testing.assert_close(mixed, reference.interpolate(real, fake, alpha), rtol=1e-15, atol=4e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_alpha_weighs_the_real_samples(dtype: torch.dtype) -> None:
    real, fake = torch.full((3, 5), 8.0, dtype=dtype), torch.full((3, 5), -8.0, dtype=dtype)
    mixed = interpolate(real, fake, torch.tensor([1.0, 0.0, 0.25]))
    assert mixed.dtype == dtype
    assert torch.equal(mixed, torch.tensor([[8.0], [-8.0], [-4.0]], dtype=dtype).expand(3, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_are_the_samples_bit_for_bit(dtype: torch.dtype) -> None:
    real, fake = random_pair(63, 7, dtype=dtype)
    assert torch.equal(interpolate(real, fake, torch.ones(63)), real)
    assert torch.equal(interpolate(real, fake, torch.zeros(63)), fake)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_error_is_at_most_twice_that_of_the_formula(dtype: torch.dtype) -> None:
    real, fake = random_pair(63, 7, dtype=dtype)
    alpha = torch.randint(65, (63,)) / 64  # exact in every dtype
    exact = textbook.interpolates(real.double(), fake.double(), alpha.double())
    usual = textbook.interpolates(real, fake, alpha.to(dtype))
    ours = interpolate(real, fake, alpha)
    assert (ours.double() - exact).norm() <= 2 * (usual.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [False, True])
def test_alpha_is_one_uniform_draw_per_sample(dtype: torch.dtype, given: bool) -> None:
    real, fake = torch.ones(63, 5, dtype=dtype), torch.zeros(63, 5, dtype=dtype)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(11) if given else None
    default_before = torch.get_rng_state()
    mixed = interpolate(real, fake, generator=generator)
    default_after = torch.get_rng_state()
    torch.set_rng_state(default_before)
    twin = torch.Generator().manual_seed(11) if given else None
    alpha = torch.rand(63, dtype=accumulate, generator=twin)
    assert torch.equal(mixed, alpha.to(dtype)[:, None].expand(63, 5))
    assert torch.equal(default_after, torch.get_rng_state())
    if given:
        assert torch.equal(generator.get_state(), twin.get_state())


def test_an_explicit_alpha_draws_nothing() -> None:
    real, fake = random_pair(3, 5)
    before = torch.get_rng_state()
    interpolate(real, fake, torch.rand(3, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    real, fake = random_pair(3, 2, 6, 8)
    alpha = torch.rand(3, dtype=torch.float64)
    expected = textbook.interpolates(real, fake, alpha)
    convert: Callable[[Tensor], Tensor] = LAYOUTS[layout]
    for pair in ((convert(real), fake), (real, convert(fake)), (convert(real), convert(fake))):
        torch.testing.assert_close(interpolate(*pair, alpha), expected, rtol=1e-15, atol=4e-15)
        out = convert(torch.full_like(real, torch.nan))
        assert interpolate(*pair, alpha, out=out) is out
        torch.testing.assert_close(out, expected, rtol=1e-15, atol=4e-15)


def test_channels_last_samples_give_channels_last_interpolates() -> None:
    real, fake = (x.contiguous(memory_format=torch.channels_last) for x in random_pair(3, 2, 6, 8))
    assert interpolate(real, fake).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_out_receives_the_same_values_and_no_graph(dtype: torch.dtype) -> None:
    real, fake = random_pair(63, 7, dtype=dtype)
    alpha = torch.rand(63)
    expected = interpolate(real, fake, alpha)
    real.requires_grad_()
    fake.requires_grad_()
    alpha.requires_grad_()
    buffer = torch.full((65, 7), torch.nan, dtype=dtype)
    version = buffer._version
    result = interpolate(real, fake, alpha, out=buffer[1:64])
    assert result.data_ptr() == buffer[1:].data_ptr()
    assert torch.equal(result, expected)
    assert torch.equal(buffer[1:64], expected)
    assert buffer[[0, 64]].isnan().all()
    assert not result.requires_grad
    assert buffer._version > version


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_samples_stay_in_their_place(dtype: torch.dtype, bad: float) -> None:
    real, fake = random_pair(3, 5, dtype=dtype)
    real[1, 2] = bad
    finite = interpolate(real, fake).isfinite()
    assert not finite[1, 2]
    assert finite.sum() == 14


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (3, 2, 2, 3)])
def test_first_and_second_derivatives(shape: tuple[int, ...]) -> None:
    real, fake = (x.requires_grad_() for x in random_pair(*shape))
    for form in ((shape[0],), (shape[0], *[1] * (len(shape) - 1))):
        # On both sides of 1/2, where an interpolation may switch formula.
        alpha = torch.linspace(0.1, 0.8, shape[0], dtype=torch.float64).view(form).requires_grad_()
        assert torch.autograd.gradcheck(interpolate, (real, fake, alpha))
        assert torch.autograd.gradgradcheck(interpolate, (real, fake, alpha))


def test_gradients_of_half_precision_samples_are_alpha_and_one_minus_alpha() -> None:
    real, fake = (x.requires_grad_() for x in random_pair(3, 5, dtype=torch.bfloat16))
    alpha = torch.tensor([0.25, 0.5, 1.0], requires_grad=True)
    interpolate(real, fake, alpha).sum().backward()
    assert torch.equal(real.grad, torch.tensor([[0.25], [0.5], [1.0]]).bfloat16().expand(3, 5))
    assert torch.equal(fake.grad, torch.tensor([[0.75], [0.5], [0.0]]).bfloat16().expand(3, 5))
    expected = (real.detach().float() - fake.detach().float()).sum(dim=1)
    torch.testing.assert_close(alpha.grad, expected, rtol=1e-6, atol=1e-6)


INTERPOLATE_ERRORS: list[Row] = [
    ("generator is a seed", {"alpha": None, "generator": 17}, TypeError, ("generator", "int")),
    ("generator is a seed, unused", {"generator": 17}, TypeError, ("generator", "int")),
    ("out is a number", {"out": 0.0}, TypeError, ("out", "float")),
    ("out is integer", {"out": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, ("out", "torch.int64")),
    ("out is double", {"out": torch.zeros(4, 6).double()}, TypeError, ("out", "torch.float64", "torch.float32")),
    ("out is too large", {"out": torch.zeros(5, 6)}, ValueError, ("out", "[5, 6]", "[4, 6]")),
    ("out is elsewhere", {"out": torch.zeros(4, 6, device="meta")}, ValueError, ("out", "meta", "cpu")),
]


@pytest.mark.parametrize(("wrong", "exception", "words"), rows(SAMPLE_ERRORS, INTERPOLATE_ERRORS))
def test_bad_arguments_raise_and_write_nothing(
    wrong: dict[str, Any], exception: type[Exception], words: tuple[str, ...]
) -> None:
    out = torch.full((4, 6), 7.0)
    arguments = {"real": torch.ones(4, 6), "fake": torch.zeros(4, 6), "alpha": torch.rand(4), "out": out, **wrong}
    before = torch.get_rng_state()
    with pytest.raises(exception) as caught:
        interpolate(arguments.pop("real"), arguments.pop("fake"), arguments.pop("alpha"), **arguments)
    assert_says(str(caught.value), words)
    assert torch.equal(out, torch.full((4, 6), 7.0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str) -> None:
    def mix(real: Tensor, fake: Tensor, alpha: Tensor | None) -> Tensor:
        return interpolate(real, fake, alpha) * 2

    torch.compiler.reset()  # the compiled forms of one function are limited in number
    compiled = torch.compile(mix, fullgraph=True, backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (7, 9):
            real, fake = random_pair(batch, 5, dtype=dtype)
            real.requires_grad_()
            alpha = torch.rand(batch)
            result, expected = compiled(real, fake, alpha), mix(real, fake, alpha)
            # A compiler may fuse a multiplication and an addition: 4 roundings of values of order 1.
            tolerance = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
            torch.testing.assert_close(result, expected, **tolerance)
            (gradient,) = torch.autograd.grad(result.sum(), real)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), real)[0], **tolerance)
            # A compiler may draw other numbers, but one per sample and from [0, 1].
            drawn = compiled(torch.ones_like(real), torch.zeros_like(real), None)
            assert torch.equal(drawn, drawn[:, :1].expand_as(drawn))
            assert len(drawn[:, 0].unique()) > 1
            assert drawn.min() >= 0
            assert drawn.max() <= 2
