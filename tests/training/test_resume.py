"""A run that is killed at any instant resumes to the very same end, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import ENVIRONMENT, TINY, assert_same_checkpoint, assert_same_run, metrics_of, newest_checkpoint, tensors_of

from wgan_fast.training.cli import main

KILLED = -signal.SIGKILL

DRIVER = '''
"""Runs the command line in forked processes and kills them when told: imports, seconds each, are paid once."""

import json, os, pathlib, random, signal, sys, time, traceback

import numpy as np
import ot, torch, torch._dynamo, torch.utils.tensorboard  # what training imports late

import wgan_fast.training.curves, wgan_fast.training.data, wgan_fast.training.quality
from wgan_fast.training import cli

# A classifier of few steps, and few samples to rate with it, in a cache of these tests' own.
os.environ["XDG_CACHE_HOME"] = sys.argv[1]
wgan_fast.training.quality._STEPS, wgan_fast.training.quality._TRACKED = 10, 50

# Drawn after the last checkpoint, the curves would take most of the time of runs as small as these.
wgan_fast.training.curves.save_curves = lambda records, path, **options: path.write_bytes(b"")


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def die_at_disk_call(last):
    """Die at the given change of the disk, counted from 1: before it, or in the middle of a write."""
    calls = 0

    def counted():
        nonlocal calls
        calls += 1
        return calls == last

    def before(function):
        def call(*arguments, **options):
            if counted():
                die()
            return function(*arguments, **options)
        return call

    for name in ("fsync", "replace", "unlink", "mkdir"):
        setattr(os, name, before(getattr(os, name)))
    opened = pathlib.Path.open

    def open_torn(self, mode="r", *arguments, **options):
        file = opened(self, mode, *arguments, **options)
        if mode == "wb":
            write = file.write
            def torn(body):
                if counted():
                    write(body[: len(body) // 2])
                    file.flush()
                    die()
                return write(body)
            file.write = torn
        return file

    pathlib.Path.open = open_torn


def logged(run):
    """How many lines of metrics a run has written."""
    path = pathlib.Path(run, "metrics.jsonl")
    return path.read_bytes().count(b"\\n") if run and path.exists() else 0


def child(order):
    out = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(order["cwd"])
    # A process of its own would not share the parent's random numbers.
    random.seed(), np.random.seed(), torch.seed()
    if order["resident_bytes"] is not None:
        wgan_fast.training.data.splits.RESIDENT_BYTES = order["resident_bytes"]
    if order["disk_call"] is not None:
        die_at_disk_call(order["disk_call"])
    try:
        cli.main(order["arguments"])
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    order = json.loads(line)
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(order)
    if order["seconds"] is not None:
        due = None
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if due is None and logged(order["log_of"]) >= order["lines"]:
                due = time.monotonic() + order["seconds"]
            if due is not None and time.monotonic() >= due:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.0005)
    _, status = os.waitpid(pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - start]), flush=True)
'''


@dataclass(frozen=True)
class Ended:
    status: int
    seconds: float
    output: str


class Runner:
    """Talks to the driver."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(log.with_name("cache"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def __call__(
        self,
        *arguments: object,
        cwd: Path,
        seconds: float | None = None,
        after: tuple[Path, int] | None = None,
        disk_call: int | None = None,
        resident_bytes: int | None = None,
    ) -> Ended:
        """Run the command line; kill it after ``seconds``, or at the n-th change of the disk.

        ``after`` is a run's folder and the lines of metrics from which the seconds count; None means from the start.
        """
        log_of, lines = ("", 0) if after is None else after
        order = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "log": str(self.log),
            "seconds": seconds,
            "log_of": str(log_of),
            "lines": lines,
            "disk_call": disk_call,
            "resident_bytes": resident_bytes,
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        status, elapsed = json.loads(self.process.stdout.readline())
        return Ended(status, elapsed, self.log.read_text())


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("driver") / "log")
    yield runner
    runner.process.stdin.close()
    assert runner.process.wait(timeout=30) == 0


def finish(cli: Runner, command: list[str], out: Path, cwd: Path, **options: Any) -> None:
    """Go on with an interrupted run to its end: resume it, or begin again where it had not begun."""
    started = (out / "config.json").exists()
    ended = cli(*(["train", "--resume", out] if started else [*command, "--out", out]), cwd=cwd, **options)
    assert ended.status == 0, ended.output
    assert not list(out.glob("**/.step-*.tmp"))


# Killed at random instants

STEPS = 30
# Autograd, because preparing the four passes would take most of the time of a short run; the variants below use them.
COMMAND = [
    "train",
    *TINY,
    "--engine",
    "autograd",
    "--steps",
    str(STEPS),
    "--checkpoint-every",
    "1",
    "--keep",
    "2",
    "--sample-every",
    "10",
]


