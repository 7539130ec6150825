"""What a run shows of itself: a banner, early pictures, how to go on, why it diverged, what is unlikely to train."""

import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY, assert_same_checkpoint, newest_checkpoint, run_process, tensors_of
from torch import Tensor, nn

from wgan_fast.training import TrainConfig, Trainer, trainer
from wgan_fast.training.cli import main
from wgan_fast.training.concerns import last_bounded
from wgan_fast.training.divergence import LossWatch
from wgan_fast.training.log import ProgressLine, duration

pytestmark = pytest.mark.usefixtures("no_curves")

SHORT = ["train", *TINY, "--engine", "autograd"]
METHODS = ["wgan-gp", "wgan-lp", "wgan-clip", "r1", "dragan", "gan", "lsgan", "hinge"]


@pytest.fixture
def failing(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: object, status: int = 2) -> str:
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        error = capfd.readouterr().err
        assert end.value.code == status, error
        assert "Traceback" not in error
        last = error.splitlines()[-1]
        assert last.startswith("wgan-fast: error: ")
        return last

    return run


# The banner


def test_a_run_says_what_it_is_in_aligned_lines_that_a_log_file_keeps(tmp_path):
    ended = run_process(
        "train", *TINY, "--steps", "2", "--loss", "hinge", "--optimizer", "adamw,weight_decay=0.1",
        "--schedule", "linear", "--clip-gradients", "2", "--out", "a run", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    banner = ended.stderr.splitlines()[:6]
    lines = dict(line.split(maxsplit=1) for line in banner)
    assert {line.index(text) for line, text in zip(banner, lines.values())} == {11}
    assert lines["data"] == "digits: 1,617 samples of shape 1x8x8 to train on, 180 held out"
    sizes = {name: sum(tensor.numel() for tensor in tensors_of(tmp_path / "a run", f"{name}.").values())
             for name in ("generator", "critic")}  # fmt: skip
    assert lines["networks"].startswith("article: generator of ")
    assert f"critic of {sizes['critic']:,} parameters, from noise of length 3" in lines["networks"]
    assert lines["method"] == (
        "wgan-gp with loss hinge, penalty 10, 2 critic steps to one of the generator, batches of 5"
    )
    assert lines["optimizer"] == (
        "adamw,weight_decay=0.1, learning rate 0.0001, falling to 0 (linear), gradients clipped to 2"
    )
    assert lines["engine"].startswith("four passes, fp32, cpu with ")
    assert lines["run"] == "a run, 2 steps"


def test_autograd_and_networks_of_ones_own_are_said(tmp_path, capfd):
    config = TrainConfig(steps=1, batch_size=4, engine="autograd", out=tmp_path / "run", method="wgan-clip")
    Trainer(nn.Linear(128, 3), nn.Linear(3, 1), torch.randn(20, 3), config).fit()
    error = capfd.readouterr().err
    assert "your own: generator of 387 parameters, critic of 4 parameters" in error
    assert "autograd, fp32" in error
    assert "weights in [-0.01, 0.01]" in error


def test_a_line_that_goes_back_goes_on() -> None:
    with ProgressLine(10, 4) as line:
        for step in (5, 6, 7, 5, 6, 3, 4):
            line.advance(step, {})


def test_the_rest_is_estimated_from_the_steps_after_the_first(monkeypatch, capfd):
    now = 0.0
    monkeypatch.setattr("wgan_fast.training.log.time.monotonic", lambda: now)
    with ProgressLine(1000, 0) as line:
        now = 60.0  # the first step plans
        line.advance(1, {})
        for step in range(2, 9):
            now += 1.0
            line.advance(step, {})
    error = capfd.readouterr().err
    assert error.count("a step: about") == 1
    assert "1 s a step: about 17 min for the 996 steps to come" in error


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5000, "83 min"), (12000, "3 h 20 min")]
)
def test_times_are_said_as_people_say_them(seconds, said):
    assert duration(seconds) == said


