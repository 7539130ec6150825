"""Asks Dynamo, at every call, what a critic's forward depends on.

``torch.compile`` with a backend of our own traces a forward into one graph of tensor functions. Every tensor that the
forward reads, wherever it lives, is an input of that graph; everything else that it reads is guarded; what it changes
is changed again at every call. Here the graph is never run: the backend's callable receives the live tensors of a call,
and whoever asked computes with those.
"""

import copy
import itertools
import logging
import operator
import os
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as modules
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_structure

from ..checks import WHOLE, Score, check_scores, picked, unconnected
from ..four_pass.capture import Captured, CaptureError, first_line, lower, raised_at, where
from .functions import noted, unguarded

MOST_IN_A_ROW = 3
"""Calls of one critic that are traced one after the other, before it is left to autograd."""


Picks = tuple[Score | types.EllipsisType, ...]


class Look(NamedTuple):
    """What a call of the forward depends on.

    Attributes:
        traced: The form that it takes.
        inputs: The live inputs of that form's graph, in order.
        fresh: Whether it had to be traced.
    """

    traced: "Traced"
    inputs: tuple[Any, ...]
    fresh: bool


class _StoppedError(Exception):
    """Ends a call before anything that the forward changes has been changed."""


class _StaleError(Exception):
    """What the forward reads without a guard has changed: what a class holds, say."""


def _never(traced: "Traced", inputs: tuple[Any, ...]) -> bool:
    return False


class _Pending(threading.local):
    """The call that this thread is about to make."""

    call: tuple[Any, ...] = ()
    ready: Callable[["Traced", tuple[Any, ...]], bool]
    traced: "Traced | None" = None
    inputs: tuple[Any, ...] = ()
    fresh: bool = False
    quiet: int = 0


_pending = _Pending()
_numbers = itertools.count()


def _picked(*picks: Any) -> tuple[Tensor, ...]:
    """Mark what is made of the critic's output, in the graph."""
    return tuple(leaf for leaf in tree_leaves(picks) if isinstance(leaf, Tensor))


def _forward(critic: Any, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], picks: Picks, nest: str) -> Any:
    """Call the critic; the only function that is traced."""
    assert nest is not None  # read, and so guarded: Dynamo does not guard the order of a dictionary's keys
    if not torch.compiler.is_compiling():
        raise CaptureError("torch.compile is switched off here")
    output = critic(x, *args, **kwargs)
    return _picked(*[picked(output, pick) for pick in picks])


_ARGUMENTS = _forward.__code__.co_varnames[: _forward.__code__.co_argcount]
"""By whose names the guards ask for them."""


