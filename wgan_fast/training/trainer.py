"""The training loop: from networks and data to samples, metrics, curves and checkpoints in one folder."""

import contextlib
import copy
import dataclasses
import fcntl
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .. import models, plots
from ..checks import check_scores
from ..clipping import clip_weights_
from ..critic_step import CriticStep, CriticStepResult
from ..data import SOURCES, Data, Split, batches, load_data
from ..double_backprop import CaptureError
from ..errors import DivergenceError, InputError
from ..files import write_atomically
from ..losses import get_loss
from ..metrics import wasserstein_estimate
from .checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    Tree,
    load_checkpoint,
    load_module,
    load_optimizer,
    optimizer_state,
    save_checkpoint,
)
from .config import TrainConfig
from .log import MetricsLog, ProgressLine
from .randomness import NETWORKS, TRAINING, random_state, seed_everything, set_random_state, undisturbed
from .run import (
    CONFIG_FILE,
    OWN_MODEL,
    Description,
    build_networks,
    check_rebuildable,
    check_unchanged,
    draw_noise,
    generate,
    latent_dim,
    load_run_data,
    resolve_device,
)

GRID = {"images": 64, "vectors": 2048}
"""Samples in the pictures written during training."""

LOCK_FILE = ".lock"
"""What the process that trains in a folder holds locked."""

