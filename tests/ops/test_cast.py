"""The operator that casts many tensors at once."""

import pytest
import torch

from wgan_fast import ops


@pytest.mark.parametrize("form", [torch.ops.wgan_fast.cast.default, ops.cast])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_it_casts_each_as_it_lies(form, dtype):
    image = torch.randn(4, 3, 5, 6)
    given = [
        torch.randn(7, 5),
        image.contiguous(memory_format=torch.channels_last),
        torch.randn(5, 7).t(),
        torch.ones(0),
    ]
    made = form(given, dtype)
    for one, tensor in zip(made, given, strict=True):
        assert torch.equal(one, tensor.to(dtype))
        assert one.stride() == tensor.stride()
        assert one.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or not one.numel()


def test_the_operator_is_registered_correctly():
    arguments = ([torch.randn(3, 2), torch.randn(2)], torch.bfloat16)
    torch.library.opcheck(torch.ops.wgan_fast.cast.default, arguments)
