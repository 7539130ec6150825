"""The batches of a step, laid out in blocks of rows that go through the four passes together."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..checks import check_loss, unconnected
from ..precision import accumulation_dtype
from .capture import CaptureError, first_line, raised_at
from .objective import RefusedError
from .passes import (
    AffinePrefix,
    Block,
    Cotangents,
    FourPasses,
    Rows,
    Run,
    number_values,
    penalty_seed,
    shared_gradients,
)

if TYPE_CHECKING:
    from .plan import Plan

Values = Mapping[fx.Node, Tensor]


class Blocks:
    """Lays the batches out in blocks and runs the four passes over each.

    Args:
        plan: The plan that is made.
        base: What no sample enters.
        batches: The samples by batch.
        alpha: What the points are mixed by, where they are not among the batches.
    """

    def __init__(self, plan: "Plan", base: Run, batches: Mapping[str, Values], alpha: Tensor | None = None) -> None:
        self.plan, self.base, self.batches, self.alpha = plan, base, batches, alpha
        if alpha is not None:
            x = plan.captured.x
            with base.label("points"):
                mixed = torch.ops.wgan_fast.interpolate(batches["real"][x], batches["fake"][x], alpha)
            self.batches = {**batches, "points": {**batches["points"], x: mixed}}
        self.captured, self.roles, self.objective = plan.captured, plan.roles, plan.objective
        self.scores = self.captured.picked(0)
        self.cotangents = Cotangents(self.captured)
        self.figures: dict[str, Any] = {}
        self.penalties: list[Tensor] = []
        self.mean_norms: list[Tensor] = []
        self.norms: list[Tensor] = []

    def record(self) -> tuple[Any, ...]:
        """Run everything; returns the fields of ``StepOutput``, or the scores where those are all."""
        objective, points = self.objective, self.objective.points()
        losses = list(objective.sides) if objective.has_loss else []
        if not losses and not points:
            run = self._forward(objective.inputs())
            return tuple(run.values[node] for node in self.scores)
        on_samples = objective.at in ("real", "fake", "both") and bool(points)
        # Of several scores to a sample each has a cotangent of its own.
        shares = bool(losses) and on_samples and self.plan.scales and self.captured.picked(-1) == self.scores
        if shares:
            losses = [name for name in losses if name not in points]
        if self.plan.schedule == "batched":
            groups = [(losses, points)]
        else:
            groups = [([name], []) for name in losses] + [([], [name]) for name in points]
        runs = [self._forward([*lead, *trail]) for lead, trail in self._in_turn(groups)]
        self._last_segment(groups)
        seeds = self._loss(groups, runs)
        passes = [
            self._pull(run, lead, trail, seeds, shares) for (lead, trail), run in zip(self._in_turn(groups), runs)
        ]
        self._last_segment(groups)
        outside = self._outside_penalty(groups, passes) if objective.outside_penalty else []
        for _, each, v in zip(self._in_turn(groups), passes, outside or [None] * len(passes)):
            self._penalise(each, v)
        self._last_segment(groups)
        shared = [node for node in self.captured.calls() if node not in self.roles.sampled]
        with self.plan.autocast():
            shared_gradients(self.base, reversed(shared), self.roles.learned, self.cotangents)
        return self._outputs()

    def _in_turn(self, groups: Sequence[Any]) -> Any:
        """Yield the groups, each to be recorded in a segment of its own."""
        for i, group in enumerate(groups):
            self.plan.recorder.segment = (self.plan.recorder.piece, 1 + i)
            yield group

    def _last_segment(self, groups: Sequence[Any]) -> None:
        self.plan.recorder.segment = (self.plan.recorder.piece, 1 + len(groups))

    def _plain(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.plan.device, enabled=False)

    def _forward(self, names: list[str]) -> Run:
        """Pass 1 over the named batches, joined."""
        run = Run(self.captured, self.base.label)
        run.values.update(self.base.values)
        run.calls.update(self.base.calls)
        with run.label("batch"):
            for node in self.captured.sampled:
                joined = [self.batches[name][node] for name in names]
                run.values[node] = torch.cat(joined) if len(joined) > 1 else joined[0]
        nodes = [node for node in self.captured.calls() if node in self.roles.sampled]
        with self.plan.autocast():
            run.evaluate(self.plan.counters, self.roles.sampled)
            if self.plan.prefix is not None and names == ["real", "fake", "points"]:
                run.evaluate(self.plan.prefix.nodes, self.roles.sampled)
                self._mix_behind(run, self.plan.prefix)
                nodes = [node for node in nodes if node not in self.plan.prefix.nodes]
            run.evaluate(nodes, self.roles.sampled)
        return run

    def _mix_behind(self, run: Run, prefix: AffinePrefix) -> None:
        """Have what the points give be mixed of what real and fake give; what is not read of it falls away."""
        pair = Run(self.captured, run.label)
        pair.values.update(self.base.values)
        x = self.captured.x
        with run.label("pair"):
            pair.values[x] = torch.cat([self.batches[name][x] for name in ("real", "fake")])
        pair.evaluate(prefix.nodes, self.roles.sampled)
        run.leading = {node: pair.values[node] for node in [x, *prefix.nodes]}
        assert self.alpha is not None
        for node in prefix.ends:
            value = pair.values[node]
            with run.label(f"mixed_{node.name}"):
                alpha = self.alpha.to(accumulation_dtype(value.dtype))
                mixed = torch.ops.wgan_fast.interpolate(*value.chunk(2), alpha)
                run.values[node] = run.calls[node].output = torch.cat([value, mixed])

    def _by_name(self, node: fx.Node, groups: list[tuple[list[str], list[str]]], runs: list[Run]) -> dict[str, Tensor]:
        """Return an output for each batch."""
        found: dict[str, Tensor] = {}
        for (lead, trail), run in zip(groups, runs):
            names = [*lead, *trail]
            if node in self.roles.sampled:
                parts = _parts(run.values[node], len(names), self.plan.dims.get(node, 0))
            else:
                parts = [self.base.values[node]] * len(names)
            # Where the points are the samples once more, the loss keeps to its own run of them.
            found = dict(zip(reversed(names), reversed(parts))) | found
        return found

    def _loss(self, groups: list[tuple[list[str], list[str]]], runs: list[Run]) -> dict[str, Values]:
        """Loss, score figures, and what each batch that the loss sees gives back to the outputs: dL/ds, by output."""
        if not self.objective.has_loss:
            return {}
        outputs = {node: self._by_name(node, groups, runs) for node in self.captured.outputs}
        with self.base.label("loss"), self._plain():
            return self._outside_loss(outputs) if self.objective.outside_loss else self._inside_loss(outputs)

    def _inside_loss(self, outputs: Mapping[fx.Node, Mapping[str, Tensor]]) -> dict[str, Values]:
        nodes, sides = self.captured.picked(-1), self.objective.sides
        with torch.enable_grad():
            leaves = {name: [outputs[n][name].detach().requires_grad_() for n in nodes] for name in sides}
            wide = [joined([s if s.dtype == torch.float64 else s.float() for s in some]) for some in leaves.values()]
            try:
                loss = self.objective.loss(*wide)  # type: ignore[misc]
            except Exception as error:
                raise CaptureError(f"the loss{raised_at(error)} cannot be recorded: {first_line(error)}") from error
            try:
                check_loss(loss)
            except (TypeError, ValueError) as error:
                raise RefusedError(error) from None
            flat = [leaf for name in sides for leaf in leaves[name]]
            if loss.requires_grad:
                seeds = torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True)
            else:
                seeds = tuple(map(torch.zeros_like, flat))
            self.figures |= {f"{name}_score": s.detach().mean(dtype=s.dtype) for name, s in zip(sides, wide)}
        self.figures["loss"] = loss.detach()
        found = iter(seeds)
        return {name: {node: next(found) for node in nodes} for name in sides}

    def _outside_loss(self, outputs: Mapping[fx.Node, Mapping[str, Tensor]]) -> dict[str, Values]:
        recorder, names = self.plan.recorder, ("real", "fake")
        for name in names:
            scores = [outputs[node][name] for node in self.captured.picked(1)]
            wide = joined([s if s.dtype == torch.float64 else s.float() for s in scores])
            self.figures[f"{name}_score"] = wide.mean(dtype=wide.dtype)
        recorder.cut([[outputs[node][name] for node in self.captured.picked(-1)] for name in names])
        seeds: dict[str, dict[fx.Node, Tensor]] = {name: {} for name in names}
        for name in names:
            for node in self.plan.differentiable:
                seed = recorder.input(f"seed_{name}_{node.name}", outputs[node][name])
                if node in self.roles.sampled:
                    seeds[name][node] = seed
                else:
                    self.cotangents.add(node, seed)
        return seeds  # type: ignore[return-value]

    def _pull(
        self, run: Run, lead: list[str], trail: list[str], seeds: Mapping[str, Values], shares: bool
    ) -> tuple[FourPasses, list[Tensor]]:
        """Pass 2 over one block; returns the passes and the input gradient, which is empty without points."""
        plan, total = self.plan, len(lead) + len(trail)
        points = Rows(run, plan.dims, len(lead), total, total, plan.numbers) if trail else None
        if points is not None and len(trail) != 1 and total == len(trail):
            points = Rows(run, plan.dims, 0, total, total, number_values(run.values))
        loss: Run | None = None
        if lead:
            loss = Rows(run, plan.dims, 0, len(lead), total, plan.numbers) if trail else run
        factors = None
        if shares and trail:
            factors = torch.cat([seeds[name][self.scores[0]] for name in trail]).flatten()
        with run.label("seed"):
            seed = self._seed(run, lead, trail, seeds)
        passes = FourPasses(Block(run, loss, points, lead, trail, self.scores, factors), self.roles, self.cotangents)
        with self.plan.autocast():
            gradient = passes.cotangents(seed)
        if points is None:
            return passes, []
        if all(part is None for part in gradient):
            raise RefusedError(unconnected())
        with run.label("penalty"):
            leaves = [points.values[leaf] for leaf in self.captured.samples]
            return passes, [torch.zeros_like(x) if part is None else part for part, x in zip(gradient, leaves)]

    def _seed(self, run: Run, lead: list[str], trail: list[str], seeds: Mapping[str, Values]) -> Values:
        """Lay out what pass 2 starts from: dL/ds for the loss, 1 for the points."""
        found, names = {}, [*lead, *trail]
        for node in self.captured.outputs:
            if node not in self.roles.sampled:
                continue
            dim, value = self.plan.dims.get(node, 0), run.values[node]
            rows = value.narrow(dim, 0, value.shape[dim] // len(names)) if names[1:] else value
            parts = [seeds[name].get(node) for name in lead]
            parts += [torch.ones_like(rows) if node in self.scores else None for _ in trail]
            if any(part is not None for part in parts):
                whole = [torch.zeros_like(rows) if part is None else part for part in parts]
                found[node] = torch.cat(whole, dim) if len(whole) > 1 else whole[0]
        return found

    def _outside_penalty(
        self, groups: list[tuple[list[str], list[str]]], passes: list[tuple[FourPasses, list[Tensor]]]
    ) -> list[list[Tensor] | None]:
        """Give the input gradients away, and scores where asked for, and take their cotangents: v of each block."""
        recorder = self.plan.recorder
        scores: list[Tensor] = []
        gradients: list[Any] = []
        for (_, trail), (each, gradient) in zip(groups, passes):
            if not trail:
                continue
            points = each.block.points
            assert points is not None
            if self.objective.outside_scores:
                scores += [points.values[node] for node in self.scores]
            gradients += zip(*[_parts(part, len(trail)) for part in gradient])
        recorder.cut((scores, gradients), given_away=self.objective.outside_scores)
        outside: list[list[Tensor] | None] = []
        for number, ((_, trail), (each, gradient)) in enumerate(zip(groups, passes)):
            if not trail:
                outside.append(None)
                continue
            if self.objective.outside_scores:
                self._outside_scores(each, [recorder.input(f"seed_{n.name}", s) for n, s in zip(self.scores, scores)])
            given = [
                [recorder.input(f"v_{number}_{k}_{i}", _parts(part, len(trail))[k]) for i, part in enumerate(gradient)]
                for k in range(len(trail))
            ]
            with each.block.run.label("penalty"):
                outside.append([torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*given)])
        return outside

    def _outside_scores(self, passes: FourPasses, seeds: list[Tensor]) -> None:
        """Have the scores at the points count: one each, as factors of what was pulled back already.

        Others go back by themselves, together with what curvature gives.
        """
        if self.plan.scales:
            passes.block.factors = seeds[0].flatten()
        else:
            passes.block.seeds = dict(zip(self.scores, seeds))

    def _penalise(self, each: tuple[FourPasses, list[Tensor]], v: list[Tensor] | None) -> None:
        """Run passes 3 and 4 over one block."""
        (passes, gradient), plan = each, self.plan
        if gradient and v is None:
            with passes.block.run.label("penalty"), self._plain():
                v, penalty, mean_norm, norms = penalty_seed(
                    gradient,
                    weight=float(len(passes.block.trail)),
                    target=0.0,
                    one_sided=self.objective.one_sided,
                    group_size=self.objective.group_size,
                )
            self.penalties.append(penalty)
            self.mean_norms.append(mean_norm)
            self.norms.append(norms)
        with self.plan.autocast():
            if v is not None:
                passes.tangents(v)
            passes.weights()
        plan.curved |= passes.curved
        plan.linear |= {str(n.target) for n in passes.nodes if n in self.roles.varying} - plan.curved

    def _outputs(self) -> tuple[Any, ...]:
        with self.base.label("result"):
            penalty = sum(self.penalties[1:], self.penalties[0]) if self.penalties else None
            norm = sum(self.mean_norms[1:], self.mean_norms[0]) if self.mean_norms else None
            norm = norm / len(self.mean_norms) if len(self.mean_norms) > 1 else norm  # type: ignore[assignment,operator]
            loss = self.figures.get("loss")
            if penalty is not None and not self.objective.outside_loss:
                loss = penalty if loss is None else loss + penalty
        return (
            loss,
            penalty,
            self.figures.get("real_score"),
            self.figures.get("fake_score"),
            norm,
            self.norms,
            self._gradients(),
        )

    def _gradients(self) -> list[Tensor | None]:
        """Return the gradients of what every batch shares, then those of the fake batch's own further arguments."""
        own = ["fake"] if self.objective.own_arguments else []
        shared = [name for name in self.objective.inputs() if name not in own]
        found: list[Tensor | None] = []
        for node in self.captured.trainable:
            if node not in self.roles.sampled:
                found.append(self.cotangents.get(node))
                continue
            parts = [part for name in shared if (part := self.cotangents.get((node, name))) is not None]
            found.append(sum(parts[1:], parts[0]) if parts else None)
        rows = [node for node in self.captured.trainable if node in self.roles.sampled]
        return [*found, *[self.cotangents.get((node, name)) for name in own for node in rows]]


def _parts(value: Tensor, count: int, dim: int = 0) -> Sequence[Tensor]:
    return value.chunk(count, dim) if count > 1 else [value]


def joined(scores: list[Tensor]) -> Tensor:
    """Return the scores of a critic as one tensor: several to a sample lie side by side."""
    return scores[0] if len(scores) == 1 else torch.cat([part.reshape(part.shape[0], -1) for part in scores], 1)
