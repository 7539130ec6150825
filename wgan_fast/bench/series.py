"""Several workloads, one after the other, into one results file that is continued where it was left."""

import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ..errors import InputError
from ..training.files import write_atomically
from . import report
from .check import WrongGradientsError
from .results import environment, read, slug, write
from .run import run
from .variants import VARIANTS
from .workloads import build


def measure(
    points: Iterable[tuple[str, str, int | None]],
    *,
    names: Iterable[str],
    device: torch.device,
    folder: Path,
    budget: float,
    sample_shape: tuple[int, ...] | None = None,
    fresh: bool = False,
) -> tuple[Path, list[str]]:
    """Measure workloads one after the other, and write what was found after each.

    A workload whose variants are all in the file already, from this commit on this device, is not measured again.

    Args:
        points: Critic, as for ``workloads.build``, penalty, a key of ``workloads.PENALTIES``, and batch size, None for
            the critic's own.
        names: Keys of ``VARIANTS``.
        device: Where.
        folder: Where the results file, its table and its plot are written.
        budget: Seconds of timed rounds for each workload.
        sample_shape: Shape of one sample, for ``module:function``.
        fresh: Whether to measure again what is in the file.

    Returns:
        The results file, and the message of every variant that was refused.

    Raises:
        InputError: A name is unknown, or the results file cannot be read.
    """
    names = list(names)
    for name in names:
        if name not in VARIANTS:
            raise InputError(f"variants must be among {', '.join(VARIANTS)}, got {name!r}")
    here = environment(device)
    path = folder / f"{slug(here)}.json"
    results: dict[str, Any] = {"environment": here, "workloads": {}}
    if path.exists():
        found = read(path)
        if found["environment"] == here:
            results = found
        else:
            print(f"wgan-fast: {path} is of another commit or other versions: starting anew", file=sys.stderr)
    refused: list[str] = []
    for model, penalty, batch_size in points:
        workload = build(model, penalty=penalty, batch_size=batch_size, sample_shape=sample_shape, device=device)
        wanted = {name for name in names if VARIANTS[name].applies(workload)}
        if not fresh and wanted <= results["workloads"].get(workload.key, {}).get("variants", {}).keys():
            continue
        # What counting and timing found must not depend on what was measured before.
        torch.compiler.reset()
        try:
            with _Bar(workload.key) as bar:
                measured = run(workload, names, budget=budget, progress=bar.show)
        except WrongGradientsError as reason:
            refused.append(str(reason))
            continue
        results["workloads"][workload.key] = measured
        refused += [v["refused"] for v in measured["variants"].values() if "refused" in v]
        folder.mkdir(parents=True, exist_ok=True)
        write(path, results)
        write_atomically(path.with_suffix(".md"), report.page(results).encode())
        report.plot(results, path.with_suffix(".png"))
        print(report.details(results | {"workloads": {workload.key: measured}}).partition("\n\n")[2])
    return path, refused


class _Bar:
    """A progress bar on a terminal, a line for each workload elsewhere; on standard error."""

    def __init__(self, key: str) -> None:
        self._console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._live = Progress(*columns, console=self._console, disable=not self._console.is_terminal, transient=True)
        self._key, self._task = key, self._live.add_task(key, total=1.0)

    def show(self, doing: str, fraction: float) -> None:
        self._live.update(self._task, description=f"{self._key}: {doing}", completed=fraction)

    def __enter__(self) -> Self:
        if not self._console.is_terminal:
            print(f"measuring {self._key}", file=sys.stderr)
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
