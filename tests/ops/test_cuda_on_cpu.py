"""The CUDA kernels without a GPU: compiled as C++, a thread after another, under the tests of their operators."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

import wgan_fast

CHECKOUT = Path(wgan_fast.__file__).parents[1]
SHIM = Path(__file__).with_name("cuda_on_cpu")
COMPILER = os.environ.get("CXX", "g++")
pytestmark = [
    pytest.mark.skipif(not (CHECKOUT / "csrc").exists(), reason="installed without its sources"),
    pytest.mark.skipif(not wgan_fast.build_info()["extension"]["active"], reason="built without the extension"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler"),
]
AS_CPP = [
    (
        r"(\w+(?:<[\w, ]+>)?)\s*<<<\s*([^;]*?), kThreads, 0, [^;]*?>>>\(([^;]*?)\);",
        r"in_turn(\2, kThreads, [&] { \1(\3); });",
    ),
    (r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\);", ""),
    (r"const torch::stable::accelerator::DeviceGuard guard\(device\);", ""),
    (r"TORCH_ERROR_CODE_CHECK\(aoti_torch_get_current_cuda_stream\(device, &stream\)\);", ""),
    (r"(STABLE_TORCH_LIBRARY_IMPL\(wgan_fast, )CUDA,", r"\1CPU,"),
]
"""What C++ or a CPU lacks, and what stands for it."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    sources = []
    for source in sorted((CHECKOUT / "csrc" / "cuda").glob("*.cu")):
        text = source.read_text()
        for pattern, replacement in AS_CPP:
            text, count = re.subn(pattern, replacement, text)
            assert count == 1, f"{source.name} has {count} of {pattern}"
        # A learning rate on the device is a tensor of a CPU here.
        text = text.replace("device_lr->is_cuda() &&", "").replace("../", f"{CHECKOUT}/csrc/")
        sources.append(folder / source.with_suffix(".cpp").name)
        sources[-1].write_text(text)
    abi = re.search(r'"WGAN_FAST_TORCH_ABI", "(\w+)"', (CHECKOUT / "setup.py").read_text())
    assert abi
    made = folder / "libcuda_on_cpu.so"
    include = [f"-I{path}" for path in (SHIM, *cpp_extension.include_paths(), sysconfig.get_path("include"))]
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        "-fno-math-errno",
        f"-DWGAN_FAST_TORCH_ABI={abi[1]}",
    ]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    run = subprocess.run(
        [COMPILER, *flags, *include, *map(str, sources), *libraries, "-o", str(made)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return made


@pytest.mark.parametrize("operator", ["clipping", "optim"])
def test_the_kernels_pass_the_tests_of_their_operator(operator: str, library: Path) -> None:
    environment = {**os.environ, "CUDA_ON_CPU": str(library)}
    environment["PYTHONPATH"] = os.pathsep.join([str(SHIM), environment.get("PYTHONPATH", "")])
    tests = str(Path(__file__).with_name(f"test_{operator}.py"))
    command = [sys.executable, "-m", "pytest", "-p", "cuda_on_cpu", "-q", "-m", "not slow", "-k", "cpu", tests]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    launches = re.search(r"(\d+) launches", run.stdout)
    assert launches
    assert int(launches[1]) > 50
