"""What training shows of itself: pictures of samples, curves, and how far the samples are from held-out data."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import plots, quality
from .config import TrainConfig
from .data import Data, Labels, Split
from .metrics import wasserstein_estimate
from .randomness import undisturbed
from .run import dealt, draw_noise, generate

GRID = 64
POINTS = 2048
"""Samples in the pictures written during training; points in a plane are many."""

CLASS_ROWS, PER_CLASS = 32, 8
"""The pictures of conditional images: a row for each class, at most as many rows, and samples in a row."""

HELD_OUT = 512
"""Held-out samples behind the held-out Wasserstein estimate."""

FIRST = 64
"""Samples to train on that stand for held-out ones where none were held out."""


class Looking:
    """Looks at networks again and again, always with the same noise, labels and real samples.

    Training is left as it was: no random number is taken from it, and no module changes its mode.

    Args:
        data: What is trained on.
        labels: Its classes, if they are known.
        classes: Their names, of a conditional run; empty for others.
        config: The resolved configuration.
        latent_dim: Length of the generator's noise.
        device: Where the networks are.
        rates: Whether this process rates samples where the configuration tracks their quality.

    Attributes:
        noise: That of the pictures, ``[N, latent_dim]`` on the device.
        labels: The classes in the pictures, ``[N]`` int64; None where none are asked for.
        real: Real samples ``[M, *sample_shape]``, held out if any are.

    Raises:
        InputError: Quality is to be tracked, and nothing was held out.
    """

    def __init__(
        self,
        data: Data,
        labels: Labels | None,
        classes: Sequence[str],
        config: TrainConfig,
        latent_dim: int,
        device: torch.device,
        *,
        rates: bool,
    ) -> None:
        self._data, self._config, self._device, self._latent_dim = data, config, device, latent_dim
        pictured, self._columns = GRID, math.isqrt(GRID)
        if data.kind == "vectors" and data.sample_shape in ((1,), (2,)):
            pictured = POINTS
        elif classes and data.kind == "images":
            pictured, self._columns = min(len(classes), CLASS_ROWS) * PER_CLASS, PER_CLASS
        self.noise = draw_noise(pictured, latent_dim, config.seed).to(device)
        self.labels = dealt(min(len(classes), CLASS_ROWS), pictured).to(device) if classes else None
        self._held_out = _some(data.held_out, HELD_OUT, config.seed)
        self._held_out_labels = _some(labels.held_out, HELD_OUT, config.seed) if labels and classes else None
        first = self._held_out if self._held_out is not None else _some(data.train, FIRST, config.seed)
        assert first is not None
        self.real = first
        self._tracker = None
        if config.track and (rates or not len(data.held_out)):
            self._tracker = quality.tracker(data, labels, seed=config.seed, conditional=config.conditional)

    def save_picture(self, generator: nn.Module, path: Path) -> Tensor:
        """Draw what a generator makes of the same noise into a PNG file; returns the samples, float32 on the CPU."""
        path.parent.mkdir(exist_ok=True)
        with undisturbed(self._device, self._config.seed):
            samples = self._generate(generator, self.noise, self.labels).float()
        if self._data.kind == "vectors" and self._data.sample_shape == (2,):
            real = self._data.train.take(min(samples.shape[0], len(self._data.train)), seed=self._config.seed)
            plots.save_scatter(samples, real, path, modes=self._data.modes)
        else:
            plots.save_grid(samples, path, columns=self._columns)
        return samples

    def held_out_wasserstein(self, generator: nn.Module, critic: nn.Module) -> float | None:
        """Estimate the Wasserstein distance to held-out samples; None where none were held out."""
        if self._held_out is None:
            return None
        with undisturbed(self._device, self._config.seed):
            fake = self._generate(generator, self._draw(len(self._held_out)), self._held_out_labels)
            return wasserstein_estimate(critic, self._held_out, fake, labels=self._held_out_labels)

    def rate(self, generator: nn.Module) -> dict[str, Any]:
        """Rate what a generator makes; no figures where quality is not tracked."""
        if self._tracker is None:
            return {}
        with undisturbed(self._device, self._config.seed):
            fake = self._generate(generator, self._draw(self._tracker.samples), self._tracker.labels)
            return self._tracker.rate(fake.float())

    def _draw(self, n: int) -> Tensor:
        return draw_noise(n, self._latent_dim, self._config.seed)

    def _generate(self, generator: nn.Module, noise: Tensor, labels: Tensor | None) -> Tensor:
        condition = () if labels is None else (labels.to(self._device),)
        return generate(generator, noise.to(self._device), *condition).cpu()


def _some(split: Split, n: int, seed: int) -> Tensor | None:
    """Up to ``n`` samples of a split on the CPU; None where it has none."""
    n = min(n, len(split))
    return split.take(n, seed=seed) if n else None
