"""What a step costs on every machine alike: FLOPs, operators, peak bytes. Better counts fail too: commit them.

``python tests/bench/test_bench_counts.py`` writes the expectations anew; the difference belongs into the same commit
as its cause.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from wgan_fast import build_info
from wgan_fast.bench.measure import count, forward_flops, peak_bytes
from wgan_fast.bench.variants import VARIANTS
from wgan_fast.bench.workloads import CRITICS, build

EXPECTED = Path(__file__).with_name("bench_counts.json")
COUNTED = ("naive", "drop-in", "ours", "ours-bf16")
RELEASE = torch.__version__.partition("+")[0]
BATCH_SIZE = {"tabular-mlp": 20}
"""Small, because counts grow with it in proportion, up to when batches are joined, which has tests of its own."""


def counts(model: str, penalty: str) -> dict[str, Any]:
    workload = build(model, penalty=penalty, batch_size=BATCH_SIZE.get(model, 4))
    found = {}
    for name in COUNTED:
        if not VARIANTS[name].applies(workload):
            continue
        step = VARIANTS[name].prepare(workload)
        step()  # plans
        counted = count(step)
        found[name] = {
            "units": round(counted.flops / forward_flops(workload), 4),
            "launches": counted.launches,
            "peak_bytes": peak_bytes(step, torch.device("cpu")),
        }
    return found


CASES = [*(f"{model}/wgan-gp" for model in CRITICS), "toy-mlp/r1-r2", "dcgan-28/r1-r2"]


@pytest.mark.skipif(not build_info()["extension"]["active"], reason="without the extension other operators run")
@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_committed(case: str) -> None:
    expected = json.loads(EXPECTED.read_text())
    if expected["torch"] != RELEASE:
        pytest.skip(f"the counts are those of torch {expected['torch']}")
    assert counts(*case.split("/")) == expected[case]


def write() -> None:
    torch.set_num_threads(1)
    text = json.dumps({"torch": RELEASE} | {case: counts(*case.split("/")) for case in CASES}, indent=1)
    EXPECTED.write_text(re.sub(r"\{([^{}]*)\}", lambda match: "{" + " ".join(match[1].split()) + "}", text) + "\n")


if __name__ == "__main__":
    write()
