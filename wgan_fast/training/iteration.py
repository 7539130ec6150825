"""One iteration of training: the critic's steps, the generator's step, and the moving average."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import convolves_in_tensor_cores, float32_products
from ..clipping import clip_weights_
from ..critic_step import CriticStep, CriticStepResult
from ..engine.checked import asked_for
from ..errors import InputError
from ..losses import AdversarialLoss, get_loss
from ..optim import ClippedRMSprop
from ..precision import accumulation_dtype
from . import models
from .augment import augment, numbers
from .conditional import ConditionalGenerator, ProjectionCritic
from .config import TrainConfig
from .distributed import Replicas
from .generator_step import GeneratorStep
from .graphed import GraphedCalls
from .networks import channels_last, copy_of, to_channels_last
from .optimizers import OptimizerFactory, capturable, make_optimizer, set_learning_rates
from .randomness import PROCESS, TRAINING, seed_everything, stream_seed

AHEAD_BYTES = 4 * 2**20
"""On a CPU the samples of several critic steps are generated in one forward only where no activation of it exceeds
this. Measured on two cores with 4 MiB of L2: the toy MLP (2.6 MB) gains 34 %, the MNIST DCGAN (16 MB) loses 9 %."""

PLANNED_AFTER = 20
"""Iterations before the generator is planned, which takes half a second: a shorter run would not win that back. By the
iteration's number, so that a run that was resumed computes what one in a piece does."""

_PER_SAMPLE = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Hardtanh, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softsign,
    nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.ZeroPad2d, nn.ReflectionPad2d,
)  # fmt: skip
"""Layers of which a sample's output is a function of that sample alone, and that neither draw nor keep state."""


Read = Callable[[Tensor], Tensor]


class IterationResult(NamedTuple):
    """What an iteration measured: 0-dim tensors on the device, averaged over the processes.

    Attributes:
        critic: The figures of the last critic step; ``penalty`` and ``gradient_norm`` are of the last one that carried
            a penalty, 0 and NaN where none did.
        generator_loss: The generator's loss.
        watched: ``[5]``, what tells that training goes on: the penalty, the critic's loss, the generator's, the
            Wasserstein estimate, and how many processes were asked to stop.
    """

    critic: CriticStepResult
    generator_loss: Tensor
    watched: Tensor


