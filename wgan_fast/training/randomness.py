"""The random numbers of a run: one stream per purpose, saved with a checkpoint, and left alone by looking."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

NETWORKS, TRAINING, PICTURES, NOISE, PROCESS = range(5)
"""Purposes; no two of them draw the same numbers from the same seed."""


def stream_seed(seed: int, *purpose: int) -> int:
    """Derive the seed of a purpose's own stream; further numbers tell the streams of one purpose apart."""
    return int(np.random.SeedSequence(seed, spawn_key=purpose).generate_state(1)[0])


def seed_everything(seed: int, *purpose: int) -> None:
    """Seed the default generators of torch, NumPy and Python: a network of the user's may draw from any."""
    seed = stream_seed(seed, *purpose)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def random_state(device: torch.device, shared: torch.Generator | None = None) -> dict[str, Any]:
    """Read every default generator, as a tree that a checkpoint can hold.

    Args:
        device: Where training runs.
        shared: What several processes draw from in place of the device's default generator; None where one trains.
    """
    cuda = device.type == "cuda"
    return {
        "torch": torch.get_rng_state() if shared is None or cuda else shared.get_state(),
        "cuda": None if not cuda else torch.cuda.get_rng_state(device) if shared is None else shared.get_state(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],  # noqa: NPY002
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any], device: torch.device, shared: torch.Generator | None = None) -> None:
    """Put every generator back to what ``random_state`` read, also where more or fewer processes train now."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    own = state[device.type if device.type == "cuda" else "torch"]
    if shared is not None and own is not None:
        shared.set_state(own)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


@contextlib.contextmanager
def undisturbed(device: torch.device, seed: int) -> Iterator[None]:
    """Draw the same numbers inside whenever it is entered, and leave the generators as they were."""
    before = random_state(device)
    seed_everything(seed, PICTURES)
    try:
        yield
    finally:
        set_random_state(before, device)
