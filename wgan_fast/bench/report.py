"""Results as people read them: tables in Markdown, a plot, and the README's table between its markers."""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..training.files import write_atomically
from .results import Ratio, milliseconds, ratio, read
from .run import TOO_SLOW_REASON
from .variants import VARIANTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN = "<!-- benchmarks: written by `make report` -->"
END = "<!-- end of benchmarks -->"
LIMITS = {"fp32": "limit", "bf16": "limit-bf16"}
OTHERS = {"naive-compiled": "PyTorch, compiled", "jax": "JAX"}
PLOTTED = ("naive-compiled", "jax", "no-penalty", "drop-in", "ours", "ours-compiled", "limit")


def details(results: dict[str, Any]) -> str:
    """One table a workload, one row a variant; Markdown that is also legible as it is."""
    parts = [f"# {where(results)}\n"]
    for key, workload in results["workloads"].items():
        parts.append(f"## {key}\n\n{workload['title']}; {workload['parameters']:,} parameters.\n")
        header = ["variant", "ms", "naive / it", "quartiles", "limit / it", "error", "units", "launches", "MB", "what"]
        rows = [header, *(_row(workload, name) for name in workload["variants"])]
        parts.append(table(rows))
    return "\n".join(parts)


def _row(workload: dict[str, Any], name: str) -> list[str]:
    variant, found = VARIANTS[name], workload["variants"][name]
    if "milliseconds" not in found:
        why = found.get("skipped") or f"REFUSED: {found['refused']}"
        return [name, *[""] * 8, f"{variant.title}: not timed: {why}"]
    speed = ratio(workload, "naive-penalty" if variant.computes == "penalty" else "naive", name)
    limit = ratio(workload, LIMITS[variant.precision], name) if variant.computes == "step" else None
    return [
        name,
        f"{milliseconds(workload, name):.2f}",
        f"{speed.median:.2f}" if speed else "",
        f"{speed.low:.2f}-{speed.high:.2f}" if speed else "",
        f"{limit.median:.2f}" if limit else "",
        f"{found['error']:.1e}" if "error" in found else "",
        f"{found['units']:.2f}" if "units" in found else "",
        f"{found['launches']}" if "launches" in found else "",
        f"{found['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in found else "",
        variant.title,
    ]


def page(results: dict[str, Any]) -> str:
    """Return the page of a results file: everything in one table, then one table a workload."""
    heading, rest = details(results).split("\n\n", 1)
    return f"{heading}\n\n{overview(results)}\n{rest}"


def summary(results: dict[str, Any]) -> str:
    """Return the README's table: one row a workload; bold where we lose."""
    header = ["critic / penalty / batch", "PyTorch", "ours", "against the best other", "of the limit", "memory"]
    rows = [header, *(_summary_row(key, workload) for key, workload in results["workloads"].items())]
    return f"{where(results)}\n\n{table(rows)}"


def _summary_row(key: str, workload: dict[str, Any]) -> list[str]:
    best, limit, memory = _best(workload), ratio(workload, "limit", _best(workload)), _memory(workload)
    others = [name for name in OTHERS if "milliseconds" in workload["variants"].get(name, {})]
    other = min(others, key=lambda name: milliseconds(workload, name), default=None)
    return [
        key.replace("/", " / "),
        f"{milliseconds(workload, 'naive'):.3g} ms",
        _times(ratio(workload, "naive", best)),
        "" if other is None else f"{_times(ratio(workload, other, best))} ({OTHERS[other]})",
        f"{limit.median:.0%}" if limit else "",
        memory,
    ]


def _best(workload: dict[str, Any]) -> str:
    """Return the faster of our two float32 variants."""
    timed = [name for name in ("ours", "ours-compiled") if "milliseconds" in workload["variants"].get(name, {})]
    return min(timed, key=lambda name: milliseconds(workload, name), default="ours")


def _memory(workload: dict[str, Any]) -> str:
    naive, ours = workload["variants"]["naive"], workload["variants"].get("ours", {})
    if "peak_bytes" not in ours:
        return ""
    share = ours["peak_bytes"] / naive["peak_bytes"]
    return _bold(f"{share:.2f}", share >= 1.005)


def overview(results: dict[str, Any]) -> str:
    """Return one row a workload, ours against each baseline; bold where we lose.

    A cell is empty where nothing was measured, and "too slow" where that would have filled the rounds.
    """
    header = [
        "critic / penalty / batch", "naive", "drop-in", "step", "compiled", "bf16", "vs compiled", "vs JAX",
        "vs no penalty", "of the limit", "memory", "units", "launches",
    ]  # fmt: skip
    workloads = results["workloads"].items()
    return table(
        [header, *(_overview_row(key, workload) for key, workload in workloads if "naive" in workload["variants"])]
    )