class Called(NamedTuple):
    """A critic, and what it is called with.

    Attributes:
        critic: The critic.
        x: Samples: a tensor ``[N, *D]``, or a nest of such.
        args: Further positional arguments.
        kwargs: Keyword arguments.
        picks: What is made of its output: first, of what the gradient is taken.
        own: Further arguments of the fake batch, where it has its own.
    """

    critic: Callable[..., Any]
    x: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    picks: Picks = (None,)
    own: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None

    @property
    def first(self) -> Tensor:
        """The first tensor of the samples."""
        return self.x if isinstance(self.x, Tensor) else tree_leaves(self.x)[0]

    def further(self, batch: str) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Return the further arguments of a batch."""
        return self.own if self.own is not None and batch == "fake" else (self.args, self.kwargs)

    def own_leaves(self) -> list[Any]:
        """Return the leaves of the fake batch's own further arguments.

        Raises:
            CaptureError: They are not of the form of the others: then its forward may be another one.
        """
        if self.own is None:
            return []
        (ours, nest), (theirs, other) = (
            tree_flatten((args, dict(kwargs))) for args, kwargs in map(self.further, ("real", "fake"))
        )
        if nest != other or not all(map(partial(_same_form, self.first), ours, theirs)):
            raise CaptureError(
                "the further arguments of real and fake differ in more than the values of tensors with a row per sample"
            )
        return theirs


class GuardedCall:
    """Calls of critics of one class, traced once for every form that their forwards take.

    Holds no critic: a graph serves every critic for which its guards hold.
    """

    def __init__(self) -> None:
        self.traces = 0
        self._begin()

    def _begin(self) -> None:
        # Inner functions would be traced: they are marked when the first critic is.
        torch.compiler.allow_in_graph(_picked)  # type: ignore[no-untyped-call]
        # Dynamo counts its traces per code object, and remembers which numbers changed by the code's name.
        self._code = _forward.__code__.replace(co_name=f"_forward_{next(_numbers)}")
        function = types.FunctionType(self._code, _forward.__globals__, _forward.__name__)
        self._functions: dict[int, types.FunctionType] = {}
        self._call = torch.compile(function, backend=self._trace, fullgraph=True)

    def serves(self, called: Called) -> bool:
        """Whether a critic that was never looked at takes a form that another one did."""
        call = _arguments(called, differentiable=True)
        try:
            with torch.enable_grad():
                return self._matching(call) is not None
        except Exception:
            return False

    def look(
        self,
        called: Called,
        ready: Callable[["Traced", tuple[Any, ...]], bool],
        differentiable: bool = True,
    ) -> Look:
        """Find out what a call depends on.

        Args:
            called: The critic and what it is called with.
            ready: Whether what the forward changes, besides tensors in place, is to be changed now.
            differentiable: Whether the samples require a gradient.

        Raises:
            CaptureError: It cannot be told.
            ValueError: The scores do not depend on the samples.
            TypeError: The critic does not return a tensor.
        """
        if any(_GLOBAL_HOOKS) and not all(map(_only_watches, itertools.chain(*map(dict.values, _GLOBAL_HOOKS)))):
            raise CaptureError("hooks of all modules are registered")
        call = _arguments(called, differentiable)
        pending = _pending
        pending.call, pending.ready, pending.traced, pending.fresh = call, ready, None, False
        try:
            watched = torch._C._len_torch_dispatch_stack()
            # A context costs more than to ask whether it is needed.
            if torch.is_grad_enabled() and not watched:
                self._run(call)
            else:
                with torch.enable_grad(), _without_modes() if watched else nullcontext():
                    self._run(call)
        except _StoppedError:
            pass
        except _StaleError:
            if pending.fresh:
                raise CaptureError("what it reads changes while it is traced") from None
            self._begin()
            return self.look(called, ready, differentiable)
        except CaptureError:
            raise
        except Exception as error:
            if type(error).__name__ == "FailOnRecompileLimitHit":
                raise CaptureError(
                    f"its forward has taken {self.traces} forms: what it reads, a number or an object, keeps changing"
                ) from error
            raise CaptureError(
                f"torch.compile could not capture the critic{_at(error)}: {first_line(error)[:300]}"
            ) from error
        finally:
            traced, inputs, fresh = pending.traced, pending.inputs, pending.fresh
            # Nothing of the critic may outlive the look, through what is asked of it either.
            pending.call, pending.inputs, pending.traced = (), (), None
            pending.ready = _never
        if traced is None:
            raise CaptureError("torch.compile did not trace the critic")
        if traced.error is not None:
            raise traced.error
        return Look(traced, inputs, fresh)

    def _run(self, call: tuple[Any, ...]) -> None:
        if self.traces == 0:
            with _FIRST:
                self._compile(call)
            return
        code = self._matching(call)
        if code is None:
            self._compile(call)
            return
        # What torch.compile would do now, without asking whether it is to.
        function = self._functions.get(id(code))
        if function is None:
            function = self._functions[id(code)] = types.FunctionType(code, _forward.__globals__)
        function(*call)

    def _compile(self, call: tuple[Any, ...]) -> None:
        with hushed(), _without_statistics(), noted(), torch._dynamo.config.patch(_NO_SHORTCUTS):
            try:
                self._call(*call)
            except Exception as error:
                if "RNN" not in str(error):
                    raise
                # Dynamo is told apart: it traces recurrent layers only where it is asked to.
                with torch._dynamo.config.patch(allow_rnn=True):
                    self._call(*call)

    def _matching(self, call: tuple[Any, ...]) -> types.CodeType | None:
        """Return the code of the form whose guards hold for a call; None where there is none."""
        given = dict(zip(_ARGUMENTS, call))
        for entry in torch._C._dynamo.eval_frame._debug_get_cache_entry_list(self._code):
            if entry.guard_manager.check(given):
                return entry.code
        return None

    def _trace(self, graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        """Serve as the backend of ``torch.compile``."""
        self.traces += 1
        _pending.fresh = True
        return Traced(graph, examples)


@dataclass
class Plans:
    """What was made of one form.

    Attributes:
        made: By the engine's options, and by whatever may change without a new trace.
        runs: The steps that were run with them.
    """

    made: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    runs: int = 0


class Traced:
    """One form of a forward.

    Attributes:
        graph: Tensor functions, as Dynamo wrote them down.
        error: Why it cannot run in four passes, or what is wrong with it.
        repeats: Whether the forward changes what is not a tensor (counts its calls, say), which is done once a batch.
        asks: Whether the forward may ask if its input requires a gradient.
        plans: What was made of it.
    """

    def __init__(self, graph: fx.GraphModule, examples: list[Any]) -> None:
        self.graph = graph
        self.error: Exception | None = None
        self.plans = Plans()
        self._changing: list[int] = []
        self._numbers: list[int] | None = None
        self._lower: partial[Captured]
        self._captured: dict[Any, Captured] = {}
        self._methods: list[tuple[Any, str, Any]] = []
        self._values: list[tuple[types.CodeType, Any]] = []
        self._shared: fx.GraphModule | None = None
        self._outputs: list[int | None] = []
        self._crossing = 0
        self._crossed: list[Tensor] = []
        try:
            codes = torch._dynamo.utils.get_traced_code() or []
            own = [code for code in codes if _is_users(code)]
            if any({"__dict__", "vars"} & {*code.co_names, *map(str, code.co_consts)} for code in own):
                # Dynamo does not guard what is not in there.
                raise CaptureError("its forward reads an object's __dict__")
            self.asks = any("requires_grad" in (*code.co_names, *code.co_consts) for code in codes)
            output = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output
            _guard_more(output)
            classes = _classes(_pending.call[0], output)
            self._methods = [*_methods(classes, set(codes)), *_attributes(classes, codes), *unguarded(graph)]
            self._values = list(_loosely_guarded(output))
            if output.random_calls:
                raise CaptureError("the critic draws Python's random numbers")
            self.repeats = any(map(_repeats, _modified(output.side_effects)))
            self._read(graph, examples)
        except (CaptureError, TypeError, ValueError) as error:
            self.error = error
        except Exception as error:
            self.error = CaptureError(f"the critic cannot be lowered{raised_at(error)}: {first_line(error)}")
            self.error.__cause__ = error
        finally:
            _let_go(graph)

    def __call__(self, *inputs: Any) -> Any:
        """Receive the live inputs, in place of the graph."""
        pending = _pending
        if not all([getattr(owner, name, None) is method for owner, name, method in self._methods]):
            raise _StaleError
        if self._values and not all(_is_still(value, eval(code, _scope())) for code, value in self._values):
            raise _StaleError
        pending.traced, pending.inputs = self, inputs
        if self.error is not None or not pending.ready(self, inputs):
            pending.inputs += self._examples() if self._shared is not None and self.error is None else ()
            raise _StoppedError
        if self._shared is None:
            return [None if i is None else inputs[i] for i in self._outputs]
        made = self._shared(*inputs)
        pending.inputs += made[: self._crossing]
        every = (*inputs, *made)
        return [None if i is None else every[i] for i in self._outputs]

    def key(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what may differ from call to call of this form besides the values of tensors: sizes and numbers."""
        values = [inputs[i] for i in self._changing]
        numbers = [inputs[i].item() for i in self._numbers or ()]
        return (*[value.shape if isinstance(value, Tensor) else value for value in values], *numbers)

    def _read(self, graph: fx.GraphModule, examples: list[Any]) -> None:
        nodes = list(graph.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        mark = next((node for node in nodes if node.target is _picked), None)
        if mark is None:
            raise CaptureError("the critic returns no tensor that it computed")
        marked = {mark, *[node for node in mark.users if node.target is operator.getitem]}
        picks = tuple(map(_plain_nest, mark.args))
        samples, leaves = tree_leaves(_pending.call[1]), tree_leaves(_pending.call[1:4])
        given = {id(leaf): i for i, leaf in enumerate(leaves) if i < len(samples) or _has_rows(leaf, samples[0])}
        sampled = {n: given[id(example)] for n, example in zip(inputs, examples) if id(example) in given}
        self._changing = [i for i, node in enumerate(inputs) if _is_symbolic(node.meta["example_value"])]
        x = [node for node, i in sampled.items() if i < len(samples) and samples[i].is_floating_point()]
        scores = tree_map(lambda leaf: leaf.meta["example_value"] if isinstance(leaf, fx.Node) else leaf, picks)
        for part, pick in zip(scores, _pending.call[4]):
            if pick is not WHOLE:
                for each in part if isinstance(part, list) and pick is not None else [part]:
                    check_scores(each, samples[0], rows=False)
        for part, pick in zip(picks, _pending.call[4]):
            if pick is not WHOLE and len(tree_leaves(part)) > len(set(tree_leaves(part))):
                raise CaptureError("one of its scores is listed twice")
        if not x:
            raise unconnected()
        numbers = [node for node in inputs if getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)]
        for node in nodes:
            if _draws_numpy(node):
                raise CaptureError(f"{where(node)} draws NumPy's random numbers")
        outputs: Any = graph.graph.output_node().args[0]
        kept = [node for node in outputs if node not in marked]
        sources = [_written_input(node) for node in kept]
        lowered, extra = graph, list[fx.Node]()
        if any(source is None for source in sources):
            lowered, extra = self._separate(graph, mark, [*sampled], [n for n, s in zip(kept, sources) if s is None])
            by_name = {node.name: node for node in lowered.graph.nodes}
            picks = tree_map(lambda leaf: by_name[leaf.name] if isinstance(leaf, fx.Node) else leaf, picks)
            x, numbers = ([by_name[node.name] for node in some] for some in (x, numbers))
            sampled = {by_name[node.name]: i for node, i in sampled.items()}
        positions = {node.name: i for i, node in enumerate([*inputs, *extra])}
        self._outputs = [None if n in marked else positions[(_written_input(n) or n).name] for n in outputs]
        self._lower = partial(lower, lowered, picks, x, sampled, len(samples))
        try:
            self._captured[()] = self._lower(dict.fromkeys(numbers))
        except Exception:
            if not numbers:
                raise
            # Some operator takes a number and no tensor: each value has a graph of its own.
            self._numbers = [positions[node.name] for node in numbers]
            self.captured(examples)

    def captured(self, inputs: Sequence[Any]) -> Captured:
        """Return the form as ATen operators.

        Args:
            inputs: Its live inputs.
        """
        if self._numbers is None:
            return self._captured[()]
        values = tuple(inputs[i].item() for i in self._numbers)
        if values not in self._captured:
            placeholders = [node for node in self._lower.args[0].graph.nodes if node.op == "placeholder"]
            self._captured[values] = self._lower({placeholders[i]: v for i, v in zip(self._numbers, values)})
        return self._captured[values]

    def _separate(
        self, graph: fx.GraphModule, mark: fx.Node, sampled: list[fx.Node], kept: list[fx.Node]
    ) -> tuple[fx.GraphModule, list[fx.Node]]:
        """Take out what no sample enters, where the forward keeps some of that: autograd is to run it.

        Old-style spectral norm, for one, leaves the weight that it computed in the module.

        Returns:
            The rest, which takes what it needs of it as further inputs, and the nodes of which these are the values,
            followed by the others that are kept.
        """
        follows = set(sampled)
        for node in graph.graph.nodes:
            if any(source in follows for source in node.all_input_nodes):
                follows.add(node)
        if not any(_is_tensor(node) for node in kept):
            # Numbers alone: they need nothing of the tensors.
            follows.update(node for node in graph.graph.nodes if _is_tensor(node) and node.op != "placeholder")
        for node in kept:
            if node in follows:
                raise CaptureError(f"its forward keeps what {where(node)} gives, which autograd must compute")
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        made = [node for node in graph.graph.nodes if node.op != "placeholder" and node not in follows]
        crossing = [
            n for n in made if isinstance(n.meta.get("example_value"), Tensor) and any(u in follows for u in n.users)
        ]
        for node in crossing:
            if _is_symbolic(node.meta["example_value"]):
                raise CaptureError(
                    f"its forward keeps tensors, and {where(node)} makes one of the batch's size beside them"
                )
        others = [node for node in kept if node not in crossing]
        shared, rest = fx.Graph(), fx.Graph()
        ours: dict[fx.Node, fx.Node] = {}
        theirs: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            ours[node], theirs[node] = shared.node_copy(node), rest.node_copy(node)
        for node in crossing:
            theirs[node] = rest.placeholder(f"s_{node.name}")
            theirs[node].meta = dict(node.meta)
        for node in graph.graph.nodes:
            if node.op in ("placeholder", "output") or node is mark or mark in node.all_input_nodes:
                continue
            if node not in follows:
                ours[node] = shared.node_copy(node, ours.__getitem__)
            # Numbers, and switches of autograd, are in both.
            number = (
                not isinstance(node.meta.get("example_value"), Tensor) and set(node.all_input_nodes) <= theirs.keys()
            )
            if node in follows or number:
                theirs[node] = rest.node_copy(node, theirs.__getitem__)
        shared.output(tuple(ours[node] for node in (*crossing, *others)))
        picked = [theirs[node] for node in mark.all_input_nodes]
        rest.output(tuple(picked))
        self._shared, self._crossing = fx.GraphModule(graph, shared), len(crossing)
        self._crossed = [node.meta["example_value"] for node in crossing]
        return fx.GraphModule(graph, rest), [*crossing, *others]

    def _examples(self) -> tuple[Tensor, ...]:
        """Return stand-ins for what the shared part would have made, without running it."""
        return tuple(
            torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
            )
            for like in self._crossed
        )


