"""A run read back from its folder: its networks, for sampling and evaluation."""

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import InputError, users_level
from . import metrics, models, quality
from .checkpoint import load_checkpoint, load_module
from .config import MAX_SEED, OWN, TrainConfig
from .data import load_labels
from .description import Description, check_found, check_rebuildable, listed, load_run_data
from .device import resolve_device
from .files import as_path
from .randomness import NOISE, stream_seed, undisturbed
from .weights import spectral_norm

PIECE = 256
"""Samples generated at a time."""

FEW = 100
"""Samples on each side of a comparison below which chance decides most of it."""


@dataclass(frozen=True)
class Run:
    """A trained pair of networks, read from a run's newest whole checkpoint.

    Attributes:
        folder: Where the run is.
        description: What it trained.
        step: The checkpoint's step.
        generator: The moving average of the generator (the generator itself where the run keeps none), in eval mode.
        critic: The critic, in eval mode; None where the generator was given to ``load`` as an object, and no critic.
        latent_dim: Length of the generator's noise.
        device: Where the networks are.
        skipped: Damaged checkpoints that were passed over, with the reason.
    """

    folder: Path
    description: Description
    step: int
    generator: nn.Module
    critic: nn.Module | None
    latent_dim: int
    device: torch.device
    skipped: tuple[str, ...]

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str = "auto",
        generator: nn.Module | None = None,
        critic: nn.Module | None = None,
        model: str | None = None,
    ) -> Self:
        """Rebuild a run's networks and load its newest whole checkpoint.

        Args:
            folder: The run's folder.
            device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one.
            generator: A network to load the generator's state into, in place, in eval mode and on the device: for a
                run whose networks were given as objects. None builds what the run names.
            critic: As ``generator``; such a run needs none to be sampled, only to score and to evaluate.
            model: ``module:function`` that builds networks of your own now, if another than the run names.

        Raises:
            InputError: There is no run, no whole checkpoint, the checkpoint is of another architecture, or the run's
                networks were given as objects and no generator is given here.
        """
        folder = as_path(folder)
        description = Description.read(folder)
        if model is not None:
            config = description.config
            if ":" not in config.model or ":" not in model:
                raise InputError(
                    f"model is for a run with networks of module:function, and this one's are {config.model}"
                )
            description = dataclasses.replace(description, config=dataclasses.replace(config, model=model))
        description.find_model()
        checkpoint = load_checkpoint(folder)
        if checkpoint is None:
            raise InputError(f"{folder} has no checkpoint yet")
        place = resolve_device(device)
        config, state = description.config, checkpoint.state
        if generator is None or (critic is None and config.model != OWN):
            named = build_networks(config, description.sample_shape, description.kind, len(description.classes))
            generator = named[0] if generator is None else generator
            critic = named[1] if critic is None else critic
        load_module(generator, state["ema"] or state["generator"], "generator", checkpoint.path)
        if critic is not None:
            if config.spectral_norm:
                spectral_norm(critic)
            load_module(critic, state["critic"], "critic", checkpoint.path)
            critic.to(place).eval()
        return cls(
            folder=folder,
            description=description,
            step=checkpoint.step,
            generator=generator.to(place).eval(),
            critic=critic,
            latent_dim=latent_dim(generator, config),
            device=place,
            skipped=checkpoint.skipped,
        )

    def sample(self, n: int, *, seed: int = 0, labels: Tensor | None = None) -> Tensor:
        """Generate ``n`` samples ``[n, *sample_shape]`` on the CPU; the same for the same seed.

        Args:
            n: How many.
            seed: Of the noise, which labels leave as it is.
            labels: Of a conditional run, the class of each, ``[n]``; by default those of ``labels(n)``.
        """
        return torch.cat(list(self.pieces(n, seed=seed, labels=labels)))

    def pieces(self, n: int, *, seed: int = 0, labels: Tensor | None = None) -> Iterator[Tensor]:
        """Generate the samples of ``sample`` piece by piece, for more of them than fit in memory.

        Until the last piece is taken, the default generators are those of the samples.

        Raises:
            InputError: n is below 1, or the seed is out of range.
        """
        if n < 1:
            raise InputError(f"n must be at least 1, got {n}")
        rng = noise_generator(seed)
        sizes = (min(PIECE, n - begin) for begin in range(0, n, PIECE))
        noise = (torch.randn(size, self.latent_dim, generator=rng) for size in sizes)
        return self._generate(noise, self.condition(n, labels), seed)

    def walk(self, stations: int, steps: int, *, seed: int = 0, labels: Tensor | None = None) -> Tensor:
        """Generate samples along a walk between random latents that ends where it begins.

        Gaussian noise of many dimensions lies near a sphere, and what lies within it a generator has seldom seen: the
        walk goes along great circles (White 2016, arXiv:1609.04468).

        Args:
            stations: Latents to walk between, at least 2.
            steps: Samples from each of them on, itself included, to before the next one.
            seed: Of the latents.
            labels: Of a conditional run, the class of each sample, ``[stations * steps]``.

        Returns:
            ``[stations * steps, *sample_shape]`` on the CPU.
        """
        latents = great_circles(draw_noise(stations, self.latent_dim, seed), steps)
        condition = self.condition(len(latents), labels)
        return torch.cat(list(self._generate(torch.split(latents, PIECE), condition, seed)))

    def _generate(self, noise: Iterable[Tensor], condition: tuple[Tensor, ...], seed: int) -> Iterator[Tensor]:
        begin = 0
        with undisturbed(self.device, seed):
            for piece in noise:
                end = begin + len(piece)
                yield generate(self.generator, piece.to(self.device), *(part[begin:end] for part in condition)).cpu()
                begin = end

    def score(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Rate samples ``[N, *sample_shape]`` with the critic; returns ``[N]`` float32 on the CPU.

        Args:
            samples: The samples.
            labels: As in ``sample``.
        """
        condition = self.condition(len(samples), labels)
        return generate(self._needed_critic(), samples.to(self.device), *condition).reshape(-1).float().cpu()

    def labels(self, n: int, label: str | None = None) -> Tensor:
        """Return labels ``[n]`` int64 for ``n`` samples of a conditional run.

        Args:
            n: How many.
            label: The class of all of them, by its name, or by its index where no class has a number for a name. None
                deals out all classes, as evenly as may be, class by class.

        Raises:
            InputError: There is no such class, or the run is not conditional.
        """
        names = self.description.classes
        if not names:
            raise InputError(f"label is for conditional runs, and {self.folder} was trained without --conditional")
        if label is None:
            return dealt(len(names), n)
        if label in names:
            return torch.full((n,), names.index(label))
        numbered = any(name.isdecimal() for name in names)
        if numbered or not label.isdecimal() or int(label) >= len(names):
            raise InputError(f"label must be one of the classes {listed(names)}, got {label!r}")
        return torch.full((n,), int(label))

    def condition(self, n: int, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what the networks take besides ``n`` samples or as much noise: labels on the device, or nothing."""
        if not self.description.classes:
            if labels is not None:
                raise InputError("labels were given, but this run is not conditional")
            return ()
        if labels is not None:
            labels = torch.as_tensor(labels)
            classes = len(self.description.classes)
            if labels.shape != (n,) or labels.is_floating_point() or not ((labels >= 0) & (labels < classes)).all():
                raise InputError(f"labels must be {n} integers from 0 to {classes - 1}, one a sample")
        return ((self.labels(n) if labels is None else labels).to(self.device),)

    def evaluate(self, *, samples: int = 2000, seed: int = 0, data: str | None = None) -> dict[str, Any]:
        """Measure the run against data that it did not train on.

        Args:
            samples: Samples on each side of a comparison; fewer where less data was held out.
            seed: Of the noise and of the projections.
            data: Where the run's data lies now; None means where it lay.

        Returns:
            The critic's Wasserstein estimate on held-out and on training data; the sliced Wasserstein distance of
            generated samples to held-out ones and, as its floor, that between two disjoint real sets of the same
            size; for toy mixtures the modes covered and the share of high-quality samples; for images with classes
            what ``quality.Judge.rate`` returns.

        Raises:
            InputError: The run's data cannot be loaded any more.
        """
        critic = self._needed_critic()
        config = self.description.config
        if data is not None:
            config = dataclasses.replace(config, data=data)
        check_found(config)
        found = load_run_data(config)
        labels = load_labels(config.data, holdout=config.holdout, seed=config.seed)
        self.description.check_data(found, config.data, labels.names if labels else ())
        if not len(found.held_out):
            raise InputError("this run held no data out (holdout 0): there is nothing to evaluate against")
        n = min(samples, len(found.held_out), len(found.train))
        if n < FEW:
            more = "take more (--samples), or hold out more (--holdout)"
            message = f"{n} samples on each side are few, and most differences chance: {more}"
            warnings.warn(message, stacklevel=users_level())
        held_out, train = found.held_out.take(n, seed=seed), found.train.take(n, seed=seed)
        theirs = trained = None
        if labels and self.description.classes:
            labels.check(found)
            theirs, trained = labels.held_out.take(n, seed=seed), labels.train.take(n, seed=seed)
        fake = self.sample(n, seed=seed, labels=theirs)
        fake_of_train = fake if trained is None else self.sample(n, seed=seed, labels=trained)
        report: dict[str, Any] = {
            "step": self.step,
            "samples": n,
            "wasserstein_held_out": metrics.wasserstein_estimate(critic, held_out, fake, labels=theirs),
            "wasserstein_train": metrics.wasserstein_estimate(critic, train, fake_of_train, labels=trained),
            "sliced_wasserstein": metrics.sliced_wasserstein(fake, held_out, seed=seed),
            "sliced_wasserstein_floor": metrics.sliced_wasserstein(train, held_out, seed=seed),
        }
        if found.modes is not None and found.mode_std is not None:
            many = self.sample(max(samples, 100 * found.modes.shape[0]), seed=seed)
            coverage = metrics.mode_coverage(many, found.modes, found.mode_std)
            report |= {
                "modes_covered": coverage.covered,
                "modes": coverage.total,
                "high_quality": coverage.high_quality,
            }
        judge = None if labels is None else quality.Judge.load(found, labels, samples=samples, seed=seed)
        if judge is not None:
            report |= judge.rate(fake, theirs)
        return report

    def _needed_critic(self) -> nn.Module:
        if self.critic is None:
            raise InputError("this run was loaded without its critic: give Run.load the critic beside the generator")
        return self.critic


def build_networks(
    config: TrainConfig, sample_shape: tuple[int, ...], kind: str = "images", num_classes: int = 0
) -> tuple[nn.Module, nn.Module]:
    """Build the generator and the critic that a configuration names, which take labels if there are classes.

    Args:
        config: The configuration.
        sample_shape: Shape of one sample.
        kind: "images", which lie in [-1, 1], or "vectors", which need not.
        num_classes: How many classes there are; 0 for networks without labels.

    Raises:
        InputError: The model is unknown, does not make such samples, or was given as objects.
    """
    check_rebuildable(config)
    name = models.default_model(sample_shape) if config.model == "auto" else config.model
    generator, critic = models.build(
        name,
        sample_shape,
        latent_dim=config.latent_dim,
        width=config.width,
        init=config.init,
        bounded=kind == "images",
        num_classes=num_classes or None,
    )
    if config.spectral_norm:
        spectral_norm(critic)
    return generator, critic


def latent_dim(generator: nn.Module, config: TrainConfig) -> int:
    """Length of the generator's noise: its own attribute, or the configuration's, or 128."""
    own = getattr(generator, "latent_dim", None)
    return own if isinstance(own, int) else config.latent_dim or 128


def draw_noise(n: int, length: int, seed: int) -> Tensor:
    """Draw standard normal noise ``[n, length]`` on the CPU without touching the default generator.

    Raises:
        InputError: The seed is out of range.
    """
    return torch.randn(n, length, generator=noise_generator(seed))


def noise_generator(seed: int) -> torch.Generator:
    """Return the CPU generator that a seed's noise is drawn from.

    Raises:
        InputError: The seed is out of range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed must be in [0, {MAX_SEED}], got {seed}")
    return torch.Generator().manual_seed(stream_seed(seed, NOISE))


def great_circles(latents: Tensor, steps: int) -> Tensor:
    """Walk from each latent to the next, and from the last to the first, by spherical interpolation.

    Where Ω is the angle between z and z', the walk is at (sin((1 − t)Ω) z + sin(tΩ) z') / sin(Ω) after the share t of
    the way (White 2016, arXiv:1609.04468, after Shoemake 1985).

    Args:
        latents: ``[K, L]``.
        steps: Points from each latent on, itself included, to before the next one.

    Returns:
        ``[K * steps, L]``.
    """
    start, end = latents[:, None], latents.roll(-1, 0)[:, None]
    share = torch.arange(steps, dtype=latents.dtype)[:, None] / steps
    angle = nn.functional.cosine_similarity(start, end, dim=2)[..., None].clamp(-1, 1).acos()
    # Along one line, as all latents of a single number are, there is no circle: the walk is straight.
    straight = angle.sin() < 1e-4
    before, after = (torch.where(straight, part, (part * angle).sin() / angle.sin()) for part in (1 - share, share))
    return (before * start + after * end).flatten(0, 1)


def dealt(classes: int, n: int) -> Tensor:
    """Deal out ``n`` labels ``[n]`` int64, class by class, as evenly as may be: the first ones where there are more."""
    return torch.arange(n) * classes // max(n, classes)


@torch.no_grad()
def generate(network: nn.Module, inputs: Tensor, *further: Tensor, batch_size: int = PIECE) -> Tensor:
    """Run a network in eval mode over ``inputs`` ``[N, *D]`` in pieces, and leave its mode as it was.

    ``further`` inputs, such as labels, go along row by row.
    """
    training = network.training
    network.eval()
    try:
        inputs = inputs.to(next(network.parameters(), inputs).dtype)
        pieces = zip(*(torch.split(tensor, batch_size) for tensor in (inputs, *further)), strict=True)
        return torch.cat([network(*piece) for piece in pieces])
    finally:
        network.train(training)
