"""What a run is: the configuration that is also the command line, which reads it before PyTorch is imported."""

import dataclasses
import math
import os
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from ..errors import InputError
from .files import as_path

if TYPE_CHECKING:
    from ..points import PenaltyConfig
    from .recipes import Recipe

Method = Literal["wgan-gp", "wgan-lp", "wgan-clip", "r1", "dragan", "gan", "lsgan", "hinge"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]
Initialisation = Literal["pytorch", "he", "dcgan", "orthogonal"]
Change = Literal["color", "translation", "cutout"]
Interval = int | str
"""Steps, as in 500, or epochs, as in "25ep"."""

STEPS = 2000
"""Generator steps where neither these nor epochs are given."""


OWN = "custom"
"""What a run records for networks or an optimizer that were given as objects."""

MAX_SEED = 2**32 - 1
"""NumPy's global generator takes no larger one."""

TOY_PENALTY_WEIGHT = 0.1
TOY_BATCH_SIZE = 256
"""Gulrajani et al.'s settings for two-dimensional data (their gan_toy.py), where a weight of 10 slows the critic."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; also the options of ``wgan-fast train``.

    None stands for the method's own default, which ``resolved`` fills in from ``RECIPES``.

    Attributes:
        data: Name of a data set (mnist5k, digits, 8gaussians, 25gaussians, swissroll) or a path: IDX files, a folder
            of images, .npy or .npz. A table (.csv, .tsv, .parquet) has options of its own: train --data FILE --help.
        image_size: Height and width that images are resized and cropped to.
        channels: Colour channels that the images of a folder are converted to: 1 or 3.
        holdout: Share of the data kept from training, for evaluation.
        flip: Whether a random half of the real images is mirrored left to right, anew in every step.
        augment: Differentiable augmentation for few images (Zhao et al. 2020, arXiv:2006.10738): changes of real and
            generated images before the critic, in this order, among color (brightness, saturation, contrast),
            translation (by up to an eighth) and cutout (of a quarter of the area). The penalty is on changed images.
        conditional: Whether both networks are told the class of every sample, so that samples of a class can be asked
            for. Labels are those of mnist5k and digits, the file of labels beside IDX images, the array y of an .npz
            file (integers or strings), or the subfolders of a folder of images, one for each class. The critic is a
            projection discriminator (Miyato and Koyama 2018, arXiv:1802.05637), the generator's noise is joined by an
            embedding of the class. A module:function of your own is called with (sample_shape, num_classes=K), for
            generator(noise, labels) and critic(samples, labels), labels [N] int64.
        method: What is trained: loss, penalty and the settings of the paper behind it.
        loss: Adversarial loss: wasserstein, non_saturating, least_squares or hinge; the method's by default.
        model: Name of a network pair (toy-mlp, mlp, mnist-dcgan, cifar-dcgan, cifar-resnet, dcgan64, dcgan, article),
            or module:function of your own, or "auto" to choose by the shape of the data: for square images of 28 pixels
            or of a power of two from 16 to 256 a DCGAN.
        width: Channels (or units) of the networks' narrowest hidden layer; the model's own default.
        latent_dim: Length of the noise vector; the model's own default.
        init: How weights are initialised: pytorch (layer defaults), he, dcgan (normal 0.02), orthogonal; the model's
            own way by default.
        spectral_norm: Whether the critic's layers are spectrally normalised.
        steps: Generator steps; 2000 where no epochs are given.
        epochs: In place of steps: how often the critic sees every training sample. A generator step takes n_critic
            batches, as in one pass over a data loader in the articles' code, so 200 epochs of MNIST's 60,000 digits in
            batches of 128, 5 to a step, are 18,750 steps.
        batch_size: Samples per step, over all processes together; the method's by default.
        n_critic: Critic steps per generator step; the method's by default.
        optimizer: Optimizer of both networks; the method's by default. Any of torch.optim by its name, with settings of
            its own after commas: adamw,weight_decay=0.01 or sgd,momentum=0.9,nesterov=true.
        learning_rate: Learning rate of both networks, also --lr; the method's by default.
        generator_learning_rate: Learning rate of the generator where it differs from the critic's.
        beta1: First decay rate of Adam and its relatives; the method's by default.
        beta2: Their second decay rate; RMSprop's smoothing constant; the method's by default.
        schedule: Course of the learning rates: constant, or falling to 0 linearly or as a cosine, from the run's first
            step to its last. Changed on resuming, it goes on as if it had been so from the first step.
        penalty_weight: Weight of the gradient penalty, the method's by default; 0 switches it off.
        penalty_every: Apply the penalty at every k-th critic step only, with k times the weight (StyleGAN2's lazy
            regularisation, Karras et al. 2020, arXiv:1912.04958). Faster, and another objective: the critic is
            unconstrained between those steps.
        penalty_samples: How many samples of a batch, evenly spread over it, the penalty is computed on; a divisor of
            batch_size, all of them by default. With 16 of 64 the critic's step of the MNIST DCGAN takes 0.72 of the
            time (one thread of a Xeon). The penalty's expectation stays what it was, and its variance grows as
            batch_size / penalty_samples. In four passes spectral norm makes two power iterations a step in place of
            one; batch norm takes the penalty's statistics from the part.
        clip: Bound c that keeps every critic weight in [-c, c] (wgan-clip).
        clip_gradients: Norm to which a network's gradients, taken together, are scaled down where they exceed it,
            before every step of its optimizer; by default they are left as they are.
        ema: Decay of the generator's moving average, which is what is sampled; 0 keeps none. After k steps it is at
            most k/(k+10), so that a young average forgets the first networks.
        seed: Seed of initialisation, data order and noise.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one.
        engine: How the penalty is differentiated: auto, four_pass, autograd, or checked against autograd.
        precision: fp32, on a GPU exactly, unlike PyTorch's default for convolutions; tf32 for products and convolutions
            in TF32 on an NVIDIA GPU; or bf16 for bfloat16 autocast.
        compile: Whether the critic's step is compiled with torch.compile; needs the four-pass engine.
        cuda_graph: Whether whole iterations are replayed as a CUDA graph, so that they cost the host nothing: on an
            H200 the toy networks train seven times as fast for it. By default on a GPU, in one process, with networks
            that are named here: what a network of your own keeps outside tensors would stay as it was captured.
        fused: Whether Adam updates all parameters in one fused call.
        generate_ahead: Whether the samples of an iteration's critic steps are generated in one forward where that is
            proven to give the same samples and is expected to cost less.
        channels_last: Whether images and the networks' weights are laid out channels last; by default for the networks
            that are named here, where a GPU convolves in tensor cores, that is in bf16 and tf32.
        workers: Processes that decode streamed data.
        out: Folder of the run; a new one under runs/ by default.
        init_from: Folder of a run whose networks training starts with, from its newest checkpoint: the generator, its
            moving average and the critic, with fresh optimizers, on whatever data of samples as large. The model,
            width, latent_dim and spectral_norm are that run's where not given.
        log_every: Steps between lines of metrics, or epochs: 100, or 1ep.
        sample_every: Steps between sample grids, or epochs.
        track: Steps, or epochs, between ratings of the generator against held-out data, which go into the metrics and
            the curves; 0 rates nothing. Images with classes (see conditional) get a Fréchet distance, coverage,
            the classes covered and, of conditional runs, how often the classifier sees the class that was asked for;
            toy mixtures the modes covered, other data the sliced Wasserstein distance.
        checkpoint_every: Steps between checkpoints, or epochs: 500, or 25ep.
        keep: Checkpoints kept, the newest ones.
        on_divergence: What to do when a loss or a parameter is not finite, or explodes: stop, or rewind to the last
            good checkpoint and go on with half the learning rates.
        max_rewinds: How often to go back before stopping after all.
    """

    data: str = "mnist5k"
    image_size: int | None = None
    channels: Literal[1, 3] | None = None
    holdout: float = 0.1
    flip: bool = False
    augment: tuple[Change, ...] = ()
    conditional: bool = False
    method: Method = "wgan-gp"
    loss: str | None = None
    model: str = "auto"
    width: int | None = None
    latent_dim: int | None = None
    init: Initialisation | None = None
    spectral_norm: bool | None = None
    steps: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    n_critic: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    generator_learning_rate: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    schedule: LearningRateSchedule = "constant"
    penalty_weight: float | None = None
    penalty_every: int = 1
    penalty_samples: int | None = None
    clip: float | None = None
    clip_gradients: float | None = None
    ema: float = 0.999
    seed: int = 0
    device: str = "auto"
    engine: Literal["auto", "four_pass", "autograd", "checked"] = "auto"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = False
    cuda_graph: bool | None = None
    fused: bool = True
    generate_ahead: bool = True
    channels_last: bool | None = None
    workers: int = 0
    out: Path | None = None
    init_from: Path | None = None
    log_every: Interval = 10
    sample_every: Interval = 500
    track: Interval = 0
    checkpoint_every: Interval = 500
    keep: int = 3
    on_divergence: Literal["stop", "rewind"] = "stop"
    max_rewinds: int = 3

    def __post_init__(self) -> None:
        for name in ("out", "init_from"):
            if isinstance(getattr(self, name), str | os.PathLike):
                object.__setattr__(self, name, as_path(getattr(self, name)))
        if isinstance(self.augment, list):  # JSON has no tuples
            object.__setattr__(self, "augment", tuple(self.augment))
        for name, hint in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        at_least = {
            "image_size": 1, "width": 1, "latent_dim": 1, "steps": 1, "epochs": 1, "batch_size": 1, "n_critic": 1,
            "seed": 0, "workers": 0, "keep": 1, "penalty_every": 1, "penalty_samples": 1, "max_rewinds": 0,
        }  # fmt: skip
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise InputError(f"{name} must be at least {lowest}, got {value}")
        for name, lowest in {"log_every": 1, "sample_every": 1, "checkpoint_every": 1, "track": 0}.items():
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, value := _interval(name, value))
            if isinstance(value, int) and value < lowest:
                raise InputError(f"{name} must be at least {lowest}, got {value}")
        if self.steps is not None and self.epochs is not None:
            raise InputError(f"steps and epochs exclude each other, got steps {self.steps} and epochs {self.epochs}")
        for name in ("learning_rate", "generator_learning_rate", "clip", "clip_gradients"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be finite and above 0, got {value}")
        for name in ("holdout", "beta1", "beta2", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"{name} must be in [0, 1), got {value}")
        if len(set(self.augment)) < len(self.augment):
            raise InputError(f"augment must name every change once, got {' '.join(self.augment)}")
        if self.seed > MAX_SEED:
            raise InputError(f"seed must be at most {MAX_SEED}, got {self.seed}")
        if self.optimizer not in (None, "adam", "rmsprop", OWN):
            from .optimizers import parse

            parse(self.optimizer)
        if self.compile and self.engine == "autograd":
            raise InputError("compile needs the four-pass engine, got engine autograd")
        if self.penalty_weight is not None and not (math.isfinite(self.penalty_weight) and self.penalty_weight >= 0):
            raise InputError(f"penalty_weight must be finite and at least 0, got {self.penalty_weight}")

    @property
    def recipe(self) -> "Recipe":
        """The method's recipe."""
        from .recipes import RECIPES

        return RECIPES[self.method]

    @property
    def penalty(self) -> "PenaltyConfig | None":
        """The critic's penalty with this configuration's weight; None where there is none."""
        penalty = self.recipe.penalty
        if penalty is None or self.penalty_weight == 0:
            return None
        weight = penalty.weight if self.penalty_weight is None else self.penalty_weight
        return dataclasses.replace(penalty, weight=weight, every=self.penalty_every, samples=self.penalty_samples)

    def resolved(self, sample_shape: tuple[int, ...]) -> Self:
        """Return this configuration with the method's default wherever a setting is None.

        Args:
            sample_shape: Shape of one sample; two-dimensional points take the paper's settings for toy data.

        Raises:
            InputError: A setting does not go with the method.
        """
        from .optimizers import takes_beta

        recipe = self.recipe
        if self.penalty_weight is not None and recipe.penalty is None:
            raise InputError(f"penalty_weight was given, but method {self.method} has no gradient penalty")
        if self.penalty_every > 1 and recipe.penalty is None:
            raise InputError(f"penalty_every was given, but method {self.method} has no gradient penalty")
        if self.penalty_samples is not None and recipe.penalty is None:
            raise InputError(f"penalty_samples was given, but method {self.method} has no gradient penalty")
        if self.clip is not None and recipe.clip is None:
            raise InputError(f"clip was given, but method {self.method} does not clip weights: use wgan-clip")
        optimizer = self.optimizer or recipe.optimizer
        rates = {"learning_rate": recipe.learning_rate, "beta1": recipe.betas[0], "beta2": recipe.betas[1]}
        takes = (False,) * 3 if optimizer == OWN else (True, *takes_beta(optimizer))
        for name, taken in zip(rates, takes):
            if getattr(self, name) is not None and not taken:
                raise InputError(f"{name} was given, but optimizer {optimizer} takes none: use adam, or set it there")
        if optimizer == OWN and self.generator_learning_rate is not None:
            raise InputError(f"generator_learning_rate was given, but optimizer {OWN} brings its own")
        toy = sample_shape == (2,)
        penalty_weight = recipe.penalty.weight if recipe.penalty else None
        if toy and self.method in ("wgan-gp", "wgan-lp"):
            penalty_weight = TOY_PENALTY_WEIGHT
        defaults = {
            "steps": STEPS if self.epochs is None else None,
            "batch_size": TOY_BATCH_SIZE if toy else recipe.batch_size,
            "n_critic": recipe.n_critic,
            "loss": recipe.loss,
            "optimizer": recipe.optimizer,
            **{name: rate for (name, rate), taken in zip(rates.items(), takes) if taken},
            "penalty_weight": penalty_weight,
            "clip": recipe.clip,
            "spectral_norm": recipe.spectral_norm,
        }
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **missing)  # type: ignore[arg-type]
        if config.penalty_samples is not None and (config.batch_size or 0) % config.penalty_samples:
            raise InputError(
                f"penalty_samples must divide the batch_size of {config.batch_size}, got {config.penalty_samples}"
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Rebuild a configuration from ``to_json``'s values.

        Raises:
            InputError: A setting is unknown or out of range.
        """
        unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise InputError(f"the configuration has unknown settings: {', '.join(sorted(unknown))}")
        return cls(**values)


def epochs_of(interval: Interval) -> int | None:
    """Return the epochs of an interval in epochs; None for one in steps."""
    return int(interval.removesuffix("ep")) if isinstance(interval, str) else None


def _interval(name: str, text: str) -> Interval:
    """Read what people type, such as "500" or "25 epochs"."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    match = re.fullmatch(r"0*([1-9]\d*) ?(ep|epochs?)", text)
    if match is None:
        raise InputError(f"{name} must be steps or epochs, such as 500 or 25ep, got {text!r}")
    return f"{match[1]}ep"


def _check_type(name: str, value: object, hint: Any) -> None:
    """Raise unless ``value`` is of the annotated type: the command line parses, Python callers must be told."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            raise InputError(f"{name} must be a tuple, got {value!r}")
        for part in value:
            _check_type(name, part, typing.get_args(hint)[0])
        return
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    choices = [choice for option in options for choice in typing.get_args(option)]
    allowed = [option for option in options if isinstance(option, type)]
    accepted = (*allowed, int) if float in allowed else tuple(allowed)
    if isinstance(value, bool) and bool not in allowed:
        accepted = ()
    if not (value in choices or isinstance(value, accepted)):
        names = [repr(choice) for choice in choices] + [option.__name__ for option in allowed]
        raise InputError(f"{name} must be one of {', '.join(names)}, got {value!r}")