_NO_SHORTCUTS = {
    "use_recursive_dict_tags_for_guards": False,
    "skip_guards_on_constant_func_defaults": False,
    "skip_tensor_guards_with_matching_dict_tags": False,
    "allow_unspec_int_on_nn_module": True,
}
"""Guards that PyTorch 2.11 leaves out: on what a closure holds, on defaults, on whether a parameter is frozen. And a
count that a module keeps may become an input, like any other number that changes."""

_HUSHED = threading.RLock()
_FIRST = threading.RLock()
"""One thread traces a critic that was never traced: others then find what it made."""


@contextmanager
def hushed() -> Iterator[None]:
    """Keep back what PyTorch logs and warns of while it looks at a critic: an error says it where it matters."""
    with _HUSHED:
        yield from _hush()


def _hush() -> Iterator[None]:
    known = list(logging.root.manager.loggerDict.items())
    loggers = [logger for name, logger in known if name.startswith("torch") and isinstance(logger, logging.Logger)]
    for logger in loggers:
        logger.addFilter(_heard)
    _pending.quiet += 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _pending.quiet -= 1
        for logger in loggers:
            logger.removeFilter(_heard)


def _heard(record: logging.LogRecord) -> bool:
    return not _pending.quiet


@contextmanager
def _without_statistics() -> Iterator[None]:
    """Keep Dynamo from timing its guards in a flushed cache and reading source files for its log: 30 ms a trace."""
    unused = (
        (torch._dynamo.guards, "profile_guard_manager", _no_latency),
        (torch._dynamo.symbolic_convert, "get_funcname", _no_name),
    )
    known = [(module, name, stand_in) for module, name, stand_in in unused if hasattr(module, name)]
    kept = [getattr(module, name) for module, name, _ in known]
    for module, name, stand_in in known:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (module, name, _), function in zip(known, kept):
            setattr(module, name, function)