# The first look


def test_first_picture_and_curves_come_by_the_clock(tmp_path, monkeypatch):
    """However far off the next ones are; later curves are spaced by what they cost."""
    monkeypatch.setattr(trainer, "FIRST_LOOK", 0.0)
    drawn = []
    monkeypatch.setattr(
        "wgan_fast.training.curves.save_curves",
        lambda records, path, **options: (drawn.append(len(records)), path.write_bytes(b"curves")),
    )
    monkeypatch.setattr(trainer, "LOOKING", 1e-9)
    out = tmp_path / "run"
    main([*SHORT, "--steps", "6", "--sample-every", "1000", "--log-every", "1", "--out", str(out)])
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-00000001.png", "step-00000006.png"]
    assert Image.open(out / "samples" / "step-00000001.png").size[0] > 100
    assert drawn == [1, 6]  # the second one of them at the end
    monkeypatch.setattr(trainer, "LOOKING", 1e9)
    main([*SHORT, "--steps", "4", "--sample-every", "1000", "--log-every", "1", "--out", str(tmp_path / "often")])
    assert drawn[2:] == [1, 2, 3, 4]


def test_an_early_look_changes_no_bit_of_the_training(tmp_path, monkeypatch):
    main([*SHORT, "--steps", "4", "--out", str(tmp_path / "plain")])
    monkeypatch.setattr(trainer, "FIRST_LOOK", 0.0)
    main([*SHORT, "--steps", "4", "--out", str(tmp_path / "looked")])
    assert_same_checkpoint(newest_checkpoint(tmp_path / "looked"), newest_checkpoint(tmp_path / "plain"))


# Ctrl-C


@pytest.mark.usefixtures("real_curves")
def test_ctrl_c_says_the_command_that_goes_on(tmp_path, monkeypatch, failing):
    out = tmp_path / "it's a run"
    put = LossWatch.put

    def interrupted(self, step, result):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return put(self, step, result)

    monkeypatch.setattr(LossWatch, "put", interrupted)
    last = failing(*SHORT, "--steps", "5", "--out", out, status=130)
    assert "stopped after step 3 of 5; go on with: wgan-fast train --resume " in last
    assert (out / "curves.png").stat().st_size > 1000
    monkeypatch.setattr(LossWatch, "put", put)
    words = shlex.split(last.partition("go on with: ")[2])
    assert words[0] == "wgan-fast"
    main(words[1:])
    assert newest_checkpoint(out).name == "step-00000005.safetensors"


# Divergence


def test_an_explosion_of_finite_numbers_ends_with_what_to_try(tmp_path, failing):
    out = tmp_path / "run"
    last = failing("train", "--data", "8gaussians", "--width", "16", "--batch-size", "32", "--learning-rate", "10",
                   "--steps", "40", "--engine", "autograd", "--out", out)  # fmt: skip
    assert "training diverged at step" in last
    assert "a learning rate of 10 where 0.0001 is usual; try --learning-rate 0.0001 or --clip-gradients 1" in last


