"""The training loop: from networks and data to samples, metrics, curves and checkpoints in one folder."""

import contextlib
import dataclasses
import itertools
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from ..errors import DivergenceError, InputError, users_level
from ..losses import LOSSES, AdversarialLoss
from . import curves, models
from .banner import banner
from .callbacks import Callback, TensorBoard
from .checkpoint import (
    Checkpoint,
    Tree,
    checkpoint_path,
    has_checkpoint,
    load_checkpoint,
    load_module,
    load_optimizer,
    optimizer_state,
    save_checkpoint,
)
from .concerns import concerns
from .config import OWN, TrainConfig
from .course import Course
from .data import (
    SOURCES,
    Data,
    Labels,
    Split,
    batches,
    has_labels,
    load_data,
    load_labels,
    split_labels,
    why_unlabelled,
)
from .description import Description, check_found, check_rebuildable, check_unchanged, load_run_data
from .device import resolve_device
from .distributed import Replicas
from .divergence import DivergedError, LossWatch, advice
from .files import as_path, write_atomically
from .folder import held, make_folder, make_new_folder, new_folder
from .init_from import load_networks, with_architecture
from .iteration import Iteration, IterationResult, Read
from .log import MetricsLog, ProgressLine
from .looking import Looking
from .optimizers import OptimizerFactory
from .randomness import NETWORKS, random_state, seed_everything, set_random_state, undisturbed
from .run import build_networks, generate, latent_dim
from .stopping import InterruptedTraining, StopRequests, way_on
from .trial import check_loss, check_networks, try_step
from .weights import spectral_norm

FIRST_LOOK = 30.0
"""Seconds after which there are a first picture of samples and first curves, however far off the next ones are."""

LOOKING = 0.02
"""Share of the time after that for which the curves are drawn anew."""


class Summary(NamedTuple):
    """What a finished run leaves behind.

    Attributes:
        out: The run's folder.
        steps: Generator steps taken in all.
        seconds: Time that this call trained.
        images_per_second: Real samples that the critic saw per second in this call.
        wasserstein: The last logged mean D(real) − mean D(fake).
        checkpoint: The newest checkpoint.
        grid: The newest picture of samples.
        curves: The learning curves.
    """

    out: Path
    steps: int
    seconds: float
    images_per_second: float
    wasserstein: float | None
    checkpoint: Path
    grid: Path
    curves: Path

    def __str__(self) -> str:
        wasserstein = "-" if self.wasserstein is None else f"{self.wasserstein:.4f}"
        return "\n".join(
            [
                f"steps                 {self.steps}",
                f"seconds               {self.seconds:.1f}",
                f"images per second     {self.images_per_second:.0f}",
                f"Wasserstein estimate  {wasserstein}",
                f"samples               {self.grid}",
                f"curves                {self.curves}",
                f"checkpoint            {self.checkpoint}",
            ]
        )


