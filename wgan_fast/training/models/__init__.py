"""Generators and critics by name, or from a function of one's own; with classes, they take that of a sample as well."""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from ...errors import InputError
from ..conditional import ConditionalGenerator, ProjectionCritic
from ..weights import initialise
from .architectures import (
    Critic,
    Generator,
    PackedCritic,
    ResidualBlock,
    dcgan_critic,
    dcgan_generator,
    dense_generator,
    language_critic,
    mlp_critic,
    mlp_generator,
    resnet_critic,
    resnet_generator,
)

__all__ = [
    "MODELS",
    "SIDES",
    "Critic",
    "Generator",
    "ModelSpec",
    "PackedCritic",
    "ResidualBlock",
    "build",
    "dcgan_critic",
    "dcgan_generator",
    "default_model",
    "dense_generator",
    "folder_of",
    "language_critic",
    "mlp_critic",
    "mlp_generator",
    "resnet_critic",
    "resnet_generator",
]

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A pair of networks that `build` knows by name.

    Attributes:
        shapes: The sample shapes it makes, in words.
        makes: Whether it makes a given sample shape.
        latent_dim: Default length of the latent vector; None means the number of values in a sample.
        width: Default width.
        generator: Called with (sample shape, latent_dim, width).
        critic: Called with (sample shape, width).
        init: Default initialisation of both. PyTorch's own halves a signal with every layer that no norm follows: the
            gradients of a critic begin at 0.04 for 16x16 images and at 0.002 for 256x256. With "he" they begin at 1.1
            to 1.2, where the penalty wants 1.
    """

    shapes: str
    makes: Callable[[_Shape], bool]
    latent_dim: int | None
    width: int
    generator: Callable[[_Shape, int, int], Generator]
    critic: Callable[[_Shape, int], Critic]
    init: str = "pytorch"


SIDES = (16, 32, 64, 128, 256)
"""Image sizes that a DCGAN is made for."""

_SIDES = ", ".join(map(str, SIDES[:-1])) + f" or {SIDES[-1]}"

SMALL = 1024
"""Values in the largest samples, of more dimensions than one, that an MLP is chosen for."""


def _square_image(side: int) -> Callable[[_Shape], bool]:
    return lambda shape: len(shape) == 3 and shape[1:] == (side, side)


MODELS: dict[str, ModelSpec] = {
    "toy-mlp": ModelSpec(
        shapes="vectors [D]",
        makes=lambda shape: len(shape) == 1,
        latent_dim=None,
        width=512,
        generator=mlp_generator,
        critic=mlp_critic,
    ),
    "mlp": ModelSpec(
        shapes="any shape",
        makes=lambda shape: True,
        latent_dim=128,
        width=512,
        generator=mlp_generator,
        critic=mlp_critic,
    ),
    "mnist-dcgan": ModelSpec(
        shapes="images [C, 28, 28]",
        makes=_square_image(28),
        latent_dim=128,
        width=64,
        generator=partial(dcgan_generator, batch_norm=False),
        critic=dcgan_critic,
    ),
    "cifar-dcgan": ModelSpec(
        shapes="images [C, 32, 32]",
        makes=_square_image(32),
        latent_dim=128,
        width=128,
        generator=dcgan_generator,
        critic=dcgan_critic,
    ),
    "cifar-resnet": ModelSpec(
        shapes="images [C, 32, 32]",
        makes=_square_image(32),
        latent_dim=128,
        width=128,
        generator=resnet_generator,
        critic=resnet_critic,
    ),
    "dcgan64": ModelSpec(
        shapes="images [C, 64, 64]",
        makes=_square_image(64),
        latent_dim=128,
        width=64,
        generator=dcgan_generator,
        critic=dcgan_critic,
    ),
    "dcgan": ModelSpec(
        shapes=f"square images of {_SIDES} pixels",
        makes=lambda shape: any(_square_image(side)(shape) for side in SIDES),
        latent_dim=128,
        width=64,
        generator=dcgan_generator,
        critic=dcgan_critic,
        init="he",
    ),
    "article": ModelSpec(
        shapes="images [C, H, W]",
        makes=lambda shape: len(shape) == 3,
        latent_dim=100,
        width=64,
        generator=dense_generator,
        critic=partial(dcgan_critic, stages=2),
    ),
}


def default_model(sample_shape: Sequence[int]) -> str:
    """Name the model in `MODELS` that suits samples of this shape.

    Args:
        sample_shape: Shape of one sample, without the batch dimension.

    Returns:
        "toy-mlp" for vectors, the DCGAN of the size for square images of 28 pixels or a power of two from 16 to 256,
        "mlp" for other samples of at most `SMALL` values.

    Raises:
        InputError: Nothing suits such samples.
    """
    shape = tuple(sample_shape)
    for name in ("toy-mlp", "mnist-dcgan", "cifar-dcgan", "dcgan64", "dcgan"):
        if MODELS[name].makes(shape):
            return name
    if math.prod(shape) <= SMALL:
        return "mlp"
    resized = ""
    if len(shape) == 3:
        side = max((side for side in SIDES if side <= min(shape[1:])), default=SIDES[0])
        resized = f"bring images to {_SIDES} pixels (--image-size {side}), or "
    raise InputError(
        f"model auto has no networks for samples of shape {list(shape)}: {resized}give --model mlp, "
        "or networks of your own (--model module:function)"
    )


def build(
    name: str,
    sample_shape: Sequence[int],
    *,
    latent_dim: int | None = None,
    width: int | None = None,
    init: str | None = None,
    bounded: bool = True,
    num_classes: int | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Make a generator and a critic for samples of one shape.

    Args:
        name: A key of `MODELS`, or `package.module:function` for networks of your own: the module is imported (the
            current directory is put on `sys.path`, as `python -m` does) and `function(sample_shape)`, or
            `function(sample_shape, num_classes=...)`, must return (generator, critic).
        sample_shape: Shape of one sample, without the batch dimension, such as `(3, 32, 32)`.
        latent_dim: Length of the latent vector; None means the model's default. A generator of your own says it in
            its attribute `latent_dim`; where it does not, the value given here becomes that attribute.
        width: The paper's DIM: units of the hidden layers, or channels at the largest image size; None means the
            model's default. Only for names in `MODELS`.
        init: One of `weights.INITIALISATIONS`; see `weights.initialise`. None means the model's default.
        bounded: Whether samples lie in [-1, 1], as images do. For others a model of `MODELS` leaves out the tanh that
            it would end in.
        num_classes: Makes them conditional: `generator(noise, labels)` and `critic(samples, labels)`, with labels `[N]`
            int64. None means no labels.

    Returns:
        The generator, which takes `[N, latent_dim]`, and the critic, which takes `[N, *sample_shape]`.

    Raises:
        InputError: An argument is not usable, or the model does not make samples of this shape.
    """
    shape = tuple(sample_shape)
    if not shape or any(not isinstance(side, int) or side < 1 for side in shape):
        raise InputError(f"sample_shape must be positive integers, got {shape}")
    for argument, value in (("latent_dim", latent_dim), ("width", width)):
        if value is not None and value < 1:
            raise InputError(f"{argument} must be at least 1, got {value}")
    if ":" in name:
        if width is not None:
            raise InputError(f"width is for built-in models; {name!r} decides its own")
        generator, critic = _build_own(name, shape, latent_dim, num_classes)
        init = init or "pytorch"
    else:
        spec = MODELS.get(name)
        if spec is None:
            raise InputError(f"model must be one of {', '.join(MODELS)} or package.module:function, got {name!r}")
        if not spec.makes(shape):
            raise InputError(f"model {name!r} makes {spec.shapes}, not samples of shape {list(shape)}")
        latent_dim = latent_dim or spec.latent_dim or math.prod(shape)
        width = width or spec.width

        def make(length: int) -> Generator:
            made = spec.generator(shape, length, width)
            if not bounded and isinstance(made[-1], nn.Tanh):
                del made[-1]
            return made

        generator = make(latent_dim) if num_classes is None else ConditionalGenerator(latent_dim, num_classes, make)
        critic = spec.critic(shape, width)
        if num_classes is not None:
            critic = ProjectionCritic(critic, num_classes)
        init = init or spec.init
    initialise(generator, init)
    initialise(critic, init)
    return generator, critic


