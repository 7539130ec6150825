"""Whatever goes wrong from outside: a clear message, and nothing lost beyond the last checkpoint."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    ENVIRONMENT,
    TINY,
    assert_same_checkpoint,
    assert_same_run,
    metrics_of,
    newest_checkpoint,
    tree,
)
from torch import Tensor, nn
from torch.utils.data import Dataset

from wgan_fast.errors import DivergenceError, InputError
from wgan_fast.training import InterruptedTraining, TrainConfig, Trainer
from wgan_fast.training.checkpoint import load_checkpoint
from wgan_fast.training.cli import main
from wgan_fast.training.data import load_data
from wgan_fast.training.divergence import DivergedError, LossWatch
from wgan_fast.training.stopping import StopRequests

pytestmark = pytest.mark.usefixtures("no_curves")

# Autograd, because preparing the four passes would take most of the time of runs as short as these.
SHORT = ["train", *TINY, "--engine", "autograd", "--steps", "6", "--checkpoint-every", "100"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wgan_fast.training.curves.save_curves", lambda records, path, **options: path.write_bytes(b""))
        main([*SHORT, "--out", str(out)])
    return out


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(5)
    generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    generator.latent_dim = 3
    return generator, nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def points(n: int = 40) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1))


def trainer_of(data: Any, out: Path, **settings: Any) -> Trainer:
    given = {"batch_size": 5, "n_critic": 2, "steps": 6, "log_every": 1, "engine": "autograd", **settings}
    return Trainer(*networks(), data, TrainConfig(out=out, **given))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Call ``act`` when an iteration has been taken, before anything is written about it."""
    put = LossWatch.put

    def acting(self: LossWatch, now: int, result: Any) -> float:
        if now == step:
            act()
        return put(self, now, result)

    monkeypatch.setattr(LossWatch, "put", acting)


