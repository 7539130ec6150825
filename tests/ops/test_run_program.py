"""The operator that runs programs; what they compute is tested with the writer of them, in tests/four_pass."""

import pytest
import torch

from wgan_fast.ops.run_program import AVAILABLE


@pytest.mark.skipif(not AVAILABLE, reason="the extension is not there")
def test_the_operator_is_registered_correctly() -> None:
    # One input of 3 elements, one output of shape [2, 3], no planned memory, and no instruction.
    program = torch.tensor([0, 1, 3, 1, 2, 2, 3])
    arguments = (program, [torch.ones(3)], 0.0, 0.0, 0)
    assert [tuple(out.shape) for out in torch.ops.wgan_fast.run_program(*arguments)] == [(2, 3)]
    # Without data nobody knows what it returns: that stands in the program.
    checks = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(torch.ops.wgan_fast.run_program.default, arguments, test_utils=checks)
