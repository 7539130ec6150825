"""The operator that writes a step's whole batch, and the graphs that take it."""

import pytest
import torch

from wgan_fast import ops

ASSEMBLE = torch.ops.wgan_fast.assemble.default


def pair(*shape: int, last: bool = False):
    layout = torch.channels_last if last else torch.contiguous_format
    real, fake = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    return real, fake


@pytest.mark.parametrize("form", [ASSEMBLE, ops.assemble])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("given_last", [False, True])
def test_it_is_what_mixing_joining_and_casting_give(form, dtype, last, given_last):
    real, fake = pair(6, 3, 4, 5, last=given_last)
    alpha = torch.rand(3)
    mixed = torch.ops.wgan_fast.interpolate(real, fake, alpha)
    layout = torch.channels_last if last else torch.contiguous_format
    expected = torch.cat([real, fake, mixed]).to(dtype, memory_format=layout)
    made = form(real, fake, alpha, dtype, last)
    assert torch.equal(made, expected)
    assert made.stride() == expected.contiguous(memory_format=layout).stride()
    assert made.dtype == dtype


@pytest.mark.parametrize("given_last", [False, True])
def test_further_channels_are_zero(given_last):
    real, fake = pair(6, 3, 4, 5, last=given_last)
    alpha = torch.rand(6)
    made = ASSEMBLE(real, fake, alpha, torch.bfloat16, True, 8)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made[:, :3], ASSEMBLE(real, fake, alpha, torch.bfloat16, True))
    assert (made[:, 3:] == 0).all()


@pytest.mark.parametrize(("last", "channels"), [(False, 8), (True, 2)])
def test_fewer_channels_and_others_than_last_are_refused(last, channels):
    with pytest.raises(ValueError, match="expected channels last, and at least the samples' 3"):
        ASSEMBLE(*pair(4, 3, 2, 5), torch.rand(4), torch.bfloat16, last, channels)


@pytest.mark.parametrize(("last", "channels"), [(False, 0), (True, 0), (True, 8)])
def test_the_operator_is_registered_correctly(last, channels):
    arguments = (*pair(4, 3, 2, 5), torch.rand(4), torch.bfloat16, last, channels)
    torch.library.opcheck(torch.ops.wgan_fast.assemble, arguments)
