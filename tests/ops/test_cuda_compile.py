"""The check of the CUDA sources: a kernel that spills registers fails it by name, a report it cannot read too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import wgan_fast

CHECKOUT = Path(wgan_fast.__file__).parents[1]
CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5scalePf' for 'sm_90'
ptxas info    : Function properties for _Z5scalePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers, 360 bytes cmem[0]
"""
SPILLING = (
    CLEAN
    + """\
ptxas info    : Compiling entry function '_Z6gatherPf' for 'sm_90'
ptxas info    : Function properties for _Z6gatherPf
    16 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 360 bytes cmem[0]
"""
)

pytestmark = pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="installed without its setup.py")


def cuda_compile(toolkit: Path, report: str, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    """The check, with an nvcc that prints ``report`` for every source."""
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    (toolkit / "report").write_text(report)
    compile_ = f'cat "{toolkit}/report" >&2; exit {exit_code}'
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in *gencode*) {compile_};; *) echo release 0.0;; esac\n')
    nvcc.chmod(0o755)
    command = [sys.executable, "setup.py", "--quiet", "cuda_compile"]
    environment = {**os.environ, "CUDA_HOME": str(toolkit)}
    return subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)


def test_kernels_without_spills_pass_for_every_architecture(tmp_path: Path) -> None:
    run = cuda_compile(tmp_path, CLEAN)
    assert run.returncode == 0, run.stderr
    for architecture in ("sm_80", "sm_90", "sm_100"):
        assert f"csrc/cuda/clipped_rmsprop.cu for {architecture}: 1 kernel, 12 to 12 registers" in run.stdout


def test_a_kernel_that_spills_is_named(tmp_path: Path) -> None:
    run = cuda_compile(tmp_path, SPILLING)
    assert run.returncode != 0
    assert "gather" in run.stderr
    assert "sm_100: 48 bytes" in run.stderr
    assert "scale" not in run.stderr.split("these kernels spill registers")[1]


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("", "has no kernel"),
        (CLEAN.replace("spill", "leak"), "not what ptxas -v used to print"),
        (CLEAN.replace("registers", "slots"), "not what ptxas -v used to print"),
    ],
)
def test_a_report_that_says_nothing_of_spills_does_not_pass(tmp_path: Path, report: str, message: str) -> None:
    run = cuda_compile(tmp_path, report)
    assert run.returncode != 0
    assert message in run.stderr


def test_a_source_that_does_not_compile_fails(tmp_path: Path) -> None:
    run = cuda_compile(tmp_path, "error: expected a ;", exit_code=1)
    assert run.returncode != 0
    assert "error: expected a ;" in run.stderr
    assert "clip_weights.cu does not compile for sm_75" in run.stderr
