"""Plans: a critic and the shapes of one batch, turned into a flat graph that is run at every step."""

import operator
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..checks import check_scores, unconnected
from ..precision import accumulation_dtype
from .blocks import Blocks
from .capture import Captured, CaptureError, first_line, raised_at
from .counting import Cost, Counter
from .flat import FlatStep, Layout
from .independence import CoupledError, Dims, batch_dims, opaque
from .objective import Objective, RefusedError, Schedule
from .optimize import assemble, cast_together, cut, finish, leave_uncast, pad_channels, pads_channels, save_memory
from .passes import AffinePrefix, Roles, Run, affine_prefix, number_values
from .program import Program, program_of
from .record import Recorder

JOINED_BYTES = 64 * 2**20
"""On a CPU, batches are not joined where their activations would exceed this together: caches are smaller, and what
a step frees at its end is handed back to the system and faulted in anew by the next. Measured, joined over apart:
0.90 to 0.95 of the time up to 50 MB (DCGAN-28 at batch 64, deep MLPs, small ResNets), 0.98 to 1.02 from 50 to 75 MB,
1.09 to 1.14 from 95 MB on (text, wide convolutions)."""
WORTH_MIXING = 0.05
"""Share of a forward's FLOPs in its affine start from which on the interpolates are mixed behind that."""


