"""Normalisation: y = γ n(x) + β with n(x) = (x − μ) r, r = 1/√(σ² + ε), over the elements that share statistics.

The Jacobian J of n is symmetric, J u = r (u − ū − n ⟨u n⟩) with means over those elements, so one function serves
VJP and JVP. For ⟨u, J t⟩ with u = γδ the curvature is

    ∂⟨u, J t⟩/∂x = −r² n Σ(u t − ū t̄ − ⟨u n⟩⟨t n⟩)/m − r (⟨u n⟩ J t + ⟨t n⟩ J u),

where the sum over the m elements divided by m is again a mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Call, Derivatives, Output, Rule, register

aten = torch.ops.aten


class Normalization(Rule):
    """What the normalisations share; a subclass says which elements share statistics and how PyTorch runs it."""

    def grouped(self, call: Call, x: Tensor) -> tuple[Tensor, list[int]]:
        """View ``x`` so that the returned dimensions run over the elements that share statistics."""
        raise NotImplementedError

    def per_channel(self, call: Call, x: Tensor) -> Tensor:
        """View a weight so that it broadcasts against the input."""
        raise NotImplementedError

    def jacobian(self, call: Call, vector: Tensor) -> Tensor:
        """Return J vector."""
        _x, dims = self.grouped(call, call.operands[0])
        u, _ = self.grouped(call, vector)
        normal = self.normal(call)
        r = self.saved(call, "rstd")
        centred = u - u.mean(dims, keepdim=True) - normal * (u * normal).mean(dims, keepdim=True)
        return (r * centred).reshape(vector.shape).to(vector.dtype)

    def normal(self, call: Call) -> Tensor:
        """Return n(x), grouped."""
        x, _ = self.grouped(call, call.operands[0])
        return (x - self.saved(call, "mean")) * self.saved(call, "rstd")

    def saved(self, call: Call, name: str) -> Tensor:
        """A statistic, viewed so that it broadcasts against the grouped input."""
        x, dims = self.grouped(call, call.operands[0])
        return call.saved[name].reshape([1 if d in dims else size for d, size in enumerate(x.shape)])

    def forward(self, call: Call) -> Output:
        """Run the normalisation, in float32 under autocast, and keep its statistics."""
        if torch.is_autocast_enabled(call.operands[0].device.type):
            half = (torch.bfloat16, torch.float16)
            call.operands = [x.float() if x.dtype in half else x for x in call.operands]
        output, call.saved["mean"], call.saved["rstd"] = self.run(call)
        return output

    def run(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Return output, μ and r, one of each per set of elements that share statistics."""
        raise NotImplementedError

    def weighted(self, call: Call, vector: Tensor) -> Tensor:
        """Return γ vector."""
        weight = call.tensor("weight")
        return vector if weight is None else (vector * self.per_channel(call, weight)).to(vector.dtype)

    def reduce(self, call: Call, values: Tensor, weight: Tensor) -> Tensor:
        """Sum ``values`` like the input down to the shape of a weight."""
        return values.to(weight.dtype).sum_to_size(self.per_channel(call, weight).shape).reshape(weight.shape)

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """J γδ for x, Σ n δ for γ, Σ δ for β."""
        gradients: Derivatives = []
        for i in wanted:
            if i == call.slot("input"):
                gradients.append(self.jacobian(call, self.weighted(call, cotangent)))
            elif i == call.slot("weight"):
                values = cotangent * self.normal(call).reshape(cotangent.shape)
                gradients.append(self.reduce(call, values, call.operands[i]))
            else:
                gradients.append(self.reduce(call, cotangent, call.operands[i]))
        return gradients

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """γ J t."""
        if any(t is not None for t in tangents[1:]):
            return super().jvp(call, tangents)
        return self.weighted(call, self.jacobian(call, tangents[0]))  # type: ignore[arg-type]

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """The formula of this module for x, Σ δ J t for γ."""
        if any(t is not None for t in tangents[1:]):
            return super().second(call, tangents, cotangent, wanted)
        tangent: Tensor = tangents[0]  # type: ignore[assignment]
        along = self.jacobian(call, tangent)
        gradients: Derivatives = []
        for i in wanted:
            if i == call.slot("input"):
                gradients.append(self._curvature(call, tangent, along, self.weighted(call, cotangent)))
            elif i == call.slot("weight"):
                gradients.append(self.reduce(call, cotangent * along, call.operands[i]))
            else:
                gradients.append(None)
        return gradients

    def _curvature(self, call: Call, tangent: Tensor, along: Tensor, u: Tensor) -> Tensor:
        back = self.jacobian(call, u)
        normal, r = self.normal(call), self.saved(call, "rstd")
        (t, dims), (u, _) = self.grouped(call, tangent), self.grouped(call, u)
        (jt, _), (ju, _) = self.grouped(call, along), self.grouped(call, back)
        un, tn = (u * normal).mean(dims, keepdim=True), (t * normal).mean(dims, keepdim=True)
        # ⟨u, J t⟩ / (m r) is the covariance left when mean and normal direction are taken out.
        spread = (u * jt).mean(dims, keepdim=True) * r
        return -(normal * spread + (un * jt + tn * ju) * r).reshape(tangent.shape).to(tangent.dtype)


