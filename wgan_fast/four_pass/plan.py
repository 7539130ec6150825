"""Plans: a critic and the shapes of one batch, turned into a flat graph that is run at every step."""

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..checks import check_loss, check_scores, unconnected
from .capture import Captured, CaptureError, first_line, raised_at
from .counting import Counter, flops_of
from .independence import CoupledError, Dims, batch_dims
from .optimize import finish, save_memory
from .passes import (
    Block,
    Cotangents,
    FourPasses,
    Roles,
    Rows,
    Run,
    number_values,
    penalty_seed,
    shared_gradients,
)
from .record import Recorder
from .stand_ins import is_view

Loss = Callable[[Tensor, Tensor], Tensor]
Schedule = Literal["auto", "batched", "split"]

JOINED_BYTES = 64 * 2**20
"""On a CPU, batches are not joined where their activations would exceed this together: caches are smaller, and what
a step frees at its end is handed back to the system and faulted in anew by the next. Measured, joined over apart:
0.90 to 0.95 of the time up to 50 MB (DCGAN-28 at batch 64, deep MLPs, small ResNets), 0.98 to 1.02 from 50 to 75 MB,
1.09 to 1.14 from 95 MB on (text, wide convolutions)."""


@dataclass(frozen=True)
class Objective:
    """What a plan computes.

    Attributes:
        loss: ``(real_scores, fake_scores) -> 0-dim``; None for the penalty alone.
        weight: The penalty's factor; None for the loss alone.
        target: The norm that costs nothing.
        one_sided: Whether only norms above it cost.
        at: "real", "fake" or "both" for the penalty on the samples themselves; "interpolates" for points mixed from
            them by α; "given" for points that are passed in.
        group_size: Samples that share one norm.
    """

    loss: Loss | None = None
    weight: float | None = 10.0
    target: float = 1.0
    one_sided: bool = False
    at: Literal["interpolates", "real", "fake", "both", "given"] = "interpolates"
    group_size: int = 1

    def parts(self) -> list[str]:
        """The batches that go through the critic, in the order of a plain implementation."""
        losses = ["real", "fake"] if self.loss else []
        return losses + [f"{name} points" for name in self.points()]

    @property
    def norm_options(self) -> dict[str, Any]:
        """What of it says how a gradient's norm is penalised, as keyword arguments."""
        return {name: getattr(self, name) for name in ("weight", "target", "one_sided", "group_size")}

    def form(self) -> "Objective":
        """The same with the numbers left out that a plan takes at every step."""
        return self if self.weight is None else replace(self, weight=1.0, target=0.0)

    def points(self) -> list[str]:
        """The batches at which the gradient is penalised."""
        if self.weight is None:
            return []
        return {"real": ["real"], "fake": ["fake"], "both": ["real", "fake"]}.get(self.at, ["mixed"])


class StepOutput(NamedTuple):
    """Figures of one step, 0-dim tensors (None where the objective has no such part), and the gradients."""

    loss: Tensor | None
    penalty: Tensor | None
    real_score: Tensor | None
    fake_score: Tensor | None
    gradient_norm: Tensor | None
    gradients: list[Tensor | None]