def fails(arguments: list[str], status: int, capfd: pytest.CaptureFixture[str]) -> str:
    """Run the command line, which must exit with ``status`` and one line about the error; returns the line."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capfd.readouterr().err
    assert end.value.code == status, error
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith("wgan-fast: error: ")
    return last


# Signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_the_iteration_and_ends(whole, tmp_path, monkeypatch, capfd, number, status):
    out = str(tmp_path / "run")
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    last = fails([*SHORT, "--out", out], status, capfd)
    assert last == f"wgan-fast: error: stopped after step 3 of 6; go on with: wgan-fast train --resume {out}"
    assert newest_checkpoint(Path(out)).name == "step-00000003.safetensors"
    monkeypatch.undo()
    main(["train", "--resume", out])
    assert_same_run(Path(out), whole)


def test_signal_handlers_are_put_back(tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedTraining, match=r"stopped after step 2 of 6; go on with fit\(resume") as stop:
        trainer_of(points(), tmp_path / "run").fit()
    assert stop.value.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_second_signal_does_not_wait():
    with StopRequests() as stop:
        with pytest.raises(InterruptedTraining):
            os.kill(os.getpid(), signal.SIGINT)
        stop.nothing_to_save = False
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signal_in_the_last_iteration_lets_it_finish(whole, tmp_path, monkeypatch):
    at_step(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    main([*SHORT, "--out", str(tmp_path / "run")])
    assert_same_run(tmp_path / "run", whole)


def test_terminated_process_is_saved_within_seconds(tmp_path):
    """Also with processes that decode images, which the signal reaches as well."""
    (tmp_path / "images").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    arguments = [*TINY, "--data", "images", "--steps", "100000", "--checkpoint-every", "100000"]
    starter = "import wgan_fast.training.data.splits as d, wgan_fast.training.cli as c; d.RESIDENT_BYTES = 0; c.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", starter, "train", *arguments, "--workers", "1", "--out", "run"],
        cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert time.monotonic() - begun < 20  # it takes about one; a shared machine is slower
    assert "Traceback" not in error
    steps = [record["step"] for record in metrics_of(tmp_path / "run")]
    assert load_checkpoint(tmp_path / "run").step >= max(steps)


# Disks


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system of ``size`` bytes; skip where that is not allowed."""
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("cannot mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk_ends_with_a_message_and_room_lets_the_run_go_on(whole, tmp_path, monkeypatch, capfd):
    with small_disk(tmp_path / "disk", 4 << 20):
        out, filler = tmp_path / "disk" / "run", tmp_path / "disk" / "filler"

        def fill() -> None:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        at_step(monkeypatch, 4, fill)
        arguments = [*SHORT, "--checkpoint-every", "1", "--keep", "2", "--out", str(out)]
        last = fails(arguments, 2, capfd)
        assert "No space left on device" in last
        assert f"{out} cannot be written at step 4" in last
        assert f"the last good checkpoint is {out}/checkpoints/step-00000003.safetensors" in last
        assert load_checkpoint(out).step == 3
        # Still full: it says so again, and leaves everything as it was.
        before = tree(out / "checkpoints")
        assert "No space left" in fails(["train", "--resume", str(out)], 2, capfd)
        assert tree(out / "checkpoints") == before
        filler.unlink()
        monkeypatch.undo()
        main(["train", "--resume", str(out)])
        assert_same_run(out, whole)


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from wgan_fast.training.cli import main
main()
"""


def test_file_that_may_not_grow_ends_with_a_message(whole, tmp_path):
    """What a quota does; it needs no privileges."""
    size = newest_checkpoint(whole).stat().st_size
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(size - 1), *SHORT, "--sample-every", "100", "--out", "run"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "run cannot be written at step 6" in ended.stderr.splitlines()[-1]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_folder_that_became_read_only_is_named_and_loses_nothing(whole, tmp_path, capfd):
    with small_disk(tmp_path / "disk", 4 << 20):
        out = tmp_path / "disk" / "run"
        shutil.copytree(whole, out)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        before = tree(out)
        last = fails(["train", "--resume", str(out), "--steps", "8"], 2, capfd)
        assert f"out {out} cannot be written: Read-only file system" in last
        assert f"out {tmp_path}/disk/new cannot be written" in fails(
            [*SHORT, "--out", str(tmp_path / "disk" / "new")], 2, capfd
        )
        assert tree(out) == before


# Data


class Vanishing(Dataset[Tensor]):
    """A set whose items cannot be read any more after a number of reads."""

    def __init__(self, reads: int, error: Exception) -> None:
        self.data, self.left, self.error = points(), reads, error

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.data[index]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "x.png"), RuntimeError("worker is gone")])
def test_data_that_goes_away_leaves_the_last_whole_iteration_saved(tmp_path, error):
    whole = trainer_of(Vanishing(10**9, error), tmp_path / "whole", holdout=0.0)
    whole.fit()
    data = Vanishing(10**9, error)
    trainer = trainer_of(data, tmp_path / "run", holdout=0.0)
    data.left = 3 * 2 * 5 + 7  # into the fourth iteration
    with pytest.raises((InputError, RuntimeError)) as raised:
        trainer.fit()
    said = " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert "after step 3" in said
    assert "step-00000003.safetensors" in said
    again = trainer_of(Vanishing(10**9, error), tmp_path / "run", holdout=0.0)
    again.fit(resume=True)
    assert_same_checkpoint(newest_checkpoint(tmp_path / "run"), newest_checkpoint(tmp_path / "whole"))


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_disappears_is_named_and_the_run_goes_on_once_it_is_back(tmp_path, monkeypatch, capfd, workers):
    images = tmp_path / "images"
    images.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(images / f"{index}.png")
    monkeypatch.setattr("wgan_fast.training.data.splits.RESIDENT_BYTES", 0)
    arguments = [*SHORT, "--data", str(images), "--workers", str(workers), "--steps", "9", "--holdout", "0"]
    main([*arguments, "--out", str(tmp_path / "whole")])
    out = tmp_path / "run"
    at_step(monkeypatch, 2, lambda: (images / "3.png").rename(tmp_path / "3.png"))
    last = fails([*arguments, "--out", str(out)], 2, capfd)
    assert "3.png" in last
    assert "the data cannot be read after step" in last
    assert newest_checkpoint(out).name in last
    monkeypatch.undo()
    monkeypatch.setattr("wgan_fast.training.data.splits.RESIDENT_BYTES", 0)
    (tmp_path / "3.png").rename(images / "3.png")
    main(["train", "--resume", str(out)])
    assert_same_checkpoint(newest_checkpoint(out), newest_checkpoint(tmp_path / "whole"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_data_is_named_before_or_while_training(tmp_path, bad):
    values = points()
    values[17, 2] = bad
    with pytest.raises(InputError, match=r"1 of 160 values are NaN or infinite.*\[17, 2\]"):
        trainer_of(values, tmp_path / "run")
    data = load_data(torch.utils.data.TensorDataset(values), holdout=0.0)
    with pytest.raises(InputError, match=r"TensorDataset\[17\].*NaN or infinite"):
        trainer_of(data, tmp_path / "run", holdout=0.0).fit()


# Divergence


def poison(trainer: Trainer, at: list[int]) -> None:
    """Make a weight infinite before the iterations that are given, once each."""
    iteration, left = trainer._iteration, list(at)
    set_rates = iteration._set_numbers

    def poisoned() -> None:
        set_rates()
        if left and iteration.step == left[0]:
            left.pop(0)
            trainer.critic[0].weight.data[0, 0] = torch.inf

    iteration._set_numbers = poisoned


def test_rewinding_goes_back_and_on_with_half_the_learning_rate(tmp_path, capfd):
    out = tmp_path / "run"
    settings = {"checkpoint_every": 2, "learning_rate": 0.01, "on_divergence": "rewind", "steps": 8}
    trainer = trainer_of(points(), out, **settings)
    poison(trainer, [4, 6])
    trainer.fit()
    records = metrics_of(out)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["learning_rate"] for record in records] == [0.01] * 2 + [0.005] * 2 + [0.0025] * 4
    assert [record.get("rewinds", 0) for record in records] == [0] * 2 + [1] * 2 + [2] * 4
    error = capfd.readouterr().err
    assert "training diverged at step 4" in error
    assert "going back to step 2 with a learning rate of 0.005" in error
    assert "going back to step 4 with a learning rate of 0.0025" in error


def test_rewound_training_is_what_half_the_learning_rate_gives_from_there(tmp_path):
    """Parameters, moments, random numbers and data are those of the checkpoint."""
    settings = {"checkpoint_every": 2, "learning_rate": 2**-6, "steps": 6}
    trainer = trainer_of(points(), tmp_path / "run", on_divergence="rewind", **settings)
    poison(trainer, [4])
    trainer.fit()
    plain = trainer_of(points(), tmp_path / "plain", **{**settings, "steps": 2})
    plain.fit()
    plain = trainer_of(points(), tmp_path / "plain", **settings)
    plain._iteration.optimizers["critic"].param_groups[0]["initial_lr"] /= 2
    plain._iteration.optimizers["generator"].param_groups[0]["initial_lr"] /= 2
    plain.fit(resume=True)
    for network in ("critic", "generator", "ema"):
        states = [getattr(each, network).state_dict() for each in (trainer, plain)]
        assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def test_rewinds_survive_a_restart(tmp_path):
    settings = {"checkpoint_every": 2, "learning_rate": 0.01, "on_divergence": "rewind"}
    trainer = trainer_of(points(), tmp_path / "run", steps=4, **settings)
    poison(trainer, [3])
    trainer.fit()
    again = trainer_of(points(), tmp_path / "run", steps=6, **settings)
    again.fit(resume=True)
    assert metrics_of(tmp_path / "run")[-1]["learning_rate"] == 0.005


def test_rewinding_ends_after_as_many_times_as_were_allowed(tmp_path):
    settings = {"checkpoint_every": 2, "on_divergence": "rewind", "max_rewinds": 2}
    trainer = trainer_of(points(), tmp_path / "run", **settings)
    poison(trainer, [3, 3, 3])
    with pytest.raises(DivergenceError, match=r"step 3: .* is nan; .*step-00000002.safetensors; went back 2 times"):
        trainer.fit()
    assert load_checkpoint(tmp_path / "run").step == 2


def test_nothing_to_go_back_to_is_said(tmp_path):
    trainer = trainer_of(points(), tmp_path / "run", on_divergence="rewind")
    poison(trainer, [1])
    with pytest.raises(DivergenceError, match="no checkpoint was written yet"):
        trainer.fit()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_divergence_on_a_gpu_is_seen_one_iteration_later_and_never_saved(tmp_path):
    trainer = trainer_of(points(), tmp_path / "run", device="cuda", log_every=100, checkpoint_every=2)
    poison(trainer, [3])
    with pytest.raises(DivergenceError, match="step 3"):
        trainer.fit()
    assert trainer.step <= 4
    assert load_checkpoint(tmp_path / "run").step == 2


class FromDevice:
    """Losses whose copy to the host is under way."""

    def __init__(self, watch: LossWatch) -> None:
        self.watch, self.waited = watch, []

    def put(self, step: int, loss: float) -> None:
        from wgan_fast.training.divergence import _Pending

        waited = self.waited
        event = type("Event", (), {"synchronize": lambda self: waited.append(step)})()
        self.watch._pending.append(_Pending(step, torch.tensor([0.0, loss, 0.0, 0.0]), event))
        self.watch._check(leave=1)


def test_losses_on_a_device_are_read_one_iteration_later():
    watch = LossWatch()
    device = FromDevice(watch)
    for step in (1, 2, 3):
        device.put(step, 1.0)
        assert device.waited == list(range(1, step))
    device.put(4, float("nan"))
    with pytest.raises(DivergedError, match="step 4: the critic's loss is nan"):
        device.put(5, 1.0)
    watch.clear()
    device.put(6, float("inf"))
    with pytest.raises(DivergedError, match="step 6"):
        watch.flush()
