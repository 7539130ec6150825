"""Pictures of made rows beside real ones: every column, and how columns go together. PNG files."""

import math
import os
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..training.figures import BLUE, GREY, new_figure, save_figure
from .judgement import View, associations, column_distances

MOST_PANELS = 60
MOST_BARS = 8
MOST_LETTERS = 60
"""Columns up to which their names are written beside a matrix."""
_OUTSIDE = 0.005
"""Share of the real numbers at either end that a panel leaves out."""


def save_marginals(
    made: View, real: View, path: str | os.PathLike[str], *, dates: frozenset[int] = frozenset()
) -> None:
    """Draw how every column is distributed, real in grey and made in blue; of more than 60 columns the worst.

    Args:
        made: Rows that were made.
        real: Real rows, of the same columns.
        path: The file to write; its folder exists.
        dates: Which of the numbers are dates, in seconds since 1970.
    """
    distances = column_distances(made, real)
    shown = sorted(sorted(distances, key=lambda i: -distances[i])[:MOST_PANELS])
    across = min(len(shown), 5 if len(shown) <= 20 else 8)
    down = math.ceil(len(shown) / across)
    figure = new_figure(max(2.4 * across, 4.8), 0.7 + 1.9 * down)
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, i in zip(grid.flat, shown):
        if i in real.codes:
            # Of the same coding; the made ones may have levels that the real ones lack.
            levels = max(real.levels[i], made.levels[i], key=len)
            _bars(axes, made.codes[i], real.codes[i], ["(missing)" if k is None else str(k[1]) for k in levels])
        else:
            _histograms(axes, made.numbers[i], real.numbers[i], date=i in dates)
        axes.set_title(f"{_short(real.names[i], 20)}  {distances[i]:.2f}", fontsize=8, loc="left")
        axes.set_yticks([])
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right", "left"]].set_visible(False)
    some = f", the {len(shown)} columns of {len(distances)} that differ most" if len(shown) < len(distances) else ""
    figure.suptitle(f"Real (grey) and made (blue){some}; behind each name the distance, 0 to 1", fontsize=10)
    save_figure(figure, path)


def save_associations(made: View, real: View, path: str | os.PathLike[str]) -> None:
    """Draw how much the columns go together, as ``associations`` measures it, in real and in made rows.

    Args:
        made: Rows that were made.
        real: Real rows, of the same columns.
        path: The file to write; its folder exists.
    """
    names = [_short(real.names[i], 16) for i in sorted(real.names)]
    side = min(max(3.2, 0.16 * len(names)), 9.6)
    figure = new_figure(2 * side + 2.2, side + 1.2)
    both = figure.subplots(1, 2)
    size = max(3.0, min(8.0, 44 * side / max(len(names), 1)))
    for axes, title, view in zip(both, ("real", "made"), (real, made)):
        image = axes.imshow(associations(view), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_yticks([])
        axes.set_xticks([])
        if len(names) <= MOST_LETTERS:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    if len(names) <= MOST_LETTERS:
        both[0].set_yticks(range(len(names)), names, fontsize=size)
    figure.colorbar(image, ax=list(both), shrink=0.7, label="correlation, or 0 to 1 with a category")
    save_figure(figure, path)


def _histograms(axes: Axes, made: Any, real: Any, *, date: bool) -> None:
    values = [side[np.isfinite(side)] for side in (real, made)]
    if not len(values[0]):
        return
    low, high = np.quantile(values[0], [_OUTSIDE, 1 - _OUTSIDE])
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 31)
    shares = [np.histogram(side, edges)[0] / max(len(side), 1) for side in values]
    if date:
        ends = np.array([low, high]).astype("datetime64[s]").astype(str)
        # Within two days it is the hour that tells.
        axes.set_xticks([low, high], [end[11:16] if high - low < 172_800 else end[:10] for end in ends])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.stairs(shares[0], edges, fill=True, color=GREY, alpha=0.6)
    axes.stairs(shares[1], edges, color=BLUE, linewidth=1.2)


def _bars(axes: Axes, made: Any, real: Any, levels: list[str]) -> None:
    counts = np.stack([np.bincount(side, minlength=len(levels)) / len(side) for side in (real, made)])
    order = np.argsort(-counts[0], kind="stable")
    shown = order[: MOST_BARS if len(order) > MOST_BARS + 1 else MOST_BARS + 1]
    names, shares = [_short(levels[i], 9) for i in shown], counts[:, shown]
    if rest := len(order) - len(shown):
        axes.set_xlabel(f"and {rest} more", fontsize=6)
    places = np.arange(len(names))
    axes.bar(places, shares[0], width=0.8, color=GREY, alpha=0.6)
    axes.bar(places, shares[1], width=0.4, color=BLUE)
    axes.set_xticks(places, names, rotation=35 if len(names) > 3 else 0, ha="right" if len(names) > 3 else "center")


def _short(text: str, letters: int) -> str:
    # A dollar sign would begin a formula.
    text = text if len(text) <= letters else text[: letters - 1] + "…"
    return text.replace("$", r"\$")