class RefusedError(Exception):
    """What a user did wrong was found while planning; carries the error to raise."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Plan:
    """The flat graph of one objective for one batch shape.

    Args:
        captured: The critic.
        objective: What to compute, with any weight and target.
        inputs: The inputs of the captured graph, or what looks like them.
        schedule: "batched" joins the batches where samples are proven apart, "split" runs them one by one, "auto"
            joins them unless, on a CPU, the activations would exceed ``JOINED_BYTES``.
        in_place: Whether the graph overwrites what it no longer needs; a compiler prefers that it does not.

    Raises:
        CaptureError: The critic cannot be planned; the message says where and why.
        TypeError: The critic does not return floating-point scores, or the loss no tensor.
        ValueError: The critic does not return one score per sample, or its scores do not depend on its input.

    Attributes:
        graph: The ``GraphModule``; ``plan.graph.code`` is what runs.
        compiled: Runs in the graph's place; None until something is put there.
        runs: How often it has been run.
        schedule: "batched" or "split".
        trainable: Which inputs the gradients belong to, in their order.
        coupled: Why samples are not proven apart; None where they are.
        curved: Operators whose curvature the step carries.
        linear: The other operators between the points and the scores.
    """

    def __init__(
        self,
        captured: Captured,
        objective: Objective,
        inputs: Sequence[Any],
        *,
        schedule: Schedule = "auto",
        in_place: bool = True,
    ) -> None:
        self.captured, self.objective, self.in_place = captured, objective, in_place
        self.device = inputs[captured.inputs.index(captured.x)].device.type
        self._autocast_enabled = torch.is_autocast_enabled(self.device)
        self._autocast_dtype = torch.get_autocast_dtype(self.device)
        self.trainable = [captured.inputs.index(node) for node in captured.trainable]
        self._live = [
            i for i, node in enumerate(captured.inputs) if node is not captured.x and isinstance(inputs[i], Tensor)
        ]
        mode = FakeTensorMode()
        self._stand_ins = {
            node: mode.from_tensor(value.detach(), static_shapes=True) if isinstance(value, Tensor) else value
            for node, value in [*zip(captured.inputs, inputs), *captured.constants.items()]
        }
        self.roles = Roles.of(captured)
        if captured.scores not in self.roles.varying:
            raise unconnected()
        self.coupled: str | None = None
        self.dims: Dims = {}
        self._numbers: dict[fx.Node, Any] = {}
        self.curved: set[str] = set()
        self.linear: set[str] = set()
        self.compiled: Callable[..., Any] | None = None
        self.runs = 0
        try:
            self._prove()
            self.schedule = self._arrange(schedule)
            self.graph = self._record(dict(zip(captured.inputs, inputs)))
        except RefusedError as refused:
            raise refused.error from None
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(f"the step cannot be recorded{raised_at(error)}: {first_line(error)}") from error

    def _prove(self) -> None:
        """Run the critic on stand-ins of one and of two batches to see which dimensions grow."""
        small, calls = self._rehearse(1)
        try:
            check_scores(small[self.captured.scores], small[self.captured.x], self.objective.group_size)
        except (TypeError, ValueError) as error:
            raise RefusedError(error) from None
        activations = [small[node] for node in self.captured.calls() if node in self.roles.sampled]
        storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in activations if isinstance(x, Tensor)}
        self._activation_bytes = sum(storage.nbytes() for storage in storages.values())
        self._numbers = number_values(small)
        if not self.captured.dynamic:
            self.coupled = "the batch size is fixed in the captured graph"
            return
        try:
            large, _ = self._rehearse(2)
            self.dims = batch_dims(self.captured, calls, small, large)
        except (CoupledError, CaptureError) as error:
            self.coupled = str(error)
        except Exception as error:
            self.coupled = f"the proof does not follow the graph: {first_line(error)}"

    def _arrange(self, schedule: Schedule) -> Literal["batched", "split"]:
        if self.coupled or schedule == "split":
            return "split"
        # By size and never by a stopwatch, so that runs can be repeated bit for bit.
        losses = ["real", "fake"] if self.objective.loss else []
        joined = len({*losses, *self.objective.points()})
        large = self.device == "cpu" and joined * self._activation_bytes > JOINED_BYTES
        return "split" if schedule == "auto" and large else "batched"

    def _rehearse(self, copies: int) -> tuple[dict[fx.Node, Any], dict[fx.Node, Any]]:
        run = Run(self.captured)
        run.values.update(self._stand_ins)
        mode = self._stand_ins[self.captured.x].fake_mode
        with mode, torch.no_grad(), self.autocast():
            for node in self.captured.sampled:
                run.values[node] = torch.cat([run.values[node]] * copies)
            run.evaluate(self.captured.calls(), self.roles.sampled)
        return run.values, run.calls

    @property
    def autocasts(self) -> bool:
        """Whether autocast was on when the plan was made."""
        return self._autocast_enabled

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast as it was when the plan was made."""
        return torch.autocast(self.device, dtype=self._autocast_dtype, enabled=self._autocast_enabled)

    def _record(self, examples: Mapping[fx.Node, Any]) -> fx.GraphModule:
        recorder = self.recorder = Recorder()
        objective = self.objective
        given = {
            node: recorder.input(node.name, value.detach()) if isinstance(value, Tensor) else value
            for node, value in examples.items()
            if node is not self.captured.x
        }
        example = examples[self.captured.x].detach()
        self.inputs = _input_names(objective)
        self.layout: dict[str, tuple[torch.Size, tuple[int, ...]]] = {}
        batches: dict[str, Tensor] = {}
        for name in self.inputs:
            like = example
            if name == "alpha":
                dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
                like = torch.empty(example.shape[0], dtype=dtype, device=example.device)
            batches[name] = recorder.input(name, like)
            self.layout[name] = (like.shape, like.stride())
        numbers = recorder.numbers("weight", "target") if objective.points() else {}
        constants = {node: recorder.constant(node.name, value) for node, value in self.captured.constants.items()}
        with recorder.fake, recorder, torch.no_grad():
            base = Run(self.captured, recorder.labelled)
            base.values.update(given | constants)
            shared = [node for node in self.captured.calls() if node not in self.roles.sampled]
            with self.autocast():
                base.evaluate([n for n in shared if not _counts(n)], self.roles.sampled)
            self._counters = [node for node in shared if _counts(node)]
            if "alpha" in batches:
                with recorder.labelled("interpolates"), torch.autocast(self.device, enabled=False):
                    batches["points"] = _mix(batches["real"], batches["fake"], batches["alpha"])
            outputs = _Step(self, base, batches).record()
        recorder.output(outputs)
        if numbers:
            _read_numbers(recorder.graph, **numbers)
        graph = finish(recorder)
        if self.in_place:
            save_memory(graph.graph)
        graph.graph.lint()
        graph.recompile()
        return graph

    def run(
        self, inputs: Sequence[Any], batches: Mapping[str, Tensor], weight: float | None, target: float
    ) -> StepOutput:
        """Run the graph.

        Args:
            inputs: The inputs of the captured graph.
            batches: What the objective takes of ``real``, ``fake``, ``alpha`` ``[N]`` and ``points`` by name.
            weight: The penalty's factor; None without a penalty.
            target: The norm that costs nothing.
        """
        self.runs += 1
        tensors: list[Any] = [inputs[i] for i in self._live]
        tensors += [_laid_out(batches[name].detach(), like) for name, like in self.layout.items()]
        if weight is not None:
            tensors += [weight, target]
        on = torch.is_autocast_enabled(self.device)
        with torch.no_grad(), torch.autocast(self.device, enabled=False) if on else nullcontext():
            return StepOutput(*(self.compiled or self._run_eagerly)(*tensors))

    def _run_eagerly(self, *tensors: Any) -> Any:
        # Nothing here is differentiated: passing every operator on through autograd, and the graph through what a
        # module's call looks for, costs a tenth of a small step.
        with torch._C._AutoDispatchBelowAutograd():
            return self.graph.forward(*tensors)

    def units(self, flops: int | None = None) -> float:
        """Return FLOPs, by default those of the step, in critic forwards over one batch."""
        with Counter(self._stand_ins[self.captured.x].fake_mode) as forward:
            self._rehearse(1)
        return float((self.flops() if flops is None else flops) / max(forward.cost.flops, 1))

    def flops(self) -> int:
        """Matmul and convolution FLOPs of the step."""
        counted = 0
        for node in self.graph.graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: source.meta.get("val"))
            counted += flops_of(node.target, args, kwargs, node.meta.get("val"))
        return counted

    @property
    def draws(self) -> bool:
        """Whether the step draws random numbers."""
        tags = [getattr(node.target, "tags", ()) for node in self.captured.calls()]
        return any(torch.Tag.nondeterministic_seeded in tag for tag in tags)

    def launches(self) -> int:
        """Operators of the graph that are not views."""
        return sum(node.op == "call_function" and not is_view(node.target) for node in self.graph.graph.nodes)

    @property
    def code(self) -> str:
        """The flat graph as Python."""
        return self.graph.code


