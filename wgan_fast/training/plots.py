"""Pictures of samples: PNG files, drawn with Pillow and Matplotlib.

Every file is written whole or not at all.
"""

import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import InputError
from .files import write_atomically

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator
    from PIL import Image, ImageDraw, ImageFont

    from .figures import BLUE, GREY, ORANGE, new_figure, save_figure
    from .waveforms import SLICES, are_waveforms, draw_waveforms, slices
except ImportError as error:
    raise ImportError("wgan_fast.training.plots needs Matplotlib and Pillow: pip install 'wgan_fast[train]'") from error

_Samples = Tensor | ArrayLike

_SCORES = matplotlib.colormaps["viridis"].with_extremes(bad=GREY)  # which NaN would leave out
_CELL = 64  # pixels that a small image is enlarged towards
_FRAME = 192  # pixels that a small image of an animation is enlarged towards
_SHOWN = 80  # milliseconds that each is shown
_GAP = 4  # pixels between the images of a grid
_GAP_GREY = 192  # between volumes, whose slices are often white at their edges
_CAPTION = 11  # pixels of a score's letters


def _array(samples: _Samples) -> NDArray[np.float32]:
    if isinstance(samples, Tensor):
        samples = samples.detach().float().cpu().numpy()
    return np.asarray(samples, dtype=np.float32)


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
