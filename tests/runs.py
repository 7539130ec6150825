"""Small runs of the command line, and what they leave on disk, read without the code under test."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import wgan_fast

ROOT = Path(wgan_fast.__file__).parents[1]
EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}

# 8 x 8 digits, a generator with batch norm and a critic of two convolutions: some milliseconds a step.
TINY = ["--data", "digits", "--model", "article", "--width", "1", "--latent-dim", "3", "--batch-size", "5"]
TINY += ["--n-critic", "2", "--log-every", "1"]

Cli = Callable[..., None]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "wgan_fast", *map(str, arguments)]


def run_process(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line as a process of its own."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*.safetensors"))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Every tensor by its name, and the JSON structure around them."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return tensors, json.loads(file.metadata()["structure"])


def tensors_of(run: Path, part: str = "") -> dict[str, Tensor]:
    """The newest checkpoint's tensors whose name begins with ``part``, under the rest of their name."""
    tensors, _ = read_checkpoint(newest_checkpoint(run))
    return {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "images_per_second"} for record in records]


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())["config"]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit: NaN equals itself and 0.0 is not -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def assert_same_checkpoint(actual: Path, expected: Path) -> None:
    """Networks, average, optimizers and random states are equal bit for bit."""
    assert actual.name == expected.name
    tensors, structure = read_checkpoint(actual)
    expected_tensors, expected_structure = read_checkpoint(expected)
    parts = {"generator", "critic", "generator_optimizer", "critic_optimizer", "random"}
    assert parts <= {name.split(".")[0] for name in expected_tensors}
    assert tensors.keys() == expected_tensors.keys()
    different = [name for name in tensors if not same_bits(tensors[name], expected_tensors[name])]
    assert not different, different
    assert structure == expected_structure


def assert_same_run(actual: Path, expected: Path) -> None:
    """The newest checkpoints, the metrics and the last picture of samples are equal."""
    assert_same_checkpoint(newest_checkpoint(actual), newest_checkpoint(expected))
    for record, expected_record in zip(metrics_of(actual), metrics_of(expected)):
        assert record == expected_record, (record, expected_record)
    assert len(metrics_of(actual)) == len(metrics_of(expected))
    picture = max(path.name for path in (expected / "samples").iterdir())
    assert (actual / "samples" / picture).read_bytes() == (expected / "samples" / picture).read_bytes()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content; None for folders."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}
