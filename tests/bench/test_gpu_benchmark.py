"""What `make gpu` runs is exercised where there is no GPU; what fails or is killed holds up nothing else."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import wgan_fast
from wgan_fast.bench import report

ROOT = Path(wgan_fast.__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu"
pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="installed without its benchmarks"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there it takes minutes: run it by hand"),
]
COMMAND = [sys.executable, str(SCRIPT)]


class Ours(TorchDispatchMode):
    """Names the package's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "wgan_fast":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.syspath_prepend(str(SCRIPT))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def items_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["items"]


def test_no_alternative_calls_an_operator_of_the_package() -> None:
    for name, make in importlib.import_module("bandwidths").KERNELS.items():
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


def test_without_a_gpu_all_four_parts_run_small_and_say_so(tmp_path: Path) -> None:
    # What a bare machine with torch, triton, numpy and pytest lacks.
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(('tyro', 'ot', 'mlxtend', 'sklearn', 'jax', 'tensorboard')))"
    )
    program = f"{blocked}; import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    command = [sys.executable, "-c", program, "--out", str(tmp_path), "--commit", "abc"]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no GPU" in run.stdout
    described = json.loads((tmp_path / "results.json").read_text())["environment"]
    assert described["gpu"] is False
    assert described["versions"]["torch"] == torch.__version__
    assert described["commit"] == "abc"
    found = items_in(tmp_path)
    assert found["ceilings"]["copy_gb_per_s"] > 0
    assert found["right/step/dcgan-28/wgan-gp"]["errors"]["ours fp64"] < 1e-12
    assert found["right/tests"]["told"] == "not run: no GPU"
    # In four passes either way, a rounding of float32 apart where sums are taken in another order.
    assert found["right/fused-mlp/16/fp32"]["errors"]["ours"] < 1e-6
    assert found["right/training"]["distance"]["graph"] < 0.01
    kernels = {key.removeprefix("bandwidth/") for key in found if key.startswith("bandwidth/")}
    norms = {f"norm_{name}" for name in ("forward", "vjp", "jvp", "second_order")}
    passes = {"activation", "activation_and_bias"}
    assert kernels == {"clip_weights", "clipped_rmsprop", "interpolate", "gradient_norm_penalty"} | norms | passes
    timed = [item["milliseconds"] for item in found.values() if "milliseconds" in item]
    assert len(timed) == len(kernels) + 4
    assert all(min(times) > 0 for each in timed for times in each.values())
    assert all({"naive", "ours"} <= set(found[key]["profiles"]) for key in found if key.startswith("target/"))
    assert "| toy-mlp, 10, bf16 " in run.stdout


def test_an_item_that_fails_is_kept_and_the_others_go_on(tmp_path: Path) -> None:
    session = importlib.import_module("session")
    calls = []

    def failing() -> dict[str, Any]:
        calls.append("failing")
        raise RuntimeError("the device is on fire")

    def working() -> dict[str, Any]:
        calls.append("working")
        return {"told": "well"}

    for _ in range(2):
        one = session.Session(tmp_path, {"device": "a"}, "cpu")
        one.item("failing", failing)
        one.item("working", working)
        assert one.failed == ["failing"]
    assert calls == ["failing", "working", "failing"]
    found = items_in(tmp_path)
    assert found["failing"]["error"] == "RuntimeError: the device is on fire"
    assert "in failing" in found["failing"]["traceback"]
    assert found["working"]["told"] == "well"
    assert not session.Session(tmp_path, {"device": "b"}, "cpu").items


def test_a_second_start_goes_on_where_the_first_was_killed(tmp_path: Path) -> None:
    command = [*COMMAND, "bandwidths", "--out", str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while not (tmp_path / "results.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
    before = items_in(tmp_path)
    assert before
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    after = items_in(tmp_path)
    assert {key: after[key] for key in before} == before
    assert not any(f"] {key}:" in run.stdout for key in before)
    assert "sanitizer" in after


def test_the_page_holds_what_the_results_say() -> None:
    made = importlib.import_module("report")
    files = sorted((ROOT / "benchmarks" / "results" / "gpu").glob("*.json"))
    section = made.section([json.loads(path.read_text()) for path in files])
    assert f"{report.BEGIN}\n\n{section}\n{report.END}" in (ROOT / "docs" / "gpu.md").read_text()
