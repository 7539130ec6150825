"""The curves of a training run, as one PNG file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

try:
    from matplotlib.axes import Axes
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    from .figures import BLUE, GREEN, GREY, ORANGE, new_figure, save_figure
except ImportError as error:
    raise ImportError("wgan_fast.training.curves needs Matplotlib: pip install 'wgan_fast[train]'") from error

_MANY = 200  # values from which a curve is drawn smoothed


class _Curve(NamedTuple):
    key: str
    label: str
    colour: str


class _Panel(NamedTuple):
    title: str
    unit: str
    curves: tuple[_Curve, ...]
    from_zero: bool = False


_PANELS = (
    _Panel(
        "Wasserstein estimate",
        "D(real) − D(generated)",
        (_Curve("wasserstein", "training", BLUE), _Curve("held_out_wasserstein", "held out", ORANGE)),
    ),
    _Panel(
        "Losses",
        "loss",
        (_Curve("critic_loss", "critic", BLUE), _Curve("generator_loss", "generator", ORANGE)),
    ),
    _Panel(
        "Critic scores",
        "mean score",
        (_Curve("real_score", "real", BLUE), _Curve("fake_score", "generated", ORANGE)),
    ),
    _Panel("Gradient norm of the critic", "mean norm", (_Curve("gradient_norm", "norm", GREEN),)),
    _Panel("Gradient penalty", "penalty, weight included", (_Curve("penalty", "penalty", GREEN),), from_zero=True),
    _Panel("Learning rate", "learning rate", (_Curve("learning_rate", "learning rate", GREY),), from_zero=True),
)


_QUALITY = (
    ("frechet_distance", "Fréchet distance"),
    ("sliced_wasserstein", "sliced Wasserstein distance"),
    ("column_distance", "mean distance of columns"),
)
"""What is drawn beside the Wasserstein estimate, if it was tracked: the first of these that was."""


def save_curves(
    records: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    target: float | None = None,
) -> None:
    """Draw the curves of a training run into a PNG file: long ones light, with a smoothed line over them.

    Args:
        records: The lines of metrics.jsonl as mappings: `step` (generator steps) and any of `wasserstein`,
            `held_out_wasserstein`, `critic_loss`, `generator_loss`, `real_score`, `fake_score`, `gradient_norm`,
            `penalty` and `learning_rate`. A panel is drawn for what occurs; a learning rate that stays the same is said
            in the title instead. Missing and non-finite values are left out; the few that lie far beyond the rest are
            marked at the edge, with the extreme. Where `frechet_distance` or `sliced_wasserstein` was tracked, it
            shares the panel of the Wasserstein estimate, with Spearman's rank correlation of the two in the title: an
            estimate that means something falls as the distance does (Arjovsky et al. 2017, arXiv:1701.07875, figure 3).
        path: The file to write; its folder exists.
        title: Title of the whole picture; None for none.
        target: The gradient norm that the penalty asks for, drawn as a line; None draws none.

    Raises:
        InputError: No record has a step and a value to draw.
    """
    records = [record for record in records if "step" in record]
    quality = next(((label, found) for key, label in _QUALITY if len((found := _series(records, key))[0])), None)
    panels = []
    for panel in _PANELS:
        series = [(curve, *_series(records, curve.key)) for curve in panel.curves]
        series = [entry for entry in series if len(entry[1])]
        if series:
            panels.append((panel, series))
    rates = _series(records, "learning_rate")[1]
    if len(panels) > 1 and len(rates) and np.ptp(rates) == 0:
        panels = [entry for entry in panels if entry[0].curves[0].key != "learning_rate"]
        title = f"{_shortened(title)}, learning rate {rates[0]:g}" if title is not None else None
    if not panels:
        raise InputError("records must hold at least one step with a finite value to draw")

    # The first panel is the one to look at: it gets a row of its own where the others fill the rows below,
    # or where its title is long.
    wide = 1 if quality is not None else len(panels) % 2
    rows = (len(panels) + wide + 1) // 2
    every_step = np.concatenate([steps for _, series in panels for _, steps, _ in series])
    first, last = every_step.min(), every_step.max()
    margin = 0.02 * (last - first) or 1.0
    frame = first - margin, last + margin
    figure = new_figure(11, 0.4 + 2.7 * rows)
    grid = figure.add_gridspec(rows, 2)
    for index, (panel, series) in enumerate(panels):
        place = grid[0, :] if wide and index == 0 else grid[divmod(index + wide, 2)]
        axes = figure.add_subplot(place)
        _draw_panel(axes, panel, series, target if panel.curves[0].key == "gradient_norm" else None, frame)
        if quality is not None and panel is _PANELS[0]:
            label, distances = quality
            _draw_quality(axes, *series[0][1:], label, *distances)
    if title is not None:
        figure.suptitle(_shortened(title), x=0.01, ha="left", fontsize=13)
    save_figure(figure, path)


def _shortened(title: str, length: int = 100) -> str:
    """Return a title that fits the figure: of a long one the middle is left out."""
    if len(title) <= length:
        return title
    return f"{title[: length // 3]} … {title[-(2 * length // 3 - 30) :]}"


def _draw_quality(
    axes: Axes,
    steps: NDArray[np.float64],
    estimates: NDArray[np.float64],
    label: str,
    tracked_steps: NDArray[np.float64],
    distances: NDArray[np.float64],
) -> None:
    """Draw a tracked distance on an axis of its own, and say how its ranks correlate with those of the estimate."""
    right = axes.twinx()
    (line,) = right.plot(tracked_steps, distances, color=GREEN, linewidth=1.6, marker="o", markersize=4)
    # A generator begins ten times as far away as it ends: on a linear scale what happens later is a flat line. Where it
    # does not move as far, a logarithmic axis would have a single number on it.
    if distances.max() > 4 * distances.min() > 0:
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        right.yaxis.set_minor_locator(NullLocator())
    else:
        right.yaxis.set_major_locator(MaxNLocator(5))
    right.set_ylabel(label, fontsize=9, color=GREEN)
    right.tick_params(labelsize=8)
    right.spines["top"].set_visible(False)
    axes.legend(
        [*axes.get_legend_handles_labels()[0], line],
        [*axes.get_legend_handles_labels()[1], label],
        loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3, frameon=False, fontsize=9,
    )  # fmt: skip
    # The estimate of one batch is noisy: take the mean of what was logged since the distance before.
    ends = np.searchsorted(steps, tracked_steps, side="right")
    starts = np.concatenate(([0], ends[:-1]))
    pairs = [(estimates[a:b].mean(), distance) for a, b, distance in zip(starts, ends, distances) if a < b]
    correlation = _rank_correlation(*np.array(pairs).reshape(-1, 2).T)
    if correlation is not None:
        axes.set_title(
            f"{axes.get_title(loc='left')}; Spearman's ρ with the {label}: {correlation:.2f} ({len(pairs)} points)",
            loc="left", fontsize=10,
        )  # fmt: skip


def _rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None where there is no order to compare."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[inverse] - (len(values) + 1) / 2)
    first, second = ranks
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return steps and values of the records in which `key` has a finite value, in the order of the steps."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    order = np.argsort(steps, kind="stable")
    order = order[np.isfinite(values[order])]
    return steps[order], values[order]


def _smooth(steps: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the moving mean of the middle half of a twentieth of the values, at no more than 300 of the steps."""
    centres = np.linspace(0, len(values) - 1, min(len(values), 300)).round().astype(int)
    half = len(values) // 40
    means = []
    for centre in centres:
        window = np.sort(values[max(centre - half, 0) : centre + half + 1])
        # A plain mean would smear the spike of the first steps over the whole window.
        quarter = len(window) // 4
        means.append(window[quarter : len(window) - quarter].mean())
    return steps[centres], np.array(means)


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    """Frame the values, cutting off the few that are far beyond the rest, as those of the first steps may be."""
    low, high = np.quantile(values, [0.06, 0.94])
    if low == high:
        low, high = np.quantile(values, [0.02, 0.98])
    reach = 0.4 * (high - low)
    low, high = low - reach, high + reach
    least, most = float(values.min()), float(values.max())
    # What lies little beyond is no reason to cut.
    little = (high - low) / 2
    return least if low - least < little else low, most if most - high < little else high


