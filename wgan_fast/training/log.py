"""What a run says while it trains: metrics on disk, and a progress line for people."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from .files import write_atomically

METRICS_FILE = "metrics.jsonl"
PLAIN_INTERVAL = 10.0
"""Seconds between lines where the output is no terminal."""

ESTIMATE_AFTER = 3.0
"""Seconds of steps from which the rest is estimated."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read a run's metrics, one dict per line; a last line cut short by a kill is left out."""
    path = run / METRICS_FILE
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsLog:
    """Appends metrics to ``metrics.jsonl``.

    Args:
        run: The run's folder; None keeps the records in memory, for a process that does not write.
        step: The step to continue after; later lines of an interrupted run are dropped.
    """

    def __init__(self, run: Path | None, step: int) -> None:
        self.records: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        if run is None:
            return
        self.records = [record for record in read_metrics(run) if record["step"] <= step]
        path = run / METRICS_FILE
        write_atomically(path, "".join(_line(record) for record in self.records).encode())
        self._file = path.open("a")

    @property
    def last(self) -> dict[str, Any]:
        """The newest record; empty before the first."""
        return self.records[-1] if self.records else {}

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, which has a ``step``.

        Figures that are not finite are written as null, and so is the penalty where no gradient norm was measured.
        """
        record = {key: None if _not_finite(value) else value for key, value in record.items()}
        # An iteration without a penalty counts it as 0, which on a curve would look like a norm at its target.
        if "penalty" in record and record["gradient_norm"] is None:
            record["penalty"] = None
        self.records.append(record)
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()

    def sync(self) -> None:
        """Bring every record to the disk: after a power cut no checkpoint may be newer than its metrics."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Where the disk is full, closing fails as writing did: the first error is the one to tell.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            if self._file is not None:
                self._file.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class Board:
    """TensorBoard's events of a run, in its folder ``tensorboard``; nothing where TensorBoard is not installed.

    Args:
        run: The run's folder.
        step: The step to continue after; later events of an interrupted run are dropped.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        with contextlib.suppress(UnicodeEncodeError):  # TensorBoard takes no path that is not UTF-8
            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record of the metrics."""
        if self._writer is not None:
            for key, value in record.items():
                if key != "step" and value is not None:
                    self._writer.add_scalar(key, value, record["step"])

    def show(self, name: str, picture: Path, step: int) -> None:
        """Write a picture that lies in a file."""
        if self._writer is not None:
            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Bring everything to the disk."""
        if self._writer is not None:
            self._writer.close()


class ProgressLine:
    """A live progress bar on a terminal, a line every few seconds elsewhere; both on standard error.

    Args:
        steps: Generator steps in all.
        step: Steps taken already.
        shown: Whether this process speaks.
        unit: What is counted per second.
    """

    def __init__(self, steps: int, step: int, *, shown: bool = True, unit: str = "images") -> None:
        self.steps, self._unit = steps, unit
        self._console = Console(stderr=True, quiet=not shown)
        self._live = Progress(
            SpinnerColumn(),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._live.add_task("train", total=steps, completed=step, figures="")
        self._printed = time.monotonic()
        self._start: tuple[int, float] | None = None
        self._estimated = False

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int, figures: dict[str, Any]) -> None:
        """Show that ``step`` is done, with the newest figures."""
        text = ""
        if figures:
            epoch = f"epoch {figures['epoch']:.1f}  " if "epoch" in figures else ""
            speed = figures[f"{self._unit}_per_second"]
            text = f"{epoch}{speed:.0f} {self._unit}/s  Wasserstein {_number(figures['wasserstein'])}"
        self._live.update(self._task, completed=step, figures=text)
        now = time.monotonic()
        # The first step plans and compiles, and tells nothing of those after it; training may have gone back before it.
        if self._start is None or step <= self._start[0]:
            self._start = step, now
            return
        first, started = self._start
        left = (now - started) / (step - first) * (self.steps - step)
        if not self._estimated and now - started >= ESTIMATE_AFTER and step < self.steps:
            self._estimated = True
            pace = (now - started) / (step - first)
            self.message(f"{pace:.3g} s a step: about {duration(left)} for the {self.steps - step:,} steps to come")
        if not self._console.is_terminal and now - self._printed >= PLAIN_INTERVAL:
            self._printed = now
            self.message(f"step {step}/{self.steps}  {text}  {duration(left)} left")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        sys.stderr.flush()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Say a time as people do: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
