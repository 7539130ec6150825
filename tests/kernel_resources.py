"""What the Triton kernels ask of each GPU architecture, compiled without a GPU, against committed baselines.

    python tests/kernel_resources.py            compare; fails where a kernel got worse, and where it got better
    python tests/kernel_resources.py --update   write what was measured to tests/kernel_baselines.json

A kernel joins by an entry in the ``SPECIALISATIONS`` of its module in ``kernels/``.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import CompiledKernel, make_backend

import wgan_fast.kernels
from wgan_fast.kernels.specialisation import Specialisation

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BASELINES = Path(__file__).with_name("kernel_baselines.json")
UPDATE = "python tests/kernel_resources.py --update"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

Resources = dict[str, Any]


def specialisations() -> Iterator[tuple[str, Specialisation]]:
    """Every specialisation of every kernel, with its name in the baselines."""
    for module in pkgutil.iter_modules(wgan_fast.kernels.__path__, "wgan_fast.kernels."):
        for entry in getattr(importlib.import_module(module.name), "SPECIALISATIONS", []):
            yield f"{entry.kernel.__name__}[{entry.name}]", entry


def compile_for(target: GPUTarget, entry: Specialisation) -> CompiledKernel:
    """Compile as the JIT would for aligned tensors (on AMD, of less than 2 GiB)."""
    backend = make_backend(target)
    types = [entry.arguments.get(name, "constexpr") for name in entry.kernel.arg_names]
    attributes = {}
    for position, kind in enumerate(types):
        if kind.startswith("*"):
            attributes[(position,)] = backend.parse_attr("DS" if target.backend == "hip" else "D")
        elif kind.endswith(":16"):
            attributes[(position,)] = backend.parse_attr("D")
    signature = {name: kind.removesuffix(":16") for name, kind in zip(entry.kernel.arg_names, types)}
    source = ASTSource(entry.kernel, signature, dict(entry.constants), attributes)
    options = {"num_warps": entry.num_warps, **entry.options, **(entry.amd if target.backend == "hip" else {})}
    return triton.compile(source, target=target, options=options)


def resources_of(kernel: CompiledKernel) -> Resources:
    """Registers of a thread, spilled bytes, shared bytes, and loads from global memory by their width in bits."""
    if "ptx" in kernel.asm:
        registers, spills = _cubin_usage(kernel.asm["cubin"])
        loads = _by_width(_ptx_loads(kernel.asm["ptx"]))
        return {"registers": registers, "spills": spills, "shared": kernel.metadata.shared, "loads": loads}
    assembly = kernel.asm["amdgcn"]

    def noted(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return {
        "registers": noted("vgpr_count"),
        "spills": noted("vgpr_spill_count") + noted("sgpr_spill_count") + noted("private_segment_fixed_size"),
        "shared": kernel.metadata.shared,
        "loads": _by_width(_amd_loads(assembly)),
    }


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report).groups()
    return int(registers), int(stack) + int(local)


def _ptx_loads(ptx: str) -> Iterator[int]:
    # The cache hints between the state space and the vector are many: ld.global.L1::evict_last.v4.b32.
    for vector, bits in re.findall(r"\bld\.global(?:\.[A-Za-z]\S*?)??(?:\.v(\d))?\.[bfsu](\d+)\s", ptx):
        yield int(vector or 1) * int(bits)


def _amd_loads(assembly: str) -> Iterator[int]:
    pattern = r"\b(?:buffer|global)_load_(?:dwordx(\d)|(dword)|(?:d16_)?(?:hi_)?[su]?(byte|short))"
    for dwords, dword, narrow in re.findall(pattern, assembly):
        yield int(dwords) * 32 if dwords else 32 if dword else {"byte": 8, "short": 16}[narrow]


def _by_width(loads: Iterator[int]) -> dict[str, int]:
    return {str(bits): count for bits, count in sorted(Counter(loads).items())}


def measure() -> dict[str, Any]:
    """Compile everything; {"triton": version, "kernels": {kernel: {target: resources}}}."""
    kernels: dict[str, dict[str, Resources]] = {}
    for name, entry in specialisations():
        kernels[name] = {arch: resources_of(compile_for(target, entry)) for arch, target in TARGETS.items()}
    return {"triton": triton.__version__, "kernels": kernels}


def differences(measured: dict[str, Any], baselines: dict[str, Any]) -> list[str]:
    """One line for everything that is not as committed, and for every spill, committed or not."""
    lines = []
    if measured["triton"] != baselines["triton"]:
        lines.append(f"Triton is {measured['triton']}; the baselines are those of {baselines['triton']}")
    now, before = measured["kernels"], baselines["kernels"]
    lines += [f"{name}: in the baselines, but no such kernel" for name in before.keys() - now.keys()]
    for name, targets in now.items():
        for arch, resources in targets.items():
            expected = before.get(name, {}).get(arch)
            if expected is None:
                lines.append(f"{name} for {arch}: not in the baselines; it uses {resources}")
            elif resources != expected:
                lines.append(f"{name} for {arch}: {resources}, but the baseline is {expected}")
            if resources["spills"]:
                lines.append(f"{name} for {arch} spills {resources['spills']} bytes")
    return lines


def main() -> int:
    """Compare or update; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the baselines")
    update = parser.parse_args().update
    measured = measure()
    if update:
        BASELINES.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
    problems = differences(measured, json.loads(BASELINES.read_text()))
    if problems:
        print(*problems, f"Where that is meant: {UPDATE}", sep="\n", file=sys.stderr)
        return 1
    print(f"{len(measured['kernels'])} kernels for {', '.join(TARGETS)}: as committed, no spills")
    return 0


if __name__ == "__main__":
    sys.exit(main())
