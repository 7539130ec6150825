"""What this installation is made of: the compiled extension, its CUDA kernels, Triton, and why a part is missing."""

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_RECORD = Path(__file__).with_name("_build.json")
"""Written by setup.py: for each part of the extension, why it was not built, or null."""


def _load_extension() -> tuple[ModuleType | None, str | None]:
    """Load the extension, or say why there is none."""
    try:
        return importlib.import_module("wgan_fast._C"), None
    except ModuleNotFoundError:
        return None, _recorded("extension") or "not built for this Python; install wgan_fast with pip"
    except ImportError as error:
        reason = f"built, but it does not load with torch {torch.__version__}: {error}"
        warnings.warn(f"wgan_fast's extension was {reason}; reinstall wgan_fast", RuntimeWarning, stacklevel=2)
        return None, reason


def _recorded(part: str) -> str | None:
    try:
        reason: str | None = json.loads(_RECORD.read_text())[part]
    except FileNotFoundError:
        return None
    return reason


extension, _extension_missing = _load_extension()


def build_info() -> dict[str, Any]:
    """Say what is active in this installation and, for what is not, why.

    Returns:
        A dictionary that JSON can hold: ``wgan_fast``, ``python`` and ``torch`` with their versions, and for each of
        ``extension`` (compiled operators; its ``products`` is the instruction set of the matrix products in programs),
        ``cuda`` (GPU kernels in it), ``triton`` and ``compiler`` (the C++ compiler that ``torch.compile`` uses on a
        CPU) a dictionary of ``active``, ``reason`` (None where active) and details.
    """
    from . import __version__

    return {
        "wgan_fast": __version__,
        "python": platform.python_version(),
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        "extension": _extension_info(),
        "cuda": _cuda_info(),
        "triton": _triton_info(),
        "compiler": _compiler_info(),
    }


def _part(reason: str | None, **details: Any) -> dict[str, Any]:
    return {"active": reason is None, "reason": reason, **details}


def _extension_info() -> dict[str, Any]:
    if extension is None:
        return _part(_extension_missing)
    config, names = extension.build_config(), ("compiler", "flags", "products", "bf16_products", "torch", "torch_abi")
    return _part(None, **{name: config[name] for name in names})


def _cuda_info() -> dict[str, Any]:
    if extension is None:
        return _part("the extension is not active")
    config = extension.build_config()
    details = {"toolkit": config["cuda"], "architectures": config["cuda_architectures"], "device": None}
    if config["cuda"] is None:
        return _part(_recorded("cuda") or "not built", **details)
    if not torch.cuda.is_available():
        return _part("built, but torch finds no CUDA device", **details)
    details["device"] = torch.cuda.get_device_name()
    capability = torch.cuda.get_device_capability()
    # A list given in names ("Turing") has no numbers to compare with.
    built = [(int(major), int(minor)) for major, minor in re.findall(r"(\d+)\.(\d+)", config["cuda_architectures"])]
    if built and capability < min(built):
        lowest, own = (".".join(map(str, version)) for version in (min(built), capability))
        return _part(f"built for compute capability {lowest} and newer, but {details['device']} has {own}", **details)
    return _part(None, **details)


def _triton_info() -> dict[str, Any]:
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return _part(f"it does not import: {error}", version=None)
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return _part(None, version=version)
    return _part("torch finds no GPU to compile for", version=version)


def _compiler_info() -> dict[str, Any]:
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        return _part(f"{name} is not on PATH", path=None, version=None)
    run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        return _part(f"{name} --version exited with {run.returncode}", path=path, version=None)
    return _part(None, path=path, version=run.stdout.partition("\n")[0])
