"""Samples with a look of their own: waveforms, and volumes by slices."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from numpy.typing import NDArray

SLICES = 3
"""Of a volume's first dimension, evenly spread."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#999999")
_POINTS = 1000  # of a waveform that are drawn, about as many as there are pixels


def are_waveforms(shape: tuple[int, ...]) -> bool:
    """Whether samples of this shape are a few channels of many values: ``[C, L]``, C at most 4."""
    return len(shape) == 2 and shape[0] <= len(_COLOURS) and shape[1] >= 4 * shape[0] and shape[1] >= 16


def slices(volumes: NDArray[np.float32], gap: int) -> NDArray[np.float32]:
    """Lay slices of volumes ``[N, C, D, H, W]`` side by side, as images ``[N, 3 or 1, H', W']`` in [-1, 1].

    Three channels are colours, others stand one below the other. Values beyond [-1, 1] are scaled into it, all alike.
    Between two slices is a line of the grey ``gap``, 0 to 255.
    """
    n, channels, depth, height, width = volumes.shape
    finite = volumes[np.isfinite(volumes)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (-1.0, 1.0)
    if low < -1 or high > 1:
        volumes = (volumes - low) * (2 / (high - low)) - 1
    count = min(SLICES, depth)
    at = ((np.arange(count) + 0.5) * depth / count).astype(int)
    rows = np.full((n, channels, height, count * (width + 1) - 1), gap / 127.5 - 1, dtype=np.float32)
    for place, index in enumerate(at):
        rows[..., place * (width + 1) : place * (width + 1) + width] = volumes[:, :, index]
    return rows if channels == 3 else rows.reshape(n, 1, channels * height, -1)


def draw_waveforms(axes: Axes, waves: NDArray[np.float32], columns: int, captions: list[str] | None) -> None:
    """Draw waveforms ``[N, C, L]`` row by row, all at one scale, channels in colours of their own.

    Args:
        axes: Where to draw.
        waves: Values; NaN and infinity leave gaps.
        columns: Waveforms in a row.
        captions: A text over each; None for none.
    """
    n, channels, length = waves.shape
    columns = min(columns, n)
    waves = np.where(np.isfinite(waves), waves, np.nan)[:, :, :: max(1, length // _POINTS)]
    finite = waves[np.isfinite(waves)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (-1.0, 1.0)
    heights = (waves - (low + high) / 2) / ((high - low) or 1.0) * 0.8  # within a cell of height 1
    across = np.linspace(0.04, 0.96, waves.shape[2])
    for channel in range(channels):
        lines = [
            np.column_stack([across + index % columns, heights[index, channel] - index // columns])
            for index in range(n)
        ]
        axes.add_collection(LineCollection(lines, colors=_COLOURS[channel], linewidths=0.8, alpha=0.9))
    for index, caption in enumerate(captions or ()):
        axes.text(index % columns + 0.5, 0.44 - index // columns, caption, ha="center", va="center", fontsize=7)
    axes.set_xlim(0, columns)
    axes.set_ylim(0.5 - math.ceil(n / columns), 0.5)
    axes.set_axis_off()
    axes.set_title(f"{n:,} generated sample{'s' * (n != 1)} of length {length:,}; values {low:.3g} to {high:.3g}",
                   loc="left", fontsize=10)  # fmt: skip