def _counts(node: fx.Node) -> bool:
    """Whether a node counts batches, which the plain implementation does once per batch."""
    schema = getattr(node.target, "_schema", None)
    value = node.meta.get("val")
    return bool(schema and schema.is_mutable and isinstance(value, Tensor) and not value.is_floating_point())


def _input_names(objective: Objective) -> list[str]:
    names = ["real", "fake"] if objective.loss or objective.at in ("interpolates", "both") else []
    if objective.weight is None:
        return names
    if objective.at == "interpolates":
        return [*names, "alpha"]
    if objective.at == "given":
        return [*names, "points"]
    return names or [objective.at]


def _mix(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    alpha = alpha.reshape(-1, *[1] * (real.dim() - 1))
    if alpha.dtype == real.dtype:
        return torch.lerp(fake, real, alpha)
    return torch.lerp(fake.to(alpha.dtype), real.to(alpha.dtype), alpha).to(real.dtype)


class _Step:
    """Lays the batches out in blocks and runs the four passes over each."""

    def __init__(self, plan: Plan, base: Run, batches: Mapping[str, Tensor]) -> None:
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
        shares = bool(losses) and on_samples and not self.plan.coupled
        if shares:
            losses = [name for name in losses if name not in points]
        self.total = {"real": "real", "fake": "fake", "mixed": "points"}
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
            joined = [self.batches[self.total[name]] for name in names]
            run.values[self.captured.x] = torch.cat(joined) if len(joined) > 1 else joined[0]
            for node in self.captured.sampled - {self.captured.x}:
                value = self.base.values[node]
                run.values[node] = torch.cat([value] * len(names)) if len(names) > 1 else value
        with self.plan.autocast():
            run.evaluate(self.plan._counters, self.roles.sampled)
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
            scores = dict(zip(names, parts)) | scores
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
        points = Rows(run, dims, len(lead), total, total, plan._numbers) if trail else None
        if points is not None and len(trail) != 1 and total == len(trail):
            points = Rows(run, dims, 0, total, total, number_values(run.values))
        loss: Run | None = None
        if lead:
            loss = Rows(run, dims, 0, len(lead), total, plan._numbers) if trail else run
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


def _read_numbers(graph: fx.Graph, weight: fx.Node, target: fx.Node) -> None:
    """Have the penalty's operator take its weight and target from the graph's inputs."""
    for node in graph.nodes:
        if node.target is torch.ops.wgan_fast.gradient_norm_penalty.default:
            gradient, parts, _, *others = node.args
            scaled: Any = weight
            if parts != 1:
                with graph.inserting_before(node):
                    scaled = graph.call_function(operator.mul, (weight, parts))
                    scaled.meta.update(val=1.0, segment=node.meta["segment"])
            node.args = (gradient, scaled, target, *others)


def _laid_out(tensor: Tensor, like: tuple[torch.Size, tuple[int, ...]]) -> Tensor:
    """Give a batch the strides that it was planned with."""
    shape, stride = like
    if tensor.stride() == stride or tensor.shape != shape:
        return tensor
    return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
