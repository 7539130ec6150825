"""The ways to compute a critic step, side by side: as the field writes it, written well, compiled, in JAX, and ours.

Each variant turns a workload into a ``Step``: a call that draws its own α, as training code does, and leaves one
gradient for each of the critic's parameters. Nothing here measures.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from .. import gradient_penalty, losses, reference
from ..critic_step import CriticStep, Precision
from .jax_step import in_jax
from .limit import limit as _limit
from .step import Skipped, Step
from .workloads import Workload

Scores = Callable[[Tensor], Tensor]
ScoresAndSlope = Callable[[Tensor], tuple[Tensor, Tensor]]
Computes = Literal["step", "penalty", "loss", "nothing"]


@dataclass(frozen=True)
class Variant:
    """One way to compute a workload.

    Attributes:
        title: What it is, in words.
        prepare: Makes the step; raises ``Skipped`` where it does not apply.
        computes: What its gradients belong to: the whole "step", the "penalty" alone, the "loss" alone, or "nothing".
        precision: What it computes in; its error is held against the well-written naive step in the same.
        compiled: Whether operators are fused out of sight, so that they cannot be counted.
        allowed_factor: How many times the well-written naive step's error, in the same precision, its own may be:
            2 for ours; a digit for the others, whose kernels are not this project's to judge.
    """

    title: str
    prepare: Callable[[Workload], Step]
    computes: Computes = "step"
    precision: Precision = "fp32"
    compiled: bool = False
    allowed_factor: float = 10.0

    def applies(self, workload: Workload) -> bool:
        """Whether this differs from the other variants on a workload."""
        return workload.penalty is not None or self.computes not in ("penalty", "loss")


def critic_loss(
    scores: Scores,
    scores_and_slope: ScoresAndSlope,
    workload: Workload,
    alpha: Tensor | None,
    computes: Computes = "step",
) -> Tensor:
    """Compute the critic's objective, written well: one forward of penalised real or fake serves both terms.

    Args:
        scores: Maps samples to scores.
        scores_and_slope: Maps samples to scores and the scores' gradient with respect to the samples.
        workload: What to compute.
        alpha: α ``[N]``; None where no interpolates are taken.
        computes: The whole step, the penalty alone or the loss alone.
    """
    penalty = workload.penalty if computes != "loss" else None
    at = penalty.at if penalty else None
    values, slopes, terms = {}, [], []
    for name, samples in (("real", workload.real), ("fake", workload.fake)):
        if at in (name, "both"):
            values[name], slope = scores_and_slope(samples)
            slopes.append(slope)
        elif computes != "penalty":
            values[name] = scores(samples)
    if at == "interpolates":
        assert alpha is not None
        slopes.append(scores_and_slope(workload.interpolates(alpha))[1])
    if computes != "penalty":
        terms.append(losses.wasserstein.critic(values["real"], values["fake"]))
    for slope in slopes:
        assert penalty is not None
        norm = reference.gradient_norm(slope, penalty.group_size)
        terms.append(
            reference.penalty_from_norm(norm, weight=penalty.weight, target=penalty.target, one_sided=penalty.one_sided)
        )
    return sum(terms[1:], terms[0])


def naive(workload: Workload, precision: Precision = "fp32", computes: Computes = "step") -> Step:
    """Plain PyTorch, written well: α on the device, fake detached, one backward over everything."""
    critic = workload.critic

    def scores_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        scores = critic(x)
        return scores, reference.input_gradient(scores, x)

    def run(alpha: Tensor | None) -> None:
        alpha = _alpha(workload, alpha)
        with _autocast(workload, precision):
            loss = critic_loss(critic, scores_and_slope, workload, alpha, computes)
        critic.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]

    return Step(run, critic)


def field(workload: Workload, computes: Computes = "step") -> Step:
    """As the popular repositories write it: α drawn by NumPy, a retained graph, one backward for each term.

    Follows compute_gradient_penalty of eriklindernoren/PyTorch-GAN and the loop of caogang/wgan-gp.
    """
    critic, real, fake, penalty = workload.critic, workload.real, workload.fake, workload.penalty
    if penalty is None:
        raise Skipped("there is no penalty")

    def compute_gradient_penalty(points: Tensor) -> Tensor:
        points = torch.autograd.Variable(points, requires_grad=True)
        scores = critic(points)
        ones = torch.ones(scores.size()).to(points.device)
        gradients = torch.autograd.grad(
            outputs=scores, inputs=points, grad_outputs=ones, create_graph=True, retain_graph=True, only_inputs=True
        )[0]
        gradients = gradients.contiguous().view(len(real) // penalty.group_size, -1)
        excess: Tensor = gradients.norm(2, dim=1) - penalty.target
        return (excess**2).mean() * penalty.weight

    def run(alpha: Tensor | None) -> None:
        critic.zero_grad()
        if computes == "step":
            critic(real).mean().backward(torch.tensor(-1.0, device=real.device))
            critic(fake).mean().backward(torch.tensor(1.0, device=real.device))
        if penalty.at == "interpolates":
            groups = len(real) // penalty.group_size
            if alpha is None:
                drawn = np.random.random(groups).repeat(penalty.group_size)  # noqa: NPY002 (as the field writes it)
                alpha = torch.tensor(drawn, dtype=torch.float32).to(real.device)
            alpha = reference.per_sample(alpha, real).expand(real.size())
            compute_gradient_penalty(alpha * real + (1 - alpha) * fake).backward()  # type: ignore[no-untyped-call]
        else:
            for points in {"real": [real], "fake": [fake], "both": [real, fake]}[penalty.at]:
                compute_gradient_penalty(points).backward()  # type: ignore[no-untyped-call]

    return Step(run, critic)


def naive_compiled(workload: Workload, precision: Precision = "fp32") -> Step:
    """Make a step of the same objective: one compiled function through torch.func, which needs no private flag.

    ``torch.autograd.grad`` inside a compiled function, under ``torch._dynamo.config.trace_autograd_ops``, compiles
    too (torch 2.13): to code that takes the same time, in up to three times as long.
    """
    critic = workload.critic

    def loss(parameters: dict[str, Tensor], alpha: Tensor | None) -> Tensor:
        def scores(x: Tensor) -> Tensor:
            return functional_call(critic, parameters, (x,))  # type: ignore[no-any-return]

        def summed(x: Tensor) -> tuple[Tensor, Tensor]:
            values = scores(x)
            return values.sum(), values

        def scores_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
            slope, values = torch.func.grad(summed, has_aux=True)(x)
            return values, slope

        with _autocast(workload, precision):
            return critic_loss(scores, scores_and_slope, workload, alpha)

    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, dynamic=False)

    def run(alpha: Tensor | None) -> None:
        parameters = {name: parameter.detach() for name, parameter in critic.named_parameters()}
        gradients = compiled(parameters, _alpha(workload, alpha))
        for name, parameter in critic.named_parameters():
            parameter.grad = gradients[name]

    return Step(run, critic)


def drop_in(workload: Workload, precision: Precision = "fp32", computes: Computes = "step") -> Step:
    """Make a step of the naive loop with ``wgan_fast.gradient_penalty`` in place of its own."""
    critic, real, fake, penalty = workload.critic, workload.real, workload.fake, workload.penalty
    if penalty is None:
        raise Skipped("there is no penalty")
    options = {name: getattr(penalty, name) for name in ("weight", "target", "one_sided", "at", "group_size")}

    def run(alpha: Tensor | None) -> None:
        critic.zero_grad(set_to_none=True)
        with _autocast(workload, precision):
            value = gradient_penalty(critic, real, fake, alpha=alpha, engine="four_pass", **options)
            if computes == "step":
                value = value + losses.wasserstein.critic(critic(real), critic(fake))
        value.backward()

    return Step(run, critic)


def ours(workload: Workload, precision: Precision = "fp32", compile: bool = False) -> Step:
    """``wgan_fast.CriticStep``."""
    if workload.penalty is None and workload.group_size > 1:
        raise Skipped("CriticStep learns of packing from the penalty, and there is none")
    step = CriticStep(
        workload.critic, penalty=workload.penalty, engine="four_pass", precision=precision, compile=compile
    )
    at_interpolates = workload.penalty is not None and workload.penalty.at == "interpolates"

    def run(alpha: Tensor | None) -> None:
        step(workload.real, workload.fake, alpha if at_interpolates else None)

    return Step(run, workload.critic)


def limit(workload: Workload, precision: Precision = "fp32") -> Step:
    """Make a step that takes as long as our step's arithmetic would take alone; see the module ``limit``."""
    return _limit(workload, ours(workload, precision), precision)


