"""The command line's ``train``, ``sample`` and ``evaluate`` for tables. What they need is imported when they run."""

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..errors import InputError
from ..training.files import as_path, write_atomically
from .config import TableConfig, pairs

Several = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class TrainTable(TableConfig):
    """Learn a table by CTGAN's method; leaves checkpoints, metrics, curves and pictures in one folder.

    Attributes:
        resume: Folder of a run to go on with, from its newest whole checkpoint; its own settings are the defaults.
    """

    column: Several = ()
    resume: Path | None = None

    def run(self) -> None:
        """Train and print the summary."""
        _check_installed()
        from ..training.distributed import launched
        from .run import TableRun

        if launched():
            raise InputError("a table is learned by one process: leave torchrun out")
        if self.resume is not None and self.out != as_path(self.resume):
            raise InputError(f"out is the resumed folder {self.resume}, got {self.out}: give --resume alone")
        config = TableConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TableConfig)})
        summary = TableRun(config, resume=self.resume is not None).fit()
        print(summary)
        print(f"make rows:       wgan-fast sample {shlex.quote(str(summary.out))} --n 1000 --out rows.csv")

    @classmethod
    def of(cls, folder: Path) -> "TrainTable":
        """Return the command that goes on with a run."""
        return cls(**{**vars(TableConfig.read(as_path(folder))), "resume": folder})


@dataclass(frozen=True)
class SampleTable:
    """Make rows like those of the table that a run has learned.

    Attributes:
        folder: The run's folder.
        n: How many rows.
        where: A category that the rows are to have, as NAME=CATEGORY, such as job=nurse; several are all met.
        seed: Of the rows.
        out: A .csv, .tsv or .parquet file, compressed or not; RUN/rows.csv by default.
        device: "cpu", "cuda", "cuda:1", or "auto".
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    n: int = 1000
    where: Several = ()
    seed: int = 0
    out: Path | None = None
    device: str = "auto"

    def run(self) -> None:
        """Write the rows and print where they are."""
        _check_installed()
        from ..training.device import resolve_device
        from .files import check_out, write_table
        from .synthesizer import TableSynthesizer

        if self.n < 1:
            raise InputError(f"n must be at least 1, got {self.n}")
        folder = as_path(self.folder)
        path = folder / "rows.csv" if self.out is None else as_path(self.out)
        check_out(path)
        synthesizer = TableSynthesizer.load(folder, device=str(resolve_device(self.device)))
        names = [str(column.name) for column in synthesizer.preparation_.columns]
        where = synthesizer.categories_of(pairs(self.where, "where", "NAME=CATEGORY, such as job=nurse", names))
        write_table(synthesizer.sample(self.n, where=where, seed=self.seed), path)
        print(path)


@dataclass(frozen=True)
class EvaluateTable:
    """Judge a run's rows against real ones that it did not learn from; each measure beside that of real rows.

    Attributes:
        folder: The run's folder.
        data: Where the run's table is now, if it was moved.
        target: The column that a model is to predict, trained on made and on real rows; the last one by default.
        samples: Rows on each side of a comparison; fewer where less was held out.
        seed: Of the rows and of what is drawn.
        device: "cpu", "cuda", "cuda:1", or "auto".
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    data: str | None = None
    target: str | None = None
    samples: int = 10_000
    seed: int = 0
    device: str = "auto"

    def run(self) -> None:
        """Print the report and write it to RUN/evaluation.json."""
        _check_installed()
        from .run import evaluate

        if self.samples < 2:
            raise InputError(f"samples must be at least 2, got {self.samples}")
        folder = as_path(self.folder)
        asked = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "folder"}
        report = evaluate(folder, **asked)
        path = folder / "evaluation.json"
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
        print(said(report))
        print(path)


def _check_installed() -> None:
    try:
        from . import TableSynthesizer  # noqa: F401
    except ImportError as error:
        raise InputError(str(error)) from None


def said(report: dict[str, Any]) -> str:
    """Write what ``judge`` found for people: every measure, and what real rows reach."""
    columns, model, privacy = report["columns"], report["model"], report["privacy"]
    lines = [f"{report['rows']} rows, step {report['step']}", f"{'':34}{'made':>8}{'real':>8}"]

    def line(name: str, made: float | None, real: float | None) -> None:
        shown = ("       -" if value is None else f"{value:8.4f}" for value in (made, real))
        lines.append(f"{name:34}" + "".join(shown))

    line("distance of columns", columns["mean"], columns["floor"])
    for name, label in (("correlation", "correlations, difference"), ("ratio", "correlation ratios, difference"),
                        ("contingency", "contingency tables, distance")):  # fmt: skip
        if report["pairs"][name]["mean"] is not None:
            line(label, report["pairs"][name]["mean"], report["pairs"][name]["floor"])
    line(f"{model['score']} of a model of {model['target']}", model["made"], model["real"])
    line("copies of training rows, share", privacy["copies"], privacy["copies_floor"])
    line("closest training row, 5 %", privacy["closest_5%"], privacy["closest_5%_floor"])
    line("closest training row, median", privacy["closest_median"], privacy["closest_median_floor"])
    line("closer to training than held out", privacy["nearer_to_train"], 0.5)
    worst = sorted(columns["each"].items(), key=lambda item: item[1]["floor"] - item[1]["distance"])[:5]
    lines.append("columns that differ most: " + ", ".join(f"{name} {of['distance']:.3f}" for name, of in worst))
    return "\n".join(lines)
