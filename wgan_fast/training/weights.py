"""How the weights of networks begin, and the spectral norm of a critic's."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ..errors import InputError

INITIALISATIONS = ("pytorch", "he", "dcgan", "orthogonal")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTED = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED_CONVOLUTIONS)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def initialise(module: nn.Module, scheme: str) -> None:
    """Draw the weights of every linear, convolution and batch norm layer anew, in place, from the default generator.

    Call it before `spectral_norm`: a parametrised weight is computed, not stored.

    Args:
        module: The network.
        scheme: "pytorch" leaves the module as it is. "he": normal with variance 2 / fan-in (He et al. 2015,
            arXiv:1502.01852), where the fan-in of a transposed convolution counts the inputs that reach one output.
            "dcgan": normal with standard deviation 0.02, batch norm scales normal around 1 with the same deviation
            (Radford et al. 2016, arXiv:1511.06434). "orthogonal" (Saxe et al. 2014, arXiv:1312.6120). The last three
            set the biases of these layers to zero.

    Raises:
        InputError: The scheme is unknown.
        ValueError: A weight is parametrised.
    """
    if scheme not in INITIALISATIONS:
        raise InputError(f"init must be one of {', '.join(INITIALISATIONS)}, got {scheme!r}")
    if scheme == "pytorch":
        return
    for name, layer in module.named_modules():
        if isinstance(layer, _WEIGHTED):
            if parametrize.is_parametrized(layer, "weight"):
                raise ValueError(f"module.{name}.weight is parametrised: initialise before parametrising")
            if scheme == "he":
                nn.init.normal_(layer.weight, std=math.sqrt(2 / _fan_in(layer)))
            elif scheme == "dcgan":
                nn.init.normal_(layer.weight, std=0.02)
            else:
                nn.init.orthogonal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, _BATCH_NORMS) and layer.affine:
            if scheme == "dcgan":
                nn.init.normal_(layer.weight, mean=1.0, std=0.02)
            nn.init.zeros_(layer.bias)


def _fan_in(layer: nn.Module) -> float:
    """Count the inputs that reach one output: torch.nn.init counts a transposed convolution's outputs instead."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, _TRANSPOSED_CONVOLUTIONS):
        kernel = math.prod(layer.kernel_size) / math.prod(layer.stride)
        return layer.in_channels / layer.groups * kernel
    return weight[0].numel()


def spectral_norm(critic: nn.Module) -> nn.Module:
    """Divide every linear, convolution and embedding weight by its largest singular value, in place.

    The value is estimated by power iteration (Miyato et al. 2018, arXiv:1802.05957), one step per forward in
    training mode, with `torch.nn.utils.parametrizations.spectral_norm`; a weight that is computed already, by a
    parametrisation or by the hook of `torch.nn.utils.spectral_norm` or `weight_norm`, is left alone.

    Args:
        critic: The network to change.

    Returns:
        The same network.

    Raises:
        InputError: A layer is of TorchScript, which takes no parametrisation.
    """
    for layer in list(critic.modules()):
        if isinstance(layer, torch.jit.ScriptModule):
            raise InputError(
                "spectral_norm must be False for a critic in TorchScript: norm its layers before scripting it"
            )
        if isinstance(layer, (*_WEIGHTED, nn.Embedding)) and "weight" in layer._parameters:
            parametrizations.spectral_norm(layer)
    return critic
