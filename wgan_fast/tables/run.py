"""A run on a table, in a folder: training with checkpoints, going on, and what its rows are worth."""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from ..errors import DivergenceError, InputError
from ..training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..training.curves import save_curves
from ..training.description import CONFIG_FILE
from ..training.device import resolve_device
from ..training.files import as_path, write_atomically
from ..training.folder import held, make_folder, make_new_folder
from ..training.log import Board, MetricsLog, ProgressLine
from ..training.randomness import TRAINING, seed_everything, undisturbed
from ..training.stopping import InterruptedTraining, StopRequests, way_on
from . import judgement, pictures
from .columns import LEAST_ROWS, Column, columns_of
from .config import TableConfig
from .files import is_too_large, read_parts, read_with_positions
from .preparation import Preparation
from .synthesizer import TableSynthesizer
from .training import StepResult

FIRST_LOOK, LOOKING = 30.0, 0.05
"""Seconds until there are pictures, and the share of the time that goes into drawing them anew."""
STREAMED = 1_000_000
"""Rows that are drawn of a table that is read in parts, by which its columns are told and fitted."""
RATED = 2_000
"""Rows that are compared with held-out ones whenever a checkpoint is written."""


class Summary(NamedTuple):
    """What a finished run leaves behind."""

    out: Path
    steps: int
    seconds: float
    rows_per_second: float
    checkpoint: Path

    def __str__(self) -> str:
        return "\n".join(
            [
                f"steps            {self.steps}",
                f"seconds          {self.seconds:.1f}",
                f"rows per second  {self.rows_per_second:.0f}",
                f"marginals        {self.out / 'marginals.png'}",
                f"associations     {self.out / 'associations.png'}",
                f"curves           {self.out / 'curves.png'}",
                f"checkpoint       {self.checkpoint}",
            ]
        )


