"""The same step in JAX under jit: the critic's exported graph, written in jax.numpy."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .step import Skipped, Step
from .workloads import Workload

Array = Any
"""A jax.Array; JAX is optional, and so are its types."""


class _JaxStep(Step):
    """Keeps the gradients as JAX left them until somebody asks."""

    def gradients(self) -> list[Tensor]:
        return [torch.from_numpy(np.array(gradient)) for gradient in self.run.latest]  # type: ignore[attr-defined]


class _Run:
    def __init__(self, workload: Workload) -> None:
        import jax

        self._jax, self._workload = jax, workload
        self._on_cpu = workload.real.device.type == "cpu"
        self._device = jax.devices("cpu" if self._on_cpu else "gpu")[0]
        self._parameters = [self._given(parameter) for parameter in workload.critic.parameters()]
        # Arguments, not constants: what a jitted function closes over is folded into it.
        self._batch = self._given(workload.real), self._given(workload.fake)
        self._key = jax.device_put(jax.random.key(0), self._device)
        self._jitted = cache(self._jit)
        self._jitted(_mode(workload))
        self.latest: list[Array] = []

    def __call__(self, alpha: Tensor | None) -> None:
        given = None if alpha is None else self._given(alpha)
        gradient = self._jitted(_mode(self._workload))
        wait: Callable[[Any], object] = self._jax.block_until_ready
        if not self._on_cpu:
            wait(self.latest)  # of the step before: the host may run one step ahead, as it may with PyTorch
        self.latest, self._key = gradient(self._parameters, *self._batch, given, self._key)
        if self._on_cpu or alpha is not None:
            wait(self.latest)

    def _given(self, tensor: Tensor) -> Array:
        return self._jax.device_put(tensor.detach().cpu().numpy(), self._device)

    def _jit(self, mode: tuple[bool, ...]) -> Callable[..., Any]:
        """Return the compiled gradient for one state of the critic's dropout, as ``_mode`` tells it."""
        jax, workload, penalty = self._jax, self._workload, self._workload.penalty
        critic = _in_jax(workload)

        def loss(parameters: list[Array], real: Array, fake: Array, alpha: Array | None, keys: Array) -> Array:
            groups = len(real) // workload.group_size

            def slope_norm(x: Array, key: Array) -> Array:
                slope = jax.grad(lambda x: critic(parameters, x, key).sum())(x)
                return jax.numpy.linalg.norm(slope.reshape(groups, -1), axis=1)

            total = critic(parameters, fake, keys[0]).mean() - critic(parameters, real, keys[1]).mean()
            if penalty is None:
                return total
            if penalty.at == "interpolates":
                if alpha is None:
                    alpha = jax.random.uniform(keys[2], (groups,)).repeat(workload.group_size)
                mixed = alpha.reshape(-1, *[1] * (real.ndim - 1))
                norms = [slope_norm(mixed * real + (1 - mixed) * fake, keys[3])]
            else:
                sides = {"fake": [(fake, keys[0])], "real": [(real, keys[1])]}
                sides["both"] = sides["fake"] + sides["real"]
                norms = [slope_norm(x, key) for x, key in sides[penalty.at]]
            return total + sum(penalty.weight * ((norm - penalty.target) ** 2).mean() for norm in norms)

        def gradient(parameters: list[Array], real: Array, fake: Array, alpha: Array | None, key: Array) -> Any:
            following, *keys = jax.random.split(key, 5)
            return jax.grad(loss)(parameters, real, fake, alpha, keys), following

        return jax.jit(gradient)  # type: ignore[no-any-return]


def _mode(workload: Workload) -> tuple[bool, ...]:
    return tuple(module.training for module in workload.critic.modules())


def in_jax(workload: Workload) -> Step:
    """Translate a workload into JAX.

    Raises:
        Skipped: JAX is not installed or does not see the workload's kind of device, or the critic has an operator
            that is not translated here.
    """
    try:
        run = _Run(workload)
    except ImportError:
        raise Skipped("JAX is not installed: pip install 'wgan_fast[jax]'") from None
    except RuntimeError as error:
        raise Skipped(f"JAX sees no such device: {str(error).splitlines()[0]}") from error
    return _JaxStep(run, workload.critic)


def _in_jax(workload: Workload) -> Callable[[list[Array], Array, Array], Array]:
    """Return the critic as a function of (parameters, samples, random key)."""
    import jax

    exported = torch.export.export(workload.critic, (workload.real,), strict=False)
    names = exported.graph_signature.inputs_to_parameters
    buffers = {
        name: jax.numpy.asarray(exported.state_dict[buffer].numpy())
        for name, buffer in exported.graph_signature.inputs_to_buffers.items()
    }
    order = {name: index for index, (name, _) in enumerate(workload.critic.named_parameters())}
    graph = exported.graph
    calls = {node: _operator(node) for node in graph.nodes if node.op == "call_function"}

    def critic(parameters: list[Array], x: Array, key: Array) -> Array:
        values: dict[fx.Node, Array] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                in_critic = parameters[order[names[node.name]]] if node.name in names else buffers.get(node.name)
                values[node] = x if in_critic is None else in_critic
            elif node.op == "output":
                (score,) = node.args[0]
                return values[score]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                if node.target is torch.ops.aten.dropout.default:
                    key, kwargs = jax.random.split(key)[0], {"key": key}
                values[node] = calls[node](*args, **kwargs)
        raise AssertionError("a graph has an output")

    return critic