def _alpha(workload: Workload, given: Tensor | None) -> Tensor | None:
    if workload.penalty is None or workload.penalty.at != "interpolates":
        return None
    return workload.draw_alpha() if given is None else given


def _autocast(workload: Workload, precision: Precision) -> AbstractContextManager[object]:
    return torch.autocast(workload.real.device.type, torch.bfloat16, enabled=precision == "bf16")


def _in_channels_last(prepare: Callable[[Workload], Step], workload: Workload) -> Step:
    if workload.real.dim() != 4:
        raise Skipped("the samples are not images")
    return prepare(workload.channels_last())


VARIANTS: dict[str, Variant] = {
    "field": Variant("PyTorch, as popular repositories write it", field),
    "naive": Variant("PyTorch, written well", naive),
    "naive-channels-last": Variant("PyTorch, channels-last", partial(_in_channels_last, naive)),
    "naive-compiled": Variant("PyTorch, compiled", naive_compiled, compiled=True),
    "jax": Variant("JAX under jit", in_jax, compiled=True),
    "no-penalty": Variant("PyTorch without the penalty", partial(naive, computes="loss"), computes="loss"),
    "drop-in": Variant("PyTorch with our gradient_penalty", drop_in, allowed_factor=2.0),
    "ours": Variant("CriticStep", ours, allowed_factor=2.0),
    "ours-channels-last": Variant("CriticStep, channels-last", partial(_in_channels_last, ours), allowed_factor=2.0),
    "ours-compiled": Variant(
        "CriticStep(compile=True)", partial(ours, compile=True), compiled=True, allowed_factor=2.0
    ),
    "limit": Variant("counted units at the measured rate", limit, computes="nothing"),
    "naive-bf16": Variant("PyTorch under autocast", partial(naive, precision="bf16"), precision="bf16"),
    "naive-compiled-bf16": Variant(
        "PyTorch under autocast, compiled", partial(naive_compiled, precision="bf16"), precision="bf16", compiled=True
    ),
    "ours-bf16": Variant(
        'CriticStep(precision="bf16")', partial(ours, precision="bf16"), precision="bf16", allowed_factor=2.0
    ),
    "ours-compiled-bf16": Variant(
        'CriticStep(precision="bf16", compile=True)',
        partial(ours, precision="bf16", compile=True),
        precision="bf16",
        compiled=True,
        allowed_factor=2.0,
    ),
    "limit-bf16": Variant(
        "counted units at the measured rate", partial(limit, precision="bf16"), "nothing", precision="bf16"
    ),
    "field-penalty": Variant("the penalty alone, as popular", partial(field, computes="penalty"), computes="penalty"),
    "naive-penalty": Variant("the penalty alone, written well", partial(naive, computes="penalty"), computes="penalty"),
    "drop-in-penalty": Variant(
        "our gradient_penalty alone", partial(drop_in, computes="penalty"), computes="penalty", allowed_factor=2.0
    ),
}
"""By the name that results file them under. The whole step is compared with "naive", a penalty with "naive-penalty"."""
