"""What training and the benchmark do to networks as wholes: copy them, and lay them out in memory."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Network = TypeVar("Network", bound=nn.Module)

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def copy_of(network: Network) -> Network:
    """Copy a network, also one that holds tensors with a graph behind them, which ``copy.deepcopy`` refuses.

    Such are weights that a hook computes before every forward (``torch.nn.utils.weight_norm``, and ``spectral_norm``
    once it was called) and activations that a layer keeps. The copy has their values, and no part in the graph.
    """
    held = [leaf for module in network.modules() for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
    with torch.no_grad():  # TorchScript clones its parameters as a forward would
        copied = copy.deepcopy(network, {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf})
    for parameter, original in zip(copied.parameters(), network.parameters()):
        parameter.requires_grad_(original.requires_grad)
    return copied


def channels_last(samples: Tensor) -> Tensor:
    """Return images ``[N, C, H, W]`` and volumes ``[N, C, D, H, W]`` in channels-last memory, others as they are."""
    layout = _CHANNELS_LAST.get(samples.dim())
    return samples if layout is None else samples.contiguous(memory_format=layout)


def to_channels_last(network: nn.Module) -> None:
    """Bring the weights of convolutions over images and volumes into channels-last memory, in place.

    ``network.to(memory_format=...)`` takes one format for both, and fails on the other.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = channels_last(tensor.data)
