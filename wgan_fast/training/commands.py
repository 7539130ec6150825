"""The command line's ``train``, ``sample``, ``export``, ``evaluate``, ``info`` and ``bench``.

What a command needs is imported when it runs: a question, or a mistake, is answered before PyTorch is there.
"""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..errors import InputError
from .config import TrainConfig
from .files import as_path, write_atomically

if TYPE_CHECKING:
    from .run import Run
    from .trainer import Summary


@dataclass(frozen=True)
class Train(TrainConfig):
    """Train a generator against a critic; leaves samples, curves, metrics and checkpoints in one folder.

    Attributes:
        resume: Folder of a run to go on with, from its newest whole checkpoint; its own settings are the defaults.
        config: File of settings by their names, YAML or JSON, such as a run's own config.json; they are the defaults.
    """

    resume: Path | None = None
    config: Path | None = None

    def run(self) -> None:
        """Train and print the summary."""
        from .device import resolve_device
        from .distributed import Replicas, processes

        if self.resume is not None and self.out != as_path(self.resume):
            raise InputError(f"out is the resumed folder {self.resume}, got {self.out}: give --resume alone")
        if self.resume is not None and self.config is not None:
            raise InputError(f"config is for a new run, and --resume {self.resume} has its own settings: give options")
        with processes(resolve_device(self.device)):
            summary = self._train()
            if Replicas().leads:
                print(summary)

    def _train(self) -> "Summary":
        from . import Trainer
        from .description import CHANGEABLE, CONFIG_FILE
        from .distributed import restarted

        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)}
        if self.resume is not None:
            return Trainer.from_run(self.resume, **settings).fit(resume=True)
        if restarted() and self.out is not None and (self.out / CONFIG_FILE).exists():
            # torchrun repeats the command that began the run; what it does not give is the method's default again.
            changes = {name: settings[name] for name in CHANGEABLE if settings[name] is not None}
            return Trainer.from_run(self.out, **changes).fit(resume=True)
        return Trainer.from_config(TrainConfig(**settings)).fit()