def _no_latency(*_: Any) -> float:
    return 0.0


def _no_name(*_: Any) -> None:
    return None


@contextmanager
def _without_modes() -> Iterator[None]:
    """Take off what watches this thread's operators, such as counters: with any on, Dynamo does nothing."""
    flags = torch.utils._python_dispatch
    tell = getattr(torch._C._dynamo.guards, "set_is_in_mode_without_ignore_compile_internals", lambda on: None)
    with flags._disable_current_modes():
        tell(False)
        try:
            yield
        finally:
            tell(flags.is_in_any_mode_without_ignore_compile_internals())


def _arguments(called: Called, differentiable: bool) -> tuple[Any, ...]:
    """Return the arguments of ``_forward``: rows of samples, and with them of further arguments, may be any number."""
    critic, x, args, kwargs, picks, _ = called
    if isinstance(x, Tensor):
        x = first = _sample(x, differentiable)
    else:
        x = tree_map(lambda leaf: _sample(leaf, differentiable), x)
        first = tree_leaves(x)[0]
    if args or kwargs:
        args, kwargs = tree_map_only(Tensor, lambda leaf: _alias(leaf, first), (args, dict(kwargs)))
    return critic, x, args, kwargs, picks, "" if isinstance(x, Tensor) else str(tree_structure(x))


