"""Everything that only a machine with a GPU can tell, in four parts of minutes each.

1. right: the build, the ceilings, every step against float64, replays, training, the tests of the kernels.
2. targets: the critic step in every way, with profiles.
3. iterations: whole iterations of training.
4. bandwidths: each kernel against the alternatives, the fused MLP step.

`make gpu` installs the package and runs them. Each item stands alone: what fails is kept with its traceback, and the
results file is written after every item, so that a second start goes on where the first was stopped. Without a GPU the
same runs at small sizes on the CPU, and the file says so. Needs torch, triton, numpy and pytest; JAX where it is.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bandwidths
import cost
import iterations
import report
import right
import targets
from session import Session

from wgan_fast.bench import report as bench_report
from wgan_fast.bench import results

PARTS = {"right": right.run, "targets": targets.run, "iterations": iterations.run, "bandwidths": bandwidths.run}


def main() -> int:
    """Measure, write the files and say where they are; 1 where an item failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "compile", []], help="what to measure (all four)")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "runs" / "gpu", help="folder of all that is left")
    parser.add_argument("--only", default="", help="a regular expression that the keys of the items to measure match")
    parser.add_argument("--commit", default="", help="what is measured, where the checkout cannot tell")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no GPU: small sizes on the CPU, which say nothing of a GPU; no test of the GPU ran")
    environment = results.environment(torch.device(device)) | {"gpu": device == "cuda"}
    environment["commit"] = options.commit or environment["commit"]
    environment["versions"] |= {"triton": results.version("triton"), "cuda": torch.version.cuda or ""}
    session = Session(options.out, environment, device, options.only)
    if options.parts == ["compile"]:
        targets.compile_all(session)
        return 0
    for part in options.parts or PARTS:
        PARTS[part](session)
    print(report.section([json.loads(session.path.read_text())]))
    if len(costs := cost.rows([json.loads(session.path.read_text())], measured_alone=True)) > 1:
        print(bench_report.table(costs))
    print(f"wrote {session.path}; failed or wrong: {', '.join(session.failed) or 'nothing'}")
    return 1 if session.failed else 0


if __name__ == "__main__":
    sys.exit(main())
