import warnings

import pytest
import torch
from torch import Tensor

from wgan_fast import reference
from wgan_fast.kernels.interpolate import interpolate
from wgan_fast.ops.registry import launch_on

# Rows and columns below, at and above a block, and more columns than one program takes.
SHAPES = [(1, 1), (3, 5), (63, 7), (100, 3), (7, 2, 6, 8), (3, 2, 3, 4, 5), (1, 3001), (2, 4096), (5, 2100)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def samples(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def expected(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """In float64, α one value per group."""
    alpha = alpha.double().repeat_interleave(real.shape[0] // alpha.shape[0])
    return reference.interpolate(real.double(), fake.double(), alpha)


def assert_rounded(actual: Tensor, exact: Tensor, compute: torch.dtype | None = None) -> None:
    """Within a rounding to the output dtype, and 8 of ``compute`` (values are of order 4), of the float64 result."""
    if compute is None:
        compute = torch.float64 if actual.dtype == torch.float64 else torch.float32
    # The interpreter rounds to bfloat16 towards 0: a whole unit in the last place, where a GPU is half a unit off.
    units = 1 if actual.dtype == torch.bfloat16 else 0.5
    tolerance = units * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=32 * torch.finfo(compute).eps)


def alpha_for(dtype: torch.dtype, count: int) -> Tensor:
    alpha = torch.rand(count, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    alpha[:2] = torch.tensor([1.0, 0.0])[:count]
    return alpha


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_formula(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    real, fake, alpha = samples(shape, dtype), samples(shape, dtype), alpha_for(dtype, shape[0])
    out = torch.empty_like(real)
    interpolate(real, fake, alpha, out)
    assert_rounded(out, expected(real, fake, alpha))
    assert torch.equal(out[:1], real[:1])
    assert torch.equal(out[1:2], fake[1:2])


@pytest.mark.parametrize("alpha", [torch.rand(14)[::2], torch.tensor([0.3]).expand(7)], ids=["strided", "expanded"])
def test_reads_alpha_with_any_stride(alpha: Tensor) -> None:
    real, fake = samples((7, 5), torch.float32), samples((7, 5), torch.float32)
    out = torch.empty_like(real)
    interpolate(real, fake, alpha, out)
    assert_rounded(out, expected(real, fake, alpha))


@pytest.mark.parametrize("fake_dtype", DTYPES)
@pytest.mark.parametrize("real_dtype", DTYPES)
def test_reads_and_writes_every_pair_of_dtypes(real_dtype: torch.dtype, fake_dtype: torch.dtype) -> None:
    real, fake, alpha = samples((5, 3, 7), real_dtype), samples((5, 3, 7), fake_dtype), alpha_for(fake_dtype, 5)
    for out_dtype in DTYPES if fake_dtype != torch.float64 else [torch.float64]:
        out = torch.empty(5, 3, 7, dtype=out_dtype)
        interpolate(real, fake, alpha, out)
        assert_rounded(out, expected(real, fake, alpha), compute=alpha.dtype)


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
def test_a_group_shares_one_alpha(group_size: int) -> None:
    real, fake, alpha = torch.randn(6, 5), torch.randn(6, 5), torch.rand(6 // group_size)
    out = torch.empty_like(real)
    interpolate(real, fake, alpha, out)
    assert_rounded(out, expected(real, fake, alpha))


def test_samples_dense_in_another_order_stay_in_it() -> None:
    real, fake = (torch.randn(3, 5, 6, 7).contiguous(memory_format=torch.channels_last) for _ in range(2))
    alpha = torch.rand(3)
    out = torch.empty_like(real)
    interpolate(real, fake, alpha, out)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_rounded(out, expected(real, fake, alpha))


def test_an_unaligned_start_is_read_and_nothing_beside_the_output_is_written() -> None:
    real, fake, alpha = torch.randn(4, 7)[1:], torch.randn(4, 7)[1:], torch.rand(3)
    buffer = torch.full((5, 7), 9.0)
    interpolate(real, fake, alpha, buffer[1:4])
    assert_rounded(buffer[1:4], expected(real, fake, alpha))
    assert (buffer[[0, 4]] == 9).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_place(bad: float) -> None:
    real, fake, alpha = torch.randn(3, 5), torch.randn(3, 5), torch.rand(3)
    real[1, 2] = bad
    out = torch.empty_like(real)
    interpolate(real, fake, alpha, out)
    assert not out[1, 2].isfinite()
    assert out.isfinite().sum() == 14


FIRST, LAST = torch.contiguous_format, torch.channels_last


@pytest.fixture(scope="module")
def _launched_on_a_cpu() -> None:
    """Once: some versions of PyTorch refuse a second registration, others warn of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        launch_on("CPU", "assemble")


@pytest.mark.usefixtures("_launched_on_a_cpu")
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64,) * 2]
)
@pytest.mark.parametrize("given", [(FIRST, FIRST), (LAST, LAST), (FIRST, LAST)])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 6, 7), (2, 1, 5, 5), (2, 40, 9, 11), (2, 5, 1, 1)])
def test_the_batch_of_a_step_in_one_pass(shape, last, given, dtypes, group_size):
    real, fake = (samples(shape, dtypes[0]).contiguous(memory_format=form) for form in given)
    alpha = alpha_for(dtypes[0], shape[0] // group_size)
    made = torch.ops.wgan_fast.assemble(real, fake, alpha, dtypes[1], last)
    assert made.is_contiguous(memory_format=LAST if last else FIRST)
    x, y, mixed = made.chunk(3)
    assert_rounded(x, real.double())
    assert_rounded(y, fake.double())
    assert_rounded(mixed, expected(real, fake, alpha), compute=alpha.dtype)


@pytest.mark.usefixtures("_launched_on_a_cpu")
@pytest.mark.parametrize("given", [FIRST, LAST])
@pytest.mark.parametrize("shape", [(4, 3, 6, 7), (2, 1, 5, 5), (3, 5, 33, 31)])
def test_the_batch_of_a_step_over_padded_channels(shape, given):
    real, fake = (samples(shape, torch.float32).contiguous(memory_format=given) for _ in range(2))
    alpha = alpha_for(torch.float32, shape[0])
    made = torch.ops.wgan_fast.assemble(real, fake, alpha, torch.bfloat16, True, 8)
    assert made.is_contiguous(memory_format=LAST)
    x, y, mixed = made[:, : shape[1]].chunk(3)
    assert_rounded(x, real.double())
    assert_rounded(y, fake.double())
    assert_rounded(mixed, expected(real, fake, alpha), compute=alpha.dtype)
    assert (made[:, shape[1] :] == 0).all()


@pytest.mark.usefixtures("_launched_on_a_cpu")
@pytest.mark.parametrize("shape", [(5,), (3, 2100), (2, 3, 4), (2, 3, 2, 3, 4)])
def test_the_batch_of_a_step_of_any_dimensions(shape):
    real, fake, alpha = samples(shape, torch.float32), samples(shape, torch.float32), alpha_for(torch.float32, shape[0])
    last = len(shape) == 5
    made = torch.ops.wgan_fast.assemble(real, fake, alpha, torch.float32, last)
    expected_rows = torch.cat([real.double(), fake.double(), expected(real, fake, alpha)])
    assert_rounded(made, expected_rows)
    assert made.is_contiguous(memory_format=torch.channels_last_3d if last else FIRST)