class TableRun:
    """Learns a table in a folder.

    Args:
        config: The run's settings.
        resume: Whether to go on with the run in ``config.out``.

    Raises:
        InputError: Something does not fit: the message names it. Nothing has been written then.
    """

    def __init__(self, config: TableConfig, *, resume: bool = False) -> None:
        device = str(resolve_device(config.device))
        if resume:
            TableConfig.read(as_path(config.out or "")).check_unchanged(config)
        config = dataclasses.replace(config, data=str(as_path(config.data).resolve()))
        if resume and not Path(config.data).exists():
            raise InputError(f"the table of this run is no longer at {config.data}: say where with --data")
        if config.stream is None:
            config = dataclasses.replace(config, stream=config.rows is None and is_too_large(Path(config.data)))
        self.config, self.resume = config, resume
        split = _split(config)
        self.train, self.held_out, columns, self.digest = split.train, split.held_out, split.columns, split.digest
        if resume:
            _check_data(Path(config.out or ""), config.data, self.digest)
        self.synthesizer = TableSynthesizer(
            epochs=config.epochs,
            batch_size=config.batch_size,
            latent_dim=config.latent_dim,
            hidden=(config.width, config.width),
            learning_rate=config.learning_rate,
            penalty_weight=config.penalty_weight,
            numbers=config.numbers,
            kinds=config.kinds,
            precision=config.precision,
            device=device,
            seed=config.seed,
        )
        # Nothing here draws from NumPy's and Python's generators; a checkpoint holds them.
        seed_everything(config.seed, TRAINING)
        # What was fitted goes on, whatever would be fitted now.
        before = load_checkpoint(as_path(config.out or "")) if resume else None
        prepared = None if before is None else Preparation.of_state(before.state["preparation"])
        parts = _all_but(split.of_held_out, config, self.train) if config.stream else None
        self.training = self.synthesizer.begin(self.train, columns, prepared, parts)
        self.steps = config.epochs * self.training.steps_per_epoch
        of_train, of_held_out = judgement.views((self.train, self.held_out), columns)
        self._real = (of_held_out if len(self.held_out) else of_train).some(RATED, config.seed)
        self._checkpoint: Path | None = None
        self._look = FIRST_LOOK

    def fit(self) -> Summary:
        """Train to the last epoch. Ctrl-C and SIGTERM end training after the step that is under way, with a checkpoint.

        Raises:
            InputError: The folder holds another run.
            DivergenceError: A loss is not finite; the last good checkpoint is kept.
            InterruptedTraining: A signal asked to stop.
        """
        if self.config.out is None:
            out = make_new_folder(self.config.data, "ctgan")
            self.config = dataclasses.replace(self.config, out=out)
        elif not self.resume:
            make_folder(self.config.out)
        self.out = Path(self.config.out or "")
        with held(self.out, new=not self.resume):
            return self._fit(load_checkpoint(self.out) if self.resume else None)

    def _fit(self, checkpoint: Checkpoint | None) -> Summary:
        if checkpoint is not None:
            if checkpoint.step > self.steps:
                done = checkpoint.step / self.training.steps_per_epoch
                raise InputError(f"epochs is {self.config.epochs}, but {checkpoint.path} is at epoch {done:g} already")
            self.synthesizer.load_state(checkpoint.state)
            self.training.load_state(checkpoint.state["training"])
            self._checkpoint = checkpoint.path
        rows = len(self.training.rows), len(self.held_out)
        _describe(self.out, self.config, self.digest, rows, self.synthesizer.preparation_)
        training, first, started = self.training, self.training.step, time.perf_counter()
        with (
            StopRequests() as stop,
            ProgressLine(self.steps, first, unit="rows") as progress,
            MetricsLog(self.out, first) as log,
            contextlib.closing(Board(self.out, first)) as board,
        ):
            if self.resume:
                for skipped in checkpoint.skipped if checkpoint else ():
                    progress.message(f"passed over a damaged checkpoint: {skipped}")
                found = f"resuming after step {first} from {self._checkpoint}"
                progress.message(found if checkpoint else "there is no checkpoint yet: beginning again at step 1")
            else:
                progress.message(self._described())
            since, logged = started, first
            while training.step < self.steps:
                result = training()
                stop.nothing_to_save = False
                last, asked = training.step == self.steps, stop.signal is not None
                saving = training.step % self.config.checkpoint_every == 0 or last or asked
                if training.step % self.config.log_every == 0 or saving:
                    now = time.perf_counter()
                    speed = (training.step - logged) * training.batch_size / (now - since)
                    figures = self._figures(result, speed)
                    rated = {"column_distance": self._rate()} if saving else {}
                    log.write(figures | rated)
                    board.write(log.last)
                    since, logged = time.perf_counter(), training.step
                progress.advance(training.step, log.last)
                if saving:
                    log.sync()
                    self._save()
                if asked or time.perf_counter() - started > self._look:
                    self._draw(log.records, started)
                if asked and not last:
                    way = way_on(self.out)
                    raise InterruptedTraining(f"stopped after step {training.step} of {self.steps}; {way}", stop.number)
            seconds = time.perf_counter() - started
        self._draw(log.records, started)
        assert self._checkpoint is not None
        speed = (training.step - first) * training.batch_size / seconds
        summary = Summary(self.out, training.step, seconds, speed, self._checkpoint)
        if training.step > first or not (self.out / "summary.txt").exists():
            write_atomically(self.out / "summary.txt", f"{summary}\n".encode())
        return summary

    def _figures(self, result: StepResult, rows_per_second: float) -> dict[str, Any]:
        critic = result.critic
        figures = {
            "step": self.training.step,
            "critic_loss": critic.loss.item(),
            "generator_loss": result.generator_loss.item(),
            "wasserstein": critic.wasserstein.item(),
            "real_score": critic.real_score.item(),
            "fake_score": critic.fake_score.item(),
            "penalty": critic.penalty.item(),
            "gradient_norm": critic.gradient_norm.item(),
            "rows_per_second": rows_per_second,
        }
        for name, label in (("critic_loss", "the critic's loss"), ("generator_loss", "the generator's loss")):
            if not math.isfinite(figures[name]):
                raise DivergenceError(
                    f"training diverged at step {self.training.step}: {label} is {figures[name]}; {self._kept()}; a "
                    f"smaller --learning-rate than {self.config.learning_rate:g} may help"
                )
        return figures

    def _described(self) -> str:
        learned, passed_over = len(self.training.rows), self.synthesizer.passed_over_
        first = f"{Path(self.config.data).name}: {learned} rows to learn, {len(self.held_out)} held out"
        if self.config.stream:
            first += f"; columns are told by {len(self.train)} of them"
        if passed_over:
            first += f", and {passed_over} rows with what none of these has are passed over"
        return "\n".join([first, *described(self.synthesizer.preparation_)])

    def _rate(self) -> float:
        """Return the mean distance of the columns between made and real rows."""
        made = self._view(len(self._real))
        return float(np.mean(list(judgement.column_distances(made, self._real).values())))

    def _view(self, n: int) -> judgement.View:
        with undisturbed(torch.device(self.synthesizer.device), self.config.seed):
            self.synthesizer.generator_.eval()
            rows = self.synthesizer.sample(n)
            self.synthesizer.generator_.train()
        return judgement.views((rows,), self.synthesizer.preparation_.columns, like=self._real)[0]

    def _save(self) -> None:
        state = {**self.synthesizer.state(), "training": self.training.state()}
        self._checkpoint = save_checkpoint(self.out, self.training.step, state, keep=self.config.keep)

    def _draw(self, records: list[dict[str, Any]], started: float) -> None:
        """Draw curves and rows; the next time so late that drawing stays a small share of the time."""
        began = time.perf_counter()
        if records:
            title = f"ctgan on {Path(self.config.data).name}"
            save_curves(records, self.out / "curves.png", title=title, target=1.0)
        columns = self.synthesizer.preparation_.columns
        dates = frozenset(i for i, column in enumerate(columns) if column.kind == "date")
        made = self._view(len(self._real))
        pictures.save_marginals(made, self._real, self.out / "marginals.png", dates=dates)
        pictures.save_associations(made, self._real, self.out / "associations.png")
        now = time.perf_counter()
        self._look = now - started + max(FIRST_LOOK, (now - began) / LOOKING)

    def _kept(self) -> str:
        if self._checkpoint is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint is {self._checkpoint}"


