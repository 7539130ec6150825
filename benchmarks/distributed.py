"""What one iteration and its messages cost with several processes.

`torchrun --nproc-per-node=2 benchmarks/distributed.py` prints, for each model and batch size, the median time of an
iteration (n_critic = 5) and of one exchange of gradients, which includes waiting for the slower process.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from wgan_fast.data import batches
from wgan_fast.training import TrainConfig, Trainer
from wgan_fast.training.distributed import Replicas, processes

CASES = [("8gaussians", "toy-mlp", 256), ("8gaussians", "toy-mlp", 4096), ("mnist5k", "mnist-dcgan", 64)]
ITERATIONS = 8


def measure(data: str, model: str, batch_size: int) -> str:
    """Time one case; returns a line of the table."""
    config = TrainConfig(
        data=data, model=model, batch_size=batch_size, out=Path(tempfile.gettempdir(), "never-written")
    )
    trainer = Trainer.from_config(config)
    iteration, replicas = trainer._iteration, trainer._iteration.replicas
    iteration.seed()
    part = replicas.rows(batch_size)
    reals = batches(trainer.data.train, batch_size, seed=0, device=trainer.device, part=part)
    exchange, messages, times = replicas.average_gradients, [], []

    def timed(name: str, parameters: Sequence[torch.nn.Parameter], figures: Sequence[Tensor]) -> Sequence[Tensor]:
        begun = time.perf_counter()
        means = exchange(name, parameters, figures)
        _ = [mean.item() for mean in means]  # on a GPU: wait for it
        messages.append(time.perf_counter() - begun)
        return means

    replicas.average_gradients = timed
    for _ in range(ITERATIONS):
        begun = time.perf_counter()
        result = iteration(list(itertools.islice(reals, iteration.n_critic)))
        result.generator_loss.item()
        times.append(time.perf_counter() - begun)
    size = sum(parameter.nbytes for parameter in trainer.critic.parameters())
    return (
        f"{model:12} batch {batch_size:5}  {replicas.world} processes  iteration {statistics.median(times[2:]):7.3f} s"
        f"  exchange {1e3 * statistics.median(messages[12:]):6.2f} ms for {size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        for case in CASES:
            line = measure(*case)
            if Replicas().leads:
                print(line, flush=True)
