"""What is planned for a GPU, on a CPU: it is exact, and costs as many launches, casts and copies as committed.

Better counts fail too: ``python tests/four_pass/test_as_on_gpu.py`` writes the expectations anew, into the same commit
as their cause. Triton kernels and cuBLAS may launch more than one kernel for an operator; these are operators.
"""

import collections
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wgan_fast.bench import variants, workloads
from wgan_fast.four_pass import optimize
from wgan_fast.four_pass.operators import base, linear, structure
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


def as_on_gpu() -> contextlib.ExitStack:
    """Plan as for a GPU with tensor cores, and have the CPU run what only a GPU has."""

    def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return a.to(dtype) @ b.to(dtype)

    stack, patch = contextlib.ExitStack(), pytest.MonkeyPatch()
    for module in (base, linear, optimize, structure):
        patch.setattr(module, "on_gpu", lambda x: True)
    patch.setattr(linear, "convolves_in_tensor_cores", lambda dtype, device: dtype == torch.bfloat16)
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", product, "CPU")
    stack.callback(library._destroy)
    stack.callback(patch.undo)
    return stack


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


def write() -> None:
    text = json.dumps({"torch": RELEASE} | {case: counts(case) for case in CASES}, indent=1)
    EXPECTED.write_text(re.sub(r"\{([^{}]*)\}", lambda match: "{" + " ".join(match[1].split()) + "}", text) + "\n")


if __name__ == "__main__":
    write()
