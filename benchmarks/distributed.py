"""What one iteration and its messages cost with several processes, and what overlapping them could save.

`torchrun --nproc-per-node=2 benchmarks/distributed.py` prints, for each model and batch size, medians of: an iteration
(n_critic = 5); and, for one critic step, its computation alone, the exchange of its gradients alone, the one after the
other, as the trainer does it, and both at once. The last is more than any overlap within a step can reach: all of the
message travels during all of the step.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from wgan_fast.training import TrainConfig, Trainer
from wgan_fast.training.data import batches
from wgan_fast.training.distributed import Replicas, processes

CASES = [("8gaussians", "toy-mlp", 256), ("8gaussians", "toy-mlp", 4096), ("mnist5k", "mnist-dcgan", 64)]
SECONDS = 6.0
"""Of timing, for each case and process count."""


def measure(data: str, model: str, batch_size: int) -> str:
    """Time one case; returns a line of the table."""
    out = Path(tempfile.gettempdir(), "never-written")
    trainer = Trainer.from_config(TrainConfig(data=data, model=model, batch_size=batch_size, out=out))
    iteration, replicas = trainer._iteration, trainer._iteration.replicas
    iteration.seed()
    part = replicas.rows(batch_size)
    reals = batches(trainer.data.train, batch_size, seed=0, device=trainer.device, part=part)
    size = sum(parameter.numel() for parameter in trainer.critic.parameters())
    message = torch.zeros(size, device=trainer.device)
    fake = next(reals).clone()

    def iterate() -> None:
        iteration(list(itertools.islice(reals, iteration.n_critic))).generator_loss.item()

    def compute() -> None:
        iteration.critic_step(fake, fake).loss.item()

    def exchange() -> None:
        dist.all_reduce(message)
        message[0].item()  # on a GPU: wait for it

    def both() -> None:
        work = dist.all_reduce(message, async_op=True)
        compute()
        work.wait()
        message[0].item()

    ways: dict[str, Callable[[], None]] = {"iteration": iterate, "step": compute}
    if replicas.world > 1:
        ways |= {"exchange": exchange, "in turn": lambda: (compute(), exchange())[0], "at once": both}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    begun = torch.zeros((), device=trainer.device)
    start = time.perf_counter()
    while begun.item() < SECONDS:
        for name, way in ways.items():
            replicas.wait()
            before = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - before)
        begun.fill_(time.perf_counter() - start)
        if replicas.world > 1:
            dist.all_reduce(begun, dist.ReduceOp.MAX)  # all stop after the same round
    figures = "".join(f"  {name} {1e3 * statistics.median(values):8.2f} ms" for name, values in times.items())
    return f"{model:12} batch {batch_size:5}  {replicas.world} processes  {4e-6 * size:.1f} MB{figures}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        for case in CASES:
            line = measure(*case)
            if Replicas().leads:
                print(line, flush=True)
