"""Devices by the names that a configuration gives them."""

import torch

from ..errors import InputError


def resolve_device(name: str) -> torch.device:
    """Turn a configuration's device into a torch device that is there.

    Raises:
        InputError: The name is no device, or that device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
            raise InputError(
                f"device {name} is not available: torch {torch.__version__} has {built}, and no GPU is seen"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise InputError(f"device {name} is not available: there are {torch.cuda.device_count()} GPUs")
    elif device.type != "cpu":
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device
