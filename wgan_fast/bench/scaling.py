"""How the cost of a step grows with batch, width, depth and image size: what is measured, its table and its plot."""

import sys
from pathlib import Path
from typing import Any

from . import report
from .results import milliseconds, ratio, read

VARIANTS = ("naive", "ours", "limit")
SERIES: dict[str, dict[int, tuple[str, int]]] = {
    "batch size, MLP": {N: ("toy-mlp", N) for N in (16, 64, 256, 1024, 4096)},
    "batch size, DCGAN": {N: ("dcgan-28", N) for N in (4, 16, 64, 256)},
    "width, MLP": {H: (f"mlp-3x{H}", 256) for H in (32, 64, 128, 256, 512, 1024)},
    "hidden layers, MLP": {L: (f"mlp-{L}x256", 256) for L in (1, 2, 4, 8)},
    "channels, DCGAN": {C: (f"dcgan-28x{C}", 32) for C in (8, 16, 32, 64)},
    "image size, ResNet": {side: (f"resnet-{side}", 8) for side in (16, 32, 64)},
}
"""Along each series one thing grows: its value, then the critic's name and the batch size."""


def points() -> list[tuple[str, str, int | None]]:
    """Every point of every series, as ``series.measure`` takes them, each once."""
    every = [point for values in SERIES.values() for point in values.values()]
    return [(model, "wgan-gp", batch_size) for model, batch_size in dict.fromkeys(every)]


def key(model: str, batch_size: int) -> str:
    """Return the name under which a results file keeps a point of a series."""
    return f"{model}/wgan-gp/{batch_size}"


def section(results: dict[str, Any]) -> str:
    """One table a series, one row a point.

    Our time is taken apart: "products" is the limit's share, "operators" what the step's operators cost were they all
    as cheap as those of the cheapest point (which do little but start), and "rest" what is left: elementwise work,
    reductions and copies on their way through memory. A point that was refused or not reached has no row.
    """
    workloads = _measured(results)
    beyond = [_beyond(w) / w["variants"]["ours"]["launches"] for w in workloads.values()]
    start = min((cost for cost in beyond if cost > 0), default=0.0)
    parts = [f"{report.where(results)}; an operator costs {1e3 * start:.1f} µs to start.\n"]
    for title, series in SERIES.items():
        header = [
            title, "naive", "ours", "naive / ours", "products", "operators", "rest", "launches", "MB, naive", "ours",
        ]  # fmt: skip
        rows = [header]
        for value, point in series.items():
            if key(*point) not in workloads:
                continue
            workload = workloads[key(*point)]
            naive, ours = workload["variants"]["naive"], workload["variants"]["ours"]
            speed, took = ratio(workload, "naive", "ours"), milliseconds(workload, "ours")
            assert speed is not None
            products = min(1.0, milliseconds(workload, "limit") / took)
            operators = min(1 - products, start * ours["launches"] / took)
            rows.append(
                [
                    f"{value:,}",
                    f"{milliseconds(workload, 'naive'):.3g} ms",
                    f"{took:.3g} ms",
                    f"{speed.median:.2f}",
                    *(f"{share:.0%}" for share in (products, operators, 1 - products - operators)),
                    f"{naive['launches']} → {ours['launches']}",
                    *(f"{found['peak_bytes'] / 1e6:.1f}" for found in (naive, ours)),
                ]
            )
        parts.append(report.table(rows))
    return "\n".join(parts)


def _measured(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Find the points of the series, by their keys, of which every variant was timed."""
    keys = [key(model, batch_size or 0) for model, _, batch_size in points()]
    found = {name: results["workloads"][name] for name in keys if name in results["workloads"]}
    return {
        name: workload
        for name, workload in found.items()
        if all("milliseconds" in workload["variants"].get(variant, {}) for variant in VARIANTS)
    }


def _beyond(workload: dict[str, Any]) -> float:
    """Milliseconds of our step beyond the limit."""
    return max(0.0, milliseconds(workload, "ours") - milliseconds(workload, "limit"))


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw milliseconds along each series, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    measured = _measured(results)
    colours = {"naive": "#D55E00", "ours": "#009E73", "limit": "#BBBBBB"}
    for axes, (title, series) in zip(figure.subplots(2, 3).flat, SERIES.items()):
        for name, colour in colours.items():
            times = {x: milliseconds(measured[key(*p)], name) for x, p in series.items() if key(*p) in measured}
            axes.loglog(list(times), list(times.values()), marker="o", markersize=3, color=colour, label=name)
        axes.set_xticks(list(series), [str(value) for value in series])
        axes.minorticks_off()
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
    figure.supylabel("milliseconds a step", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    report.save(figure, path)


def page_section(folder: Path) -> str:
    """Return what stands between the page's markers: a plot and the tables for each results file in a folder."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        picture = f"../benchmarks/results/scaling/{path.stem}.png"
        parts.append(f"![Milliseconds a step along each series]({picture})\n\n{section(read(path))}")
    return "\n".join(parts)


if __name__ == "__main__":
    page, folder = map(Path, sys.argv[1:])
    report.update(page, page_section(folder))