def _build_own(
    name: str, shape: _Shape, latent_dim: int | None, num_classes: int | None
) -> tuple[nn.Module, nn.Module]:
    module_name, _, function_name = name.partition(":")
    if module_name.endswith(".py"):
        dotted = module_name.removesuffix(".py").replace("/", ".")
        raise InputError(f"model {name!r} names a file, and a module is wanted: {dotted}:{function_name}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:  # ValueError: an empty module name
        where = ""
        if isinstance(error, ModuleNotFoundError) and error.name and module_name.split(".")[0] == error.name:
            where = (
                f"; run this where {error.name} lies, put that folder on PYTHONPATH, or give the name that it has now"
            )
        raise InputError(f"model {name!r}: cannot import {module_name!r}: {error}{where}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"model {name!r}: module {module_name!r} has no function {function_name!r}")
    if num_classes is None:
        _check_takes_no_classes(name, function)
        pair = function(shape)
    else:
        _check_takes_classes(name, function)
        pair = function(shape, num_classes=num_classes)
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(m, nn.Module) for m in pair)):
        raise InputError(
            f"model {name!r}: the function must return a pair of nn.Modules (generator, critic), "
            f"got {type(pair).__name__}"
        )
    generator, critic = pair
    own = getattr(generator, "latent_dim", latent_dim)
    if not isinstance(own, int):
        raise InputError(f"model {name!r}: give latent_dim, or the generator an integer attribute of that name")
    if latent_dim not in (None, own):
        raise InputError(f"latent_dim is {latent_dim}, but the generator of model {name!r} has {own}")
    generator.latent_dim = own
    return generator, critic


def folder_of(name: str) -> str | None:
    """Return where Python found the module of ``package.module:function``; None for other names."""
    module_name, colon, _ = name.partition(":")
    file = getattr(sys.modules.get(module_name), "__file__", None) if colon else None
    if file is None:
        return None
    path = Path(file).resolve()
    return str(path.parents[module_name.count(".") + (path.stem == "__init__")])


def _check_takes_classes(name: str, function: Callable[..., object]) -> None:
    try:
        inspect.signature(function).bind((), num_classes=1)
    except TypeError as error:
        raise InputError(
            f"model {name!r} takes no labels: conditional training calls function(sample_shape, num_classes=K), for "
            f"generator(noise, labels) and critic(samples, labels); {error}"
        ) from error


def _check_takes_no_classes(name: str, function: Callable[..., object]) -> None:
    try:
        inspect.signature(function).bind(())
    except TypeError as error:
        classes = ": networks that are told the class need --conditional" if "num_classes" in str(error) else ""
        raise InputError(f"model {name!r} must take the shape of a sample alone; {error}{classes}") from error