@pytest.fixture(scope="module")
def undisturbed(cli: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A whole run, and the seconds it took (the second time, when every cache was warm)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("first", "second"):
        ended = cli(*COMMAND, "--out", folder / name, cwd=folder)
        assert ended.status == 0, ended.output
    return folder / "second", ended.seconds


def test_two_runs_with_one_seed_are_equal_bit_for_bit(undisturbed):
    out, _ = undisturbed
    assert_same_run(out, out.with_name("first"))


def test_another_seed_makes_another_run(cli, undisturbed, tmp_path):
    out, _ = undisturbed
    assert cli(*COMMAND, "--seed", "1", "--out", tmp_path / "run", cwd=tmp_path).status == 0
    assert tensors_of(tmp_path / "run", "critic.")["0.weight"].ne(tensors_of(out, "critic.")["0.weight"]).all()
    assert metrics_of(tmp_path / "run")[0]["critic_loss"] != metrics_of(out)[0]["critic_loss"]


def kill_at_random(
    cli: Runner, undisturbed: tuple[Path, float], folder: Path, kills: int, command: list[str] = COMMAND
) -> None:
    """Kill a run at an instant drawn from each of ``kills`` equal parts of its duration, and resume it."""
    expected, duration = undisturbed
    draw = random.Random(kills)
    killed_while_training = 0
    for kill in range(kills):
        out = folder / f"{kill}"
        instant = (kill + draw.random()) / kills * duration
        ended = cli(*command, "--out", out, cwd=folder, seconds=instant)
        assert ended.status in (KILLED, 0), ended.output
        reached = newest_checkpoint(out).name if list(out.glob("checkpoints/*.safetensors")) else ""
        killed_while_training += ended.status == KILLED and "" < reached < newest_checkpoint(expected).name
        finish(cli, command, out, folder)
        assert_same_run(out, expected)
        shutil.rmtree(out)
    # The kills must have hit what the promise is about, also where the machine was slower than at the measurement.
    assert killed_while_training >= kills / 10


def test_run_killed_at_twenty_random_instants_resumes_bit_for_bit(cli, undisturbed, tmp_path):
    kill_at_random(cli, undisturbed, tmp_path, 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_killed_at_two_hundred_random_instants_resumes_bit_for_bit(cli, undisturbed, tmp_path):
    kill_at_random(cli, undisturbed, tmp_path, 200)


EVERY_OPTION = [
    "train", *TINY, "--engine", "four_pass", "--cuda-graph", "--channels-last", "--precision", "bf16",
    "--batch-size", "6", "--penalty-every", "3", "--penalty-samples", "3", "--schedule", "cosine",
    "--on-divergence", "rewind", "--steps", "80", "--checkpoint-every", "3", "--sample-every", "20", "--track", "4",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_with_every_option_killed_at_fifty_random_instants_resumes_bit_for_bit(cli, tmp_path):
    """At every instant from the first iteration on, also while samples are rated and checkpoints written."""
    whole, out, draw = tmp_path / "whole", tmp_path / "run", random.Random(0)
    ended = cli(*EVERY_OPTION, "--out", whole, cwd=tmp_path)
    assert ended.status == 0, ended.output
    steps, longest = len(metrics_of(whole)), 0.05  # seconds; an iteration with a picture takes about as long
    writing = 0
    for kill in range(50):
        # Always within the training: the first line of metrics is there, and many iterations are to come.
        after = out, 1 + kill * (steps - 10) // 50
        ended = cli(*EVERY_OPTION, "--out", out, cwd=tmp_path, seconds=draw.uniform(0, longest), after=after)
        assert ended.status == KILLED, ended.output
        assert after[1] <= len((out / "metrics.jsonl").read_text().splitlines()) < steps
        writing += bool(list(out.glob("**/.*.tmp")))
        finish(cli, EVERY_OPTION, out, tmp_path)
        assert_same_run(out, whole)
        shutil.rmtree(out)
    print(f"{writing} of 50 kills left a file half written")


def test_run_killed_again_and_again_resumes_bit_for_bit(cli, undisturbed, tmp_path):
    expected, duration = undisturbed
    out, draw, kills = tmp_path / "run", random.Random(1), 0
    while kills < 12:
        started = (out / "config.json").exists()
        command = ["train", "--resume", out] if started else [*COMMAND, "--out", out]
        ended = cli(*command, cwd=tmp_path, seconds=draw.uniform(0.1, 0.4) * duration)
        assert ended.status in (KILLED, 0), ended.output
        if ended.status == 0:
            break
        kills += 1
    assert kills >= 2
    finish(cli, COMMAND, out, tmp_path)
    assert_same_run(out, expected)


# Killed inside a write

SHORT = ["train", *TINY, "--engine", "autograd", "--steps", "2", "--checkpoint-every", "1", "--keep", "1"]


@pytest.fixture(scope="module")
def short(cli: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    assert cli(*SHORT, "--out", folder / "run", cwd=folder).status == 0
    return folder / "run"


def test_run_killed_at_every_change_of_the_disk_resumes_bit_for_bit(cli, short, tmp_path):
    """Before every fsync, rename, removal and new folder, and half-way through every file's content."""
    call = 0
    while True:
        call += 1
        out = tmp_path / f"{call}"
        ended = cli(*SHORT, "--out", out, cwd=tmp_path, disk_call=call)
        if ended.status == 0:
            break
        assert ended.status == KILLED, ended.output
        finish(cli, SHORT, out, tmp_path)
        assert_same_run(out, short)
        shutil.rmtree(out)
    # Two checkpoints of two files, each written, synced, renamed and its folder synced; one of them removed.
    assert call > 2 * 8 + 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_resumed_run_killed_at_every_change_of_the_disk_resumes_bit_for_bit(cli, short, tmp_path):
    interrupted = tmp_path / "interrupted"
    assert cli(*SHORT, "--out", interrupted, cwd=tmp_path, disk_call=24).status == KILLED
    call = 0
    while True:
        call += 1
        out = Path(shutil.copytree(interrupted, tmp_path / f"{call}"))
        ended = cli("train", "--resume", out, cwd=tmp_path, disk_call=call)
        if ended.status == 0:
            break
        assert ended.status == KILLED, ended.output
        finish(cli, SHORT, out, tmp_path)
        assert_same_run(out, short)
        shutil.rmtree(out)
    assert call > 10


def test_line_of_metrics_cut_short_is_written_again(cli, short, tmp_path):
    out = tmp_path / "run"
    assert cli(*SHORT, "--out", out, cwd=tmp_path, disk_call=24).status == KILLED
    metrics = out / "metrics.jsonl"
    assert len(metrics_of(out)) == 2
    assert newest_checkpoint(out).name == "step-00000001.safetensors"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    finish(cli, SHORT, out, tmp_path)
    assert_same_run(out, short)


def test_resuming_a_finished_run_changes_nothing(cli, short, tmp_path):
    out = Path(shutil.copytree(short, tmp_path / "run"))
    finish(cli, SHORT, out, tmp_path)
    assert_same_run(out, short)


# Whatever the run is made of

OWN_NETWORKS = '''
import random

import numpy as np
import torch
from torch import nn


class Restless(nn.Module):
    """Draws from the generators of Python and NumPy at every forward, and keeps state in buffers."""

    latent_dim = 3

    def __init__(self, units, shape):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, units), nn.Unflatten(1, shape)
        )
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.scale = nn.Parameter(torch.tensor(random.random() + np.random.rand()))

    def forward(self, z):
        if self.training:
            self.calls += 1
        # In eval mode too, as StyleGAN's noise does: looking at samples must not move the training's numbers.
        z = z * (1 + 0.1 * random.gauss(0, 1)) + 0.1 * float(np.random.standard_normal()) + 0.1 * torch.randn_like(z)
        return (self.scale * self.layers(z)).tanh()


def restless(shape):
    units = int(np.prod(shape))
    return Restless(units, shape), nn.Sequential(nn.Flatten(), nn.Linear(units, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def dropout(shape):
    units = int(np.prod(shape))
    critic = nn.Sequential(
        nn.Flatten(), nn.Linear(units, 8), nn.LeakyReLU(0.2), nn.Dropout(0.4), nn.Linear(8, 8), nn.ReLU(),
        nn.Dropout(0.2), nn.Linear(8, 1),
    )
    return Restless(units, shape), critic
'''

OWN = ["--data", "digits", "--batch-size", "5", "--n-critic", "2"]
TOY = ["--data", "8gaussians", "--width", "4", "--batch-size", "7"]
VARIANTS = {
    "dropout in the critic": [*OWN, "--model", "own_networks:dropout"],
    "networks that draw from Python and NumPy": [*OWN, "--model", "own_networks:restless"],
    "linear schedule": [*TINY, "--schedule", "linear"],
    "cosine schedule": [*TINY, "--schedule", "cosine", "--generator-learning-rate", "0.01"],
    "no average": [*TINY, "--ema", "0"],
    "toy data": TOY,
    "toy data, wgan-lp": [*TOY, "--method", "wgan-lp"],
    "wgan-clip": [*TINY, "--method", "wgan-clip"],
    "r1": [*TINY, "--method", "r1"],
    "dragan": [*TINY, "--method", "dragan"],
    "hinge with spectral norm": [*TINY, "--method", "hinge"],
    "lazy penalty": [*TINY, "--penalty-every", "3"],
    "penalty on a part": [*TINY, "--batch-size", "6", "--penalty-samples", "2", "--penalty-every", "3"],
    "augmentation": [*TINY, "--flip", "--augment", "translation", "cutout", "color"],
    "static buffers": [*TINY, "--cuda-graph", "--schedule", "cosine"],
    "plain options": [*TINY, "--no-fused", "--no-generate-ahead"],
    "bfloat16": [*TINY, "--precision", "bf16"],
    "no data held out": [*TINY, "--holdout", "0"],
    "tracking": [*TINY, "--track", "2"],
    "tracking, toy data": [*TOY, "--track", "1"],
    "folder of images": [*TINY, "--data", "images"],
    "streamed folder": [*TINY, "--data", "images"],
    "streamed folder, decoded by a process": [*TINY, "--data", "images", "--workers", "1"],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with networks of one's own and with 23 images of 8 x 8."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "own_networks.py").write_text(OWN_NETWORKS)
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_run_resumes_bit_for_bit_with(cli, workplace, tmp_path, variant):
    # Killed within the checkpoint of step 6, it goes on from step 3. 23 images make several epochs of these steps.
    command = ["train", *VARIANTS[variant], "--steps", "8", "--checkpoint-every", "3"]
    options = {"cwd": workplace, "resident_bytes": 0 if variant.startswith("streamed") else None}
    ended = cli(*command, "--out", tmp_path / "whole", **options)
    assert ended.status == 0, ended.output
    assert cli(*command, "--out", tmp_path / "killed", disk_call=22, **options).status == KILLED
    assert newest_checkpoint(tmp_path / "killed").name in ("step-00000003.safetensors", "step-00000006.safetensors")
    finish(cli, command, tmp_path / "killed", **options)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert bool(tensors_of(tmp_path / "whole", "ema.")) == (variant != "no average")


@pytest.mark.parametrize("networks", ["own_networks:restless", "mlp"])
def test_extended_run_equals_one_that_was_planned_longer(cli, workplace, tmp_path, networks):
    # The shorter run draws its last picture where the longer one draws none.
    command = ["train", *OWN, "--model", networks, "--sample-every", "3", "--checkpoint-every", "4"]
    assert cli(*command, "--steps", "8", "--out", tmp_path / "planned", cwd=workplace).status == 0
    assert cli(*command, "--steps", "4", "--out", tmp_path / "extended", cwd=workplace).status == 0
    ended = cli("train", "--resume", tmp_path / "extended", "--steps", "8", cwd=workplace)
    assert ended.status == 0, ended.output
    last = "checkpoints/step-00000008.safetensors"
    assert_same_checkpoint(tmp_path / "extended" / last, tmp_path / "planned" / last)


def test_data_that_has_changed_is_not_trained_on(cli, tmp_path):
    values = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    command = ["train", "--data", tmp_path / "x.npy", "--width", "4", "--batch-size", "5", "--steps", "2"]
    command[2] = "x.npy"
    assert cli(*command, "--out", tmp_path / "run", cwd=tmp_path).status == 0
    (tmp_path / "elsewhere").mkdir()
    assert cli("evaluate", "../run", cwd=tmp_path / "elsewhere").status == 0
    np.save(tmp_path / "x.npy", values[:60])
    for again in (["train", "--resume", tmp_path / "run", "--steps", "4"], ["evaluate", tmp_path / "run"]):
        ended = cli(*again, cwd=tmp_path)
        assert ended.status == 2
        assert "is not what the run was trained on" in ended.output


def test_checkpoints_themselves_do_not_change_the_run(cli, tmp_path):
    command = ["train", *TINY, "--steps", "6"]
    for every in ("1", "4", "100"):
        assert cli(*command, "--checkpoint-every", every, "--out", tmp_path / every, cwd=tmp_path).status == 0
    assert_same_run(tmp_path / "1", tmp_path / "100")
    assert_same_run(tmp_path / "4", tmp_path / "100")


def test_pictures_and_logs_do_not_change_what_is_trained(cli, tmp_path):
    command = ["train", *TINY, "--steps", "6"]
    settings = {"often": ["--sample-every", "1", "--log-every", "1"], "rarely": ["--sample-every", "9"]}
    for name, setting in settings.items():
        assert cli(*command, *setting, "--out", tmp_path / name, cwd=tmp_path).status == 0
    assert_same_checkpoint(newest_checkpoint(tmp_path / "often"), newest_checkpoint(tmp_path / "rarely"))


def test_metrics_reach_the_disk_before_the_checkpoint_that_follows_them(tmp_path, monkeypatch):
    """Else a power cut could leave a checkpoint whose run has lost a part of its curves."""
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    main([*SHORT, "--out", str(tmp_path / "run")])
    for step in (1, 2):
        first = synced.index(f".step-{step:08d}.safetensors.tmp")
        assert "metrics.jsonl" in synced[first - 2 : first]