def _sample(leaf: Tensor, differentiable: bool) -> Tensor:
    sample = leaf.detach()
    torch._dynamo.maybe_mark_dynamic(sample, 0)
    return sample.requires_grad_(differentiable) if sample.is_floating_point() else sample


def _alias(leaf: Tensor, x: Tensor) -> Tensor:
    if not _has_rows(leaf, x):
        return leaf
    alias = leaf.view_as(leaf)
    torch._dynamo.maybe_mark_dynamic(alias, 0)
    return alias


def _has_rows(leaf: Any, x: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == x.shape[0]


def _same_form(x: Tensor, ours: Any, theirs: Any) -> bool:
    """Whether one further argument may stand where another one was seen."""
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        return type(ours) is type(theirs) and bool(ours == theirs)
    alike = all(getattr(ours, name) == getattr(theirs, name) for name in ("shape", "dtype", "device", "requires_grad"))
    return alike and (ours is theirs or _has_rows(ours, x))


def _let_go(graph: fx.GraphModule) -> None:
    """Drop what a trace still knows the live tensors by: no parameter can be swapped that has weak references."""
    for node in graph.graph.nodes:
        argument, example = node.meta.get("grapharg"), node.meta.get("example_value")
        if argument is not None:
            argument.erase()
        if isinstance(example, FakeTensor):
            describer = example.fake_mode.fake_tensor_converter.meta_converter.describer
            describer.lookup_tensor.clear()


def _plain_nest(value: Any) -> Any:
    """Return a nest of nodes with Python's own lists and dictionaries, which a graph has replaced."""
    if isinstance(value, Mapping):
        return {key: _plain_nest(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain_nest(part) for part in value]
    if isinstance(value, tuple):
        parts = [_plain_nest(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)
"""Dynamo does not guard these."""


def _only_watches(hook: Any) -> bool:
    """Whether a hook is PyTorch's own, such as those that count FLOPs by module."""
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _guard_more(output: Any) -> None:
    """Have Dynamo notice what it does not by default: new keys of dictionaries, those of a module's hooks included."""
    builder = torch._dynamo.guards.GuardBuilder
    empty = [g.originating_source for g in output.guards if g.create_fn is builder.EMPTY_NN_MODULE_HOOKS_DICT]
    variables = list(output.side_effects.id_to_variable.values())
    dictionaries = [variable.source for variable in variables if "Dict" in type(variable).__name__]
    # Hooks of all modules are looked at apart: PyTorch's own counters add theirs, which ask for no new form.
    known = {g.originating_source for g in output.guards if "_global_" not in str(g.originating_source.name)}
    for source in (*empty, *[source for source in dictionaries if source in known]):
        output.guards.add(source.make_guard(builder.SEQUENCE_LENGTH))


def _loosely_guarded(output: Any) -> Iterator[tuple[types.CodeType, Any]]:
    """Find what Dynamo compares by ``==`` with a value that may equal another: zeros, and lists inside of tuples.

    Yields:
        How to read it, and a copy of what it is.
    """
    builder, scope = torch._dynamo.guards.GuardBuilder, _scope()
    for guard in list(output.guards):
        if guard.create_fn in (builder.EQUALS_MATCH, builder.CONSTANT_MATCH):
            try:
                code = compile(guard.name, "<guard>", "eval")
                value = eval(code, scope)
                if isinstance(value, tuple) or (isinstance(value, float) and value == 0):
                    yield code, copy.deepcopy(value)
            except Exception:
                # Read by means of Dynamo's own.
                continue


def _scope() -> dict[str, Any]:
    """Names by which Dynamo's guards find what they guard."""
    call = _pending.call
    return {"L": dict(zip(_ARGUMENTS, call)), "G": globals()}


def _is_still(before: Any, now: Any) -> bool:
    if isinstance(before, float) and before == 0:
        return str(before) == str(now)
    return bool(before == now)


def _methods(classes: set[Any], codes: set[types.CodeType]) -> Iterator[tuple[type, str, Any]]:
    """Find the methods that were traced, by the classes that define them and by those of the critic's own modules."""
    pending, seen = [nn.Module], {nn.Module}
    while pending:
        owner = pending.pop()
        new = [child for child in type.__subclasses__(owner) if child not in seen]
        seen.update(new)
        pending += new
        for name, method in vars(owner).items():
            if getattr(getattr(method, "fget", method), "__code__", None) in codes:
                yield owner, name, getattr(owner, name)
    for kind in classes:
        for name in {name for base in kind.__mro__[:-2] for name in vars(base)}:
            method = getattr(kind, name, None)
            if name not in vars(kind) and getattr(method, "__code__", None) in codes and name not in vars(nn.Module):
                yield kind, name, method


def _attributes(classes: set[Any], codes: list[types.CodeType]) -> Iterator[tuple[Any, str, Any]]:
    """Find what the user's code may read from the classes of what it meets: numbers kept there, inherited methods."""
    own = [code for code in codes if not code.co_filename.startswith(_TORCH)]
    names = {"forward", "__call__"}.union(*[code.co_names for code in own])
    for kind in classes:
        for name in names:
            value = getattr(kind, name, None)
            # Some are made anew whenever they are asked for.
            if value is not None and value is getattr(kind, name, None):
                yield kind, name, value


def _classes(critic: Any, output: Any) -> set[Any]:
    """Return the classes of what the forward meets: the critic's modules, and objects that are held otherwise."""
    # Of some it is a property, which raises.
    met = [vars(variable).get("value") for variable in output.side_effects.id_to_variable.values()]
    objects = [value for value in met if value is not None and type(value).__module__ != "builtins"]
    modules = critic.modules() if isinstance(critic, nn.Module) else [critic]
    return {*map(type, modules), *map(type, objects)}


def _is_users(code: types.CodeType) -> bool:
    """Whether code is neither PyTorch's nor Python's own."""
    file = code.co_filename
    return not file.startswith(("<", _TORCH)) and ("site-packages" in file or not file.startswith(_PYTHON))


_TORCH, _PYTHON = os.path.dirname(torch.__file__), os.path.dirname(os.__file__)


def _modified(side_effects: Any) -> list[Any]:
    """Find what a forward changes of that which was there before it."""
    return [
        variable
        for variable in side_effects.id_to_variable.values()
        if "Existing" in type(variable.mutation_type).__name__ and side_effects.is_modified(variable)
        for variable in [(variable, side_effects.store_attr_mutations.get(variable))]
    ]


def _repeats(change: tuple[Any, Any]) -> bool:
    """Whether a change made twice differs from one made once: to store a tensor that it computed does not."""
    variable, attributes = change
    stored = attributes or getattr(variable, "items", None)
    values = list(stored.values()) if isinstance(stored, dict) else []
    return not values or any(type(value.realize()).__name__ != "TensorVariable" for value in values)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return True


def _draws_numpy(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "f", None), "__name__", "")
    return type(node.target).__name__ == "numpy_to_tensor_wrapper" and hasattr(numpy.random, name)


def _written_input(node: fx.Node) -> fx.Node | None:
    """Return the input that a node wrote to and returned, or is."""
    while node.op != "placeholder":
        written = node.kwargs.get("out")
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if written is None and name.endswith("_") and not name.endswith("__") and node.args:
            written = node.args[0]
        if not isinstance(written, fx.Node):
            return None
        node = written
    return node


def _at(error: Exception) -> str:
    """Describe where in the user's code Dynamo stopped."""
    stack = getattr(error, "real_stack", None) or []
    outside = [frame for frame in stack if "/torch/" not in frame.filename and frame.filename != __file__]
    if not outside:
        return raised_at(error)
    frame = outside[-1]
    return f' at File "{frame.filename}", line {frame.lineno}, in {frame.name} {frame.line}'