@register("layer_norm")
class LayerNorm(Normalization):
    """Statistics per sample over the last dimensions."""

    def run(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """PyTorch's kernel."""
        return aten.native_layer_norm(  # type: ignore[no-any-return]
            call.operands[0], call.argument("normalized_shape"), call.tensor("weight"), call.tensor("bias"),
            call.argument("eps"),
        )  # fmt: skip

    def grouped(self, call: Call, x: Tensor) -> tuple[Tensor, list[int]]:
        """As it is."""
        return x, list(range(x.dim() - len(call.argument("normalized_shape")), x.dim()))

    def per_channel(self, call: Call, x: Tensor) -> Tensor:
        """As it is: the last dimensions."""
        return x

    def jacobian(self, call: Call, vector: Tensor) -> Tensor:
        """PyTorch's kernel."""
        mask = [True, False, False]
        return aten.native_layer_norm_backward(  # type: ignore[no-any-return]
            vector, call.operands[0], call.argument("normalized_shape"), call.saved["mean"], call.saved["rstd"],
            None, None, mask,
        )[0]  # fmt: skip


@register("group_norm")
class GroupNorm(Normalization):
    """Statistics per sample and group of channels."""

    def groups(self, call: Call) -> int:
        """How many sets of channels."""
        return int(call.argument("num_groups"))

    def run(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """PyTorch's kernel."""
        x = call.operands[0]
        return aten.native_group_norm(  # type: ignore[no-any-return]
            x,
            call.tensor("weight"),
            call.tensor("bias"),
            *self._sizes(x),
            self.groups(call),
            call.argument("eps"),
        )

    def grouped(self, call: Call, x: Tensor) -> tuple[Tensor, list[int]]:
        """Split the channels: a view of contiguous and of channels-last tensors."""
        groups = self.groups(call)
        x = x.unflatten(1, (groups, x.shape[1] // groups))  # type: ignore[no-untyped-call]
        return x, list(range(2, x.dim()))

    def per_channel(self, call: Call, x: Tensor) -> Tensor:
        """``[C]`` to ``[C, 1, ...]``."""
        return x.reshape(-1, *[1] * (call.operands[0].dim() - 2))

    def jacobian(self, call: Call, vector: Tensor) -> Tensor:
        """PyTorch's kernel."""
        x = call.operands[0]
        return aten.native_group_norm_backward(  # type: ignore[no-any-return]
            vector, x, call.saved["mean"], call.saved["rstd"], None, *self._sizes(x), self.groups(call),
            [True, False, False],
        )[0]  # fmt: skip

    def _sizes(self, x: Tensor) -> tuple[int, int, int]:
        return x.shape[0], x.shape[1], x.shape[2:].numel()


@register("instance_norm")
class InstanceNorm(GroupNorm):
    """Group normalisation with one channel per group."""

    def groups(self, call: Call) -> int:
        """One channel each."""
        return call.operands[0].shape[1]

    def forward(self, call: Call) -> Output:
        """As group normalisation; running statistics have no rule."""
        if not call.argument("use_input_stats") or call.slot("running_mean") is not None:
            raise NotImplementedError("instance normalisation with running statistics has no rule")
        return super().forward(call)


@register("batch_norm")
class BatchNorm(Normalization):
    """Statistics per channel: of the batch in training, fixed in evaluation."""

    def forward(self, call: Call) -> Output:
        """Run as PyTorch does, updating the running statistics."""
        if call.argument("training"):
            return super().forward(call)
        self._fix(call)
        scale, shift = self._scale(call), self._shift(call)
        return call.operands[0] * self.per_channel(call, scale) + self.per_channel(call, shift)

    def run(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """PyTorch's kernel."""
        x, weight, bias = call.operands[0], call.tensor("weight"), call.tensor("bias")
        momentum, eps = call.argument("momentum"), call.argument("eps")
        if call.slot("running_mean") is None:
            return aten._native_batch_norm_legit.no_stats(x, weight, bias, True, momentum, eps)  # type: ignore[no-any-return]
        running = call.tensor("running_mean"), call.tensor("running_var")
        return aten._native_batch_norm_legit(x, weight, bias, *running, True, momentum, eps)  # type: ignore[no-any-return]

    def grouped(self, call: Call, x: Tensor) -> tuple[Tensor, list[int]]:
        """As it is."""
        return x, [0, *range(2, x.dim())]

    def per_channel(self, call: Call, x: Tensor) -> Tensor:
        """``[C]`` to ``[C, 1, ...]``."""
        return x.reshape(-1, *[1] * (call.operands[0].dim() - 2))

    def normal(self, call: Call) -> Tensor:
        """With the statistics that the forward used."""
        if call.argument("training"):
            return super().normal(call)
        x = call.operands[0]
        mean, rstd = call.tensor("running_mean"), self._rstd(call)
        return (x - self.per_channel(call, mean)) * self.per_channel(call, rstd)  # type: ignore[arg-type]

    def jacobian(self, call: Call, vector: Tensor) -> Tensor:
        """Diagonal in evaluation."""
        if call.argument("training"):
            return super().jacobian(call, vector)
        return vector * self.per_channel(call, self._rstd(call))

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """In evaluation the scale is applied at once."""
        if call.argument("training") or list(wanted) != [0]:
            return super().vjp(call, cotangent, wanted)
        return [cotangent * self.per_channel(call, self._scale(call))]

    def _curvature(self, call: Call, tangent: Tensor, along: Tensor, u: Tensor) -> Tensor | None:  # type: ignore[override]
        return super()._curvature(call, tangent, along, u) if call.argument("training") else None

    def _fix(self, call: Call) -> None:
        if call.slot("running_mean") is None or call.slot("running_var") is None:
            raise NotImplementedError("batch normalisation in evaluation needs its running statistics")

    def _rstd(self, call: Call) -> Tensor:
        return (call.tensor("running_var") + call.argument("eps")).rsqrt()  # type: ignore[no-any-return]

    def _scale(self, call: Call) -> Tensor:
        weight = call.tensor("weight")
        return self._rstd(call) if weight is None else self._rstd(call) * weight

    def _shift(self, call: Call) -> Tensor:
        bias, offset = call.tensor("bias"), call.tensor("running_mean") * self._scale(call)  # type: ignore[operator]
        return -offset if bias is None else bias - offset
