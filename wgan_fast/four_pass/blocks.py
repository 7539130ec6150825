"""The batches of a step, laid out in blocks of rows that go through the four passes together."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_loss, unconnected
from .capture import CaptureError, first_line, raised_at
from .objective import RefusedError
from .passes import Block, Cotangents, FourPasses, Rows, Run, number_values, penalty_seed, shared_gradients

if TYPE_CHECKING:
    from .plan import Plan


class Blocks:
    """Lays the batches out in blocks and runs the four passes over each."""

    def __init__(self, plan: "Plan", base: Run, batches: Mapping[str, Tensor]) -> None:
        self.plan, self.base, self.batches = plan, base, batches
        self.captured, self.roles, self.objective = plan.captured, plan.roles, plan.objective
        self.cotangents = Cotangents()
        self.figures: dict[str, Any] = {}
        self.penalties: list[Tensor] = []
        self.norms: list[Tensor] = []

    def record(self) -> tuple[Any, ...]:
        """Run everything; returns the fields of ``StepOutput``."""
        objective, points = self.objective, self.objective.points()
        losses = ["real", "fake"] if objective.loss else []
        on_samples = objective.at in ("real", "fake", "both") and bool(points)
        # Of several scores to a sample each has a cotangent of its own.
        shares = bool(losses) and on_samples and not self.plan.coupled and self.plan.one_score
        if shares:
            losses = [name for name in losses if name not in points]
        if self.plan.schedule == "batched":
            groups = [(losses, points)]
        else:
            groups = [([name], []) for name in losses] + [([], [name]) for name in points]
        recorder, runs = self.plan.recorder, []
        for recorder.segment, (lead, trail) in enumerate(groups, 1):
            runs.append(self._forward([*lead, *trail]))
        recorder.segment = len(groups) + 1
        seeds = self._loss(groups, runs)
        for recorder.segment, ((lead, trail), run) in enumerate(zip(groups, runs), 1):
            self._passes(run, lead, trail, seeds, shares)
        recorder.segment = len(groups) + 1
        shared = [node for node in self.captured.calls() if node not in self.roles.sampled]
        with self.plan.autocast():
            shared_gradients(self.base, reversed(shared), self.roles.learned, self.cotangents)
        return self._outputs()

    def _plain(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.plan.device, enabled=False)

    def _forward(self, names: list[str]) -> Run:
        """Pass 1 over the named batches, joined."""
        run = Run(self.captured, self.base.label)
        run.values.update(self.base.values)
        run.calls.update(self.base.calls)
        with run.label("batch"):
            joined = [self.batches[name] for name in names]
            run.values[self.captured.x] = torch.cat(joined) if len(joined) > 1 else joined[0]
            for node in self.captured.sampled - {self.captured.x}:
                value = self.base.values[node]
                run.values[node] = torch.cat([value] * len(names)) if len(names) > 1 else value
        with self.plan.autocast():
            run.evaluate(self.plan.counters, self.roles.sampled)
            run.evaluate([n for n in self.captured.calls() if n in self.roles.sampled], self.roles.sampled)
        return run

    def _loss(self, groups: list[tuple[list[str], list[str]]], runs: list[Run]) -> dict[str, Tensor]:
        """Loss, score figures, and dL/ds for each batch that the loss sees."""
        if self.objective.loss is None:
            return {}
        scores: dict[str, Tensor] = {}
        for (lead, trail), run in zip(groups, runs):
            names = [*lead, *trail]
            parts = run.values[self.captured.scores].chunk(len(names))
            # Where the points are the samples once more, the loss keeps to its own run of them.
            scores = dict(zip(reversed(names), reversed(parts))) | scores
        with self.base.label("loss"), self._plain(), torch.enable_grad():
            leaves = [scores[name].detach().requires_grad_() for name in ("real", "fake")]
            wide = [s if s.dtype == torch.float64 else s.float() for s in leaves]
            try:
                loss = self.objective.loss(*wide)
            except Exception as error:
                raise CaptureError(f"the loss{raised_at(error)} cannot be recorded: {first_line(error)}") from error
            try:
                check_loss(loss)
            except (TypeError, ValueError) as error:
                raise RefusedError(error) from None
            if loss.requires_grad:
                seeds = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            else:
                seeds = tuple(map(torch.zeros_like, leaves))
            self.figures["real_score"], self.figures["fake_score"] = (s.detach().mean(dtype=s.dtype) for s in wide)
        self.figures["loss"] = loss.detach()
        return dict(zip(("real", "fake"), seeds))

    def _passes(self, run: Run, lead: list[str], trail: list[str], seeds: Mapping[str, Tensor], shares: bool) -> None:
        plan, total = self.plan, len(lead) + len(trail)
        dims = plan.dims
        points = Rows(run, dims, len(lead), total, total, plan.numbers) if trail else None
        if points is not None and len(trail) != 1 and total == len(trail):
            points = Rows(run, dims, 0, total, total, number_values(run.values))
        loss: Run | None = None
        if lead:
            loss = Rows(run, dims, 0, len(lead), total, plan.numbers) if trail else run
        factors = torch.cat([seeds[name] for name in trail]).flatten() if shares and trail else None
        scores = run.values[self.captured.scores]
        with run.label("seed"):
            rows = scores.shape[0] // total
            units = [torch.ones_like(scores.narrow(0, 0, rows)) for _ in trail]
            parts = [seeds[name] for name in lead] + units
            seed = torch.cat(parts) if len(parts) > 1 else parts[0]
        passes = FourPasses(Block(run, loss, points, total, factors), self.roles, self.cotangents)
        with self.plan.autocast():
            gradient = passes.cotangents(seed)
        if points is not None:
            self._penalise(run, passes, gradient, len(trail))
        with self.plan.autocast():
            passes.weights()
        plan.curved |= passes.curved
        plan.linear |= {str(n.target) for n in passes.nodes if n in self.roles.varying} - plan.curved

    def _penalise(self, run: Run, passes: FourPasses, gradient: Tensor | None, parts: int) -> None:
        objective = self.objective
        if gradient is None:
            raise RefusedError(unconnected())
        with run.label("penalty"), self._plain():
            v, penalty, norm = penalty_seed(
                gradient,
                weight=float(parts),
                target=0.0,
                one_sided=objective.one_sided,
                group_size=objective.group_size,
            )
        self.penalties.append(penalty)
        self.norms.append(norm)
        with self.plan.autocast():
            passes.tangents(v)

    def _outputs(self) -> tuple[Any, ...]:
        with self.base.label("result"):
            penalty = sum(self.penalties[1:], self.penalties[0]) if self.penalties else None
            norm = sum(self.norms[1:], self.norms[0]) if self.norms else None
            norm = norm / len(self.norms) if len(self.norms) > 1 else norm  # type: ignore[assignment,operator]
            loss = self.figures.get("loss")
            if penalty is not None:
                loss = penalty if loss is None else loss + penalty
        return (
            loss,
            penalty,
            self.figures.get("real_score"),
            self.figures.get("fake_score"),
            norm,
            [self.cotangents.get(node) for node in self.captured.trainable],
        )