class Plan(FlatStep):
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
        ValueError: The critic does not return a row of scores per sample, or its scores do not depend on its input.

    Attributes:
        pieces: As ``FlatStep``; ``plan.code`` is what runs.
        schedule: "batched" or "split".
        trainable: Which inputs the gradients belong to, in their order; those of the fake batch's own further
            arguments come after them.
        scales: Whether what the points give back to the one score of each scales what was pulled back from it.
        differentiable: The outputs of which an outside loss is to have a derivative.
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
        self.own_arguments = [n for n in captured.sampled if n in captured.trainable] if objective.own_arguments else []
        self._autocast_enabled = torch.is_autocast_enabled(self.device)
        self._autocast_dtype = torch.get_autocast_dtype(self.device)
        self.trainable = [captured.inputs.index(node) for node in captured.trainable]
        mode = FakeTensorMode()
        self._stand_ins = {
            node: mode.from_tensor(value.detach(), static_shapes=True) if isinstance(value, Tensor) else value
            for node, value in [*zip(captured.inputs, inputs), *captured.constants.items()]
        }
        self.roles = Roles.of(captured)
        if not self.roles.varying.intersection(captured.picked(0)):
            raise unconnected()
        self.differentiable = [node for node in captured.picked(-1) if node in self.roles.learned]
        self.coupled: str | None = None
        self.dims: Dims = {}
        self.numbers: dict[fx.Node, Any] = {}
        self.curved: set[str] = set()
        self.linear: set[str] = set()
        try:
            self._prove()
            self.prefix = self._affine_prefix()
            self.scales = self.one_score and not self.coupled
            self.schedule = self._arrange(schedule)
            pieces, programs, layout = self._record(dict(zip(captured.inputs, inputs)))
        except RefusedError as refused:
            raise refused.error from None
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(f"the step cannot be recorded{raised_at(error)}: {first_line(error)}") from error
        super().__init__(pieces, programs, self._live(inputs), layout, self.device)

    def _live(self, inputs: Sequence[Any]) -> list[int]:
        """Return which inputs of the captured graph are read as they are."""
        samples = set(self._apart())
        tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        return [i for i in tensors if self.captured.inputs[i] not in samples]

    def _apart(self, name: str | None = None) -> list[fx.Node]:
        """Return the inputs that a batch brings itself: its samples, and its own further arguments."""
        own = self.objective.own_arguments and name == "fake"
        return [node for node, i in self.captured.sampled.items() if own or i < self.captured.leaves]

    def _prove(self) -> None:
        """Run the critic on stand-ins of one and of two batches to see which dimensions grow."""
        small, calls = self._rehearse(1)
        try:
            scores = [
                check_scores(
                    small[node],
                    small[self.captured.x],
                    self.objective.group_size,
                    rows=not self.objective.outside_penalty,
                )
                for node in self.captured.picked(0)
            ]
        except (TypeError, ValueError) as error:
            raise RefusedError(error) from None
        self.one_score = len(scores) == 1 and scores[0].dim() > 0 and scores[0].numel() == scores[0].shape[0]
        activations = [small[node] for node in self.captured.calls() if node in self.roles.sampled]
        storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in activations if isinstance(x, Tensor)}
        self._activation_bytes = sum(storage.nbytes() for storage in storages.values())
        self.numbers = number_values(small)
        groups = small[self.captured.x].shape[0] // self.objective.group_size
        if any(part.dim() == 0 or part.shape[0] != groups for part in scores):
            self.coupled = "scores are not in rows of samples"
            return
        if not self.captured.dynamic:
            self.coupled = "the batch size is fixed in the captured graph"
            return
        self.coupled = opaque(self.captured)
        if self.coupled:
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
        joined = len(self.objective.inputs())
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

    def _affine_prefix(self) -> AffinePrefix | None:
        """Find the affine start of the critic, where the interpolates are cheaper to mix behind it than before it."""
        if self.coupled or self.objective.at != "mixed":
            return None
        prefix = affine_prefix(self.captured, self.roles, self.dims)
        run = Run(self.captured)
        run.values.update(self._stand_ins)
        mode = self._stand_ins[self.captured.x].fake_mode
        with mode, torch.no_grad(), self.autocast(), Counter(mode) as counter:
            run.evaluate([n for n in self.captured.calls() if n not in self.roles.sampled], self.roles.sampled)
            before = counter.cost.flops
            run.evaluate(prefix.nodes, self.roles.sampled)
            saved = counter.cost.flops - before
            run.evaluate([n for n in self.captured.calls() if n not in run.values], self.roles.sampled)
            forward = counter.cost.flops - before
        mixing = Cost(0, len(prefix.ends), sum(3 * run.values[node].nbytes for node in prefix.ends))
        worth = saved > WORTH_MIXING * forward and Cost(saved, 0, 0).seconds() > 2 * mixing.seconds()
        return prefix if worth else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast as it was when the plan was made."""
        return torch.autocast(self.device, dtype=self._autocast_dtype, enabled=self._autocast_enabled)

    def _record(self, examples: Mapping[fx.Node, Any]) -> tuple[list[fx.GraphModule], list[Program | str], Layout]:
        recorder = self.recorder = Recorder()
        objective = self.objective
        apart = set(self._apart())
        given = {
            node: recorder.input(node.name, value.detach()) if isinstance(value, Tensor) else value
            for node, value in examples.items()
            if node not in apart
        }
        layout: Layout = []
        batches: dict[str, dict[fx.Node, Tensor]] = {}
        for name in objective.inputs():
            batches[name] = {node: given[node] for node in self.captured.sampled if node not in apart}
            if name == "points" and objective.at == "mixed":
                continue
            for node in self._apart(name):
                example, position = examples[node].detach(), self.captured.sampled[node]
                label = name if node is self.captured.x else f"{name}_{node.name}"
                batches[name][node] = recorder.input(label, example)
                layout.append((name, position, example.shape, example.stride()))
        alpha = None
        if objective.at == "mixed":
            x = batches["real"][self.captured.x]
            alpha = torch.empty(x.shape[0] // objective.group_size, dtype=accumulation_dtype(x.dtype), device=x.device)
            layout.append(("alpha", 0, alpha.shape, alpha.stride()))
            alpha = recorder.input("alpha", alpha)
        penalised = objective.points() and not objective.outside_penalty
        numbers = recorder.numbers("weight", "target") if penalised else {}
        constants = {node: recorder.constant(node.name, value) for node, value in self.captured.constants.items()}
        with recorder.fake, recorder, torch.no_grad():
            base = Run(self.captured, recorder.labelled)
            base.values.update(given | constants)
            shared = [node for node in self.captured.calls() if node not in self.roles.sampled]
            with self.autocast():
                base.evaluate([n for n in shared if not _counts(n)], self.roles.sampled)
            self.counters = [node for node in shared if _counts(node)]
            outputs = Blocks(self, base, batches, alpha).record()
        recorder.output(outputs)
        if numbers:
            _read_numbers(recorder.graph, **numbers)
        pieces = cut(finish(recorder), 1 + recorder.piece)
        programs = [program_of(piece, leaves=i < recorder.piece) for i, piece in enumerate(pieces)]
        for piece in pieces:
            if self.in_place:  # a compiler does this by itself
                assemble(piece.graph)
                leave_uncast(piece.graph)
                cast_together(piece.graph)
                save_memory(piece.graph)
                if pads_channels():
                    pad_channels(piece.graph)
            piece.graph.lint()
            piece.recompile()
        return pieces, programs, layout

    def units(self, flops: int | None = None) -> float:
        """Return FLOPs, by default those of the step, in critic forwards over one batch."""
        with Counter(self._stand_ins[self.captured.x].fake_mode) as forward:
            self._rehearse(1)
        return float((self.flops() if flops is None else flops) / max(forward.cost.flops, 1))

    @property
    def draws(self) -> bool:
        """Whether the step draws random numbers."""
        tags = [getattr(node.target, "tags", ()) for node in self.captured.calls()]
        return any(torch.Tag.nondeterministic_seeded in tag for tag in tags)


def _counts(node: fx.Node) -> bool:
    """Whether a node counts batches, which the plain implementation does once per batch."""
    schema = getattr(node.target, "_schema", None)
    value = node.meta.get("val")
    return bool(schema and schema.is_mutable and isinstance(value, Tensor) and not value.is_floating_point())


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
