"""What is planned for a GPU, on a CPU: it is exact, and costs as many launches, casts and copies as committed.

Better counts fail too: ``python tests/four_pass/test_as_on_gpu.py`` writes the expectations anew, into the same commit
as their cause. Triton kernels and cuBLAS may launch more than one kernel for an operator; these are operators.
"""

import collections
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wgan_fast import CriticStep
from wgan_fast.bench import variants, workloads
from wgan_fast.bench.as_on_gpu import as_on_gpu
from wgan_fast.four_pass import optimize
from wgan_fast.four_pass.record import Recorder
from wgan_fast.four_pass.stand_ins import is_view

EXPECTED = Path(__file__).with_name("gpu_counts.json")
RELEASE = torch.__version__.partition("+")[0]
MODELS = {"toy-mlp": 16, "tabular-mlp": 20, "amp": 16, "dcgan-28": 8, "dcgan-64": 4, "resnet-32": 4, "language": 4}
FORMS = {
    "fp32": ("fp32", False),
    "bf16": ("bf16", False),
    "bf16, channels last": ("bf16", True),
}
CASES = [f"{model}/{form}" for model in MODELS for form in FORMS if "last" not in form or "-mlp" not in model != "amp"]


class Counted(TorchDispatchMode):
    """Counts operators that compute, and which of them only cast, only lay out anew or only copy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not is_view(func):
            self.found["operators"] += 1
            if func._opname in ("_to_copy", "clone", "copy_", "cast"):
                given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)][-1]
                made = tree_leaves(out)[-1]
                same = given.dtype == made.dtype
                kind = "copies" if same and given.stride() == made.stride() else "layouts" if same else "casts"
                self.found[kind] += 1
        return out


def workload(case: str) -> tuple[workloads.Workload, str]:
    model, form = case.split("/")
    precision, channels_last = FORMS[form]
    made = workloads.build(model, batch_size=MODELS[model])
    return (made.channels_last() if channels_last else made), precision


def counts(case: str) -> dict[str, int]:
    made, precision = workload(case)
    with as_on_gpu():
        step = variants.ours(made, precision=precision)
        step(None)  # plans
        with Counted() as counted:
            step(None)
    return {kind: counted.found[kind] for kind in ("operators", "casts", "layouts", "copies")}


@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_committed(case: str) -> None:
    expected = json.loads(EXPECTED.read_text())
    if expected["torch"] != RELEASE:
        pytest.skip(f"the counts are those of torch {expected['torch']}")
    assert counts(case) == expected[case]


def gradients(step: variants.Step, alpha: Tensor) -> Tensor:
    with workloads.repeatable(step.critic):
        step(alpha)
    return torch.cat([gradient.flatten() for gradient in step.gradients()]).double()


@pytest.mark.parametrize("model", MODELS)
def test_it_is_exact(model: str) -> None:
    made = workloads.build(model, batch_size=MODELS[model]).double()
    truth = gradients(variants.naive(made), made.alpha)
    with as_on_gpu():
        ours = gradients(variants.ours(made), made.alpha)
    assert (ours - truth).norm() <= 1e-12 * truth.norm()


@pytest.mark.parametrize("case", [case for case in CASES if "bf16" in case])
def test_in_bf16_it_errs_as_plain_pytorch_does(case: str) -> None:
    made, precision = workload(case)
    exact = made.double()
    truth = gradients(variants.naive(exact), exact.alpha)
    naive = gradients(variants.naive(made, precision=precision), made.alpha)
    with as_on_gpu():
        ours = gradients(variants.ours(made, precision=precision), made.alpha)
    assert (ours - truth).norm() <= 2 * (naive - truth).norm()


@pytest.mark.parametrize(("given", "asked"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_channels_are_padded_where_it_is_asked_for(
    given: str | None, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(optimize.PAD_CHANNELS, raising=False)
    if given is not None:
        monkeypatch.setenv(optimize.PAD_CHANNELS, given)
    assert optimize.pads_channels() is asked


@pytest.mark.parametrize("model", ["dcgan-28", "dcgan-64"])
def test_a_first_layer_over_padded_channels_errs_no_more(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, precision = workload(f"{model}/bf16, channels last")
    channels = made.real.shape[1]
    exact = made.double()
    truth = gradients(variants.naive(exact), exact.alpha)
    naive = gradients(variants.naive(made, precision=precision), made.alpha)
    monkeypatch.setenv(optimize.PAD_CHANNELS, "1")
    with as_on_gpu():
        # Of a class of its own: plans are kept for all critics of one, whatever the environment said.
        made.critic.__class__ = type("Padded", (type(made.critic),), {})
        ours_ = variants.ours(made, precision=precision)
        ours = gradients(ours_, made.alpha)
        with Convolved() as convolved:
            ours_(made.alpha)
    assert (ours - truth).norm() <= 2 * (naive - truth).norm()
    # Over the whole batch, forward and for the weight's gradient; the points' gradient and tangents as before.
    first = [name for name, x in convolved.found if x.shape[1] in (channels, 8)]
    assert [name for name, x in convolved.found if x.shape[1] == 8] == ["convolution", "convolution_backward"]
    assert len(first) == 4


class Given(nn.Module):
    """A critic of images whose forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8 * 4 * 4, 1)
        self.register_buffer("seen", torch.zeros(3, 6, 6))
        self.given = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, x)

    def scores(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(x)).flatten(1))


