"""Items of a measurement, each in a try of its own, in one file that is written after each of them."""

import dataclasses
import json
import re
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from wgan_fast.backends import float32_products
from wgan_fast.bench import results

Found = dict[str, Any]
PRECISIONS = ("bf16", "tf32", "fp32")


@dataclasses.dataclass
class Session:
    """What is measured on one device, kept in one folder.

    Args:
        folder: Of everything that is written: ``results.json`` and what the items leave beside it.
        environment: Device, versions and commit; a file of another environment is not continued.
        device: "cuda", or "cpu" where everything runs at small sizes.
        only: What is searched for in an item's key; others are not measured.
    """

    folder: Path
    environment: Found
    device: str
    only: str = ""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "results.json"
        self.items: dict[str, Found] = {}
        if self.path.exists():
            before = json.loads(self.path.read_text())
            if before["environment"] == self.environment:
                self.items = before["items"]
            else:
                print(f"{self.path} is of another commit, device or version: beginning anew", flush=True)

    @property
    def on_gpu(self) -> bool:
        """Whether sizes are a GPU's."""
        return self.device == "cuda"

    def item(self, key: str, measure: Callable[[], Found]) -> None:
        """Measure one thing, unless an earlier start has; whatever it raises is kept and the others go on."""
        if not self.wants(key):
            return
        begun = time.perf_counter()
        try:
            found = measure()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        found["seconds"] = round(time.perf_counter() - begun, 1)
        self.items[key] = found
        results.write(self.path, {"environment": self.environment, "items": self.items})
        told = found.get("error") or found.get("told", "done")
        print(f"[{found['seconds']:5.1f} s] {key}: {str(told).splitlines()[0][:400]}", flush=True)

    def wants(self, key: str) -> bool:
        """Whether an item is asked for and not measured yet."""
        return re.search(self.only, key) is not None and "error" in self.items.get(key, {"error": ""})

    @property
    def failed(self) -> list[str]:
        """The items that raised, and those that measured something wrong."""
        return [key for key, found in self.items.items() if "error" in found or found.get("wrong")]


def arithmetic(precision: str) -> AbstractContextManager[None]:
    """Matrix products and convolutions in full float32, or in TF32, which is PyTorch's default for convolutions."""
    return float32_products(in_tf32=precision == "tf32")


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """A call as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def device_milliseconds(call: Callable[[], object], device: str) -> float:
    """What a call takes the device; on a GPU without what the host takes to ask for it, up to a millisecond."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # cycles, in which the host runs ahead
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: float(f"{statistics.median(found):.4g}") for name, found in times.items()}


def profile(call: Callable[[], object], device: str, calls: int = 3) -> tuple[Found, str]:
    """Kernels, the device's busy share and the wall's milliseconds of a call, and its 25 dearest kernels as text."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    wall = (time.perf_counter() - start) / calls
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(calls):
            call()
        wait()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    averages = profiled.key_averages()
    total = sum(getattr(event, key) for event in averages) / calls / 1e3
    found = {
        "milliseconds": float(f"{1e3 * wall:.4g}"),
        "device_milliseconds": float(f"{total:.4g}"),
        "busy": round(total / (1e3 * wall), 3),
        "kernels": round(sum(event.count for event in averages if getattr(event, key) > 0) / calls),
    }
    top = sorted(averages, key=lambda event: -getattr(event, key))[:25]
    lines = [
        f"{getattr(event, key) / calls / 1e3:9.4f} ms {event.count / calls:7.1f} x  {event.key[:150]}" for event in top
    ]
    return found, "\n".join(lines)
