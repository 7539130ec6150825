"""Pictures of samples and of training: PNG files, drawn with Pillow and Matplotlib.

Figures are drawn through Matplotlib's object interface: the caller's backend and pyplot state are never touched.
Every file is written whole or not at all.
"""

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import InputError
from .files import write_atomically

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
    from PIL import Image, ImageDraw, ImageFont

    from .waveforms import SLICES, are_waveforms, draw_waveforms, slices
except ImportError as error:
    raise ImportError("wgan_fast.training.plots needs Matplotlib and Pillow: pip install 'wgan_fast[train]'") from error

_Samples = Tensor | ArrayLike

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
_SCORES = matplotlib.colormaps["viridis"].with_extremes(bad=GREY)  # which NaN would leave out
_CELL = 64  # pixels that a small image is enlarged towards
_FRAME = 192  # pixels that a small image of an animation is enlarged towards
_SHOWN = 80  # milliseconds that each is shown
_GAP = 4  # pixels between the images of a grid
_GAP_GREY = 192  # between volumes, whose slices are often white at their edges
_CAPTION = 11  # pixels of a score's letters
_MANY = 200  # values from which a curve is drawn smoothed


def _array(samples: _Samples) -> NDArray[np.float32]:
    if isinstance(samples, Tensor):
        samples = samples.detach().float().cpu().numpy()
    return np.asarray(samples, dtype=np.float32)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, apart from pyplot's."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(width, height), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure into a PNG file, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(Path(path), buffer.getvalue())


def save_grid(
    samples: _Samples,
    path: str | os.PathLike[str],
    *,
    columns: int,
    scores: Tensor | ArrayLike | None = None,
) -> None:
    """Draw samples of any shape into one PNG file.

    Images make a grid, row by row, small ones enlarged by a whole factor, and so do volumes, by three slices each;
    waveforms are drawn as such, row by row; points in the plane make a scatter plot, numbers a histogram; other samples
    are flattened and make the rows of a heat map.

    Args:
        samples: Images `[N, C, H, W]` with values in [-1, 1] (three channels are colours, the channels of any other
            number are drawn side by side in grey), volumes `[N, C, D, H, W]`, waveforms `[N, C, L]` of up to four
            channels, points `[N, 2]`, numbers `[N, 1]`, or any other `[N, *D]`.
        path: The file to write; its folder exists.
        columns: Images per row of the grid.
        scores: One critic score per sample, `[N]`: images and rows are sorted by it, highest first, and captioned
            with it; points are coloured by it. None draws the samples in their order.

    Raises:
        InputError: There are no samples, columns is below 1, or scores are not one per sample.
    """
    values = _array(samples)
    if values.ndim < 2 or values.size == 0:
        raise InputError(f"samples must have shape [N, *D] with at least one value, got {list(values.shape)}")
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    marks = None if scores is None else _array(scores)
    if marks is not None:
        if marks.shape != (len(values),):
            raise InputError(f"scores must be one per sample, [{len(values)}], got {list(marks.shape)}")
        # Stable, and NaN last: negated, it still sorts to the end.
        order = np.argsort(-marks, kind="stable")
        values, marks = values[order], marks[order]
    if values.ndim == 4:
        _save_images(values, path, columns, marks)
    elif values.ndim == 5:
        _save_images(slices(values, _GAP_GREY), path, columns, marks, SLICES * _CELL, _GAP_GREY)
    elif are_waveforms(values.shape[1:]):
        _save_waveforms(values, path, columns, marks)
    elif values.shape[1:] == (2,):
        _save_points(values, path, marks)
    elif values.shape[1:] == (1,) and marks is None:
        _save_histogram(values[:, 0], path)
    else:
        _save_heat_map(values.reshape(len(values), -1), path, marks)


def _captions(scores: NDArray[np.float32]) -> list[str]:
    """Format scores with as many decimals as tell them apart, to three digits of their spread."""
    finite = scores[np.isfinite(scores)]
    spread = float(np.ptp(finite)) if len(finite) else 0.0
    decimals = min(max(2 - math.floor(math.log10(spread)), 0), 4) if spread > 0 else 2
    return [f"{score:z.{decimals}f}".replace("-", "−") for score in scores.tolist()]


