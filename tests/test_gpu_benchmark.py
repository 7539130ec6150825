"""What `make gpu` runs is exercised where there is no GPU, and one file holds what it found."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import wgan_fast
from wgan_fast.bench import results

SCRIPT = Path(wgan_fast.__file__).parents[1] / "benchmarks" / "gpu.py"


class Ours(TorchDispatchMode):
    """Names the package's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "wgan_fast":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not SCRIPT.exists(), reason="installed without its benchmarks")
def test_no_alternative_calls_an_operator_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name, make in importlib.import_module("gpu").KERNELS.items():
        case = make(1 << 16, "cpu")
        called = {}
        for variant, call in case.variants.items():
            with torch.no_grad(), Ours() as ours:
                case.prepare()
                call()
            called[variant] = ours.names
        # The activation passes have no operator: Inductor fuses them.
        assert bool(called.pop("ours")) is not name.startswith("activation"), name
        assert len(called) >= 1
        assert not set().union(*called.values()), name


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
        assert {"eager", "expression"} & kernel["milliseconds"].keys()
        assert "ours" in kernel["milliseconds"]
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