@dataclass(frozen=True)
class Sample:
    """Draw samples from a trained run: into a picture, or as many as you like into files.

    Attributes:
        folder: The run's folder.
        grid: Rows x columns of the picture, 12x12 by default; for a conditional run 12 columns and a row for each
            class (of at most 32).
        label: The class of all samples, of a conditional run: its name, or its index where names are no numbers. By
            default the rows go through the classes, and with --n as many samples are of each, class by class.
        scores: Sort the picture by the critic's score, write the scores into it, and all of them into a CSV file.
        interpolate: Draw a walk through the latent space: every row of the picture goes from one random latent to that
            of the next row, the last one to the first, along great circles (spherical interpolation, as for Gaussian
            noise); a GIF beside it shows the same images one after another. For images.
        n: Number of samples to write to --out as they are, in place of a picture.
        seed: Seed of the noise.
        out: Where to write. The picture: a .png file, RUN/samples/grid-ROWSxCOLUMNS.png by default, with the label
            where one is given; beside it the CSV or the GIF file lies. With --n: a new folder for images as PNG files,
            00000.png and so on, whose 8-bit pixels are round(127.5 (x + 1)), for a conditional run with their classes
            in labels.csv; or a .npy file, or an .npz file with the array "x", of float32 [N, *shape], images
            [N, C, H, W] in [-1, 1], all else in the range of the data, and the classes of a conditional run as "y".
        model: The run's networks of your own, module:function, where they have another name or place now.
        device: "cpu", "cuda", "cuda:1", or "auto".
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    grid: str | None = None
    label: str | None = None
    scores: bool = False
    interpolate: bool = False
    n: int | None = None
    seed: int = 0
    out: Path | None = None
    model: str | None = None
    device: str = "auto"

    def run(self) -> None:
        """Write what was asked for and print where it is."""
        from .description import Description

        Description.read(self.folder)  # that there is no run is said before anything else
        out = None if self.out is None else as_path(self.out)
        if self.n is None:
            self._draw(out)
        else:
            self._write(self.n, out)

    def _draw(self, out: Path | None) -> None:
        from . import plots

        grid = "12x12" if self.grid is None else self.grid
        match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", grid)
        if match is None:
            raise InputError(f"grid must be ROWSxCOLUMNS, such as 12x12, got {grid!r}")
        rows, columns = int(match[1]), int(match[2])
        if self.interpolate and self.scores:
            raise InputError("scores sorts the picture, and the order of an interpolation is its own: give one of them")
        if self.interpolate and rows < 2:
            raise InputError(f"grid must have at least 2 rows to interpolate between, got {grid}")
        if out is not None and out.suffix != ".png":
            raise InputError(f"out must end in .png, got {out}; samples as files need --n")
        run = _load(self.folder, self.device, self.model)
        if self.interpolate and run.description.kind != "images":
            raise InputError(f"interpolate is for images, this run makes samples of shape {_shape(run)}")
        classes = run.description.classes
        if classes and self.grid is None and self.label is None:
            rows = min(len(classes), 32)
        labels = None
        if classes or self.label is not None:
            labels = run.labels(rows, self.label).repeat_interleave(columns)
        mark = "" if self.label is None else "-" + re.sub(r"[^\w-]", "_", self.label)
        kind = "interpolation" if self.interpolate else "grid"
        path = out or run.folder / "samples" / f"{kind}-{rows}x{columns}{mark}.png"
        if self.interpolate:
            samples = run.walk(rows, columns, seed=self.seed, labels=labels)
        else:
            samples = run.sample(rows * columns, seed=self.seed, labels=labels)
        scores = run.score(samples, labels) if self.scores else None
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            plots.save_grid(samples, path, columns=columns, scores=scores)
            print(path)
            if self.interpolate:
                plots.save_animation(samples, path.with_suffix(".gif"))
                print(path.with_suffix(".gif"))
            if scores is not None:
                table = path.with_suffix(".csv")
                write_atomically(table, _csv(scores.tolist()).encode())
                print(table)

    def _write(self, n: int, path: Path | None) -> None:
        import numpy as np

        from .sampling import save_array, save_images

        for name in ("grid", "scores", "interpolate"):
            if getattr(self, name) not in (None, False):
                raise InputError(f"{name} is for a picture, and n writes samples as they are: give one of the two")
        if n < 1:
            raise InputError(f"n must be at least 1, got {n}")
        if path is None:
            raise InputError("n needs --out: a new folder for images, or a .npy or .npz file")
        array = path.suffix in (".npy", ".npz")
        if not array and path.suffix[1:].isalpha():
            raise InputError(f"with n, out must be a new folder or end in .npy or .npz, got {path}")
        run = _load(self.folder, self.device, self.model)
        if not array and run.description.kind != "images":
            raise InputError(
                f"out must end in .npy or .npz where samples are no images, but of shape {_shape(run)}, got {path}"
            )
        names = run.description.classes
        labels = run.labels(n, self.label) if names or self.label is not None else None
        pieces = run.pieces(n, seed=self.seed, labels=labels)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            classes = None if labels is None else np.array(names)[labels.numpy()]
            if array:
                save_array(pieces, (n, *run.description.sample_shape), path, classes)
            else:
                save_images(pieces, n, path, classes)
        print(path)


@dataclass(frozen=True)
class Export:
    """Write a trained run's generator as files that PyTorch loads without this package.

    Attributes:
        folder: The run's folder.
        out: Folder for generator.safetensors (the weights), generator.pt2 (a program of torch.export) and
            generator.json (what they are); RUN/export by default.
        model: The run's networks of your own, module:function, where they have another name or place now.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    out: Path | None = None
    model: str | None = None

    def run(self) -> None:
        """Write the files and print where they are."""
        from .export import export_generator

        run = _load(self.folder, "cpu", self.model)
        out = run.folder / "export" if self.out is None else as_path(self.out)
        with _writing(out):
            for path in export_generator(run, out):
                print(path)


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run against data that it did not train on, and in the eyes of a classifier if it has classes.

    Attributes:
        folder: The run's folder.
        samples: Samples on each side of a comparison; fewer where less data was held out.
        seed: Seed of the noise and of the projections.
        data: Where the run's data lies now, if it was moved.
        model: The run's networks of your own, module:function, where they have another name or place now.
        device: "cpu", "cuda", "cuda:1", or "auto".
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    samples: int = 2000
    seed: int = 0
    data: str | None = None
    model: str | None = None
    device: str = "auto"

    def run(self) -> None:
        """Print the report and write it to RUN/evaluation.json."""
        if self.samples < 2:
            raise InputError(f"samples must be at least 2, got {self.samples}")
        run = _load(self.folder, self.device, self.model)
        report = run.evaluate(samples=self.samples, seed=self.seed, data=self.data)
        path = run.folder / "evaluation.json"
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
        _print_table({name.replace("_", " "): value for name, value in report.items()})
        print(path)


@dataclass(frozen=True)
class Info:
    """Say what is active in this installation and, for what is not, why.

    Attributes:
        json: Print JSON.
    """

    json: bool = False

    def run(self) -> None:
        """Print the build information."""
        from ..build import build_info

        info = build_info()
        if self.json:
            print(json.dumps(info, indent=2))
        else:
            _print_table(info)


