"""What `make gpu` runs is exercised where there is no GPU, and one file holds what it found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wgan_fast
from wgan_fast.bench import results

SCRIPT = Path(wgan_fast.__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it takes minutes: run it by hand")
@pytest.mark.skipif(not SCRIPT.exists(), reason="installed without its benchmarks")
def test_without_a_gpu_every_step_runs_small_and_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--commit", "abc"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "no GPU" in run.stdout
    (path,) = tmp_path.iterdir()
    found = results.read(path)
    assert found["environment"]["gpu"] is False
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["environment"]["commit"]
    assert found["copy_gb_per_s"] > 0
    norms = {f"norm_{name}" for name in ("forward", "vjp", "jvp", "second_order")}
    passes = {"activation", "activation_and_bias"}
    named = {"clip_weights", "clipped_rmsprop", "interpolate", "gradient_norm_penalty"}
    assert found["kernels"].keys() == named | norms | passes
    for kernel in found["kernels"].values():
        assert {"eager", "ours"} <= kernel["milliseconds"].keys()
        assert all(len(times) > 1 and min(times) > 0 for times in kernel["milliseconds"].values())
        assert kernel["of_copy_bandwidth"] > 0
    (mlp,) = found["mlp_critic_step"].values()
    assert mlp["milliseconds"].keys() == {"four_pass", "ours"}
    # Both are the same four passes on a CPU; a rounding of float32 apart where sums are taken in another order.
    assert mlp["distance"] < 1e-5
    assert "GPU" in mlp["unfused"]
    (workload,) = found["workloads"].values()
    assert results.ratio(workload, "naive", "ours")
    assert found["tests"]["summary"] == "not run: no GPU"