def summed_too(s: Any, x: Tensor) -> Tensor:
    return s.scores(x) + x.square().sum((1, 2, 3), keepdim=False)[:, None]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layouts", [(False, False), (True, True), (False, True)], ids=str)
@pytest.mark.parametrize("forward", [lambda s, x: s.scores(x), summed_too], ids=["once", "twice"])
def test_a_batch_that_is_assembled_is_the_batch(
    forward: Callable[[Any, Tensor], Tensor], layouts: tuple[bool, bool], precision: str
) -> None:
    """Read once, cast and laid out, or twice, as it is too."""
    forms = [torch.channels_last if last else torch.contiguous_format for last in layouts]
    real, fake = (torch.randn(6, 3, 6, 6).contiguous(memory_format=form) for form in forms)
    alpha = torch.rand(6)
    made, assembled = [], []
    for moved in (True, False):
        critic = Given(forward)
        with as_on_gpu(moved=moved):
            step = CriticStep(critic, engine="four_pass", precision=precision)
            step(real, fake, alpha)
            with Names() as names:
                loss = step(real, fake, alpha).loss
        assembled.append("assemble" in names.found)
        made.append([loss, *[p.grad for p in critic.parameters()]])
    assert assembled == [True, False]
    for ours, theirs in zip(*made):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def joined(real: Tensor, fake: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    mixed = torch.ops.wgan_fast.interpolate(real, fake, alpha)
    return torch.cat([real, fake, mixed]), mixed


def narrowed(real: Tensor, fake: Tensor, alpha: Tensor) -> list[Tensor]:
    batch = joined(real, fake, alpha)[0]
    return [batch.bfloat16(), batch * 2]


JOINED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], str | None]] = {
    "joined": (lambda r, f, a: [joined(r, f, a)[0] * 2], "float32"),
    "cast": (lambda r, f, a: [joined(r, f, a)[0].bfloat16()], "bfloat16"),
    "cast, and read as it is": (narrowed, "float32"),
    "widened": (lambda r, f, a: [joined(r, f, a)[0].double()], "float32"),
    "mixed samples that are read alone, too": (lambda r, f, a: [*joined(r, f, a)], None),
    "samples that are written to": (lambda r, f, a: [joined(r, f, a)[0] * 2, r.mul_(2)], None),
    "another order": (lambda r, f, a: [torch.cat([f, r, joined(r, f, a)[1]])], None),
    "another dimension": (lambda r, f, a: [torch.cat([r, f, joined(r, f, a)[1]], 1)], None),
    "samples of two dtypes": (lambda r, f, a: [joined(r.half(), f, a)[0] * 2], None),
    "samples of another order": (lambda r, f, a: [joined(r.transpose(1, 2), f.transpose(1, 2), a)[0] * 2], "float32"),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_batch_is_assembled_where_it_is_nothing_else(name: str) -> None:
    function, dtype = JOINED[name]
    recorder = Recorder()
    sizes = {"r": (4, 3, 5, 6), "f": (4, 3, 5, 6), "a": (4,)}
    given = [recorder.input(name, torch.randn(size)) for name, size in sizes.items()]
    with recorder.fake, recorder, torch.no_grad():
        outputs = function(*given)
    recorder.output(outputs)
    with as_on_gpu():
        optimize.assemble(recorder.graph)
    made = [node for node in recorder.graph.nodes if node.target is torch.ops.wgan_fast.assemble.default]
    assert [str(node.args[3]).removeprefix("torch.") for node in made] == ([] if dtype is None else [dtype])


class Names(TorchDispatchMode):
    """Remembers which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(func._opname)
        return func(*args, **(kwargs or {}))


class Convolved(TorchDispatchMode):
    """Remembers which convolutions run, over what."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname.startswith("convolution"):
            self.found.append((func._opname, args[func._opname.endswith("backward")]))
        return func(*args, **(kwargs or {}))


class Casting(nn.Module):
    """A critic that casts in its forward, which is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.register_buffer("u", torch.randn(8, 8))
        self.register_buffer("h", torch.randn(8, dtype=torch.bfloat16))
        self.register_buffer("one", torch.ones(1, 1, 1, 1))
        w = torch.randn(2, 3, 2, 2, dtype=torch.bfloat16)
        self.register_buffer("w", w.to(memory_format=torch.channels_last))
        self.register_buffer("e", torch.randn(8).to(torch.float8_e4m3fn))
        self.given = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, x)


def written(write: Callable[[Tensor], object]) -> Callable[[Any, Tensor], Tensor]:
    def forward(s: Any, x: Tensor) -> Tensor:
        write(s.u)
        return s.c(linear_(torch.relu(s.a(x)), s.u))

    return forward


def cast_before_it_is_written(s: Any, x: Tensor) -> Tensor:
    v = s.u.bfloat16()
    s.u.mul_(2)
    return s.c(linear_(torch.relu(s.a(x)), v.clone(memory_format=torch.contiguous_format).to(x.dtype)))


def averaged_before_it_is_written(s: Any, x: Tensor) -> Tensor:
    wide = s.h.float()
    s.h.mul_(2)
    return s.c(torch.relu(s.a(x)) * wide.mean())


def added_before_it_is_written(s: Any, x: Tensor) -> Tensor:
    wide = s.h.float()
    s.h.mul_(2)
    return s.c(torch.relu(s.a(x)).float() + wide)


@torch.library.custom_op("wgan_fast_tests::contiguous_sum", mutates_args=())
def contiguous_sum(values: Tensor) -> Tensor:
    assert values.is_contiguous(), values.stride()
    return values.sum()


@contiguous_sum.register_fake
def _(values: Tensor) -> Tensor:
    return values.new_empty(())


def laid_out(s: Any, x: Tensor) -> Tensor:
    """The sum lies as the critic asked for what was widened, which an operator relies on."""
    total = (s.one + s.w.float().contiguous()).contiguous()
    return s.c(torch.relu(s.a(x)) * contiguous_sum(total))


def twice(s: Any, x: Tensor) -> Tensor:
    h = torch.relu(s.a(x)).float()
    return ((h + h) * 1.001).sum(1)


CASTING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a buffer that is written by an index": written(lambda u: u.__setitem__(0, 3.0)),
    "a buffer that is written through a slice": written(lambda u: u[:4].mul_(2)),
    "a buffer that is written through a view": written(lambda u: u.view(-1).mul_(2)),
    "a buffer that is written": written(lambda u: u.mul_(2)),
    "a buffer that is cast and then written": cast_before_it_is_written,
    "a weight that is computed from a cast one": lambda s, x: s.c(
        linear_(torch.relu(s.a(x)), torch.tanh(s.b.weight.bfloat16()).to(s.b.weight.dtype), s.b.bias)
    ),
    "a weight that is cast first": lambda s, x: s.c(
        torch.relu(linear_(x.bfloat16(), torch.tanh(s.a.weight.bfloat16()), s.a.bias.bfloat16())).to(x.dtype)
    ),
    "what was cast, twice": twice,
    "a buffer that is averaged before it is written": averaged_before_it_is_written,
    "a buffer that is added before it is written": added_before_it_is_written,
    "a buffer that is averaged": lambda s, x: s.c(torch.relu(s.a(x)) * s.h.float().mean()),
    "what was widened and laid out, added": laid_out,
    "a sum of narrowed values, widened": lambda s, x: s.c((torch.relu(s.a(x)).bfloat16() + s.u[0].bfloat16()).float()),
    "a mean of what was narrowed": lambda s, x: s.c(torch.relu(s.a(x)) * s.a.weight.bfloat16().mean()),
    "float8, added": lambda s, x: s.c(torch.relu(s.a(x)).float() + s.e.float()),
    "samples that are read as they are, too": lambda s, x: s.c(torch.relu(s.a(x))).float() + x.square().sum(1, True),
    "half precision, averaged twice": lambda s, x: s.c(torch.relu(s.a(x)) * (s.h.float().mean() + s.h.float().mean())),
}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASTING)
def test_casts_read_what_they_would_have_read(name: str, precision: str, gpu: bool) -> None:
    """As with every cast where it was recorded; how often a forward writes is another test's matter."""
    real, fake = torch.randn(2, 16, 6).unbind()
    alpha = torch.rand(16)
    made = []
    for moved in (True, False):
        critic = Casting(CASTING[name])
        with as_on_gpu(gpu=gpu, moved=moved):
            step = CriticStep(critic, engine="four_pass", precision=precision)
            losses = [step(real, fake, alpha).loss for _ in range(2)]
        gradients = [p.grad.flatten() for p in critic.parameters() if p.grad is not None]
        made.append([torch.stack(losses), critic.u, critic.h, torch.cat(gradients)])
    for ours, theirs in zip(*made):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def write() -> None:
    text = json.dumps({"torch": RELEASE} | {case: counts(case) for case in CASES}, indent=1)
    EXPECTED.write_text(re.sub(r"\{([^{}]*)\}", lambda match: "{" + " ".join(match[1].split()) + "}", text) + "\n")


if __name__ == "__main__":
    write()