class Iteration:
    """Takes ``n_critic`` critic steps and one generator step at every call.

    Args:
        generator: The generator, on its device.
        critic: The critic, on the same device.
        config: The resolved configuration.
        latent_dim: Length of the generator's noise.
        replicas: The processes that train together.
        loss: An adversarial loss of one's own; None for the configuration's.
        optimizer: What makes a network's optimizer; None for the configuration's.

    Attributes:
        ema: The generator's moving average; None where the configuration keeps none.
        step: Iterations taken.
        steps: Iterations that there will be, over which the learning rates take their course.
        rewinds: How often training went back after a divergence; every time halves the learning rates.
        dtype: Of the critic, and so of the samples that it is given.
        noise_dtype: Of the generator.
        device: Of both networks.
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        config: TrainConfig,
        latent_dim: int,
        replicas: Replicas,
        *,
        loss: AdversarialLoss | None = None,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        self._trained = {"critic": trainable("critic", critic), "generator": trainable("generator", generator)}
        first = self._trained["critic"][0]
        self.device, self.dtype = first.device, first.dtype
        asked = config.cuda_graph
        config = for_device(config, self.device, alone=replicas.world == 1)
        self.generator, self.critic, self.config, self.latent_dim = generator, critic, config, latent_dim
        self.replicas = replicas
        if config.channels_last:
            for network in (generator, critic):
                to_channels_last(network)
        self.batch_size, self.n_critic = config.batch_size or 0, config.n_critic or 0
        self.noise_dtype = self._trained["generator"][0].dtype
        self.ema = _averaged(generator) if config.ema else None
        loss = loss or get_loss(config.loss or config.recipe.loss)
        self.critic_step = make_critic_step(critic, config, replicas.world, loss)
        self._generator_loss = loss.generator
        self._generator_step = None
        # A comparison with autograd is of the critic's step alone, and autograd means autograd.
        if config.engine in ("auto", "four_pass") and not asked_for() and config.precision == "fp32":
            self._generator_step = GeneratorStep(generator, critic, loss, self._trained["generator"])
        rates = {"critic": config.learning_rate, "generator": config.generator_learning_rate or config.learning_rate}
        self._changes = {"real": ("flip",) * config.flip + config.augment, "fake": config.augment}
        self.optimizers = {
            name: make_optimizer(
                self._trained[name], config, rate, config.clip if name == "critic" else None, optimizer
            )
            for name, rate in rates.items()
        }
        fused = isinstance(self.optimizers["critic"], ClippedRMSprop)
        self._clip = None if fused else config.clip
        self.step, self.steps = 0, config.steps or 0
        self.rewinds = 0
        self.rng = torch.Generator(self.device) if replicas.world > 1 else None
        """Source of noise and α where several processes share one stream; None is the default generator."""
        gives_way = asked is None
        self._graphed = GraphedCalls(self._run, self.device, gives_way=gives_way) if config.cuda_graph else None
        self._decay = torch.zeros((), dtype=self.noise_dtype, device=self.device) if config.cuda_graph else None
        self._rates: dict[int, float] = {}
        self._kept = math.nan
        """The learning rates of the optimizers' groups, and the decay, that tensors on the device hold."""
        self._read_real: Read = as_it_is
        self._read_labels: Read = as_it_is
        self._ahead = config.generate_ahead and self.n_critic > 1 and self._may_generate_ahead()

    def seed(self) -> None:
        """Begin the training's random numbers."""
        seed_everything(self.config.seed, TRAINING)
        if self.rng is not None:
            self.rng.manual_seed(stream_seed(self.config.seed, TRAINING))

    def __call__(
        self, reals: Sequence[Tensor], labels: Sequence[Tensor] = (), *, stop: bool = False
    ) -> IterationResult:
        """Run one iteration on ``n_critic`` batches ``[N, *D]`` of real samples, or on what ``reads`` says.

        Args:
            reals: The batches; of N samples on each process.
            labels: Of each batch the classes, ``[N]``, for conditional networks. A critic step's generated samples, and
                so the interpolates, are of the same classes as its real ones, the generator step's of those of the last
                batch.
            stop: Whether this process was asked to stop.

        Returns:
            The figures; the next call may overwrite them.
        """
        with self.arithmetic():
            return self._iterate(reals, labels, stop)

    def _iterate(self, reals: Sequence[Tensor], labels: Sequence[Tensor], stop: bool) -> IterationResult:
        self.step += 1
        if self.rng is not None:
            # What a layer draws for itself differs from process to process, and depends on nothing that was before.
            seed_everything(self.config.seed, PROCESS, self.replicas.rank, self.step)
        self.critic_step.steps_taken = (self.step - 1) * self.n_critic
        self._set_numbers()
        if self._graphed is None:
            return self._run(reals, labels, stop)
        every = self.config.penalty.every if self.config.penalty else 1
        key = self.critic_step.steps_taken % every
        figures: IterationResult = self._graphed(reals, *((labels,) if labels else ()), key=key)
        return figures

    def _run(self, reals: Sequence[Tensor], labels: Sequence[Tensor] = (), stop: bool = False) -> IterationResult:
        critic = self._trained["critic"]
        penalised = None
        reals = [self._read_real(real) for real in reals]
        conditions: list[tuple[Tensor, ...]] = [(self._read_labels(each),) for each in labels] or [()] * len(reals)
        # Before anything else is drawn, so that the order stays what it is where samples are generated ahead.
        reals = [self._changed(self.laid_out(real), "real", self._change_draws("real")) for real in reals]
        for k, (real, condition, (fake, alpha)) in enumerate(zip(reals, conditions, self._fakes(conditions))):
            result = self.critic_step(real, fake, alpha, critic_args=condition)
            result = CriticStepResult(*self.replicas.average_gradients("critic", critic, result))
            if self._penalises(k):
                penalised = result
            self._move("critic")
            if self._clip is not None:
                clip_weights_(critic, self._clip)
        if penalised is not None:
            result = result._replace(penalty=penalised.penalty, gradient_norm=penalised.gradient_norm)

        loss, backward = self._differentiated(*condition)
        self.optimizers["generator"].zero_grad(set_to_none=True)
        backward()
        stopping = torch.full_like(loss, stop, requires_grad=False)
        loss, stopping = self.replicas.average_gradients(
            "generator", self._trained["generator"], (loss.detach(), stopping)
        )
        self._move("generator")
        self.replicas.share_buffers(self.generator, self.critic)
        if self.ema is not None:
            update_ema_(self.ema, self.generator, self.decay if self._decay is None else self._decay)
        return IterationResult(
            result, loss, torch.stack([result.penalty, result.loss, loss, result.wasserstein, stopping])
        )

    def _fakes(self, conditions: Sequence[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Draw generated samples, changed, and α for every critic step, in one order one by one and all at once."""
        if not self._ahead:
            for k, condition in enumerate(conditions):
                fake = self._generate(self._noise(), *condition)
                yield self._changed(fake, "fake", self._change_draws("fake")), self._alpha(k)
            return
        drawn = [(self._noise(), self._change_draws("fake"), self._alpha(k)) for k in range(len(conditions))]
        inputs = zip(*((noise, *condition) for (noise, _, _), condition in zip(drawn, conditions)))
        fakes = self._generate(*map(torch.cat, inputs)).chunk(len(conditions))
        for fake, (_, draws, alpha) in zip(fakes, drawn):
            yield self._changed(fake, "fake", draws), alpha

    @torch.no_grad()
    def _generate(self, noise: Tensor, *condition: Tensor) -> Tensor:
        planned = self._planned(condition)
        samples = planned.samples(noise) if planned else None
        if samples is not None:
            return self.laid_out(samples)
        with self._autocast():
            return self.laid_out(self.generator(noise, *condition))

    def _differentiated(self, *condition: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Return the generator's loss, and what leaves its gradients in the generator's parameters."""
        noise = self._noise()
        planned = None if self._changes["fake"] else self._planned(condition)
        made = planned.differentiate(noise) if planned else None
        if made is not None:
            return made
        with self._autocast():
            fake = self.generator(noise, *condition).to(self.dtype)
            fake = self._changed(fake, "fake", self._change_draws("fake"))
            loss = self._generator_loss(self.critic(fake, *condition))
        # Names its parameters, so that the critic's own gradients are neither computed nor touched.
        return loss, partial(loss.backward, inputs=self._trained["generator"])

    def _planned(self, condition: tuple[Tensor, ...]) -> GeneratorStep | None:
        return None if condition or self.step <= PLANNED_AFTER else self._generator_step

    def laid_out(self, samples: Tensor) -> Tensor:
        """Return samples as the critic takes them: of its dtype, and channels last where that is asked for."""
        samples = samples.to(self.dtype)
        return channels_last(samples) if self.config.channels_last else samples

    def _change_draws(self, which: str) -> Tensor | None:
        """Numbers ``[N, k]`` that decide how "real" or "fake" samples are changed; None where they are not."""
        count = numbers(self._changes[which])
        if not count:
            return None
        draws = torch.rand(self.batch_size, count, device=self.device, generator=self.rng)
        return draws[self.replicas.rows(self.batch_size)]

    def _changed(self, samples: Tensor, which: str, draws: Tensor | None) -> Tensor:
        """Return samples as the critic is shown them, differentiably."""
        return samples if draws is None else self.laid_out(augment(samples, self._changes[which], draws))

    def _move(self, name: str) -> None:
        for parameter in self._trained[name]:
            gradient = parameter.grad
            # Fused optimizers go through memory side by side, whatever the strides say.
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
        if self.config.clip_gradients is not None:
            nn.utils.clip_grad_norm_(self._trained[name], self.config.clip_gradients)
        self.optimizers[name].step()

    def _noise(self) -> Tensor:
        noise = torch.randn(
            self.batch_size, self.latent_dim, dtype=self.noise_dtype, device=self.device, generator=self.rng
        )  # [N, latent_dim] of all processes, of which each takes its rows
        return noise[self.replicas.rows(self.batch_size)]

    def _alpha(self, k: int) -> Tensor | None:
        """α ``[N]`` of the k-th critic step; None where it takes none or draws its own."""
        penalty = self.config.penalty
        if penalty is None or penalty.at != "interpolates" or not self._penalises(k):
            return None
        dtype = accumulation_dtype(self.dtype)
        alpha = torch.rand(self.batch_size, dtype=dtype, device=self.device, generator=self.rng)
        return alpha[self.replicas.rows(self.batch_size)]

    def _penalises(self, k: int) -> bool:
        """Whether the k-th critic step carries a penalty."""
        penalty = self.config.penalty
        return penalty is not None and ((self.step - 1) * self.n_critic + k) % penalty.every == 0

    def _may_generate_ahead(self) -> bool:
        """Whether one forward gives what ``n_critic`` of them give, and does not cost more.

        α must be drawn here, or the order of the random numbers would change, as it would with a critic that draws.
        """
        penalty = self.config.penalty
        if penalty is not None and penalty.at == "perturbed":
            return False
        if not (keeps_samples_apart(self.generator) and _draws_nothing(self.critic)):
            return False
        if self.device.type != "cpu":
            return True
        rows = len(range(self.batch_size)[self.replicas.rows(self.batch_size)])
        example = torch.zeros(1, self.latent_dim, dtype=self.noise_dtype), *self.condition(1)
        return self.n_critic * rows * _largest_activation(self.generator, *example) <= AHEAD_BYTES

    def condition(self, n: int) -> tuple[Tensor, ...]:
        """Return what networks take besides ``n`` samples or as much noise: labels ``[n]``, here zeros, or nothing."""
        return (torch.zeros(n, dtype=torch.int64, device=self.device),) if self.config.conditional else ()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Have a GPU compute float32 as the configuration says, in training and in what is made of it."""
        if self.device.type == "cuda" and self.config.precision != "bf16":
            return float32_products(in_tf32=self.config.precision == "tf32")
        return contextlib.nullcontext()

    @property
    def decay(self) -> float:
        """Of the moving average at this step: a young one forgets faster, or the first networks would linger in it."""
        return min(self.config.ema, self.step / (self.step + 10))

    def learning_rate(self, name: str) -> float:
        """Of the "critic" or the "generator" at this step."""
        initial: float = self.optimizers[name].param_groups[0]["initial_lr"]
        return initial * self._learning_rate_factor()

    def _learning_rate_factor(self) -> float:
        return learning_rate_factor(self.config.schedule, max(self.step, 1), self.steps) * 0.5**self.rewinds

    def _set_numbers(self) -> None:
        """Bring this step's learning rates and decay to where they are read; to a device where they have changed."""
        for optimizer in self.optimizers.values():
            set_learning_rates(optimizer, self._learning_rate_factor(), self._rates)
        if self._decay is not None and self._kept != self.decay:
            self._kept = self.decay
            self._decay.fill_(self._kept)

    @property
    def replayed(self) -> bool:
        """Whether iterations are replayed as CUDA graphs, on a CPU as they would be."""
        return self._graphed is not None

    def reads(self, real: Read | None = None, labels: Read | None = None) -> None:
        """Say how batches are made of what an iteration is given, such as rows ``[N]`` of data on the device.

        Args:
            real: Makes real samples, ``[N, *D]``; None for what is given samples already.
            labels: Makes labels, ``[N]`` int64; likewise.
        """
        self._read_real, self._read_labels = real or as_it_is, labels or as_it_is
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Capture anew: tensors that the graphs read were replaced."""
        self._rates.clear()
        self._kept = math.nan
        if self._graphed is not None:
            self._graphed.clear()


def as_it_is(batch: Tensor) -> Tensor:
    """Read a batch of samples, or of labels, that is one already."""
    return batch


def for_device(config: TrainConfig, device: torch.device, *, alone: bool) -> TrainConfig:
    """Return a configuration with what is left to the device filled in.

    Args:
        config: The resolved configuration.
        device: Of the networks.
        alone: Whether this process trains without others.
    """
    if config.precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision tf32 is an NVIDIA GPU's arithmetic: device {device.type} has fp32 and bf16")
    # Networks that do nothing which a replay would leave out, and keep no view that another layout would not allow.
    named = config.model in ("auto", *models.MODELS)
    # A comparison with autograd waits for the device.
    compared = config.engine == "checked" or asked_for()
    replayed = capturable(config.optimizer or "adam")
    if config.cuda_graph and not replayed:
        raise InputError(f"cuda_graph needs an optimizer that can be captured: {config.optimizer} cannot")
    left = {
        "cuda_graph": device.type == "cuda" and alone and named and not compared and replayed,
        "channels_last": named and config.precision != "fp32" and _in_tensor_cores(config, device),
    }
    return dataclasses.replace(config, **{k: v for k, v in left.items() if getattr(config, k) is None})  # type: ignore[arg-type]


def _in_tensor_cores(config: TrainConfig, device: torch.device) -> bool:
    with float32_products(in_tf32=True):
        return convolves_in_tensor_cores(torch.bfloat16 if config.precision == "bf16" else torch.float32, device)


def _averaged(generator: nn.Module) -> nn.Module:
    average = copy_of(generator).eval()
    for parameter in average.parameters():  # TorchScript has no requires_grad_ for all of them
        parameter.requires_grad_(False)
    return average


def trainable(name: str, network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a network that training moves.

    Raises:
        InputError: There are none.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError(f"{name} has no trainable parameters")
    return parameters


def make_critic_step(critic: nn.Module, config: TrainConfig, world: int, loss: AdversarialLoss) -> CriticStep:
    """Build the critic's step as the resolved configuration says, for one of ``world`` processes."""
    penalty = config.penalty
    if penalty and penalty.samples:
        penalty = dataclasses.replace(penalty, samples=penalty.samples // world)
    return CriticStep(
        critic,
        loss=loss,
        penalty=penalty,
        engine=config.engine,
        compile=config.compile,
        precision=config.precision,
    )


def learning_rate_factor(schedule: str, step: int, steps: int) -> float:
    """Return what the learning rate is multiplied with at ``step`` (from 1) of ``steps``.

    "constant" stays at 1; "linear" and "cosine" fall from 1 at the first step towards 0 after the last.
    """
    done = (step - 1) / steps
    if schedule == "linear":
        return 1 - done
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    return 1.0


@torch.no_grad()
def update_ema_(average: nn.Module, module: nn.Module, decay: float | Tensor) -> None:
    """Move ``average`` towards ``module``: θ̄ ← decay·θ̄ + (1 − decay)·θ for parameters, a copy for buffers.

    A tensor ``decay`` is read on its device, so that a CUDA graph that is replayed sees the new value.
    """
    means: list[Tensor] = list(average.parameters())
    values: list[Tensor] = list(module.parameters())
    if isinstance(decay, Tensor):
        steps = torch._foreach_sub(values, means)
        torch._foreach_mul_(steps, 1 - decay)
        torch._foreach_add_(means, steps)
    else:
        torch._foreach_lerp_(means, values, 1 - decay)
    for mean, value in zip(average.buffers(), module.buffers()):
        mean.copy_(value)


def keeps_samples_apart(network: nn.Module) -> bool:
    """Whether every sample's output is proven to depend on that sample alone, without draws and without state.

    The proof is by layer, through plain ``nn.Sequential``; a forward method of one's own is not looked into.
    """
    if "forward" in vars(network):
        return False
    if type(network) is ConditionalGenerator:
        return keeps_samples_apart(network.layers)
    if isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward:
        return all(keeps_samples_apart(layer) for layer in network)
    return type(network) in _PER_SAMPLE and not any(
        (network._forward_hooks, network._forward_pre_hooks, hasattr(network, "parametrizations"))
    )


def _draws_nothing(network: nn.Module) -> bool:
    """Whether a critic is known to draw no random numbers; one with layers of its own is not."""
    return all(
        type(module) in (*_PER_SAMPLE, nn.Embedding) or _forward(module) in _FORWARDS for module in network.modules()
    )


def _forward(module: nn.Module) -> object:
    return getattr(type(module), "forward", None)  # TorchScript's class has none


_FORWARDS = {nn.Sequential.forward, models.Critic.forward, models.ResidualBlock.forward, ProjectionCritic.forward}
"""How containers run their layers that draw nothing themselves."""


def _largest_activation(network: nn.Module, *sample: Tensor) -> int:
    """Bytes of the largest output of a layer for one sample."""
    largest = 0

    def measure(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.nbytes)

    handles = [layer.register_forward_hook(measure) for layer in network.modules()]
    with torch.no_grad():
        network(*sample)
    for handle in handles:
        handle.remove()
    return largest
