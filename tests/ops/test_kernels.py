"""The Triton kernels without a GPU: interpreted against their references, and compiled against their baselines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

import kernel_resources  # imports Triton
import triton

from wgan_fast.kernels import gradient_norm_penalty, mlp_critic_step
from wgan_fast.kernels.numbers import bits


def test_every_kernel_equals_its_reference_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", str(Path(__file__).with_name("interpreted"))]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_kernel_asks_of_a_gpu_what_its_baseline_says() -> None:
    baselines = json.loads(kernel_resources.BASELINES.read_text())
    if baselines["triton"] != triton.__version__:
        pytest.skip(f"the baselines are those of Triton {baselines['triton']}, this is {triton.__version__}")
    problems = kernel_resources.differences(kernel_resources.measure(), baselines)
    assert not problems, "\n".join([*problems, f"Where that is meant: {kernel_resources.UPDATE}"])


@pytest.mark.parametrize("file", [gradient_norm_penalty, mlp_critic_step])
def test_another_weight_of_the_penalty_compiles_nothing(file: ModuleType) -> None:
    """It may follow a schedule; what is compiled anew is told by constants, and by what is specialised."""
    taking = {form.kernel for form in file.SPECIALISATIONS if "weight" in form.arguments}
    assert taking
    for kernel in taking:
        (weight,) = [parameter for parameter in kernel.params if parameter.name.lower() == "weight"]
        assert not weight.is_constexpr
        assert weight.do_not_specialize
    # Triton tells integers of 32 bits from those of 64 by their values.
    for value in (0.0, 5e-324, 1e-300, 0.1, 1.0, 10.0, 1e300):
        assert not -(2**31) <= bits(value) < 2**31


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("resource", ["registers", "spills", "shared"])
def test_a_resource_that_moves_either_way_is_reported(resource: str, change: int) -> None:
    usual = {"registers": 32, "spills": 0, "shared": 1024, "loads": {"128": 4}}
    moved = {**usual, resource: usual[resource] + change}
    before = {"triton": "3", "kernels": {"kernel[form]": {"sm_80": usual}}}
    now = {"triton": "3", "kernels": {"kernel[form]": {"sm_80": moved}}}
    assert kernel_resources.differences(before, before) == []
    assert f"'{resource}': {moved[resource]}" in kernel_resources.differences(now, before)[0]


def test_a_narrower_load_a_new_kernel_a_lost_one_and_a_committed_spill_are_reported() -> None:
    usual = {"registers": 32, "spills": 0, "shared": 0, "loads": {"128": 4}}

    def record(**kernels: dict[str, object]) -> dict[str, object]:
        return {"triton": "3", "kernels": {name: {"sm_80": resources} for name, resources in kernels.items()}}

    def only(lines: list[str]) -> str:
        (line,) = lines
        return line

    narrow = {**usual, "loads": {"32": 16}}
    assert "{'32': 16}" in only(kernel_resources.differences(record(a=narrow), record(a=usual)))
    assert "not in the baselines" in only(kernel_resources.differences(record(a=usual, b=usual), record(a=usual)))
    assert "no such kernel" in only(kernel_resources.differences(record(a=usual), record(a=usual, b=usual)))
    spilling = {**usual, "spills": 8}
    assert "spills 8 bytes" in only(kernel_resources.differences(record(a=spilling), record(a=spilling)))


def test_loads_are_counted_by_their_width() -> None:
    ptx = (
        "ld.global.v4.b32 {%r1}, [%rd1];\n ld.global.L1::evict_last.L2::cache_hint.v2.b64 {%rd3}, [%rd2];\n"
        "ld.global.b8 %rs1, [%rd1];\n ld.global.nc.f32 %f1, [%rd1];\n ld.shared.v4.b32 {%r1}, [%r2];\n"
    )
    assert kernel_resources._by_width(kernel_resources._ptx_loads(ptx)) == {"8": 1, "32": 1, "128": 2}
    amd = "buffer_load_dwordx4 v[2:5]\n global_load_dword v1\n buffer_load_ubyte v1\n global_load_short_d16_hi v1\n"
    assert kernel_resources._by_width(kernel_resources._amd_loads(amd)) == {"8": 1, "16": 1, "32": 1, "128": 1}