def _short(value: float) -> str:
    digits = ",.0f" if 100 <= abs(value) < 1e6 else ".3g"
    return f"{value:{digits}}".replace("-", "−", 1)


def _mark_beyond(axes: Axes, series: list[tuple[_Curve, NDArray[np.float64], NDArray[np.float64]]]) -> None:
    """Mark at the upper and lower edge the extremes that lie beyond them."""
    bottom, top = axes.get_ylim()
    first, last = axes.get_xlim()
    marks = {"^": 0, "v": 0}
    for curve, steps, values in series:
        for marker, edge, at in (("^", top, values.argmax()), ("v", bottom, values.argmin())):
            if bottom <= values[at] <= top:
                continue
            right = (steps[at] - first) < 0.6 * (last - first)
            axes.plot([steps[at]], [edge], marker, color=curve.colour, markersize=6, clip_on=False)
            axes.annotate(
                _short(values[at]), (steps[at], edge), textcoords="offset points", color=curve.colour, fontsize=7,
                xytext=(7 if right else -7, (-1 if marker == "^" else 1) * (5 + 10 * marks[marker])),
                ha="left" if right else "right", va="center", zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )  # fmt: skip
            marks[marker] += 1


def _draw_panel(
    axes: Axes,
    panel: _Panel,
    series: list[tuple[_Curve, NDArray[np.float64], NDArray[np.float64]]],
    target: float | None,
    frame: tuple[float, float],
) -> None:
    for curve, steps, values in series:
        if len(values) < _MANY:
            size = 4 if len(values) > 1 else 9
            axes.plot(steps, values, color=curve.colour, linewidth=1.3, marker=".", markersize=size, label=curve.label)
        else:
            axes.plot(steps, values, color=curve.colour, linewidth=0.6, alpha=0.3)
            axes.plot(*_smooth(steps, values), color=curve.colour, linewidth=1.6, label=curve.label)
    limits = [limit for _, _, values in series for limit in _limits(values)]
    if panel.from_zero:
        limits.append(0.0)
    if target is not None:
        axes.axhline(target, color="black", linewidth=1, linestyle="--", label=f"target {target:g}")
        limits.append(target)
    low, high = min(limits), max(limits)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    axes.set_ylim(low if panel.from_zero else low - margin, high + margin)
    axes.set_xlim(*frame)
    _mark_beyond(axes, series)
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.set_xlabel("generator step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=len(labels), frameon=False, fontsize=9)