@pytest.mark.parametrize("method", [method for method in METHODS if method != "wgan-clip"])  # its weights are bounded
def test_a_learning_rate_of_ten_is_told_for_every_method_that_it_breaks(tmp_path, failing, method):
    settings = ["--width", "16", "--batch-size", "16", "--learning-rate", "10", "--steps", "60", "--n-critic", "2"]
    if method == "hinge":
        settings += ["--no-spectral-norm"]
    last = failing("train", "--data", "8gaussians", "--method", method, *settings, "--engine", "autograd",
                   "--out", tmp_path / "run")  # fmt: skip
    assert "training diverged" in last


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.filterwarnings("ignore:.*standardise:RuntimeWarning")
def test_healthy_runs_are_no_alarm_whatever_the_scale_of_the_data(tmp_path, method, scale):
    data = (np.random.default_rng(0).normal(size=(200, 3)) * scale + 3 * scale).astype(np.float32)
    config = TrainConfig(method=method, steps=30, batch_size=16, n_critic=2, engine="autograd", out=tmp_path / "run")
    generator = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 3))
    critic = nn.Sequential(nn.Linear(3, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    assert Trainer(generator, critic, data, config).fit().steps == 30


# What is unlikely to train


class Functional(nn.Module):
    """Ends in a function, not in a layer."""

    def __init__(self, features: int, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.end = nn.Linear(features, 3), end

    def forward(self, noise: Tensor) -> Tensor:
        return self.end(self.layer(noise))


@pytest.mark.parametrize(
    ("end", "named"),
    [
        (torch.tanh, "tanh"),
        (lambda x: x.tanh_(), "tanh"),
        (lambda x: torch.sigmoid(x).reshape(-1, 1, 3), "sigmoid"),
        (nn.functional.softsign, "softsign"),
        (nn.Hardtanh(-2, 2), None),
        (lambda x: torch.tanh(x) * 3, None),
        (lambda x: torch.tanh(x).mul_(3), None),
        (lambda x: torch.tanh(x)[:, :2], None),
        (lambda x: torch.tanh(x).relu() + x, None),
        (lambda x: x, None),
    ],
)
def test_what_a_network_ends_in_is_found_whether_a_layer_or_a_function(end, named):
    assert last_bounded(Functional(5, end), torch.randn(2, 5)) == named


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bounded.py").write_text(
        "from torch import nn\n"
        "def tanh(shape):\n"
        "    generator = nn.Sequential(nn.Linear(4, shape[0]), nn.Tanh()); generator.latent_dim = 4\n"
        "    return generator, nn.Linear(shape[0], 1)\n"
        "def sigmoid(shape):\n"
        "    generator = nn.Linear(4, shape[0]); generator.latent_dim = 4\n"
        "    return generator, nn.Sequential(nn.Linear(shape[0], 1), nn.Sigmoid())\n"
    )
    monkeypatch.chdir(tmp_path)


def test_data_out_of_the_generators_reach_is_said_once(tmp_path, own_model, recwarn):
    for name, scale in (("wide", 4), ("narrow", 0.9)):
        np.save(tmp_path / f"{name}.npy", np.linspace(-scale, scale, 300, dtype=np.float32).reshape(100, 3))
    short = ["--model", "bounded:tanh", "--steps", "1", "--batch-size", "4", "--engine", "autograd"]
    ended = run_process("train", "--data", "wide.npy", *short, "--out", "a", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stderr.splitlines() if "warning" in line]
    assert len(said) == 1
    assert said[0].startswith(
        "wgan-fast: warning: the generator ends in tanh and makes values in [-1, 1], but the data has "
    )
    main(["train", "--data", "narrow.npy", *short, "--out", "b"])
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(("method", "warned"), [("wgan-gp", True), ("gan", True), ("lsgan", False)])
def test_a_critic_that_ends_in_a_sigmoid_is_said(tmp_path, method, warned, recwarn):
    critic = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())
    config = TrainConfig(method=method, steps=1, batch_size=4, engine="autograd", out=tmp_path / "run")
    Trainer(nn.Linear(128, 3), critic, torch.randn(20, 3), config).fit()
    said = [str(warning.message) for warning in recwarn if "the critic ends in" in str(warning.message)]
    assert [text.split(":")[0] for text in said] == ["the critic ends in sigmoid, so its scores lie in [0, 1]"] * warned


def test_the_packages_own_networks_are_no_concern(tmp_path, recwarn):
    for data in ("digits", "8gaussians"):
        main(["train", "--data", data, "--width", "4", "--steps", "1", "--batch-size", "4", "--engine", "autograd",
              "--out", str(tmp_path / data)])  # fmt: skip
    assert [str(warning.message) for warning in recwarn] == []
    assert json.loads((tmp_path / "digits" / "config.json").read_text())["config"]["loss"] == "wasserstein"
