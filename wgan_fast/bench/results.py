"""Results files: one a device, which says what was measured, on what, and at which commit."""

import json
import os
import platform
import re
import statistics
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import InputError
from ..training.files import write_atomically

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


class Ratio(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float


def environment(device: torch.device) -> dict[str, Any]:
    """Describe what is being measured on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "wgan_fast": version("wgan_fast")}
    if version("jax"):
        versions["jax"] = version("jax")
    described: dict[str, Any] = {"device": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "flags": _cpu_flags()}
    if device.type == "cuda":
        described["device"] = torch.cuda.get_device_name(device)
    return described | {"threads": torch.get_num_threads(), "versions": versions, "commit": _commit()}


def slug(described: dict[str, Any]) -> str:
    """Name a results file after its device."""
    name = re.sub(r"\((?:r|tm)\)", "", described["device"].lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {described['threads']} threads").strip("-")


def version(package: str) -> str:
    """Return the installed version of a package; "" without one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    match = re.search(rf"^{key}\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return match[1] if match else ""


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    present = _cpu_info("flags").split()
    return [flag for flag in _FLAGS if flag in present]


def _commit() -> str:
    """Find the last commit of what is measured, with "+" where files differ from it; "" in an installed package."""
    here, measured = Path(__file__), [":/wgan_fast", ":/csrc", ":/kernels"]
    commands = (
        ["git", "ls-files", "--error-unmatch", here.name],
        ["git", "log", "-1", "--abbrev=10", "--format=%h", "--", *measured],
        ["git", "status", "--porcelain", "-uno", *measured],
    )
    try:
        _, commit, changes = (
            subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changes else "")


def read(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        InputError: It is not one.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"results {path} cannot be read: {error}") from error
    if not isinstance(results, dict) or not {"environment", "workloads"} <= results.keys():
        raise InputError(f"results {path} has no environment and workloads")
    return results


def write(path: Path, results: dict[str, Any]) -> None:
    """Write a results file, lists on one line each."""
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()), text)
    write_atomically(path, (text + "\n").encode())


def ratio(workload: dict[str, Any], slower: str, faster: str) -> Ratio | None:
    """How many times as long ``slower`` takes as ``faster``, round by round; None where either was not timed."""
    rounds = [workload["variants"].get(name, {}).get("milliseconds") for name in (slower, faster)]
    if not all(rounds):
        return None
    low, median, high = statistics.quantiles([a / b for a, b in zip(*rounds)], n=4)
    return Ratio(median, low, high)


def milliseconds(workload: dict[str, Any], name: str) -> float:
    """Return the median time of a variant that was timed."""
    return float(statistics.median(workload["variants"][name]["milliseconds"]))
