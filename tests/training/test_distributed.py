"""Several processes train what one does: with the trainer, and with the drop-in penalty in a loop of one's own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import ENVIRONMENT, TINY, metrics_of, newest_checkpoint, read_checkpoint, same_bits
from torch import nn

from wgan_fast.training.data import batches, load_data
from wgan_fast.training.distributed import Replicas

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")

DRIVER = '''
"""Forks the processes of a test, as many as it is told: imports, seconds each, are paid once."""

import json, os, signal, sys, traceback

import numpy as np
import ot, torch, torch._dynamo, torch.distributed, torch.utils.tensorboard  # what training imports late
from torch import nn

torch.set_num_threads(1)
import wgan_fast.training.curves, wgan_fast.training.data
from wgan_fast.training import cli
from wgan_fast.training.divergence import LossWatch
wgan_fast.training.curves.save_curves = lambda records, path, **options: path.write_bytes(b"")

from wgan_fast import gradient_penalty
from wgan_fast.training import TrainConfig, Trainer
from wgan_fast.training.conditional import ConditionalGenerator, ProjectionCritic
from wgan_fast.training.distributed import Replicas, processes


def networks(shape=(5,)):
    torch.manual_seed(3)
    units = int(np.prod(shape))
    generator = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, units), nn.Unflatten(1, shape))
    generator.latent_dim = 3
    hidden = [nn.Flatten(), nn.Linear(units, 9), nn.Softplus(), nn.Linear(9, 6), nn.LeakyReLU(0.2)]
    critic = nn.Sequential(*hidden, nn.Linear(6, 1, bias=False))
    return generator.double(), critic.double()


def points(n=60):
    return np.random.default_rng(1).normal(size=(n, 5)).astype(np.float32)


def train(out, steps, batch_size, options, resume=False):
    options = {"log_every": 1, **options}
    config = TrainConfig(out=out, steps=steps, batch_size=batch_size, learning_rate=2**-7, **options)
    data = points()
    if config.flip:
        data = np.random.default_rng(1).uniform(-1, 1, size=(60, 3, 8, 8))
    pair, labels = networks(data.shape[1:]), None
    if config.conditional:
        wider = nn.Sequential(nn.Linear(6, 3, dtype=torch.float64), pair[0])
        pair = ConditionalGenerator(3, 4, lambda length: wider).double(), ProjectionCritic(pair[1], 4).double()
        labels = np.arange(60) % 4
    trainer = Trainer(*pair, data, config, labels=labels)
    trainer.fit(resume=resume)
    return trainer


def loop(batch_size, steps):
    """A loop of one's own: DistributedDataParallel where there are several processes, the penalty dropped in."""
    replicas = Replicas()
    generator, critic = networks()
    wrapped = nn.parallel.DistributedDataParallel(critic) if replicas.world > 1 else critic
    optimizer = torch.optim.Adam(critic.parameters(), lr=2**-7, betas=(0.5, 0.9))
    data = torch.from_numpy(points()).double()
    rows = replicas.rows(batch_size)
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        real = data[torch.randperm(len(data), generator=draw)[:batch_size]][rows]
        noise = torch.randn(batch_size, 3, generator=draw, dtype=torch.float64)[rows]
        alpha = torch.rand(batch_size, generator=draw, dtype=torch.float64)[rows]
        fake = generator(noise).detach()
        loss = wrapped(fake).mean() - wrapped(real).mean()
        loss = loss + gradient_penalty(wrapped, real, fake, alpha=alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return critic


def terminated(rank, at_step):
    """Send this process SIGTERM in the middle of its training, if it is the one."""
    put = LossWatch.put
    def acting(self, step, result):
        if step == at_step and Replicas().rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(self, step, result)
    LossWatch.put = acting


def diverging(at_step):
    """Show the generator's loss as NaN once, and check losses one step late, as on a GPU."""
    put, check, steps = LossWatch.put, LossWatch._check, [at_step]
    def late(self, step, result):
        if step in steps:
            steps.remove(step)
            result.watched[2] = float("nan")
        self._check = lambda leave: check(self, leave=1)
        try:
            return put(self, step, result)
        finally:
            del self._check
    LossWatch.put = late
    signal.alarm(40)  # processes that wait for each other end all the same


def child(order, rank):
    log = os.open(order["log"] + str(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(order["cwd"])
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["world"]), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(order["port"]),
    )
    what, *rest = order["arguments"]
    try:
        if what == "command":
            if order["terminate"]:
                terminated(*order["terminate"])
            cli.main(rest)
            return 0
        with processes(torch.device("cpu")):
            if what == "train":
                train(*rest)
            elif what == "diverge":
                at_step, *settings = rest
                diverging(at_step)
                train(*settings)
            else:
                out, *settings = rest
                critic = loop(*settings)
                if Replicas().leads:
                    np.save(out, torch.cat([p.detach().flatten() for p in critic.parameters()]).numpy())
        return 0
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


for line in sys.stdin:
    order, pids = json.loads(line), []
    for rank in range(order["world"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            status = child(order, rank)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
'''


class Runner:
    """A driver that runs what it is told in several processes, and waits for them."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def __call__(
        self, world: int, *arguments: Any, cwd: Path, terminate: tuple[int, int] | None = None
    ) -> tuple[list[int], list[str]]:
        """Return every process's status and what it printed; ``terminate`` is a rank and a step."""
        order = {"world": world, "arguments": arguments, "cwd": str(cwd), "port": free_port(), "log": str(self.log)}
        self.driver.stdin.write(json.dumps({**order, "terminate": terminate}) + "\n")
        self.driver.stdin.flush()
        statuses = json.loads(self.driver.stdout.readline())
        return statuses, [Path(f"{self.log}{rank}").read_text() for rank in range(world)]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("driver"))
    yield runner
    runner.driver.stdin.close()
    assert runner.driver.wait(timeout=30) == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(worker: Runner, world: int, *arguments: Any, cwd: Path) -> None:
    statuses, output = worker(world, *arguments, cwd=cwd)
    assert statuses == [0] * world, output


def assert_close_runs(actual: Path, expected: Path, tolerance: float = 1e-10) -> None:
    """Networks and averages agree; the data's order and the random numbers are the very same."""
    assert newest_checkpoint(actual).name == newest_checkpoint(expected).name
    (tensors, _), (wanted, _) = (read_checkpoint(newest_checkpoint(run)) for run in (actual, expected))
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name == "random.torch":
            assert torch.equal(tensors[name], tensor)
        elif tensor.is_floating_point():
            assert (tensors[name] - tensor).abs().max() <= tolerance, name
    for record, wanted_record in zip(metrics_of(actual), metrics_of(expected), strict=True):
        for key, value in wanted_record.items():
            assert record[key] == pytest.approx(value, abs=1e-8), key


CASES = {
    "wgan-gp": {"n_critic": 3},
    "lazy penalty on a part, four passes, cosine, tracked": {
        "n_critic": 3, "penalty_every": 2, "engine": "four_pass", "schedule": "cosine", "generate_ahead": False,
        "penalty_samples": 4,
        "track": 20,
    },
    "augmented images": {"flip": True, "augment": ["color", "translation", "cutout"], "n_critic": 2},
    "r1": {"method": "r1"},
    "conditional": {"conditional": True, "n_critic": 2, "engine": "four_pass"},
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name == "r1")) for name in CASES])
def test_two_processes_equal_one_with_the_same_batch_for_fifty_iterations(worker, tmp_path, case):
    for world in (1, 2):
        run(worker, world, "train", f"run{world}", 50, 12, CASES[case], cwd=tmp_path)
    assert_close_runs(tmp_path / "run2", tmp_path / "run1")
    one, two = (sorted(path.name for path in (tmp_path / f"run{world}").iterdir()) for world in (1, 2))
    assert one == two


def test_divergence_at_a_step_that_is_rated_sends_every_process_back(worker, tmp_path):
    """Only process 0 rates; the others must look at the losses of that step all the same."""
    options = {"engine": "autograd", "n_critic": 2, "log_every": 100, "sample_every": 100, "track": 5}
    options |= {"checkpoint_every": 2, "on_divergence": "rewind"}
    statuses, output = worker(2, "diverge", 5, "run", 8, 12, options, cwd=tmp_path)
    assert statuses == [0, 0], output
    assert "diverged at step 5: the generator's loss is nan; going back to step 4" in output[0]
    assert newest_checkpoint(tmp_path / "run").name == "step-00000008.safetensors"
    assert [(record["step"], record.get("rewinds")) for record in metrics_of(tmp_path / "run")] == [(5, 1), (8, 1)]


def test_checkpoint_goes_on_with_more_and_with_fewer_processes(worker, tmp_path):
    options = {"n_critic": 2, "checkpoint_every": 3}
    run(worker, 1, "train", "whole", 9, 12, options, cwd=tmp_path)
    run(worker, 1, "train", "run", 3, 12, options, cwd=tmp_path)
    run(worker, 3, "train", "run", 6, 12, options, True, cwd=tmp_path)
    run(worker, 2, "train", "run", 9, 12, options, True, cwd=tmp_path)
    assert_close_runs(tmp_path / "run", tmp_path / "whole")


def test_dropped_in_penalty_under_data_parallel_equals_one_process(worker, tmp_path):
    for world in (1, 2):
        run(worker, world, "loop", f"critic{world}.npy", 12, 50, cwd=tmp_path)
    one, two = (np.load(tmp_path / f"critic{world}.npy") for world in (1, 2))
    assert np.abs(one - two).max() <= 1e-10


SMALL = [*TINY[:6], "--batch-size", "6", "--n-critic", "2", "--log-every", "1", "--engine", "autograd"]


def test_termination_of_one_process_stops_and_saves_all_at_the_same_step(worker, tmp_path):
    arguments = ["command", "train", *SMALL, "--steps", "8", "--checkpoint-every", "100", "--out", "run"]
    statuses, output = worker(2, *arguments, cwd=tmp_path, terminate=(1, 3))
    assert statuses == [143, 143], output
    # The step after the signal is the first one that tells the others.
    assert newest_checkpoint(tmp_path / "run").name == "step-00000004.safetensors"
    run(worker, 2, "command", "train", "--resume", "run", cwd=tmp_path)
    run(worker, 2, *arguments[:-1], "whole", cwd=tmp_path)
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "5", "--out", "run"], "batch_size must be a multiple of the 2 processes, got 5"),
        (
            ["--batch-size", "6", "--penalty-samples", "3", "--out", "run"],
            "penalty_samples must be a multiple of the 2 processes, got 3",
        ),
        (["--batch-size", "6"], "out must be given where several processes train together"),
        (["--batch-size", "6", "--out", "run", "--cuda-graph"], "cuda_graph is for one process"),
    ],
)
def test_settings_that_processes_cannot_share_are_refused_by_each(worker, tmp_path, arguments, message):
    statuses, output = worker(2, "command", "train", *TINY[:6], *arguments, "--steps", "1", cwd=tmp_path)
    assert statuses == [2, 2], output
    assert all(message in each.splitlines()[-1] for each in output), output
    assert not (tmp_path / "run").exists()


def assert_same_bits(actual: Path, expected: Path) -> None:
    """The same sums in the same order."""
    (tensors, structure), (wanted, wanted_structure) = (
        read_checkpoint(newest_checkpoint(run)) for run in (actual, expected)
    )
    assert [name for name in wanted if not same_bits(tensors[name], wanted[name])] == []
    assert structure == wanted_structure


# Under torchrun


def torchrun(*arguments: object, cwd: Path, restarts: int = 0) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    launcher.append(f"--max-restarts={restarts}")
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "wgan_fast", *map(str, arguments)], cwd=cwd, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kill_a_rank(launcher: subprocess.Popen[str], run: Path, step: int) -> None:
    """Kill rank 1 with SIGKILL once ``step`` is saved."""
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/*.json")) or newest_checkpoint(run).name < f"step-{step:08d}":
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {environment_of(int(child)).get("RANK"): int(child) for child in children}
    os.kill(ranks["1"], signal.SIGKILL)


def environment_of(process: int) -> dict[str, str]:
    entries = Path(f"/proc/{process}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def test_rank_that_dies_ends_the_job_with_a_message(tmp_path):
    arguments = ["train", *SMALL, "--steps", "100000", "--checkpoint-every", "2", "--out", "run"]
    launcher = torchrun(*arguments, cwd=tmp_path)
    kill_a_rank(launcher, tmp_path / "run", 4)
    _, error = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    lines = [line for line in error.splitlines() if "wgan-fast: error: " in line]
    assert len(lines) == 1, error
    assert "process 0 of 2 lost another one: " in lines[0]
    assert lines[0].endswith("train goes on with --resume and the run's folder")


@pytest.mark.slow
def test_torchrun_restarts_after_a_rank_died_and_ends_where_an_undisturbed_run_does(tmp_path):
    arguments = ["train", *SMALL, "--steps", "60", "--checkpoint-every", "2"]
    whole = torchrun(*arguments, "--out", "whole", cwd=tmp_path)
    output, error = whole.communicate(timeout=240)
    assert whole.returncode == 0, error
    assert output.count("images per second") == 1  # one summary, of one of them
    disturbed = torchrun(*arguments, "--out", "run", cwd=tmp_path, restarts=1)
    kill_a_rank(disturbed, tmp_path / "run", 4)
    _, error = disturbed.communicate(timeout=240)
    assert disturbed.returncode == 0, error
    assert "resuming after step" in error
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


# Rows


@pytest.mark.parametrize("source", ["8gaussians", "array", "stream"])
def test_shares_of_every_batch_make_the_whole_one(source):
    data: Any = source
    if source != "8gaussians":
        values = torch.arange(44.0).view(22, 2)
        data = values if source == "array" else torch.utils.data.TensorDataset(values)
    split = load_data(data, holdout=0.0).train
    replicas = [Replicas() for _ in range(3)]
    for rank, replica in enumerate(replicas):
        replica.rank, replica.world = rank, 3
    shares = [batches(split, 6, seed=1, start=2, part=replica.rows(6)) for replica in replicas]
    whole = batches(split, 6, seed=1, start=2)
    for _ in range(70):  # more than a block of toy data, and many epochs
        assert torch.equal(torch.cat([next(share) for share in shares]), next(whole))


def test_only_a_processs_own_samples_are_read():
    reads: list[int] = []

    class Counting(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> torch.Tensor:
            reads.append(index)
            return torch.full((2,), float(index))

    split = load_data(Counting(), holdout=0.0).train
    reads.clear()
    part = batches(split, 10, seed=0, part=slice(5, 10))
    seen = torch.cat([next(part) for _ in range(2)])
    assert sorted(reads) == sorted(seen[:, 0].int().tolist())
    assert len(set(reads)) == 10


def test_a_process_of_its_own_exchanges_nothing():
    network = nn.Linear(2, 1)
    network(torch.ones(1, 2)).sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    figures = (torch.tensor(1.0),)
    assert Replicas().average_gradients("critic", list(network.parameters()), figures) == figures
    assert all(parameter.grad is gradient for parameter, gradient in zip(network.parameters(), gradients))
    assert Replicas().rows(7) == slice(0, 7)
