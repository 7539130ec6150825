"""Normalisation: statistics per sample and group of channels, or per channel of the batch.

The formulas are those of ``wgan_fast.ops.normalization``; per sample they run as the operators ``wgan_fast::norm_*``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.normalization import curvature, jacobian
from ...precision import accumulation_dtype
from . import rows
from .base import Call, Derivatives, Output, Rule, W, X, register

aten, ops = torch.ops.aten, torch.ops.wgan_fast


def _widen(call: Call) -> None:
    """Under autocast normalise in float32 where autocast does, which is everywhere but on a CPU."""
    device = call.operands[0].device.type
    if device != "cpu" and torch.is_autocast_enabled(device):
        half = (torch.bfloat16, torch.float16)
        call.operands = [x.float() if x.dtype in half else x for x in call.operands]


@register(
    "group_norm",
    rows.keep_leading,
    (X((3, 6, 7, 5)), 3, W((6,)), W((6,))),
    (X((3, 6, 7, 5), torch.channels_last), 2, W((6,)), W((6,))),
)
class GroupNorm(Rule):
    """Statistics per sample and group of channels."""

    def groups(self, call: Call) -> int:
        """How many sets of channels."""
        return int(call.argument("num_groups"))

    def channels(self, call: Call, x: Tensor) -> Tensor:
        """View ``x`` as ``[N, C, *]``."""
        return x

    def forward(self, call: Call) -> Output:
        """Run the normalisation and keep its statistics."""
        _widen(call)
        x = call.operands[0]
        weight, bias = (None if w is None else w.flatten() for w in (call.tensor("weight"), call.tensor("bias")))
        groups, eps = self.groups(call), call.argument("eps")
        output, mean, rstd = ops.norm_forward(self.channels(call, x), weight, bias, groups, eps)
        call.saved["mean"], call.saved["rstd"] = (self.per_sample(call, s) for s in (mean, rstd))
        return output.reshape(x.shape)

    def per_sample(self, call: Call, statistic: Tensor) -> Tensor:
        """View a statistic so that its rows lie where those of the output do."""
        return statistic

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """J γδ for x, Σ n δ for γ, Σ δ for β."""
        found: dict[int | None, Tensor] = {}
        delta, saved, weight = self.channels(call, cotangent), self._saved(call), self._weight(call)
        if call.slot("input") in wanted:
            found[call.slot("input")] = ops.norm_vjp(delta, *saved, weight, self.groups(call))
        if set(wanted) - {call.slot("input")}:
            shares = ops.norm_parameters(delta, *saved, self.groups(call))
            found |= dict(zip((call.slot("weight"), call.slot("bias")), shares))
        return [found[i].reshape(call.operands[i].shape) for i in wanted]

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """γ J t."""
        if any(t is not None for t in tangents[1:]):
            return super().jvp(call, tangents)
        tangent: Tensor = tangents[0]  # type: ignore[assignment]
        along = self.channels(call, tangent), *self._saved(call), self._weight(call), self.groups(call)
        return ops.norm_jvp(*along).reshape(tangent.shape)

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """Return the curvature for x, Σ δ J t for γ, nothing for β."""
        if any(t is not None for t in tangents[1:]):
            return super().second(call, tangents, cotangent, wanted)
        tangent, delta = self.channels(call, tangents[0]), self.channels(call, cotangent)  # type: ignore[arg-type]
        given = tangent, delta, None, *self._saved(call), self._weight(call), self.groups(call)
        found = dict(zip((call.slot("input"), call.slot("weight")), ops.norm_second_order(*given)))
        return [found[i].reshape(call.operands[i].shape) if i in found else None for i in wanted]

    def _saved(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        x = self.channels(call, call.operands[0])
        statistics = x.shape[0], self.groups(call)
        return x, call.saved["mean"].reshape(statistics), call.saved["rstd"].reshape(statistics)

    def _weight(self, call: Call) -> Tensor | None:
        weight = call.tensor("weight")
        return None if weight is None else weight.flatten()


@register("instance_norm", rows.keep_leading, (X((3, 6, 7, 5)), W((6,)), W((6,)), None, None, True, 0.1, 1e-5, False))
class InstanceNorm(GroupNorm):
    """Group normalisation with one channel per group."""

    def groups(self, call: Call) -> int:
        """Count the channels: each is a set of its own."""
        return call.operands[0].shape[1]

    def forward(self, call: Call) -> Output:
        """Run group normalisation; refuse running statistics, which have no rule."""
        if not call.argument("use_input_stats") or call.slot("running_mean") is not None:
            raise NotImplementedError("instance normalisation with running statistics has no rule")
        return super().forward(call)


@register(
    "layer_norm",
    rows.before_last(lambda call: len(call.argument("normalized_shape"))),
    (X((3, 6, 7, 5)), [7, 5], W((7, 5)), W((7, 5))),
    (X((3, 5)), [5]),
)
class LayerNorm(GroupNorm):
    """One group whose channels are all the elements that share statistics."""

    def groups(self, call: Call) -> int:
        """Return 1: all channels are one set."""
        return 1

    def channels(self, call: Call, x: Tensor) -> Tensor:
        """Flatten what shares statistics, and what does not."""
        return x.reshape(-1, math.prod(call.argument("normalized_shape")))

    def per_sample(self, call: Call, statistic: Tensor) -> Tensor:
        """``[*, 1]`` with the leading dimensions of the input."""
        lead = call.operands[0].dim() - len(call.argument("normalized_shape"))
        return statistic.reshape(*call.operands[0].shape[:lead], 1)


@register(
    "batch_norm",
    rows.in_evaluation,
    (X((3, 6, 7, 5)), W((6,)), W((6,)), None, None, True, 0.1, 1e-5, False),
)
class BatchNorm(Rule):
    """Statistics per channel: of the batch in training, fixed in evaluation."""

    def forward(self, call: Call) -> Output:
        """Run as PyTorch does, updating the running statistics."""
        if not call.argument("training"):
            return self._evaluate(call)
        _widen(call)
        x, weight, bias = call.operands[0], call.tensor("weight"), call.tensor("bias")
        momentum, eps = call.argument("momentum"), call.argument("eps")
        if call.slot("running_mean") is None:
            made = aten._native_batch_norm_legit.no_stats(x, weight, bias, True, momentum, eps)
        else:
            running = call.tensor("running_mean"), call.tensor("running_var")
            made = aten._native_batch_norm_legit(x, weight, bias, *running, True, momentum, eps)
        output, call.saved["mean"], call.saved["rstd"] = made
        return output

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """γ J δ for x, Σ n δ for γ, Σ δ for β."""
        gradients: Derivatives = []
        for i in wanted:
            if i == call.slot("input"):
                gradients.append(self._along(call, cotangent))
            elif i == call.slot("weight"):
                gradients.append(self._sum(cotangent * self._normal(call)))
            else:
                gradients.append(self._sum(cotangent))
        return gradients

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """γ J t."""
        if any(t is not None for t in tangents[1:]):
            return super().jvp(call, tangents)
        return self._along(call, tangents[0])  # type: ignore[arg-type]

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """Return the curvature for x, none in evaluation; Σ δ J t for γ."""
        if any(t is not None for t in tangents[1:]):
            return super().second(call, tangents, cotangent, wanted)
        tangent: Tensor = tangents[0]  # type: ignore[assignment]
        training, r = call.argument("training"), self._channels(self._rstd(call), tangent)
        gradients: Derivatives = []
        for i in wanted:
            if i == call.slot("weight"):
                along = jacobian(tangent, self._normal(call), r, _shared(tangent)) if training else tangent * r
                gradients.append(self._sum(cotangent * along))
            elif i == call.slot("input") and training:
                weight = call.tensor("weight")
                u = cotangent if weight is None else cotangent * self._channels(weight, cotangent)
                back = curvature(tangent, u, self._normal(call), r, _shared(tangent))
                gradients.append(back.to(tangent.dtype))
            else:
                gradients.append(None)
        return gradients

    def _along(self, call: Call, vector: Tensor) -> Tensor:
        """γ J vector, which is J (γ vector): elements that share statistics share γ."""
        scale = self._channels(self._scale(call), vector)
        if not call.argument("training"):
            return vector * scale
        return jacobian(vector, self._normal(call), scale, _shared(vector)).to(vector.dtype)

    def _normal(self, call: Call) -> Tensor:
        x = call.operands[0]
        mean = call.saved["mean"] if call.argument("training") else call.tensor("running_mean")
        return (x - self._channels(mean, x)) * self._channels(self._rstd(call), x)  # type: ignore[arg-type]

    def _evaluate(self, call: Call) -> Tensor:
        if call.slot("running_mean") is None or call.slot("running_var") is None:
            raise NotImplementedError("batch normalisation in evaluation needs its running statistics")
        x, bias, scale = call.operands[0], call.tensor("bias"), self._scale(call)
        offset = call.tensor("running_mean") * scale  # type: ignore[operator]
        shift = -offset if bias is None else bias - offset
        return x * self._channels(scale, x) + self._channels(shift, x)

    def _rstd(self, call: Call) -> Tensor:
        if call.argument("training"):
            return call.saved["rstd"]
        return (call.tensor("running_var") + call.argument("eps")).rsqrt()  # type: ignore[no-any-return]

    def _scale(self, call: Call) -> Tensor:
        weight = call.tensor("weight")
        return self._rstd(call) if weight is None else self._rstd(call) * weight

    @staticmethod
    def _channels(values: Tensor, like: Tensor) -> Tensor:
        """``[C]`` to ``[C, 1, ...]``."""
        return values.reshape(-1, *[1] * (like.dim() - 2))

    @staticmethod
    def _sum(values: Tensor) -> Tensor:
        """Down to ``[C]``, in float32 at least."""
        return values.sum(_shared(values), dtype=accumulation_dtype(values.dtype))


def _shared(x: Tensor) -> list[int]:
    """Return the dimensions over which the elements of a channel lie."""
    return [0, *range(2, x.dim())]
