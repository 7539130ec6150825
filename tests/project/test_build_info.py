"""build_info says what is active, and for every part that is not, why."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import wgan_fast
from wgan_fast import build_info

PARTS = ["extension", "cuda", "triton", "compiler"]


def run_in_a_new_process(code: str) -> str:
    checkout = Path(wgan_fast.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
    return run.stdout


def test_every_part_is_active_or_says_why_not() -> None:
    info = build_info()
    for part in PARTS:
        if info[part]["active"]:
            assert info[part]["reason"] is None
        else:
            assert len(info[part]["reason"]) > 10


def test_it_survives_json() -> None:
    assert json.loads(json.dumps(build_info())) == build_info()


def test_it_reports_the_torch_that_runs() -> None:
    info = build_info()["torch"]
    assert info["version"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()


@pytest.mark.skipif(not build_info()["extension"]["active"], reason="no extension")
def test_the_extension_reports_the_compiler_and_the_oldest_torch_it_serves() -> None:
    info = build_info()["extension"]
    assert info["compiler"].split()[0] in {"g++", "Clang"}
    assert "-O3" in info["flags"]
    assert info["torch_abi"] == "2.11"


@pytest.mark.skipif(not build_info()["extension"]["active"], reason="no extension")
def test_cuda_is_compiled_in_exactly_where_it_says_so() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("wgan_fast::clip_weights_", "CUDA")
    assert registered == (build_info()["cuda"]["toolkit"] is not None)


@pytest.mark.skipif(not build_info()["extension"]["active"], reason="no extension")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_extension_needs_only_the_stable_abi_of_torch() -> None:
    library = importlib.import_module("wgan_fast._C").__file__
    run = subprocess.run(["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True)
    assert "aoti_torch" in run.stdout
    assert not [line for line in run.stdout.splitlines() if "at::" in line or "c10::" in line]


@pytest.mark.parametrize(
    ("architectures", "capability", "reason"),
    [
        ("7.5;8.0;9.0;10.0+PTX", (7, 0), "built for compute capability 7.5 and newer, but Some GPU has 7.0"),
        ("10.0 9.0a", (8, 9), "built for compute capability 9.0 and newer, but Some GPU has 8.9"),
        ("7.5;8.0;9.0;10.0+PTX", (7, 5), None),
        ("9.0+PTX", (12, 0), None),
        ("10.0", (10, 0), None),
        ("Turing+PTX", (8, 0), None),
    ],
)
def test_a_gpu_older_than_every_architecture_built_is_reported(
    monkeypatch: pytest.MonkeyPatch, architectures: str, capability: tuple[int, int], reason: str | None
) -> None:
    config = dict.fromkeys(("compiler", "flags", "products", "bf16_products", "torch", "torch_abi"), "some")
    config |= {"cuda": "13.0", "cuda_architectures": architectures}
    monkeypatch.setattr("wgan_fast.build.extension", SimpleNamespace(build_config=lambda: config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    details = {"toolkit": "13.0", "architectures": architectures, "device": "Some GPU"}
    assert build_info()["cuda"] == {"active": reason is None, "reason": reason, **details}


CLIP_AND_REPORT = """
import json, torch, wgan_fast
weight = torch.tensor([-7.0, 0.0, 7.0])
wgan_fast.clip_weights_(weight, 0.5)
assert weight.tolist() == [-0.5, 0.0, 0.5]
print(json.dumps(wgan_fast.build_info()))
"""


def test_without_extension_and_triton_weights_are_still_clipped() -> None:
    absent = "import sys; sys.modules['wgan_fast._C'] = sys.modules['triton'] = None"
    info = json.loads(run_in_a_new_process(absent + CLIP_AND_REPORT))
    assert not info["extension"]["active"]
    assert info["cuda"]["reason"] == "the extension is not active"
    assert info["triton"]["reason"].startswith("it does not import")


def test_an_extension_that_does_not_load_is_reported_and_done_without(tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(b"not a library")
    broken = f"""
import importlib.util, sys, warnings
warnings.simplefilter("ignore")
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "wgan_fast._C":
            return importlib.util.spec_from_file_location(name, {str(library)!r})
sys.meta_path.insert(0, Finder())
"""
    info = json.loads(run_in_a_new_process(broken + CLIP_AND_REPORT))
    assert not info["extension"]["active"]
    assert "does not load with torch" in info["extension"]["reason"]


def test_a_compiler_that_is_missing_or_does_not_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = "no-such-compiler is not on PATH"
    assert build_info()["compiler"] == {"active": False, "reason": reason, "path": None, "version": None}
    monkeypatch.setenv("CXX", "false")
    assert build_info()["compiler"]["reason"] == "false --version exited with 1"


def test_interpreted_triton_is_active_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert build_info()["triton"]["active"]