class Trainer:
    """Trains a generator against a critic.

    Args:
        generator: Maps noise ``[N, latent_dim]`` to samples ``[N, *sample_shape]``. The noise's length is its
            attribute ``latent_dim``, or the configuration's, or 128.
        critic: Maps samples to one score each, ``[N]`` or ``[N, 1]``.
        data: What ``load_data`` returns, or anything that it takes: a name, a path, an array, a Dataset.
        config: The run's settings. Its ``model``, ``width`` and ``init`` describe what is given here; with
            ``spectral_norm``, which hinge has by default, the critic is normalised in place. With ``conditional`` both
            networks are called with labels ``[N]`` int64 as well.
        labels: The class of every sample, ``[N]``, integers or strings: of data that is an array or a Dataset. Those of
            a name or a path are found.
        callbacks: Are told what happens, in this order, and may stop training: see ``Callback``.
        loss: An adversarial loss of your own, ``AdversarialLoss(name, critic, generator)``, in place of the
            configuration's. Its functions get scores as the critic gives them; the penalty is the method's. A run is
            resumed with the same one.
        optimizer: Makes the optimizer of a network from the list of its parameters, such as
            ``lambda parameters: torch.optim.AdamW(parameters, lr=1e-4)``, once for the critic and once for the
            generator, in place of the configuration's. A schedule scales its learning rates.

    Raises:
        InputError: Something does not fit: the message names it. Nothing has been written then.

    Examples:
        >>> trainer = Trainer(generator, critic, images, TrainConfig(steps=1000))  # doctest: +SKIP
        >>> print(trainer.fit())  # doctest: +SKIP
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        data: Any,
        config: TrainConfig,
        *,
        labels: Any = None,
        callbacks: Sequence[Callback] = (),
        loss: AdversarialLoss | None = None,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        if optimizer is not None and not callable(optimizer):
            raise InputError(
                f"optimizer must make one of a list of parameters, such as lambda p: {type(optimizer).__name__}(p)"
            )
        if labels is not None and not isinstance(labels, Labels):
            if isinstance(data, Data):
                raise InputError("labels of what load_data returned must be what load_labels returned, split alike")
            labels = split_labels(labels, holdout=config.holdout, seed=config.seed)
        source = data if isinstance(data, str | os.PathLike) else None
        if not isinstance(data, Data):
            _check_apart(config.out, data)
            if labels is None and (config.track or config.conditional) and isinstance(data, str | os.PathLike):
                labels = load_labels(data, holdout=config.holdout, seed=config.seed)
            data = load_data(
                data,
                image_size=config.image_size,
                channels=config.channels,
                holdout=config.holdout,
                seed=config.seed,
            )
        given = {"data": data.name, "model": OWN}
        if loss is not None:
            given["loss"] = check_loss(loss, config.loss).name
        if optimizer is not None:
            if config.optimizer not in (None, OWN):
                raise InputError(f"optimizer was given twice: as {config.optimizer} in the configuration, too")
            given["optimizer"] = OWN
        config = dataclasses.replace(config, **given).resolved(data.sample_shape)
        if config.spectral_norm:
            spectral_norm(critic)
        self._set_up(generator, critic, data, labels, config, callbacks, loss, optimizer, source=source)

    @classmethod
    def from_config(cls, config: TrainConfig, *, callbacks: Sequence[Callback] = ()) -> Self:
        """Build the networks and load the data that a configuration names.

        Args:
            config: The run's settings.
            callbacks: As for the constructor.

        Raises:
            InputError: As the constructor.
        """
        resolve_device(config.device)
        check_rebuildable(config)
        path = Path(config.data).expanduser()
        if config.data not in SOURCES and path.exists():
            # A run is resumed and evaluated from wherever one happens to be.
            config = dataclasses.replace(config, data=str(path.resolve()))
        _check_apart(config.out, config.data)
        if config.init_from is not None and not _under_way(config):
            config = with_architecture(config, config.init_from)
        data = load_run_data(config)
        config = config.resolved(data.sample_shape)
        if config.model == "auto":
            # Named in config.json, so that another version's choice changes no run.
            config = dataclasses.replace(config, model=models.default_model(data.sample_shape))
        labels = None
        if config.track or config.conditional:
            labels = load_labels(config.data, holdout=config.holdout, seed=config.seed)
        classes = _classes(data, labels, config, config.data)
        seed_everything(config.seed, NETWORKS)
        generator, critic = build_networks(config, data.sample_shape, data.kind, len(classes))
        trainer = cls.__new__(cls)
        trainer._set_up(generator, critic, data, labels, config, callbacks, source=config.data)
        trainer._named_data = True
        return trainer

    @classmethod
    def from_run(cls, folder: str | os.PathLike[str], *, callbacks: Sequence[Callback] = (), **changes: Any) -> Self:
        """Rebuild the trainer of an earlier run, ready to ``fit(resume=True)``.

        Args:
            folder: The run's folder.
            callbacks: As for the constructor.
            **changes: Settings to change, such as ``steps``, which take the place of ``epochs``, or the other way.

        Raises:
            InputError: There is no run, a setting may not change, or the networks were given as objects and cannot
                be rebuilt.
        """
        description = Description.read(folder)
        description.find_model()
        for name, other in (("steps", "epochs"), ("epochs", "steps")):
            if changes.get(name) is not None:
                changes = {other: None, **changes}
        config = dataclasses.replace(description.config, **{**changes, "out": as_path(folder)})
        check_unchanged(description.config, config)
        check_rebuildable(config)
        check_found(config)
        return cls.from_config(config, callbacks=callbacks)

    def _set_up(
        self,
        generator: nn.Module,
        critic: nn.Module,
        data: Data,
        labels: Labels | None,
        config: TrainConfig,
        callbacks: Sequence[Callback] = (),
        loss: AdversarialLoss | None = None,
        optimizer: OptimizerFactory | None = None,
        source: str | os.PathLike[str] | None = None,
    ) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise InputError(f"callbacks must be instances of Callback, got {callback!r}")
        if loss is None and config.loss not in (None, *LOSSES):
            own = "; one of your own is given to Trainer(..., loss=...)"
            raise InputError(f"loss must be one of {', '.join(LOSSES)}, got {config.loss!r}{own}")
        self._replicas = Replicas()
        self._named = config.out is None
        if config.out is None:
            if self._replicas.world > 1:
                raise InputError("out must be given where several processes train together")
            config = dataclasses.replace(config, out=new_folder(data.name, config.method))
        for setting in ("flip", "augment"):
            if getattr(config, setting) and data.kind != "images":
                raise InputError(f"{setting} is for images, and {data.name} holds vectors of {list(data.sample_shape)}")
        batch_size = config.batch_size or 0
        if batch_size > len(data.train):
            n = len(data.train)
            held = f" ({len(data.held_out)} more are held out)" if len(data.held_out) else ""
            raise InputError(f"batch_size must be at most the {n} samples to train on{held}, got {batch_size}")
        self._course = Course(config, data.train)
        self._replicas.check_shared(batch_size=batch_size, penalty_samples=config.penalty_samples)
        self.config = config
        self.data = data
        self.classes = _classes(data, labels, config, source)
        self._labels = labels.train if labels and self.classes else None
        self._named_data, self._given_labels = False, labels is not None
        self.out = Path(config.out or "")
        self.device = self._replicas.device(resolve_device(config.device))
        if config.cuda_graph and self._replicas.world > 1:
            raise InputError("cuda_graph is for one process: train without it where several train together")
        self.latent_dim = latent_dim(generator, config)
        self.generator = generator.to(self.device)
        self.critic = critic.to(self.device)
        check_networks(
            self.generator,
            self.critic,
            data.sample_shape,
            self.latent_dim,
            min(2, batch_size),
            conditional=config.conditional,
        )
        self._iteration = Iteration(
            self.generator, self.critic, config, self.latent_dim, self._replicas, loss=loss, optimizer=optimizer
        )
        self._iteration.steps = self._course.steps
        self.ema = self._iteration.ema
        if config.init_from is not None and not _under_way(config):
            load_networks(config.init_from, data, self.classes, self.generator, self.ema, self.critic)
        try_step(self._iteration, data.sample_shape, batch_size // self._replicas.world)
        self._looking = Looking(
            data, labels, self.classes, config, self.latent_dim, self.device, rates=self._replicas.leads
        )
        self._checkpoint: tuple[int, Path] | None = None
        self._begun = False
        self._stopped = self._telling = False
        self._callbacks = [*callbacks, *([TensorBoard()] if self._replicas.leads else [])]
        self._look_at_first_samples()

    def _look_at_first_samples(self) -> None:
        """Measure real and generated samples, by which an explosion is told, and note what is unlikely to train."""
        looking, real = self._looking, self._looking.real
        with undisturbed(self.device, self.config.seed):
            labels = () if looking.labels is None else (looking.labels[:2],)
            noise = looking.noise[:2].to(self._iteration.noise_dtype)
            fake = generate(self.generator, noise, *labels).cpu()
            few = self._iteration.laid_out(real[:2].to(self.device))
            inputs = {"noise": (noise, *labels), "real": (few, *(of[: len(few)] for of in labels))}
            self._concerns = concerns(self.generator, self.critic, **inputs, span=real.aminmax(), loss=self.config.loss)
        size = max(1.0, *(samples.double().flatten(1).norm(dim=1).max().item() for samples in (real, fake)))
        self._watch = LossWatch(size, self.config.penalty.weight if self.config.penalty else 0.0)
        self._value = real.double().square().mean().sqrt().item()

    @property
    def step(self) -> int:
        """Generator steps taken."""
        return self._iteration.step

    def stop(self) -> None:
        """End training after the iteration that is under way, as at its end: for callbacks."""
        self._stopped = True

    def _tell(self, event: str, *what: Any) -> None:
        self._telling = True
        for callback in self._callbacks:
            getattr(callback, event)(self, *what)
        self._telling = False

    def _leaves_labels(self) -> bool:
        """Whether the data has labels that nothing uses; asked by the process that says so, of a new run."""
        if self.config.conditional or self.config.track or not self._replicas.leads:
            return False
        return self._given_labels or (self._named_data and has_labels(self.config.data))

    def fit(self, *, resume: bool = False) -> Summary:
        """Train to the last of ``config.steps`` or ``epochs``. Seeds the default generators of torch, NumPy and Python.

        In the main thread, Ctrl-C and SIGTERM end training after the iteration that is under way, with a checkpoint.

        Args:
            resume: Continue the run in ``config.out`` from its newest whole checkpoint (from the start if it has
                none yet); on the CPU the result equals an undisturbed run's bit for bit.

        Returns:
            What the run left behind.

        Raises:
            InputError: The folder holds another run, or none to resume; data cannot be read any more.
            DivergenceError: A loss or a parameter is not finite, or exploded; the last good checkpoint is kept.
            InterruptedTraining: A signal asked to stop; a ``KeyboardInterrupt``.
            LostProcessError: Another process of the same training is gone.
            OSError: The folder cannot be written; the last checkpoint is kept.
        """
        self._stopped = False
        with self._claimed_folder(resume):
            before = Description.read(self.out) if resume else None
            self._replicas.wait()
            try:
                summary = self._fit(load_checkpoint(self.out) if resume else None, before)
            except BaseException as error:
                self._tell("on_end", error)
                raise
            self._tell("on_end", None)
            return summary

    def _fit(self, checkpoint: Checkpoint | None, before: Description | None) -> Summary:
        if checkpoint is None and self._begun:
            raise InputError(f"{self.out} has no checkpoint to go back to: build the Trainer anew")
        self._iteration.seed()
        if checkpoint is not None:
            self._restore(checkpoint)
        if self._replicas.leads:
            if before is None:
                now = Description.of(self.config, self.data, self.classes)
            else:
                now = before.resumed(self.config, self.data, self.step, self.classes)
            now.write(self.out)
        self._begun = True
        self.generator.train()
        self.critic.train()
        if self._replicas.leads:
            print(banner(self.config, self.data, self._iteration, self.classes), file=sys.stderr)
            for concern in self._concerns:
                warnings.warn(concern, stacklevel=users_level())
        first, started = self.step, time.perf_counter()
        with (
            self._iteration.arithmetic(),
            StopRequests() as stop,
            ProgressLine(self._course.steps, first, shown=self._replicas.leads) as progress,
        ):
            if before is None and self._leaves_labels():
                name = self.data.name
                progress.message(f"{name} has labels, which this training does not use: --conditional does")
            for skipped in checkpoint.skipped if checkpoint else ():
                progress.message(f"passed over a damaged checkpoint: {skipped}")
            if checkpoint is not None:
                progress.message(f"resuming after step {first} from {checkpoint.path}")
            elif before is not None:
                progress.message("there is no checkpoint yet: beginning again at step 1")
            if before is not None and (changed := before.changed(self.config)):
                said = ", ".join(f"{name} {now} (was {was})" for name, (was, now) in changed.items())
                progress.message(f"from step {first + 1} on: {said}")
            records = self._train_to_the_end(progress, stop)
            seconds = time.perf_counter() - started
        images = (self.step - first) * self._iteration.n_critic * self._iteration.batch_size
        assert self._checkpoint is not None
        summary = Summary(
            out=self.out,
            steps=self.step,
            seconds=seconds,
            images_per_second=images / seconds,
            wasserstein=records[-1].get("wasserstein") if records else None,
            checkpoint=self._checkpoint[1],
            grid=self._grid_path(self.step),
            curves=self.out / "curves.png",
        )
        if self._replicas.leads:
            if not self._grid_path(self.step).exists():
                self._save_picture()
            if self.step > first or not (self.out / "summary.txt").exists():
                write_atomically(self.out / "summary.txt", os.fsencode(f"{summary}\n"))
        self._replicas.wait()
        return summary

    def _train_to_the_end(self, progress: ProgressLine, stop: StopRequests) -> list[dict[str, Any]]:
        """Train, going back where the configuration says so; returns the metrics."""
        while True:
            try:
                with MetricsLog(self.out if self._replicas.leads else None, self.step) as log:
                    self._tell("on_begin")
                    try:
                        self._train(progress, log, stop)
                    except (DivergedError, InterruptedTraining):
                        with contextlib.suppress(OSError):  # the first error is the one to tell
                            self._draw_curves(log.records)
                        raise
                    finally:
                        self._iteration.reads()  # the data on the device is no longer needed
                    self._draw_curves(log.records)
                    return log.records
            except DivergedError as error:
                self._go_back(error, progress)
            except OSError as error:
                if self._telling:  # it is a callback's own
                    raise
                why = f"{error.strerror or error}: {self.out} cannot be written at step {self.step}"
                raise OSError(error.errno, f"{why}; {self._kept()}") from error

    def _train(self, progress: ProgressLine, log: MetricsLog, stop: StopRequests) -> None:
        config, iteration, course = self.config, self._iteration, self._course
        # The same rows of both: a batch is decided by the number of samples, the seed and its index alone.
        reals, read_real = self._drawn(self.data.train)
        labels, read_labels = self._drawn(self._labels) if self._labels is not None else (iter(()), None)
        iteration.reads(read_real, read_labels)
        logged, since = self.step, time.perf_counter()
        look = since + FIRST_LOOK
        while self.step < course.steps:
            batch = self._read(reals)
            result = iteration(batch, self._read(labels), stop=stop.signal is not None)
            stop.nothing_to_save = False
            stopping = self._watch.put(self.step, result)
            self._tell("on_step", result)
            last = self.step == course.steps
            pictured = course.due(config.sample_every, self.step) or last
            # By the configuration alone: the processes must see a divergence at the same step, whoever rates.
            due = bool(config.track) and (course.due(config.track, self.step) or last)
            if course.due(config.log_every, self.step) or pictured or due:
                self._watch.flush()
                now = time.perf_counter()
                images = (self.step - logged) * iteration.n_critic * iteration.batch_size
                figures = self._figures(result, images / (now - since), held_out=pictured)
                log.write(figures | (self._rate(progress) if due else {}))
                self._tell("on_log", log.last)
                logged, since = self.step, time.perf_counter()
            progress.advance(self.step, log.last)
            if pictured and self._replicas.leads:
                self._save_picture()
            if course.due(config.checkpoint_every, self.step) or last:
                log.sync()
                self._save_checkpoint()
            if self._replicas.leads and (began := time.perf_counter()) >= look and not last:
                # By the clock, which the other processes do not share: nothing here is of the training.
                if not any((self.out / "samples").glob("step-*.png")):
                    self._save_picture()
                self._draw_curves(log.records)
                look = time.perf_counter() + max(FIRST_LOOK, (time.perf_counter() - began) / LOOKING)
            if self._stopped and not last:
                log.sync()
                self._save_unless_saved()
                progress.message(f"stopped after step {self.step} of {course.steps}; {way_on(self.out, config.model)}")
                return
            if not last and (stopping or (self._replicas.world == 1 and stop.signal is not None)):
                log.sync()
                self._save_unless_saved()
                message = f"stopped after step {self.step} of {course.steps}; {way_on(self.out, config.model)}"
                raise InterruptedTraining(message, stop.number)

    def _drawn(self, split: Split) -> tuple[Iterator[Tensor], Read | None]:
        """Draw a split's batches from this step on, and say how an iteration reads them.

        Where iterations are replayed and the split is kept on the device, they are rows, and reading is replayed too.
        """
        config, iteration = self.config, self._iteration
        n, begin = iteration.batch_size, self._course.next_batch(self.step, iteration.batch_size)
        part = self._replicas.rows(n)
        resident = split.resident(self.device) if iteration.replayed else None
        if resident is not None:
            return resident.rows(n, seed=config.seed, start=begin, part=part), resident.read
        drawn = batches(
            split, n, seed=config.seed, start=begin, device=self.device, workers=config.workers, part=part,
            ahead=2 * iteration.n_critic,  # those of the next iteration too
        )  # fmt: skip
        return drawn, None

    def _read(self, reals: Iterator[Tensor]) -> list[Tensor]:
        """Read the real samples (or labels) of one iteration before it begins: an error leaves nothing half done."""
        try:
            return list(itertools.islice(reals, self._iteration.n_critic))
        except Exception as error:
            if self._replicas.leads:
                self._save_unless_saved()
            if isinstance(error, InputError | OSError):
                why = f"the data cannot be read after step {self.step}: {error}"
                raise InputError(f"{why}; {self._kept()}") from error
            error.add_note(f"while reading data after step {self.step}; {self._kept()}")
            raise

    def _figures(self, result: IterationResult, images_per_second: float, *, held_out: bool) -> dict[str, Any]:
        critic = result.critic
        figures = {
            "step": self.step,
            "critic_loss": critic.loss.item(),
            "generator_loss": result.generator_loss.item(),
            "wasserstein": critic.wasserstein.item(),
            "real_score": critic.real_score.item(),
            "fake_score": critic.fake_score.item(),
            "learning_rate": self._iteration.learning_rate("critic"),
            "images_per_second": images_per_second,
        }
        if self.config.penalty is not None:
            figures |= {"penalty": critic.penalty.item(), "gradient_norm": critic.gradient_norm.item()}
        if self.config.epochs is not None:
            figures["epoch"] = self._course.epoch(self.step)
        if self._iteration.rewinds:
            figures["rewinds"] = self._iteration.rewinds
        if held_out and self._replicas.leads:
            estimate = self._looking.held_out_wasserstein(self.generator, self.critic)
            figures |= {} if estimate is None else {"held_out_wasserstein": estimate}
        return figures

    def _rate(self, progress: ProgressLine) -> dict[str, Any]:
        """Rate what would be sampled now, where there is a tracker."""
        figures = self._looking.rate(self.ema or self.generator)
        if figures:
            said = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
            progress.message(f"step {self.step}: {said}")
        return figures

    def _go_back(self, error: DivergedError, progress: ProgressLine) -> None:
        """Return to the last good checkpoint with half the learning rates.

        Raises:
            DivergenceError: The configuration says to stop, or there is nothing to go back to.
        """
        self._watch.clear()
        self._replicas.wait()
        rewinds = self._iteration.rewinds
        good = load_checkpoint(self.out) if self.config.on_divergence == "rewind" else None
        if good is None or rewinds >= self.config.max_rewinds:
            back = f"; went back {rewinds} times" if rewinds else ""
            if self._checkpoint and self.config.on_divergence == "stop" and self.config.model != OWN:
                back = f"; {way_on(self.out, self.config.model)} --on-divergence rewind"
            raise DivergenceError(f"{error}; {advice(self.config, self._value)}; {self._kept()}{back}") from error
        self._restore(good)
        self._iteration.rewinds = rewinds + 1
        self.generator.train()
        self.critic.train()
        rate = self._iteration.learning_rate("critic")
        progress.message(f"{error}; going back to step {good.step} with a learning rate of {rate:g}")

    def _kept(self) -> str:
        if self._checkpoint is None:
            return f"no checkpoint was written yet, remove {self.out}"
        return f"the last good checkpoint is {self._checkpoint[1]}"

    def _save_picture(self) -> None:
        path = self._grid_path(self.step)
        samples = self._looking.save_picture(self.ema or self.generator, path)
        self._tell("on_picture", samples, path)

    def _draw_curves(self, records: list[dict[str, Any]]) -> None:
        if self._replicas.leads and records:
            target = self.config.penalty.target if self.config.penalty else None
            title = f"{self.config.method} on {self.data.name}"
            curves.save_curves(records, self.out / "curves.png", title=title, target=target)

    def _grid_path(self, step: int) -> Path:
        return self.out / "samples" / f"step-{step:08d}.png"

    def _save_unless_saved(self) -> None:
        if self.step > 0 and (self._checkpoint is None or self._checkpoint[0] != self.step):
            self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        self._watch.flush()
        for network, module in (("critic", self.critic), ("generator", self.generator)):
            for name, parameter in module.named_parameters():
                if not parameter.isfinite().all():
                    raise DivergedError(f"the {network}'s {name} is not finite", self.step)
        if self._replicas.leads:
            save_checkpoint(self.out, self.step, self._state(), keep=self.config.keep)
        self._checkpoint = self.step, checkpoint_path(self.out, self.step)
        self._tell("on_checkpoint", self._checkpoint[1])

    def _state(self) -> Tree:
        iteration = self._iteration
        return {
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "generator_optimizer": optimizer_state(iteration.optimizers["generator"]),
            "critic_optimizer": optimizer_state(iteration.optimizers["critic"]),
            "rewinds": iteration.rewinds,
            "seen": self._course.seen(self.step),
            "random": random_state(self.device, iteration.rng),
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, source, iteration = checkpoint.state, checkpoint.path, self._iteration
        self._course.begin(checkpoint.step, state["seen"])
        if checkpoint.step > self._course.steps:
            given, at = f"steps is {self.config.steps}", f"step {checkpoint.step}"
            if self.config.epochs is not None:
                given, at = f"epochs is {self.config.epochs}", f"epoch {self._course.epoch(checkpoint.step):.1f}"
            raise InputError(f"{given}, but {source} is at {at} already")
        iteration.steps = self._course.steps
        load_module(self.generator, state["generator"], "generator", source)
        load_module(self.critic, state["critic"], "critic", source)
        if self.ema is not None:
            load_module(self.ema, state["ema"], "generator", source)
        for name, optimizer in iteration.optimizers.items():
            load_optimizer(optimizer, state[f"{name}_optimizer"], own=self.config.optimizer == OWN)
        iteration.forget_graphs()
        iteration.step, iteration.rewinds = checkpoint.step, state["rewinds"]
        set_random_state(state["random"], self.device, iteration.rng)
        self._checkpoint = checkpoint.step, source

    @contextlib.contextmanager
    def _claimed_folder(self, resume: bool) -> Iterator[None]:
        """Hold the folder of a new run, or of the one to go on with, against every other process."""
        if not self._replicas.leads:
            yield
            return
        if resume:
            Description.read(self.out).check(self.config, self.data, self.classes)
        elif self._named:
            self.out = make_new_folder(self.data.name, self.config.method)
            self.config = dataclasses.replace(self.config, out=self.out)
        else:
            make_folder(self.out)
        with held(self.out, new=not resume):
            yield


def _check_apart(out: Path | None, data: Any) -> None:
    """Raise where a run would be written between its data; in a folder below, its pictures are not read as data."""
    if out is not None and isinstance(data, str | os.PathLike) and out.resolve() == Path(data).expanduser().resolve():
        raise InputError(f"out must be another folder than data, got {out} for both")


def _under_way(config: TrainConfig) -> bool:
    """Whether a run has a checkpoint to go on from, so that what it began with does not matter any more."""
    return config.out is not None and has_checkpoint(config.out)


def _classes(
    data: Data, labels: Labels | None, config: TrainConfig, source: str | os.PathLike[str] | None
) -> tuple[str, ...]:
    """Name the classes that a conditional run tells its networks; none where it is not conditional.

    Raises:
        InputError: It has none to tell, or not one a sample.
    """
    if not config.conditional:
        return ()
    if labels is None:
        why = "give them as labels=" if source is None else why_unlabelled(source)
        raise InputError(f"conditional needs labels, and none were found for {data.name}: {why}")
    labels.check(data)
    if len(labels.names) < 2:
        raise InputError(f"conditional needs two or more classes, and {data.name} has {labels.names[0]} alone")
    return labels.names