def _overview_row(key: str, workload: dict[str, Any]) -> list[str]:
    variants, best = workload["variants"], _best(workload)
    naive, ours = variants["naive"], variants.get("ours", {})
    limit = ratio(workload, "limit", best)
    return [
        key.replace("/", " / "),
        f"{milliseconds(workload, 'naive'):.3g} ms",
        *(_times(ratio(workload, "naive", name)) for name in ("drop-in", "ours", "ours-compiled")),
        _times(ratio(workload, "naive-bf16", "ours-bf16")),
        *(_against(workload, name, best) for name in ("naive-compiled", "jax", "no-penalty")),
        f"{limit.median:.0%}" if limit else "",
        _memory(workload),
        f"{naive['units']:.1f} → {ours['units']:.1f}" if "units" in ours else "",
        f"{naive['launches']} → {ours['launches']}" if "launches" in ours else "",
    ]


def _against(workload: dict[str, Any], competitor: str, best: str) -> str:
    if workload["variants"].get(competitor, {}).get("skipped", "").endswith(TOO_SLOW_REASON):
        return "too slow"
    return _times(ratio(workload, competitor, best))


def _times(ratio: Ratio | None) -> str:
    return "" if ratio is None else _bold(f"{ratio.median:.2f}", ratio.median < 1)


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def where(results: dict[str, Any]) -> str:
    """Device, versions and commit in a line."""
    env = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    flags = f" ({', '.join(env['flags'])})" if env["flags"] else ""
    return f"{env['device']}{flags}, {env['threads']} threads; {versions}; commit {env['commit'] or 'unknown'}"


def table(rows: list[list[str]]) -> str:
    """Rows as a Markdown table, the first its header, with columns that line up."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw how many times as fast as naive every variant is, a group of bars a workload, quartiles as whiskers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    workloads = results["workloads"]
    # Okabe and Ito's colours, which colour-blind readers can tell apart; grey is what nobody can reach.
    colours = dict(zip(PLOTTED, ("#E69F00", "#CC79A7", "#56B4E9", "#F0E442", "#009E73", "#0072B2", "#BBBBBB")))
    bars: list[tuple[float, str, Ratio]] = []
    centres, y = [], 0.0
    for workload in workloads.values():
        found = [(name, value) for name in PLOTTED if (value := ratio(workload, "naive", name)) is not None]
        bars += [(y + index, name, value) for index, (name, value) in enumerate(found)]
        centres.append(y + (len(found) - 1) / 2)
        y += len(found) + 1
    figure = Figure(figsize=(9, 1.4 + 0.14 * y), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in PLOTTED:
        shown = [(at, value) for at, of, value in bars if of == name]
        if not shown:
            continue
        axes.barh(
            [at for at, _ in shown],
            [value.median for _, value in shown],
            0.9,
            xerr=[[v.median - v.low for _, v in shown], [v.high - v.median for _, v in shown]],
            color=colours[name],
            error_kw={"elinewidth": 0.8},
            label=VARIANTS[name].title,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(centres, [_in_words(key, workload) for key, workload in workloads.items()], fontsize=8)
    axes.set_ylim(y - 0.5, -1)
    axes.set_xlabel("critic steps in the time of one in plain PyTorch, float32; longer is faster")
    env = results["environment"]
    axes.set_title(f"{env['device']}, {env['threads']} threads, torch {env['versions']['torch']}", fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    save(figure, path)


def _in_words(key: str, workload: dict[str, Any]) -> str:
    name, penalty, batch = key.split("/")
    penalised = {"none": "no penalty", "wgan-gp": "WGAN-GP", "r1": "R1", "r1-r2": "R1 + R2"}.get(penalty, penalty)
    return f"{workload['title'] or name}\n{penalised}, batch {batch}"


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def readme_section(folder: Path) -> str:
    """Return what stands between the README's markers: a table and a plot for each results file in a folder."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        picture = f"benchmarks/results/{path.stem}.png"
        parts.append(f"{summary(read(path))}\n![Speed on {path.stem}]({picture})\n")
    return "\n".join(parts) or "No results are committed yet.\n"


def update(page: Path, section: str) -> None:
    """Write the section between a page's markers anew.

    Raises:
        InputError: The markers are not there, once each and in order.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{page} must contain the lines {BEGIN} and {END}")
    write_atomically(page, f"{before}{BEGIN}\n\n{section}\n{END}{after}".encode())


if __name__ == "__main__":
    update(Path(sys.argv[1]), readme_section(Path(sys.argv[2])))