@dataclass(frozen=True)
class Bench:
    """Time the critic step against other ways to write it, after checking each against float64.

    Attributes:
        models: Critics: toy-mlp, tabular-mlp, dcgan-28, resnet-32, dcgan-64, language, or all; others by their size:
            mlp-4x256 (layers x width), dcgan-28x32 (width), resnet-64 (image size).
        critic: A critic of your own in place of them: module:function, which takes nothing and returns the module.
        shape: Shape of one sample for it, such as 3x32x32.
        penalties: Among wgan-gp, r1-r2 and none.
        batch_sizes: Samples in a batch, several for a sweep; each critic's own by default.
        variants: Ways to write the step; all by default. See docs/benchmarks.md.
        precision: "fp32", "bf16", or "all".
        device: "cpu", "cuda", "cuda:1", or "auto".
        threads: CPU threads; PyTorch's own choice by default.
        seconds: Seconds of timed rounds for each workload.
        scaling: Instead of models, penalties, batch sizes and variants: how time and memory grow with batch, width,
            depth and image size, as docs/scaling.md shows it; results go into a folder `scaling` of their own.
        fresh: Measure again what the results file has already.
        out: Folder of the results: a JSON file named after the device, a table and a plot.
    """

    models: tuple[str, ...] = ("toy-mlp",)
    critic: str | None = None
    shape: str | None = None
    penalties: tuple[str, ...] = ("wgan-gp",)
    batch_sizes: tuple[int, ...] = ()
    variants: tuple[str, ...] = ()
    precision: Literal["fp32", "bf16", "all"] = "all"
    device: str = "auto"
    threads: int | None = None
    seconds: float = 20.0
    scaling: bool = False
    fresh: bool = False
    out: Path = Path("runs/bench")

    def run(self) -> None:
        """Measure, print a table for each workload and say where the results are."""
        import torch

        from ..bench import scaling, series, variants, workloads
        from ..bench.results import read
        from .device import resolve_device

        if self.shape is not None and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", self.shape) is None:
            raise InputError(f"shape must be sizes joined by x, such as 3x32x32, got {self.shape!r}")
        if self.threads is not None:
            if self.threads < 1:
                raise InputError(f"threads must be at least 1, got {self.threads}")
            torch.set_num_threads(self.threads)
        if not self.seconds >= 0:
            raise InputError(f"seconds must be at least 0, got {self.seconds}")
        if self.critic is not None:
            if self.models != Bench.models:
                raise InputError(f"critic takes the place of models, so models {' '.join(self.models)} cannot be given")
            if ":" not in self.critic:
                raise InputError(f"critic must be module:function, got {self.critic!r}")
        models = tuple(workloads.CRITICS) if self.models == ("all",) else self.models
        names = [
            name
            for name in self.variants or variants.VARIANTS
            if name not in variants.VARIANTS or self.precision in ("all", variants.VARIANTS[name].precision)
        ]
        points: Iterable[tuple[str, str, int | None]] = itertools.product(
            models if self.critic is None else (self.critic,), self.penalties, self.batch_sizes or (None,)
        )
        if self.scaling:
            given = ("models", "critic", "shape", "penalties", "batch_sizes", "variants", "precision")
            for name in given:
                if getattr(self, name) != Bench.__dataclass_fields__[name].default:
                    raise InputError(f"scaling measures a list of its own, so {name} cannot be given with it")
            points, names = scaling.points(), list(scaling.VARIANTS)
        results, refused = series.measure(
            points,
            names=names,
            device=resolve_device(self.device),
            folder=self.out / "scaling" if self.scaling else self.out,
            budget=self.seconds,
            sample_shape=None if self.shape is None else tuple(map(int, self.shape.split("x"))),
            fresh=self.fresh,
        )
        if self.scaling:
            scaling.plot(read(results), results.with_suffix(".png"))
        for path in (results, results.with_suffix(".md"), results.with_suffix(".png")):
            print(path)
        if refused:
            raise InputError("; ".join(refused))


def _load(folder: Path, device: str, model: str | None) -> "Run":
    from . import Run

    run = Run.load(folder, device=device, model=model)
    for skipped in run.skipped:
        print(f"wgan-fast: passed over a damaged checkpoint: {skipped}; using step {run.step}", file=sys.stderr)
    return run


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say of what cannot be written that it is ``out``."""
    try:
        yield
    except OSError as error:
        raise InputError(f"out {path} cannot be written: {error.strerror or error}") from error


def _shape(run: "Run") -> list[int]:
    return list(run.description.sample_shape)


def _csv(scores: list[float]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["rank", "sample", "score"])
    order = sorted(range(len(scores)), key=lambda sample: -scores[sample])
    writer.writerows([rank, sample, f"{scores[sample]:.6f}"] for rank, sample in enumerate(order, 1))
    return table.getvalue()


def _print_table(values: dict[str, Any], indent: int = 0) -> None:
    width = max(len(name) for name in values)
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"{'':{indent}}{name}")
            _print_table(value, indent + 2)
        else:
            text = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{'':{indent}}{name:{width}}  {text}")