def _save_images(
    images: NDArray[np.float32],
    path: str | os.PathLike[str],
    columns: int,
    scores: NDArray[np.float32] | None,
    cell: int = _CELL,
    gap: int = 255,
) -> None:
    if images.shape[1] != 3:
        images = np.concatenate(np.split(images, images.shape[1], axis=1), axis=3)
    pixels = _enlarged(to_pixels(images), cell)
    height, width = pixels.shape[1:3]
    captions = None if scores is None else _captions(scores)
    pitch_x, pitch_y = width + _GAP, height + _GAP
    if captions is not None:
        font_file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
        font = ImageFont.truetype(str(font_file), _CAPTION)
        pitch_x = max(pitch_x, _GAP + math.ceil(max(font.getlength(caption) for caption in captions)))
        pitch_y += _CAPTION + _GAP
    columns = min(columns, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    canvas = Image.new("RGB", (_GAP + columns * pitch_x, _GAP + rows * pitch_y), (gap, gap, gap))
    draw = ImageDraw.Draw(canvas)
    for index, picture in enumerate(pixels):
        centre = _GAP + index % columns * pitch_x + (pitch_x - _GAP) // 2
        top = _GAP + index // columns * pitch_y
        canvas.paste(Image.fromarray(picture), (centre - width // 2, top))
        if captions is not None:
            draw.text((centre, top + height + 1), captions[index], fill="black", font=font, anchor="ma")
    buffer = io.BytesIO()
    canvas.save(buffer, format="png")
    write_atomically(Path(path), buffer.getvalue())


def to_pixels(images: _Samples) -> NDArray[np.uint8]:
    """Turn images into 8-bit pixels: round(127.5 (x + 1)), halves to even, cut off below 0 and above 255.

    Pixels that data was read from come back as they were.

    Args:
        images: `[N, C, H, W]` with values in [-1, 1].

    Returns:
        `[N, H, W]` where C is 1, `[N, H, W, C]` otherwise.
    """
    # NaN has no grey: draw it black rather than as whatever the cast makes of it.
    values = np.nan_to_num((_array(images) + 1) * 127.5, nan=0.0)
    pixels: NDArray[np.uint8] = values.round().clip(0, 255).astype(np.uint8)
    return pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)


def _enlarged(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    scale = max(1, round(side / max(pixels.shape[1:3])))
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def save_animation(images: _Samples, path: str | os.PathLike[str]) -> None:
    """Show images one after another, for ever, in one GIF file; small ones enlarged by a whole factor.

    Args:
        images: `[N, C, H, W]` with values in [-1, 1]; grey where C is 1, colours where it is 3 or 4.
        path: The file to write; its folder exists.
    """
    frames = [Image.fromarray(frame) for frame in _enlarged(to_pixels(images), _FRAME)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="gif", save_all=True, append_images=frames[1:], duration=_SHOWN, loop=0)
    write_atomically(Path(path), buffer.getvalue())


def _save_waveforms(
    waves: NDArray[np.float32], path: str | os.PathLike[str], columns: int, scores: NDArray[np.float32] | None
) -> None:
    columns = min(columns, len(waves))
    rows = math.ceil(len(waves) / columns)
    figure = new_figure(min(max(1.5 * columns, 6), 18), min(max(0.5 + 0.8 * rows, 1.5), 18))
    draw_waveforms(figure.add_subplot(), waves, columns, None if scores is None else _captions(scores))
    save_figure(figure, path)


def _save_histogram(numbers: NDArray[np.float32], path: str | os.PathLike[str]) -> None:
    figure = new_figure(6.2, 4)
    axes = figure.add_subplot()
    axes.hist(numbers[np.isfinite(numbers)], bins=min(60, 10 + len(numbers) // 40), color=BLUE, alpha=0.8)
    axes.set_title(_heading(numbers[:, None]), loc="left")
    axes.set_xlabel("value")
    axes.set_ylabel("samples")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _heading(samples: NDArray[np.float32]) -> str:
    """Count samples ``[N, *D]``, and those of them that cannot be drawn."""
    count, broken = len(samples), int((~np.isfinite(samples.reshape(len(samples), -1)).all(axis=1)).sum())
    lost = f", {broken:,} with values that are not finite" if broken else ""
    return f"{count:,} generated sample{'s' * (count != 1)}{lost}"


def _save_points(points: NDArray[np.float32], path: str | os.PathLike[str], scores: NDArray[np.float32] | None) -> None:
    figure = new_figure(6.2 if scores is None else 7.2, 6)
    axes = figure.add_subplot()
    size = 8 if len(points) > 50 else 30
    if scores is None:
        axes.scatter(points[:, 0], points[:, 1], s=size, color=BLUE, alpha=0.6, linewidths=0)
    else:
        marks = axes.scatter(
            points[:, 0], points[:, 1], s=size, c=scores, cmap=_SCORES, plotnonfinite=True, linewidths=0
        )
        figure.colorbar(marks, ax=axes, label="critic score", shrink=0.8)
    _dress_plane(axes, _heading(points))
    save_figure(figure, path)


def _dress_plane(axes: Axes, title: str) -> None:
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title(title, loc="left")
    axes.set_xlabel("first coordinate")
    axes.set_ylabel("second coordinate")
    axes.spines[["top", "right"]].set_visible(False)


def _save_heat_map(rows: NDArray[np.float32], path: str | os.PathLike[str], scores: NDArray[np.float32] | None) -> None:
    figure = new_figure(8, min(max(2.5, 1.2 + 0.16 * len(rows)), 14))
    axes = figure.add_subplot()
    finite = rows[np.isfinite(rows)]
    # One value a thousand times the others would leave them a single colour.
    low, high = np.quantile(finite, [0.005, 0.995]) if finite.size else (-1.0, 1.0)
    picture = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(picture, ax=axes, label="value", extend="both")
    axes.set_xlabel("component of the flattened sample")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if scores is None:
        axes.set_ylabel("sample")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        labelled = np.unique(np.linspace(0, len(rows) - 1, 40).round().astype(int))
        axes.set_yticks(labelled, _captions(scores[labelled]), fontsize=7)
        axes.set_ylabel("critic score of the sample")
    axes.set_title(_heading(rows), loc="left")
    save_figure(figure, path)


def save_scatter(fake: _Samples, real: _Samples, path: str | os.PathLike[str], modes: _Samples | None = None) -> None:
    """Draw generated over real points in the plane into a PNG file.

    The frame is a square around the real points; how many generated points lie outside is said in the title.

    Args:
        fake: Generated points, `[N, 2]`.
        real: Real points, `[M, 2]`.
        path: The file to write; its folder exists.
        modes: Centres of the real distribution, `[K, 2]`, marked with crosses; None marks nothing.

    Raises:
        InputError: A set is empty or not of points in the plane.
    """
    sets = {"fake": _array(fake), "real": _array(real)}
    if modes is not None:
        sets["modes"] = _array(modes)
    for name, points in sets.items():
        if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
            raise InputError(f"{name} must be points of the plane, [N, 2], got shape {list(points.shape)}")
    low, high = sets["real"].min(axis=0), sets["real"].max(axis=0)
    centre = (low + high) / 2
    side = float((high - low).max()) or 0.1 * float(np.abs(centre).max()) or 1.0
    reach = 0.65 * side  # half of the widest side, and a margin
    outside = int((~(np.abs(sets["fake"] - centre) <= reach).all(axis=1)).sum())

    figure = new_figure(6.2, 6.6)
    axes = figure.add_subplot()
    styles: dict[str, dict[str, Any]] = {
        "real": {"s": 6, "color": GREY, "alpha": 0.5, "linewidths": 0, "label": "real"},
        "fake": {"s": 6, "color": ORANGE, "alpha": 0.6, "linewidths": 0, "label": "generated"},
        "modes": {"s": 40, "color": "black", "marker": "+", "linewidths": 1, "label": "mode"},
    }
    for name, style in styles.items():
        if name in sets:
            axes.scatter(sets[name][:, 0], sets[name][:, 1], **style)
    beyond = f", {outside:,} of them outside the frame" if outside else ""
    _dress_plane(axes, f"{len(sets['fake']):,} generated sample{'s' * (len(sets['fake']) != 1)}{beyond}")
    axes.set_aspect("equal", adjustable="box")
    axes.set_xlim(centre[0] - reach, centre[0] + reach)
    axes.set_ylim(centre[1] - reach, centre[1] + reach)
    figure.legend(loc="outside lower center", ncols=len(sets), frameon=False, markerscale=2)
    save_figure(figure, path)


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
            loc="left", fontsize=11,
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