HELD_OUT = 512
"""Held-out samples behind the held-out Wasserstein estimate, taken whenever a picture is written."""


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
            ``spectral_norm``, which hinge has by default, the critic is normalised in place.

    Raises:
        InputError: Something does not fit: the message names it. Nothing has been written then.

    >>> trainer = Trainer(generator, critic, images, TrainConfig(steps=1000))  # doctest: +SKIP
    >>> print(trainer.fit())  # doctest: +SKIP
    """

    def __init__(self, generator: nn.Module, critic: nn.Module, data: Any, config: TrainConfig) -> None:
        if not isinstance(data, Data):
            data = load_data(
                data,
                image_size=config.image_size,
                channels=config.channels,
                holdout=config.holdout,
                seed=config.seed,
            )
        config = dataclasses.replace(config, data=data.name, model=OWN_MODEL).resolved(data.sample_shape)
        if config.spectral_norm:
            models.spectral_norm(critic)
        self._set_up(generator, critic, data, config)

    @classmethod
    def from_config(cls, config: TrainConfig) -> Self:
        """Build the networks and load the data that a configuration names.

        Raises:
            InputError: As the constructor.
        """
        resolve_device(config.device)
        check_rebuildable(config)
        path = Path(config.data).expanduser()
        if config.data not in SOURCES and path.exists():
            # A run is resumed and evaluated from wherever one happens to be.
            config = dataclasses.replace(config, data=str(path.resolve()))
        data = load_run_data(config)
        config = config.resolved(data.sample_shape)
        seed_everything(config.seed, NETWORKS)
        generator, critic = build_networks(config, data.sample_shape)
        trainer = cls.__new__(cls)
        trainer._set_up(generator, critic, data, config)
        return trainer

    @classmethod
    def from_run(cls, folder: Path, **changes: Any) -> Self:
        """Rebuild the trainer of an earlier run, ready to ``fit(resume=True)``.

        Args:
            folder: The run's folder.
            **changes: Settings to change, such as ``steps``.

        Raises:
            InputError: There is no run, a setting may not change, or the networks were given as objects and cannot
                be rebuilt.
        """
        before = Description.read(folder).config
        config = dataclasses.replace(before, **{**changes, "out": folder})
        check_unchanged(before, config)
        return cls.from_config(config)

    def _set_up(self, generator: nn.Module, critic: nn.Module, data: Data, config: TrainConfig) -> None:
        self._named = config.out is None
        if config.out is None:
            config = dataclasses.replace(config, out=_new_folder(data.name, config.method))
        if (config.batch_size or 0) > len(data.train):
            n = len(data.train)
            raise InputError(f"batch_size must be at most the {n} samples to train on, got {config.batch_size}")
        self.config = config
        self.data = data
        self.out = Path(config.out or "")
        self.device = resolve_device(config.device)
        self.latent_dim = latent_dim(generator, config)
        self.generator = generator.to(self.device)
        self.critic = critic.to(self.device)
        self._check_networks()
        self.ema = copy.deepcopy(self.generator).requires_grad_(False).eval() if config.ema else None
        self._trainable = _trainable("critic", self.critic)
        self._generator_loss = get_loss(config.recipe.loss).generator
        self._critic_step = CriticStep(
            self.critic,
            loss=config.recipe.loss,
            penalty=config.penalty,
            engine=config.engine,
            precision=config.precision,
        )
        self._try_step()
        self._critic_optimizer = _optimizer(self._trainable, config, config.learning_rate)
        self._generator_optimizer = _optimizer(
            _trainable("generator", self.generator),
            config,
            config.generator_learning_rate or config.learning_rate,
        )
        self._fixed_noise = draw_noise(GRID[data.kind], self.latent_dim, config.seed).to(self.device)
        self._held_out = _some(data.held_out, HELD_OUT, config.seed)
        self.step = 0
        self._begun = False

    def fit(self, *, resume: bool = False) -> Summary:
        """Train to ``config.steps``. Seeds the default generators of torch, NumPy and Python.

        Args:
            resume: Continue the run in ``config.out`` from its newest whole checkpoint (from the start if it has
                none yet); on the CPU the result equals an undisturbed run's bit for bit.

        Returns:
            What the run left behind.

        Raises:
            InputError: The folder holds another run, or none to resume.
            DivergenceError: A loss or a parameter is not finite; the last good checkpoint is kept.
        """
        with self._claimed_folder(resume):
            return self._fit(load_checkpoint(self.out) if resume else None, resume)

    def _fit(self, checkpoint: Checkpoint | None, resume: bool) -> Summary:
        if checkpoint is None and self._begun:
            raise InputError(f"{self.out} has no checkpoint to go back to: build the Trainer anew")
        seed_everything(self.config.seed, TRAINING)
        if checkpoint is not None:
            self._restore(checkpoint)
        Description.of(self.config, self.data).write(self.out)
        self._begun = True
        self.generator.train()
        self.critic.train()
        first, started = self.step, time.perf_counter()
        with (
            ProgressLine(self.config.steps, first) as progress,
            MetricsLog(self.out, first) as log,
        ):
            for skipped in checkpoint.skipped if checkpoint else ():
                progress.message(f"passed over a damaged checkpoint: {skipped}")
            if checkpoint is not None:
                progress.message(f"resuming after step {first} from {checkpoint.path}")
            elif resume:
                progress.message("there is no checkpoint yet: beginning again at step 1")
            self._train(progress, log)
            seconds = time.perf_counter() - started
            curves = self.out / "curves.png"
            target = self.config.penalty.target if self.config.penalty else None
            if log.records:
                plots.save_curves(log.records, curves, title=f"{self.config.method} on {self.data.name}", target=target)
        if not self._grid_path(self.step).exists():
            self._save_picture()
        images = (self.step - first) * (self.config.n_critic or 0) * (self.config.batch_size or 0)
        summary = Summary(
            out=self.out,
            steps=self.step,
            seconds=seconds,
            images_per_second=images / seconds,
            wasserstein=log.last.get("wasserstein"),
            checkpoint=self._checkpoint_path,
            grid=self._grid_path(self.step),
            curves=curves,
        )
        if self.step > first or not (self.out / "summary.txt").exists():
            write_atomically(self.out / "summary.txt", f"{summary}\n".encode())
        return summary

    def _train(self, progress: ProgressLine, log: MetricsLog) -> None:
        config = self.config
        n_critic, batch_size = config.n_critic or 0, config.batch_size or 0
        reals = batches(
            self.data.train,
            batch_size,
            seed=config.seed,
            start=self.step * n_critic,
            device=self.device,
            workers=config.workers,
        )
        logged, since = self.step, time.perf_counter()
        for step in range(self.step + 1, config.steps + 1):
            result, generator_loss = self._iterate(step, itertools.islice(reals, n_critic))
            self._check_losses(step, result, generator_loss)
            self.step = step
            last = step == config.steps
            pictured = step % config.sample_every == 0 or last
            if step % config.log_every == 0 or pictured:
                now = time.perf_counter()
                images = (step - logged) * n_critic * batch_size
                logged, since, seconds = step, now, now - since
                log.write(self._figures(result, generator_loss, images / seconds, held_out=pictured))
            progress.advance(step, log.last)
            if pictured:
                self._save_picture()
            if step % config.checkpoint_every == 0 or last:
                log.sync()
                self._save_checkpoint()

    def _iterate(self, step: int, reals: Iterator[Tensor]) -> tuple[CriticStepResult, Tensor]:
        """The critic's steps and the generator's step of one iteration; returns the last result and the loss."""
        factor = learning_rate_factor(self.config.schedule, step, self.config.steps)
        for optimizer in (self._critic_optimizer, self._generator_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

        for real in reals:
            with torch.no_grad(), self._autocast():
                fake = self.generator(self._noise()).to(real.dtype)
            result = self._critic_step(real, fake)
            self._critic_optimizer.step()
            if self.config.clip is not None:
                clip_weights_(self._trainable, self.config.clip)

        with _frozen(self._trainable), self._autocast():
            generator_loss = self._generator_loss(self.critic(self.generator(self._noise())))
            self._generator_optimizer.zero_grad(set_to_none=True)
            generator_loss.backward()  # type: ignore[no-untyped-call]
        self._generator_optimizer.step()
        if self.ema is not None:
            # A young average forgets faster, or the first networks would linger in it.
            update_ema_(self.ema, self.generator, min(self.config.ema, step / (step + 10)))
        return result, generator_loss.detach()

    def _noise(self) -> Tensor:
        return torch.randn(self.config.batch_size or 0, self.latent_dim, device=self.device)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _figures(
        self, result: CriticStepResult, generator_loss: Tensor, images_per_second: float, *, held_out: bool
    ) -> dict[str, Any]:
        figures = {
            "step": self.step,
            "critic_loss": result.loss.item(),
            "generator_loss": generator_loss.item(),
            "wasserstein": result.wasserstein.item(),
            "real_score": result.real_score.item(),
            "fake_score": result.fake_score.item(),
            "learning_rate": self._critic_optimizer.param_groups[0]["lr"],
            "images_per_second": images_per_second,
        }
        if self.config.penalty is not None:
            figures |= {"penalty": result.penalty.item(), "gradient_norm": result.gradient_norm.item()}
        if held_out and self._held_out is not None:
            noise = draw_noise(self._held_out.shape[0], self.latent_dim, self.config.seed)
            with undisturbed(self.device, self.config.seed):
                fake = generate(self.generator, noise.to(self.device))
                real = self._held_out.to(self.device)
                figures["held_out_wasserstein"] = wasserstein_estimate(self.critic, real, fake)
        return figures

    def _check_losses(self, step: int, result: CriticStepResult, generator_loss: Tensor) -> None:
        quantities = {
            "the gradient penalty": result.penalty,  # before the loss, which contains it
            "the critic's loss": result.loss,
            "the generator's loss": generator_loss,
        }
        if not torch.stack([value.float() for value in quantities.values()]).isfinite().all():
            name, value = next((n, v.item()) for n, v in quantities.items() if not math.isfinite(v.item()))
            raise self._diverged(f"{name} is {value}", step)

    def _diverged(self, what: str, step: int) -> DivergenceError:
        good = load_checkpoint(self.out)
        kept = (
            f"the last good checkpoint is {good.path}" if good else f"no checkpoint was written yet, remove {self.out}"
        )
        return DivergenceError(f"training diverged at step {step}: {what}; {kept}")

    def _save_picture(self) -> None:
        path = self._grid_path(self.step)
        path.parent.mkdir(exist_ok=True)
        with undisturbed(self.device, self.config.seed):
            samples = generate(self.ema or self.generator, self._fixed_noise).float().cpu()
        if self.data.kind == "vectors" and self.data.sample_shape == (2,):
            real = self.data.train.take(min(samples.shape[0], len(self.data.train)), seed=self.config.seed)
            plots.save_scatter(samples, real, path, modes=self.data.modes)
        else:
            plots.save_grid(samples, path, columns=math.isqrt(samples.shape[0]))

    def _grid_path(self, step: int) -> Path:
        return self.out / "samples" / f"step-{step:08d}.png"

    def _save_checkpoint(self) -> None:
        for network, module in (("critic", self.critic), ("generator", self.generator)):
            for name, parameter in module.named_parameters():
                if not parameter.isfinite().all():
                    raise self._diverged(f"the {network}'s {name} is not finite", self.step)
        self._checkpoint_path = save_checkpoint(self.out, self.step, self._state(), keep=self.config.keep)

    def _state(self) -> Tree:
        return {
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "generator_optimizer": optimizer_state(self._generator_optimizer),
            "critic_optimizer": optimizer_state(self._critic_optimizer),
            "critic_steps": self._critic_step.steps_taken,
            "random": random_state(self.device),
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, source = checkpoint.state, checkpoint.path
        if checkpoint.step > self.config.steps:
            raise InputError(f"steps is {self.config.steps}, but {source} is at step {checkpoint.step} already")
        load_module(self.generator, state["generator"], "generator", source)
        load_module(self.critic, state["critic"], "critic", source)
        if self.ema is not None:
            load_module(self.ema, state["ema"], "generator", source)
        load_optimizer(self._generator_optimizer, state["generator_optimizer"])
        load_optimizer(self._critic_optimizer, state["critic_optimizer"])
        self._critic_step.steps_taken = state["critic_steps"]
        set_random_state(state["random"], self.device)
        self.step = checkpoint.step
        self._checkpoint_path = source

    @contextlib.contextmanager
    def _claimed_folder(self, resume: bool) -> Iterator[None]:
        """Hold the folder of a new run, or of the one to go on with, against every other process."""
        if resume:
            Description.read(self.out).check(self.config, self.data)
        else:
            self._make_folder()
        with (self.out / LOCK_FILE).open("w") as lock:
            try:
                # A record lock: the kernel lets go when this process dies, and worker processes do not inherit it.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"out {self.out} is being trained by another process") from error
            if not resume:
                self._check_free()
            yield

    def _make_folder(self) -> None:
        self._check_free()
        try:
            if not self._named:
                self.out.mkdir(parents=True, exist_ok=True)
                return
            while True:
                try:
                    return self.out.mkdir(parents=True)
                except FileExistsError:
                    # Another run has taken the name since this one chose it.
                    self.out = _new_folder(self.data.name, self.config.method)
                    self.config = dataclasses.replace(self.config, out=self.out)
        except OSError as error:
            raise InputError(f"out {self.out} cannot be written: {error.strerror}") from error

    def _check_free(self) -> None:
        if not self._named and any((self.out / name).exists() for name in (CONFIG_FILE, CHECKPOINTS)):
            raise InputError(
                f"out {self.out} already holds a run: give another folder, or go on with --resume {self.out}"
            )

    def _check_networks(self) -> None:
        """Run both networks on two samples (one where a batch has one) and raise unless the shapes fit."""
        n = min(2, self.config.batch_size or 0)
        shape = [n, *self.data.sample_shape]
        fake = self._try("generator", self.generator, torch.zeros(n, self.latent_dim, device=self.device))
        if not isinstance(fake, Tensor) or list(fake.shape) != shape:
            got = list(fake.shape) if isinstance(fake, Tensor) else type(fake).__name__
            raise InputError(
                f"generator must make samples of the data's shape {shape} from noise [{n}, {self.latent_dim}], "
                f"got {got}"
            )
        scores = self._try("critic", self.critic, torch.zeros(shape, device=self.device))
        try:
            check_scores(scores, torch.empty(shape))
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    def _try_step(self) -> None:
        """Take a critic step on zeros, which leaves no trace, and raise if that fails."""
        before = copy.deepcopy(self.critic.state_dict())
        zeros = torch.zeros(self.config.batch_size or 0, *self.data.sample_shape, device=self.device)
        try:
            self.critic.train()
            self._critic_step(zeros, zeros)
        except CaptureError as error:
            raise InputError(f"engine four_pass cannot take this critic: {error}") from error
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError(f"critic fails in a training step: {str(error).partition(chr(10))[0]}") from error
        finally:
            self.critic.load_state_dict(before)
            self.critic.zero_grad(set_to_none=True)
            self._critic_step.steps_taken = 0

    @torch.no_grad()
    def _try(self, name: str, network: nn.Module, x: Tensor) -> Any:
        """What the network returns in training mode; its buffers stay as they were."""
        before = copy.deepcopy(network.state_dict())
        try:
            return network.train()(x)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            hint = (
                "; the noise's length is latent_dim, of the configuration or the generator"
                if name == "generator"
                else ""
            )
            raise InputError(f"{name} fails on an input of shape {list(x.shape)}: {reason}{hint}") from error
        finally:
            network.load_state_dict(before)


def _trainable(name: str, network: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError(f"{name} has no trainable parameters")
    return parameters


@contextlib.contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Keep autograd from computing gradients for parameters that the generator's step does not use."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def learning_rate_factor(schedule: str, step: int, steps: int) -> float:
    """What the learning rate is multiplied with at ``step`` (from 1) of ``steps``.

    "constant" stays at 1; "linear" and "cosine" fall from 1 at the first step towards 0 after the last.
    """
    done = (step - 1) / steps
    if schedule == "linear":
        return 1 - done
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0


@torch.no_grad()
def update_ema_(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move ``average`` towards ``module``: θ̄ ← decay·θ̄ + (1 − decay)·θ for parameters, a copy for buffers."""
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for mean, value in zip(average.buffers(), module.buffers()):
        mean.copy_(value)


def _some(split: Split, n: int, seed: int) -> Tensor | None:
    """Up to ``n`` samples of a split on the CPU; None where it has none."""
    n = min(n, len(split))
    return split.take(n, seed=seed) if n else None


def _optimizer(
    parameters: list[nn.Parameter], config: TrainConfig, learning_rate: float | None
) -> torch.optim.Optimizer:
    rate, beta1, beta2 = learning_rate or 0.0, config.beta1 or 0.0, config.beta2 or 0.0
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, lr=rate, betas=(beta1, beta2), fused=True)
    else:
        optimizer = torch.optim.RMSprop(parameters, lr=rate, alpha=beta2)
    for group in optimizer.param_groups:
        group["initial_lr"] = rate
    return optimizer


def _new_folder(data: str, method: str) -> Path:
    names = (
        f"{Path(data).stem}-{method}{suffix}" for suffix in itertools.chain([""], map("-{}".format, itertools.count(2)))
    )
    return next(path for name in names if not (path := Path("runs") / name).exists())
