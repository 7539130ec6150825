"""The tables of docs/gpu.md, from the committed results."""

import json
import sys
from pathlib import Path
from typing import Any

from session import Found, medians

from wgan_fast.bench import report


def section(files: list[Found]) -> str:
    """What was found in each file."""
    return "\n".join(_file(found) for found in files)


def _file(found: Found) -> str:
    items, parts = found["items"], [f"**{report.where(found)}**\n"]
    ceilings = items.get("ceilings", {})
    if "copy_gb_per_s" in ceilings:
        rates = ", ".join(f"{ceilings[f'{name}_tflop_per_s']:.0f} in {name}" for name in ("fp32", "tf32", "bf16"))
        parts.append(f"A copy moves {ceilings['copy_gb_per_s']:.0f} GB/s; products reach {rates} (TFLOP/s).\n")
    for make in (_steps, _iterations, _kernels, _fused):
        rows = make(items)
        if len(rows) > 1:
            parts.append(report.table(rows))
    return "\n".join(parts)


def _chosen(items: dict[str, Found], part: str) -> dict[str, dict[str, float]]:
    return {
        key.removeprefix(f"{part}/").replace("/", ", "): medians(found["milliseconds"])
        for key, found in items.items()
        if key.startswith(f"{part}/") and "milliseconds" in found
    }


def _best(times: dict[str, float], name: str, **having: bool) -> float | None:
    """The least time of a way to compute it over layouts, as a graph or compiled where that is asked for."""
    chosen = [
        time
        for key, time in times.items()
        if key.split(", ")[0] == name and all((word in key.split(", ")) is given for word, given in having.items())
    ]
    return min(chosen, default=None)


def _steps(items: dict[str, Found]) -> list[list[str]]:
    header = ["critic, batch, arithmetic", "naive", "ours", "as a graph", "compiled, as a graph"]
    rows = [
        [
            *header,
            "eager: naive / ours",
            "both as graphs",
            "both compiled, as graphs",
            "eager naive / best of ours",
            "JAX in TF32 / best of ours",
        ]
    ]
    for case, times in _chosen(items, "target").items():
        graph, compiled = (_best(times, "ours", graph=True, compiled=is_compiled) for is_compiled in (False, True))
        naive_graph, naive_compiled = (_best(times, "naive", graph=True, compiled=given) for given in (False, True))
        ours = min(time for key, time in times.items() if key.startswith("ours"))
        milliseconds = [times["naive"], times["ours"], graph, compiled]
        jax = times.get("jax") if case.endswith("tf32") else None
        pairs = [(times["naive"], times["ours"]), (naive_graph, graph), (naive_compiled, compiled)]
        pairs += [(times["naive"], ours), (jax, ours)]
        rows.append([case, *map(_milliseconds, milliseconds), *(_ratio(a, b) for a, b in pairs)])
    return rows


def _iterations(items: dict[str, Found]) -> list[list[str]]:
    names = {"naive": "usual loop", "tuned": "tuned loop", "ours": "ours", "ours, graph": "as a graph"}
    names["ours, channels last, graph"] = "channels last, as a graph"
    names["ours, channels last, compiled, graph"] = "that compiled"
    rows = [["whole iteration", *names.values(), "usual loop / best of ours"]]
    for case, times in _chosen(items, "iteration").items():
        ours = min(time for key, time in times.items() if key.startswith("ours"))
        rows.append([case, *(_milliseconds(times.get(name)) for name in names), _ratio(times["naive"], ours)])
    return rows


def _kernels(items: dict[str, Found]) -> list[list[str]]:
    rows = [["kernel", "of a copy's bandwidth", "target", "times as fast as torch.compile", "as eager PyTorch"]]
    for case, times in _chosen(items, "bandwidth").items():
        found: dict[str, Any] = items[f"bandwidth/{case}"]
        eager = next((times[name] for name in ("eager", "autograd") if name in times), None)
        ratios = [_ratio(other, times["ours"]) for other in (times.get("compiled"), eager)]
        rows.append([case, f"{found['of_copy_bandwidth']:.2f}", f"{found['target']:.2f}", *ratios])
    return rows


def _fused(items: dict[str, Found]) -> list[list[str]]:
    header = ["fused MLP step: width, arithmetic", "four passes, compiled", "fused", "as graphs: four passes", "fused"]
    rows = [[*header, "four passes / fused"]]
    for case, times in _chosen(items, "fused-mlp").items():
        names = [f"{way}{form}" for form in ("", "-graph") for way in ("four_pass", "ours")]
        ratio = _ratio(times.get("four_pass-graph"), times.get("ours-graph"))
        rows.append([case, *(_milliseconds(times.get(name)) for name in names), ratio])
    return rows


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms"


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.2f}" if one and other else ""


if __name__ == "__main__":
    page, folder = map(Path, sys.argv[1:])
    report.update(page, section([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]))