def evaluate(
    folder: Path, *, data: str | None, samples: int, target: str | None, seed: int, device: str
) -> dict[str, Any]:
    """Judge the rows of a run; what ``judgement.judge`` returns.

    Raises:
        InputError: There is no run, its table is not where it was, or nothing was held out.
    """
    config = TableConfig.read(folder)
    config = dataclasses.replace(config, data=data or config.data)
    synthesizer = TableSynthesizer.load(folder, device=str(resolve_device(device)))
    if not Path(config.data).expanduser().exists():
        raise InputError(f"the table of this run is no longer at {config.data}: say where with --data")
    train, held_out, columns, digest, _ = _split(config)
    _check_data(folder, config.data, digest)
    if len(held_out) < 2:
        raise InputError("this run held no rows out (holdout 0): there is nothing to evaluate against")
    # A model learns from as many rows as there are real ones.
    made = synthesizer.sample(max(min(samples, len(held_out)), min(len(train), judgement.MOST_ROWS)), seed=seed)
    held_out = held_out.sample(min(samples, len(held_out)), random_state=seed)
    report = judgement.judge(made, train, held_out, columns=columns, target=target, seed=seed)
    return {"step": synthesizer.n_iter_, **report}


def described(preparation: Preparation) -> list[str]:
    """Say what was found in a table, a line for each column."""
    lines = []
    width = min(max(len(str(column.name)) for column in preparation.columns), 30)
    for i, column in enumerate(preparation.columns):
        kind = "left out" if column.kind == "identifier" else column.kind
        about = [preparation.said(i), f"({column.why})" if column.why else ""]
        lines.append(f"  {column.name!s:{width}}  {kind:9}  {' '.join(part for part in about if part)}".rstrip())
    return lines


class _Split(NamedTuple):
    """A table, or what was drawn of it."""

    train: pd.DataFrame
    held_out: pd.DataFrame
    columns: list[Column]
    digest: str
    of_held_out: set[int]


def _split(config: TableConfig) -> _Split:
    rows = STREAMED if config.stream else config.rows
    table, positions = read_with_positions(
        config.data, kinds=config.written, sep=config.sep, decimal=config.decimal, rows=rows, seed=config.seed
    )
    columns = columns_of(table, config.kinds)
    with Path(config.data).expanduser().open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    order = np.random.default_rng(config.seed).permutation(len(table))
    held_out = min(round(config.holdout * len(table)), max(len(table) - LEAST_ROWS, 0))
    train, kept = np.sort(order[held_out:]), np.sort(order[:held_out])
    learned, left = (table.iloc[which].reset_index(drop=True) for which in (train, kept))
    return _Split(learned, left, columns, digest, set(positions[kept].tolist()))


def _all_but(held_out: set[int], config: TableConfig, like: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Read the rows of a file part by part, all but those that are held out."""
    first = 0
    for part in read_parts(Path(config.data), like, kinds=config.written, sep=config.sep, decimal=config.decimal):
        learned = [row not in held_out for row in range(first, first + len(part))]
        first += len(part)
        yield part[learned]


def _check_data(folder: Path, data: str, digest: str) -> None:
    if json.loads((folder / CONFIG_FILE).read_text())["sha256"] != digest:
        raise InputError(f"data {data} is not the table that the run in {folder} was trained on: its content differs")


def _describe(out: Path, config: TableConfig, digest: str, rows: tuple[int, int], preparation: Preparation) -> None:
    columns = [{"name": str(c.name), "kind": c.kind, "why": c.why} for c in preparation.columns]
    values = {"format": 1, "kind": "table", "config": config.to_json(), "sha256": digest}
    values |= {"rows": rows, "columns": columns}
    write_atomically(out / CONFIG_FILE, (json.dumps(values, indent=2) + "\n").encode())
