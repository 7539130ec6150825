"""A pytest plugin under which the operators on a CPU are the kernels of csrc/cuda/, compiled as C++."""

import ctypes
import os
from typing import Any

import torch

import wgan_fast

assert wgan_fast.build_info()["extension"]["active"]  # first: the last to register is who is called
torch.ops.load_library(os.environ["CUDA_ON_CPU"])
LAUNCHES = ctypes.c_int64.in_dll(ctypes.CDLL(os.environ["CUDA_ON_CPU"]), "wgan_fast_launches")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say that the kernels did run."""
    terminalreporter.write_line(f"{LAUNCHES.value} launches")