def _operator(node: fx.Node) -> Callable[..., Array]:
    operators = _operators()
    if node.target not in operators:
        raise Skipped(f"{node.target} is not translated to JAX")
    return operators[node.target]


def _operators() -> dict[Any, Callable[..., Array]]:
    import jax
    from jax import lax
    from jax import numpy as jnp

    aten = torch.ops.aten

    def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
        y = x @ weight.T
        return y if bias is None else y + bias

    def convolution(
        letters: str,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        stride: list[int] = [1],  # noqa: B006 (read only)
        padding: list[int] = [0],  # noqa: B006
        dilation: list[int] = [1],  # noqa: B006
        groups: int = 1,
    ) -> Array:
        n = len(letters)
        stride, padding, dilation = (values * (n // len(values)) for values in (stride, padding, dilation))
        y = lax.conv_general_dilated(
            x,
            weight,
            stride,
            [(p, p) for p in padding],
            rhs_dilation=dilation,
            dimension_numbers=("NC" + letters, "OI" + letters, "NC" + letters),
            feature_group_count=groups,
        )
        return y if bias is None else y + bias.reshape(-1, *[1] * n)

    def group_norm(
        x: Array, groups: int, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5, *_: Any
    ) -> Array:
        grouped = x.reshape(x.shape[0], groups, -1)
        mean, variance = grouped.mean(axis=2, keepdims=True), grouped.var(axis=2, keepdims=True)
        y = ((grouped - mean) * lax.rsqrt(variance + eps)).reshape(x.shape)
        shape = (-1, *[1] * (x.ndim - 2))
        y = y if weight is None else y * weight.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)

    def avg_pool(x: Array, size: list[int], stride: list[int] | None = None) -> Array:
        if stride not in (None, [], size):
            raise Skipped("overlapping average pooling is not translated to JAX")
        height, width = size * (2 // len(size))
        N, C, H, W = x.shape
        return x.reshape(N, C, H // height, height, W // width, width).mean(axis=(3, 5))

    def adaptive_avg_pool(x: Array, size: list[int]) -> Array:
        if math.prod(size) != 1:
            raise Skipped("adaptive average pooling to more than one pixel is not translated to JAX")
        return x.mean(axis=(2, 3), keepdims=True)

    def flatten(x: Array, start: int = 0, end: int = -1) -> Array:
        end = end % x.ndim
        return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])

    def dropout(x: Array, rate: float, training: bool, *, key: Array) -> Array:
        return x * jax.random.bernoulli(key, 1 - rate, x.shape) / (1 - rate) if training else x

    def leaky_relu(x: Array, slope: float = 0.01) -> Array:
        return jnp.where(x > 0, x, slope * x)

    def over(function: Callable[..., Array]) -> Callable[..., Array]:
        def reduce(x: Array, dims: Any, keepdim: bool = False) -> Array:
            return function(x, axis=None if dims is None else tuple(dims), keepdims=keepdim)

        return reduce

    def variance(x: Array, dims: Any, unbiased: bool = True, keepdim: bool = False) -> Array:
        return jnp.var(x, axis=tuple(dims), ddof=int(unbiased), keepdims=keepdim)

    def expand(x: Array, sizes: list[int], implicit: bool = False) -> Array:
        new = len(sizes) - x.ndim
        return jnp.broadcast_to(x, [x.shape[i - new] if size == -1 else size for i, size in enumerate(sizes)])

    return {
        aten.linear.default: linear,
        aten.mean.dim: over(jnp.mean),
        aten.var.dim: variance,
        aten.expand.default: expand,
        aten.select.int: lambda x, dim, index: jnp.take(x, index, axis=dim),
        aten.repeat.default: jnp.tile,
        aten.cat.default: lambda tensors, dim=0: jnp.concatenate(tensors, axis=dim),
        aten.sqrt.default: jnp.sqrt,
        aten.div.Tensor: lambda x, y: x / y,
        aten.conv1d.default: partial(convolution, "W"),
        aten.conv2d.default: partial(convolution, "HW"),
        aten.relu.default: jax.nn.relu,
        aten.relu_.default: jax.nn.relu,
        aten.leaky_relu.default: leaky_relu,
        aten.leaky_relu_.default: leaky_relu,
        aten.group_norm.default: group_norm,
        aten.avg_pool2d.default: avg_pool,
        aten.adaptive_avg_pool2d.default: adaptive_avg_pool,
        aten.flatten.using_ints: flatten,
        aten.view.default: lambda x, shape: x.reshape(shape),
        aten.reshape.default: lambda x, shape: x.reshape(shape),
        aten.squeeze.dim: lambda x, dim: x.squeeze(dim),
        aten.dropout.default: dropout,
        aten.add.Tensor: lambda x, y: x + y,
        aten.mul.Tensor: lambda x, y: x * y,
    }
