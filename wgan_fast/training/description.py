"""What a run records about itself in its folder, and what it may go on with."""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..errors import InputError
from . import models
from .config import OWN, TrainConfig
from .data import SOURCES, Data, load_data
from .files import as_path, write_atomically

CONFIG_FILE = "config.json"

FORMAT = 2

CHANGEABLE = {
    "out", "data", "steps", "epochs", "device", "workers", "log_every", "sample_every", "track", "checkpoint_every",
    "keep", "compile", "cuda_graph", "fused", "generate_ahead", "channels_last", "on_divergence", "max_rewinds",
    "batch_size", "n_critic", "learning_rate", "generator_learning_rate", "beta1", "beta2", "schedule",
    "penalty_weight", "penalty_every", "penalty_samples", "clip", "clip_gradients", "ema", "engine", "precision",
}  # fmt: skip
"""Settings that a resumed run may change: those that define neither the networks, nor the data, nor the method."""

MARKS = 8
"""Samples whose means tell one data set from another."""


@dataclass(frozen=True)
class Description:
    """What ``config.json`` holds.

    Attributes:
        config: The resolved configuration.
        sample_shape: Shape of one sample.
        kind: "images" or "vectors".
        samples: How many there are to train on, and held out.
        marks: Means of a few training samples, by which data that was moved is known again; empty for objects.
        model_folder: Where the module of networks of one's own was found.
        history: For every resumption that changed settings, its step and for each setting what it was and became.
        classes: What the classes are called, by their index; none where the run is not conditional.
    """

    config: TrainConfig
    sample_shape: tuple[int, ...]
    kind: str
    samples: tuple[int, int]
    marks: tuple[float, ...] = ()
    model_folder: str | None = None
    history: tuple[dict[str, Any], ...] = ()
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: TrainConfig, data: Data, classes: tuple[str, ...]) -> Self:
        """Describe a run on ``data``."""
        # Given as objects, both are given again on resuming; a Dataset may augment its samples.
        marks = () if config.model == OWN else _marks(data)
        samples = len(data.train), len(data.held_out)
        return cls(
            config, data.sample_shape, data.kind, samples, marks, models.folder_of(config.model), classes=classes
        )

    def changed(self, config: TrainConfig) -> dict[str, list[Any]]:
        """Return what each setting was that ``config`` changes, and what it becomes."""
        before, after = self.config.to_json(), config.to_json()
        return {name: [before[name], after[name]] for name in after if before[name] != after[name] and name != "out"}

    def resumed(self, config: TrainConfig, data: Data, step: int, classes: tuple[str, ...]) -> Self:
        """Describe what this run becomes after ``step``."""
        changed = self.changed(config)
        history = (*self.history, {"step": step, "changed": changed}) if changed else self.history
        return dataclasses.replace(type(self).of(config, data, classes), history=history)

    def check(self, config: TrainConfig, data: Data, classes: tuple[str, ...]) -> None:
        """Raise unless a run may go on with this configuration and this data.

        Raises:
            InputError: A setting that must stay was changed, or the data is not what it was.
        """
        check_unchanged(self.config, config)
        self.check_data(data, config.data, classes)

    def check_data(self, data: Data, source: str, classes: tuple[str, ...]) -> None:
        """Raise unless ``data``, loaded from ``source``, looks like what the run was trained on.

        Raises:
            InputError: The shape, the number or the values of samples differ, or the classes of a conditional run.
        """
        was = [list(self.sample_shape), *self.samples]
        now = [list(data.sample_shape), len(data.train), len(data.held_out)]
        if was != now:
            raise InputError(
                f"data {source} is not what the run was trained on: samples of shape {was[0]}, {was[1]} to "
                f"train on and {was[2]} held out, are now {now[0]}, {now[1]} and {now[2]}"
            )
        # As near as images are that another library decoded.
        near = 0.01 * max(map(abs, self.marks), default=0)
        if self.marks and any(abs(was - now) > near for was, now in zip(self.marks, _marks(data))):
            raise InputError(
                f"data {source} is not what the run was trained on: as many samples of the same shape, with other "
                "values; on other data its networks are trained with --init-from"
            )
        if self.classes and self.classes != classes:
            raise InputError(
                f"data {source} is not what the run was trained on: its classes were "
                f"{listed(self.classes)}, they are now {listed(classes)}"
            )

    def find_model(self) -> None:
        """Let the module of networks of one's own be imported from where it was before, if from nowhere else."""
        if self.model_folder is not None and self.model_folder not in sys.path:
            sys.path.append(self.model_folder)

    def write(self, folder: Path) -> None:
        """Write ``config.json`` into a run's folder."""
        values = {
            "format": FORMAT,
            "config": self.config.to_json(),
            "sample_shape": list(self.sample_shape),
            "kind": self.kind,
            "samples": list(self.samples),
            "marks": list(self.marks),
            "model_folder": self.model_folder,
            "history": list(self.history),
            "classes": list(self.classes),
        }
        write_atomically(folder / CONFIG_FILE, (json.dumps(values, indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Self:
        """Read the description of the run in ``folder``.

        Raises:
            InputError: There is no run, or its description is damaged.
        """
        path = as_path(folder) / CONFIG_FILE
        if not path.is_file():
            raise InputError(f"{path.parent} holds no run: it has no {CONFIG_FILE}")
        try:
            values = json.loads(path.read_bytes())
            if values["kind"] == "table":
                raise ValueError("the run is on a table, which wgan_fast.tables.TableSynthesizer.load reads")
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']}, this version reads {FORMAT}")
            config, shape = TrainConfig.from_json(values["config"]), tuple(values["sample_shape"])
            return cls(
                config,
                shape,
                values["kind"],
                tuple(values["samples"]),
                tuple(values["marks"]),
                values["model_folder"],
                tuple(values["history"]),
                tuple(values["classes"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error


def listed(classes: tuple[str, ...]) -> str:
    """Name classes for a message, the first twenty of them."""
    return ", ".join(classes[:20]) + f", ... ({len(classes)} in all)" * (len(classes) > 20)


def check_unchanged(before: TrainConfig, after: TrainConfig) -> None:
    """Raise where a resumed run would change what its networks, its data or its method are.

    Raises:
        InputError: Naming the setting, what it was and what may change.
    """
    settings = before.to_json()
    for name, value in after.to_json().items():
        was = settings[name]
        if value == was or (name in CHANGEABLE and name != "ema"):
            continue
        if name == "ema" and was and value:
            continue
        if name == "model" and ":" in was and ":" in value:
            continue  # a module of one's own that was moved; the checkpoint says whether the networks are the same
        raise InputError(
            f"a resumed run keeps its settings: {name} was {was!r}, got {value!r} (what may change: "
            f"{', '.join(sorted(CHANGEABLE - {'out'}))}); a new run begins with its networks by --init-from"
        )


def check_found(config: TrainConfig) -> None:
    """Raise where the data of an earlier run is not where it was.

    Raises:
        InputError: Asking where it lies now.
    """
    if config.data not in SOURCES and not Path(config.data).expanduser().exists():
        raise InputError(f"data {config.data} is not there: give --data and where the run's data lies now")


def _marks(data: Data) -> tuple[float, ...]:
    samples = data.train.take(min(MARKS, len(data.train)))
    return tuple(samples.flatten(1).double().mean(1).tolist())


def load_run_data(config: TrainConfig) -> Data:
    """Load the data that a configuration names, with its split and image settings."""
    return load_data(
        config.data,
        image_size=config.image_size,
        channels=config.channels,
        holdout=config.holdout,
        seed=config.seed,
    )


def check_rebuildable(config: TrainConfig) -> None:
    """Raise for a run whose networks were given as objects."""
    if config.model == OWN:
        raise InputError(
            "this run's networks were given as objects and cannot be rebuilt from its folder: from Python, "
            "Run.load(folder, generator=..., critic=...) loads them into yours, and its Trainer, built again, goes on "
            "with fit(resume=True); the command line needs a run of --model module:function"
        )
