"""Builds the compiled extension and its record; the metadata is in pyproject.toml.

The extension is optional: without torch in the build environment (``--no-build-isolation`` gives it the installed
one) or without a working compiler the install goes on without it, and ``wgan_fast.build_info()`` says why.

Environment:
    WGAN_FAST_REQUIRE_EXT=1: fail instead of installing without the extension, or without CUDA where torch has it.
    TORCH_CUDA_ARCH_LIST: the GPU architectures, as for any torch extension; by default 7.5, 8.0, 9.0, 10.0, with PTX.
    CXX, CUDA_HOME: the compiler and the CUDA toolkit, as for any torch extension.

``python setup.py cuda_compile`` checks the CUDA sources, also where torch has no CUDA.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
REQUIRED = os.environ.get("WGAN_FAST_REQUIRE_EXT") == "1"
PACKAGES = [
    "wgan_fast",
    "wgan_fast.bench",
    "wgan_fast.engine",
    "wgan_fast.four_pass",
    "wgan_fast.four_pass.operators",
    "wgan_fast.kernels",
    "wgan_fast.ops",
    "wgan_fast.tables",
    "wgan_fast.training",
    "wgan_fast.training.data",
    "wgan_fast.training.models",
]

CPU_SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp"))
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h"))

# The stable ABI of torch 2.11, the oldest that is supported.
TORCH_ABI = ("WGAN_FAST_TORCH_ABI", "0x020B000000000000")
# -g0 undoes the interpreter's own -g: debug information would be most of the library.
# -fno-math-errno lets square roots be vectorised; no contraction, so that no result depends on which of its
# instruction sets a processor has.
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
NVCC_FLAGS = ["-O3"]
ARCHITECTURES = ["7.5", "8.0", "9.0", "10.0"]

missing: dict[str, str | None] = {"extension": None, "cuda": None}
"""Why a part is not built, for build_info(); None for a part that is."""


def ask(nvcc: str, *arguments: str) -> str:
    """What nvcc prints, or nothing where it does not run."""
    try:
        answer = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return answer.stdout + answer.stderr


def cuda_home() -> str | None:
    """The CUDA toolkit: CUDA_HOME, or the one that the nvcc on PATH belongs to, or the usual place."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return named
    # Asked, because the nvcc on PATH may be a script outside its toolkit.
    top = re.search(r"^#\$ TOP=(.+)$", ask("nvcc", "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    if top:
        return os.path.realpath(top[1])
    return "/usr/local/cuda" if os.path.exists("/usr/local/cuda/bin/nvcc") else None


CUDA_HOME = cuda_home()
NVCC = f"{CUDA_HOME}/bin/nvcc"
if CUDA_HOME:
    # Before torch, which looks for it as it is imported.
    os.environ["CUDA_HOME"] = CUDA_HOME

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    reason = f"torch was not there to build against ({error}); install with --no-build-isolation"
    missing.update(extension=reason, cuda=reason)
    if REQUIRED:
        sys.exit(f"WGAN_FAST_REQUIRE_EXT=1, but {reason}")


def cuda_missing() -> str | None:
    """Why the extension is built without CUDA, or None where it is built with it."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    toolkit = re.search(r"release ([\d.]+)", ask(NVCC, "--version"))
    if toolkit is None:
        return "no CUDA toolkit was found; put nvcc on PATH or set CUDA_HOME"
    if toolkit[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"the CUDA toolkit is {toolkit[1]}, but torch {torch.__version__} is built for {torch.version.cuda}"
    return None


def architectures() -> list[str]:
    """The default GPU architectures that the toolkit knows."""
    known = ask(NVCC, "--list-gpu-arch").split()
    return [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in known]


def write_record(folder: Path) -> None:
    """Leave ``missing`` for build_info()."""
    if missing["extension"]:
        warnings.warn(f"wgan_fast is installed without its extension: {missing['extension']}", stacklevel=1)
    (folder / "_build.json").write_text(json.dumps(missing, indent=2) + "\n")


class BuildPython(build_py):
    """The Python files and the record, without what an earlier build may have left."""

    def run(self) -> None:
        """Copy the packages."""
        super().run()
        folder = ROOT / "wgan_fast" if self.editable_mode else Path(self.build_lib, "wgan_fast")
        (folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
        write_record(folder)


def kernel_resources(report: str) -> dict[str, tuple[int, int]]:
    """The registers of every kernel in what ptxas -v prints, and the bytes that it spills."""
    resources = {}
    for kernel in re.split(r"Compiling entry function", report)[1:]:
        name = re.match(r" '(\S+)'", kernel)
        spills, registers = re.findall(r"(\d+) bytes spill", kernel), re.search(r"Used (\d+) registers", kernel)
        if not name or not spills or not registers:
            sys.exit(f"cuda_compile: this is not what ptxas -v used to print: {kernel}")
        resources[name[1]] = int(registers[1]), sum(map(int, spills))
    return resources


def demangled(name: str) -> str:
    """A kernel's name as it is written, where the toolkit's or the compiler's demangler is there to ask."""
    for tool in (f"{CUDA_HOME}/bin/cu++filt", "c++filt"):
        if answer := ask(tool, name).strip():
            return answer
    return name


class CompileCuda(Command):
    """Compile the CUDA sources for every default architecture, without linking; fail where registers spill."""

    description = "check the CUDA sources; needs nvcc, but neither a GPU nor a CUDA build of torch"
    user_options: ClassVar = []

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        """Compile, and print the registers of every kernel."""
        if not ask(NVCC, "--version"):
            print("cuda_compile: SKIPPED: no nvcc, so the CUDA sources were NOT compiled", file=sys.stderr)
            return
        if missing["extension"]:
            sys.exit(f"cuda_compile: {missing['extension']}")
        flags = ["-std=c++20", "-Xptxas=-v", "-DUSE_CUDA", f"-D{'='.join(TORCH_ABI)}", *NVCC_FLAGS]
        flags += [f"-I{path}" for path in cpp_extension.include_paths()]
        spilling = []
        with tempfile.TemporaryDirectory() as folder:
            for source in CUDA_SOURCES:
                for architecture in (f"sm_{name.replace('.', '')}" for name in ARCHITECTURES):
                    target = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
                    command = [NVCC, *flags, target, "-c", source, "-o", f"{folder}/object.o"]
                    answer = subprocess.run(command, capture_output=True, text=True)
                    if answer.returncode != 0:
                        problem = f"{source} does not compile for {architecture}"
                        sys.exit(f"{answer.stdout}{answer.stderr}cuda_compile: {problem}")
                    resources = kernel_resources(answer.stderr)
                    if not resources:
                        sys.exit(f"cuda_compile: {source} has no kernel for {architecture}, or ptxas names none")
                    registers = sorted(used for used, _ in resources.values())
                    kernels = f"{len(resources)} kernels" if len(resources) > 1 else "1 kernel"
                    print(f"{source} for {architecture}: {kernels}, {registers[0]} to {registers[-1]} registers")
                    spilling += [
                        f"{demangled(name)} for {architecture}: {spilled} bytes"
                        for name, (_, spilled) in resources.items()
                        if spilled
                    ]
        if spilling:
            sys.exit("cuda_compile: these kernels spill registers:\n" + "\n".join(spilling))


def without_cuda(extension: Extension) -> bool:
    """Take CUDA out of an extension; False where there is none in it."""
    had_cuda = ("USE_CUDA", None) in extension.define_macros
    extension.sources = CPU_SOURCES
    extension.define_macros = [macro for macro in extension.define_macros if macro[0] != "USE_CUDA"]
    extension.libraries = [name for name in extension.libraries if "cuda" not in name]
    return had_cuda


def extension_build() -> tuple[list[Extension], dict[str, type[Command]]]:
    """The extension and the command that builds it; neither where there is no torch to build against."""
    if missing["extension"]:
        return [], {}
    missing["cuda"] = cuda_missing()
    with_cuda = missing["cuda"] is None
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(architectures()) + "+PTX")
    if REQUIRED and not with_cuda and torch.version.cuda:
        sys.exit(f"WGAN_FAST_REQUIRE_EXT=1, but {missing['cuda']}")

    class BuildExtension(cpp_extension.BuildExtension):
        """Compile; where that fails, install without the extension."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, use_ninja=cpp_extension.is_ninja_available(), **options)

        def build_extensions(self) -> None:
            """Compile, or note the reason why not."""
            try:
                super().build_extensions()
            except Exception as error:  # setuptools, ninja, torch and the toolkit each raise their own
                if REQUIRED:
                    raise
                reason = f"it did not compile (pip install -v shows more): {' '.join(str(error).split())}"
                missing["cuda"] = missing["cuda"] or reason
                if without_cuda(extension):
                    self.build_extensions()
                else:
                    missing["extension"] = reason
                    self.extensions = []

        def run(self) -> None:
            """Build and write the record."""
            super().run()
            write_record(ROOT / "wgan_fast" if self.inplace else Path(self.build_lib, "wgan_fast"))

    macros = [TORCH_ABI, ("WGAN_FAST_FLAGS", f'"{" ".join(CXX_FLAGS)}"')]
    if with_cuda:
        architecture_list = os.environ["TORCH_CUDA_ARCH_LIST"]
        macros += [("USE_CUDA", None), ("WGAN_FAST_CUDA_ARCHITECTURES", f'"{architecture_list}"')]
    build = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    extension = build(
        "wgan_fast._C",
        CPU_SOURCES + CUDA_SOURCES if with_cuda else CPU_SOURCES,
        depends=HEADERS,
        define_macros=macros,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )
    return [extension], {"build_ext": BuildExtension}


extensions, build_ext = extension_build()
setup(
    packages=PACKAGES,
    package_dir={"wgan_fast": "wgan_fast", "wgan_fast.kernels": "kernels"},
    package_data={"wgan_fast": ["py.typed"]},
    ext_modules=extensions,
    cmdclass={"build_py": BuildPython, "cuda_compile": CompileCuda, **build_ext},
)
