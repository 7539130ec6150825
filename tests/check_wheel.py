"""Build wheels from a source distribution and use each away from the checkout: `make wheel-test`.

Three ways an install goes: with torch and a compiler at hand, with torch but no compiler, and isolated from torch.
Each wheel is installed into a fresh environment that borrows the dependencies of this one.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]

# Runs outside the checkout: what it imports can only come from the wheel.
USE = """
import importlib.resources, subprocess, sys
import torch, wgan_fast, wgan_fast.kernels, wgan_fast.training

assert importlib.resources.files(wgan_fast).joinpath("py.typed").is_file()

reason = sys.argv[1]
extension = wgan_fast.build_info()["extension"]
assert extension["active"] == (reason == ""), extension
assert reason in (extension["reason"] or ""), extension

critic = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
wgan_fast.gradient_penalty(critic, torch.randn(4, 3), torch.randn(4, 3)).backward()
assert wgan_fast.clip_weights_(critic, 0.01)[0].weight.abs().max() <= 0.01

try:
    sys.path.insert(0, wgan_fast.__path__[0])
    import kernels
except ImportError as error:
    assert "wgan_fast.kernels" in str(error), error
else:
    raise AssertionError(f"{kernels} was imported under a second name")
"""


def run(*command: str | Path, cwd: Path = CHECKOUT, **environment: str) -> None:
    """Run a command to its end; where it fails, show what it said and stop."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\ncheck_wheel: {' '.join(map(str, command))} exited with {done.returncode}")


def check(name: str, sdist: Path, folder: Path, *options: str, reason: str = "", **environment: str) -> None:
    """Build a wheel, install it into a new environment and use it; ``reason``: why it should lack the extension."""
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, *options, sdist, **environment)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv/bin/python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    run(python, "-c", USE, reason, cwd=elsewhere)
    run(folder / "venv/bin/wgan-fast", "info", cwd=elsewhere)
    print(f"check_wheel: {name}: {wheel.name} works")


def main() -> None:
    """Check the three ways."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder)
        (sdist,) = folder.glob("*.tar.gz")
        for way in ("compiled", "no-compiler", "isolated"):
            (folder / way).mkdir()
        check("compiled", sdist, folder / "compiled", "--no-build-isolation", WGAN_FAST_REQUIRE_EXT="1")
        no_compiler = {"CC": "false", "CXX": "false"}
        options = "--no-build-isolation"
        check("no compiler", sdist, folder / "no-compiler", options, reason="it did not compile", **no_compiler)
        check("isolated", sdist, folder / "isolated", reason="torch was not there to build against")


if __name__ == "__main__":
    main()
