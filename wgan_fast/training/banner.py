"""What a run says of itself before it begins: what is trained on what, where, and how."""

import sys

import torch
from torch import nn

from .config import OWN, TrainConfig
from .data import Data
from .description import listed
from .iteration import Iteration
from .models import default_model


def banner(config: TrainConfig, data: Data, iteration: Iteration, classes: tuple[str, ...] = ()) -> str:
    """Describe a run in a few aligned lines.

    Args:
        config: The resolved configuration.
        data: What it trains on.
        iteration: What trains, its critic's step already tried.
        classes: What the classes of a conditional run are called.
    """
    model = default_model(data.sample_shape) if config.model == "auto" else config.model.replace(OWN, "your own")
    networks = {"generator": iteration.generator, "critic": iteration.critic}
    sizes = ", ".join(f"{name} of {_size(network)} parameters" for name, network in networks.items())
    bounds = f", penalty {config.penalty.weight:g}" if config.penalty else ""
    bounds += f", weights in [-{config.clip:g}, {config.clip:g}]" if config.clip is not None else ""
    loss = f" with loss {config.loss}" if config.loss not in (None, config.recipe.loss) else ""
    critic_steps = f"{config.n_critic} critic step{'s' * (config.n_critic != 1)}"
    epochs = f" ({config.epochs:,} epoch{'s' * (config.epochs > 1)})" if config.epochs else ""
    lines = {
        "data": f"{config.data}: {_samples(data)}",
        **({"classes": listed(classes)} if classes else {}),
        "networks": f"{model}: {sizes}, from noise of length {iteration.latent_dim}",
        "method": f"{config.method}{loss}{bounds}, {critic_steps} to one of the generator, batches of "
        f"{config.batch_size}",
        "optimizer": _optimizer(config, iteration),
        "engine": f"{'four passes' if iteration.critic_step.code else 'autograd'}, {config.precision}, "
        f"{_place(iteration.device)}",
        "run": f"{config.out}, {iteration.steps:,} steps{epochs}",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {line}" for name, line in lines.items())


def _samples(data: Data) -> str:
    shape = "x".join(map(str, data.sample_shape))
    if len(data.train) == sys.maxsize:
        return f"samples of shape {shape}, drawn anew without end"
    return f"{len(data.train):,} samples of shape {shape} to train on, {len(data.held_out):,} held out"


def _size(network: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()):,}"


def _optimizer(config: TrainConfig, iteration: Iteration) -> str:
    name = type(iteration.optimizers["critic"]).__name__ if config.optimizer == OWN else config.optimizer
    critic, generator = (iteration.learning_rate(network) for network in ("critic", "generator"))
    rates = f"{critic:g}" if critic == generator else f"{critic:g}, the generator's {generator:g}"
    course = f", falling to 0 ({config.schedule})" if config.schedule != "constant" else ""
    clipped = f", gradients clipped to {config.clip_gradients:g}" if config.clip_gradients is not None else ""
    return f"{name}, learning rate {rates}{course}{clipped}"


def _place(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device} with {threads} thread{'s' * (threads != 1)}"
