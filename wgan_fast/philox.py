"""The random numbers of the Triton kernels in plain PyTorch: a draw on a GPU can be repeated on a CPU."""

import torch
from torch import Tensor

_ROUNDS = 10
_MASK = 0xFFFFFFFF


def uniform(state: Tensor, count: int) -> Tensor:
    """Draw from U[0, 1): number i is a function of the seed and of offset + i alone, on every device.

    Equals ``triton.language.rand(seed, offset + i)`` bit for bit.

    Args:
        state: int64, seed and offset first.
        count: How many numbers.

    Returns:
        ``[count]``, float32, on the device of ``state``.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Philox4x32-10.
    """
    seed, offset = state[0], state[1]
    counter = offset + torch.arange(count, device=state.device)
    # 32-bit words in int64: a product wraps around, which leaves all of its 64 bits right.
    c0, c1 = counter & _MASK, counter >> 32 & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(_ROUNDS):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & _MASK) ^ c1 ^ k0, b & _MASK, (a >> 32 & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    # As a signed word, folded onto the positive ones; the factor keeps the greatest of them below 1 in float32.
    signed = torch.where(c0 > 0x7FFFFFFF, _MASK - c0, c0)
    return signed.to(torch.int32).to(torch.float32) * 4.6566127342e-10
