"""Every bad input ends in one clear line on standard error, status 2, and nothing left behind."""

import dataclasses
import math
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY, metrics_of, newest_checkpoint, run_process, tensors_of, tree

from wgan_fast.errors import InputError
from wgan_fast.training import Run, TrainConfig, Trainer
from wgan_fast.training.cli import main

pytestmark = pytest.mark.usefixtures("no_curves")

Refused = Callable[..., str]


@pytest.fixture
def refused(workplace: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run the command line, check that it refuses in one line and leaves nothing, and return the line."""

    def run(*arguments: object, unchanged: bool = True) -> str:
        before = tree(workplace)
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert end.value.code == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        if unchanged:
            assert {name: c for name, c in tree(workplace).items() if "__pycache__" not in name} == before
        # A run that began has said what it is, and what it does not use.
        lines = captured.err.splitlines()
        assert len(lines) == 1 or not unchanged, captured.err
        assert lines[-1].startswith("wgan-fast: error: ")
        assert captured.err.count("wgan-fast: ") == 1
        return lines[-1].removeprefix("wgan-fast: error: ")

    return run


def mentions(message: str, *fragments: object) -> None:
    for fragment in fragments:
        assert str(fragment) in message, message


# As a process of its own


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["train", "--data", "nowhere/at/all", "--out", "run"], ["nowhere/at/all", "mnist5k"]),
        (["train", "--data", "nan.npy", "--out", "run"], ["nan.npy", "NaN", "[1, 2]"]),
        (["train", "--learning-rate", "-1", "--out", "run"], ["learning_rate", "-1"]),
        (["sample", "."], ["holds no run"]),
    ],
)
def test_process_refuses_in_one_line_with_status_2(tmp_path, arguments, fragments):
    array = np.zeros((8, 3), dtype=np.float32)
    array[1, 2] = np.nan
    np.save(tmp_path / "nan.npy", array)
    ended = run_process(*arguments, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    mentions(ended.stderr, "wgan-fast: error: ", *fragments)
    assert [path.name for path in tmp_path.iterdir()] == ["nan.npy"]


# Data


def write_image(path: Path, height: int = 8, width: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def empty_folder(path: Path) -> None:
    path.mkdir()


def folder_without_images(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("no image")


def unreadable_image(path: Path) -> None:
    write_image(path / "good.png")
    (path / "torn.png").write_bytes((path / "good.png").read_bytes()[:100])


def not_an_image(path: Path) -> None:
    write_image(path / "good.png")
    (path / "text.jpg").write_text("not an image")


def images_of_two_sizes(path: Path) -> None:
    write_image(path / "a.png", 8, 8)
    write_image(path / "b.png", 8, 9)


def array(values: Any) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, values, allow_pickle=True)

    return save


def with_values(*values: float) -> np.ndarray:
    samples = np.linspace(-1, 1, 60, dtype=np.float32).reshape(20, 3)
    samples[7, : len(values)] = values
    return samples


BAD_DATA = {
    "missing path": ("data", None, ["data", "mnist5k", "8gaussians"]),
    "unknown name": ("mnist6k", None, ["mnist6k", "mnist5k"]),
    "empty folder": ("data", empty_folder, ["holds no images"]),
    "folder without images": ("data", folder_without_images, ["holds no images"]),
    "unreadable image": ("data", unreadable_image, ["torn.png"]),
    "text named as an image": ("data", not_an_image, ["text.jpg"]),
    "images of two sizes": ("data", images_of_two_sizes, ["2 sizes", "8x8", "9x8", "--image-size"]),
    "NaN": ("data.npy", array(with_values(math.nan)), ["NaN", "1 of 60", "[7, 0]"]),
    "infinity": ("data.npy", array(with_values(0, math.inf)), ["infinite", "[7, 1]"]),
    "NaN in images": ("data.npy", array(np.full((20, 1, 8, 8), np.nan, np.float32)), ["NaN", "[0, 0, 0, 0]"]),
    "integers": ("data.npy", array(np.zeros((20, 3), np.int64)), ["int64", "uint8", "floating point"]),
    "complex numbers": ("data.npy", array(np.zeros((20, 3), np.complex64)), ["complex64"]),
    "text": ("data.npy", array(np.array([["a", "b"]] * 20)), ["dtype"]),
    "objects": ("data.npy", array(np.array([{}] * 20, dtype=object)), ["data.npy", "cannot read"]),
    "one dimension": ("data.npy", array(np.zeros(20, np.float32)), ["(20,)", "[N, ...]"]),
    "no samples": ("data.npy", array(np.zeros((0, 3), np.float32)), ["(0, 3)"]),
    "no features": ("data.npy", array(np.zeros((20, 0), np.float32)), ["(20, 0)"]),
    "bytes in five dimensions": ("data.npy", array(np.zeros((9, 1, 2, 2, 2), np.uint8)), ["(9, 1, 2, 2, 2)"]),
    "float images beyond 1": ("data.npy", array(np.full((20, 1, 8, 8), 2, np.float32)), ["2", "[-1, 1]"]),
    "array cut short": (
        "data.npy",
        lambda p: (array(with_values())(p), p.write_bytes(p.read_bytes()[:-9])),
        ["cannot"],
    ),
    "empty array file": ("data.npy", lambda path: path.write_bytes(b""), ["data.npy"]),
    "empty archive": ("data.npz", lambda path: path.write_bytes(b""), ["data.npz"]),
    "archive of arrays of other names": (
        "data.npz",
        lambda path: np.savez(path, a=np.zeros(1), b=np.zeros(1)),
        ["images, data or x", "a, b"],
    ),
    "other file": ("data.txt", lambda path: path.write_text("text"), ["data.txt", ".npy"]),
    "IDX file cut short": (
        "x-images-idx3-ubyte",
        lambda path: path.write_bytes(bytes((0, 0, 8, 3, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0, 0, 2)) + b"\0" * 35),
        ["35", "36"],
    ),
    "IDX file of something else": ("x-images-idx3-ubyte", lambda path: path.write_bytes(b"\1" * 40), ["not an IDX"]),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_is_refused(workplace, refused, kind):
    name, make, fragments = BAD_DATA[kind]
    if make is not None:
        make(workplace / name)
    mentions(refused("train", "--data", name, "--batch-size", "4", "--out", "run"), *fragments)


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_pickled_data_is_not_executed(workplace, refused):
    (workplace / "data.npy").write_bytes(pickle.dumps(Bomb()))
    refused("train", "--data", "data.npy", "--out", "run")
    array(np.array([Bomb()] * 4, dtype=object))(workplace / "data2.npy")
    refused("train", "--data", "data2.npy", "--out", "run")
    pickle.loads((workplace / "data.npy").read_bytes())
    assert (workplace / "executed").exists()  # the bomb was live


@pytest.mark.parametrize("batch_size", [1618, 10**9])
def test_batch_larger_than_the_data_is_refused(refused, batch_size):
    # 1797 digits, of which a tenth is held out.
    message = refused("train", *TINY, "--batch-size", batch_size, "--out", "run")
    mentions(message, "batch_size", "1617", batch_size)


def test_batch_as_large_as_the_data_is_allowed(workplace):
    array(with_values())(workplace / "data.npy")
    main(["train", "--data", "data.npy", "--width", "4", "--batch-size", "18", "--steps", "1", "--out", "run"])


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--holdout", "0.99"], ["holdout", "20"]),
        (["--image-size", "8"], ["image_size"]),
        (["--channels", "1"], ["channels"]),
    ],
)
def test_settings_that_the_data_cannot_meet_are_refused(workplace, refused, arguments, fragments):
    array(with_values())(workplace / "data.npy")
    mentions(refused("train", "--data", "data.npy", *arguments, "--out", "run"), *fragments)


def test_image_that_becomes_unreadable_while_streaming_is_named(workplace, refused, monkeypatch):
    for index in range(20):
        write_image(workplace / "images" / f"{index}.png")
    # Its header is whole, so that only decoding finds it torn.
    torn = workplace / "images" / "3.png"
    torn.write_bytes(torn.read_bytes()[:150])
    monkeypatch.setattr("wgan_fast.training.data.splits.RESIDENT_BYTES", 0)
    arguments = [*TINY, "--data", "images", "--holdout", "0", "--steps", "9", "--out", "run"]
    mentions(refused("train", *arguments, unchanged=False), "3.png")


# Devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_cuda_without_cuda_is_refused(run, refused, command, device):
    arguments = ["--out", "new"] if command == "train" else [run]
    mentions(refused(command, *arguments, "--device", device), f"device {device} is not available", torch.__version__)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps", "meta", "cpu:x", ""])
def test_unknown_device_is_refused(refused, device):
    mentions(refused("train", *TINY, "--device", device, "--out", "run"), "device must be", repr(device))


# The output folder


def test_folder_that_holds_a_run_is_refused(run, refused):
    message = refused("train", *TINY, "--steps", "1", "--out", run)
    mentions(message, f"out {run} already holds a run", f"--resume {run}")


def test_folder_with_checkpoints_of_an_unknown_run_is_refused(run, refused):
    (run / "config.json").unlink()
    mentions(refused("train", *TINY, "--steps", "1", "--out", run), "already holds a run")


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/run", "/proc/self/deep/run"])
def test_folder_that_cannot_be_written_is_refused(workplace, refused, out):
    (workplace / "file").write_text("kept")
    mentions(refused("train", *TINY, "--steps", "1", "--out", out), f"out {out} cannot be written")


@pytest.mark.parametrize("out", ["file/x.png", "/proc/x.png"])
def test_picture_that_cannot_be_written_is_refused(run, refused, out):
    (run.parent / "file").write_text("kept")
    mentions(refused("sample", run, "--grid", "1x1", "--out", out), f"out {out} cannot be written")


# Models


NETWORKS = """
import math

import torch
from torch import nn


class Generator(nn.Module):
    latent_dim = 2

    def __init__(self, shape):
        super().__init__()
        self.linear = nn.Linear(2, math.prod(shape))
        self.shape = shape
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.broken_call = None

    def forward(self, z):
        out = self.linear(z).tanh().view(-1, *self.shape)
        if self.training:
            self.calls += 1
            if self.broken_call is not None and self.calls == self.broken_call:
                return out * math.nan
        return out


def critic(shape, scores=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), scores))


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.what = what

    def forward(self, x):
        return self.what(x * self.weight)


def good(shape):
    return Generator(shape), critic(shape)


not_callable = 3


def one_network(shape):
    return critic(shape)


def three_networks(shape):
    return Generator(shape), critic(shape), critic(shape)


def not_networks(shape):
    return "generator", "critic"


def no_latent_dim(shape):
    return critic(shape), critic(shape)


def two_scores(shape):
    return Generator(shape), critic(shape, scores=2)


def one_score_per_batch(shape):
    return Generator(shape), Returns(lambda x: x.mean())


def score_per_pixel(shape):
    return Generator(shape), Returns(lambda x: x)


def integer_scores(shape):
    return Generator(shape), Returns(lambda x: x.flatten(1).sum(1).int())


def tuple_of_scores(shape):
    return Generator(shape), Returns(lambda x: (x.flatten(1).sum(1), x))


def critic_of_other_features(shape):
    return Generator(shape), nn.Sequential(nn.Flatten(), nn.Linear(7, 1))


def critic_of_other_dimensions(shape):
    return Generator(shape), Returns(lambda x: x.sum(dim=9))


def larger_samples(shape):
    return Generator((*shape[:-1], shape[-1] + 1)), critic(shape)


def flat_samples(shape):
    return Generator((math.prod(shape),)), critic(shape)


def samples_in_a_list(shape):
    generator = Returns(lambda z: [z])
    generator.latent_dim = 2
    return generator, critic(shape)


def generator_of_other_noise(shape):
    generator = Generator(shape)
    generator.latent_dim = 5
    return generator, critic(shape)


def frozen_critic(shape):
    return Generator(shape), critic(shape).requires_grad_(False)


class Branching(nn.Module):
    def __init__(self, units):
        super().__init__()
        self.first, self.last = nn.Linear(units, 4), nn.Linear(4, 1)

    def forward(self, x):
        hidden = self.first(x.flatten(1)).tanh()
        return self.last(hidden * 2 if hidden.sum() > 0 else hidden)


def branching(shape):
    return Generator(shape), Branching(math.prod(shape))


def diverges_in_the_critics_step(shape):
    generator, d = good(shape)
    generator.broken_call = 7
    return generator, d


def diverges_in_the_penalty(shape):
    generator, _ = diverges_in_the_critics_step(shape)
    return generator, nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 4), nn.Tanh(), nn.Linear(4, 1))


def diverges_in_its_own_step(shape):
    generator, d = good(shape)
    generator.broken_call = 8
    return generator, d


def loses_its_gradient(shape):
    generator, d = good(shape)
    steps = []

    def spoil(gradient):
        steps.append(1)
        return gradient * math.nan if len(steps) == 4 else gradient

    generator.linear.weight.register_hook(spoil)
    return generator, d
"""


@pytest.fixture
def networks(workplace: Path) -> Iterator[None]:
    (workplace / "bad_networks.py").write_text(NETWORKS)
    (workplace / "bad_import.py").write_text("import nothing_of_this_name\n")
    yield
    for name in ("bad_networks", "bad_import"):
        sys.modules.pop(name, None)


BAD_MODELS = {
    "resnet": ["resnet", "mnist-dcgan", "package.module:function"],
    "": ["model must be one of"],
    "mnist-dcgan": ["mnist-dcgan", "28, 28", "[1, 8, 8]"],
    "toy-mlp": ["toy-mlp", "vectors", "[1, 8, 8]"],
    "custom": ["given as objects"],
    "no_such_module:build": ["cannot import 'no_such_module'"],
    ":build": ["cannot import ''"],
    "bad_import:build": ["cannot import 'bad_import'", "nothing_of_this_name"],
    "bad_networks:nothing": ["bad_networks", "no function 'nothing'"],
    "bad_networks:": ["no function ''"],
    "bad_networks:not_callable": ["no function 'not_callable'"],
    "bad_networks:one_network": ["(generator, critic)", "Sequential"],
    "bad_networks:three_networks": ["(generator, critic)"],
    "bad_networks:not_networks": ["(generator, critic)"],
    "bad_networks:no_latent_dim": ["latent_dim"],
    "bad_networks:two_scores": ["one score per sample", "[2, 2]"],
    "bad_networks:one_score_per_batch": ["one score per sample", "[]"],
    "bad_networks:score_per_pixel": ["one score per sample", "[2, 1, 8, 8]"],
    "bad_networks:integer_scores": ["floating-point scores", "int32"],
    "bad_networks:tuple_of_scores": ["tensor of scores", "tuple"],
    "bad_networks:critic_of_other_features": ["critic fails on an input of shape [2, 1, 8, 8]", "2x64 and 7x1"],
    "bad_networks:critic_of_other_dimensions": ["critic fails on an input of shape [2, 1, 8, 8]", "9"],
    "bad_networks:larger_samples": ["generator must make samples", "[2, 1, 8, 8]", "[2, 1, 8, 9]"],
    "bad_networks:flat_samples": ["generator must make samples", "[2, 64]"],
    "bad_networks:samples_in_a_list": ["generator must make samples", "list"],
    "bad_networks:generator_of_other_noise": ["generator fails on an input of shape [2, 5]"],
    "bad_networks:frozen_critic": ["critic has no trainable parameters"],
}


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("model", BAD_MODELS)
def test_bad_model_is_refused(refused, model):
    mentions(refused("train", "--data", "digits", "--model", model, "--out", "run"), *BAD_MODELS[model])


def test_batch_too_small_for_batch_norm_is_refused(refused):
    message = refused("train", *TINY, "--batch-size", "1", "--out", "run")
    mentions(message, "generator fails on an input of shape [1, 3]", "more than 1 value per channel")


def test_batch_of_one_is_allowed_without_batch_norm(workplace):
    main(["train", "--data", "digits", "--width", "4", "--batch-size", "1", "--steps", "1", "--out", "run"])
    assert newest_checkpoint(workplace / "run").name == "step-00000001.safetensors"


@pytest.mark.usefixtures("networks")
def test_engine_that_cannot_take_the_critic_is_refused(workplace, capfd):
    arguments = ["train", "--data", "digits", "--model", "bad_networks:branching", "--batch-size", "5", "--out", "run"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--engine", "four_pass"])
    assert end.value.code == 2
    # torch.export itself may print what it could not capture before that.
    last = capfd.readouterr().err.splitlines()[-1]
    mentions(last, "wgan-fast: error: engine four_pass cannot take this critic", "capture")
    assert not (workplace / "run").exists()
    with pytest.warns(RuntimeWarning, match="autograd"):
        main([*arguments, "--steps", "1"])


# Divergence

FEW = ["--data", "digits", "--n-critic", "1", "--batch-size", "5", "--steps", "9", "--log-every", "1"]


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("diverges_in_the_critics_step", "the critic's loss is nan"),
        ("diverges_in_the_penalty", "the gradient penalty is nan"),
        ("diverges_in_its_own_step", "the generator's loss is nan"),
        ("loses_its_gradient", "the generator's linear.weight is not finite"),
    ],
)
def test_divergence_names_step_and_quantity_and_keeps_the_last_good_checkpoint(workplace, refused, function, what):
    arguments = [*FEW, "--model", f"bad_networks:{function}", "--checkpoint-every", "1", "--out", "run"]
    message = refused("train", *arguments, unchanged=False)
    mentions(message, "step 4", what, "last good checkpoint is run/checkpoints/step-00000003.safetensors")
    assert newest_checkpoint(Path("run")).name == "step-00000003.safetensors"
    for name, tensor in tensors_of(Path("run")).items():
        assert tensor.isfinite().all(), name
    assert [record["step"] for record in metrics_of(Path("run"))][:3] == [1, 2, 3]
    main(["sample", "run", "--grid", "1x2"])


@pytest.mark.usefixtures("networks")
def test_divergence_before_the_first_checkpoint_says_so(refused):
    arguments = [*FEW, "--method", "hinge", "--model", "bad_networks:diverges_in_the_critics_step", "--out", "run"]
    message = refused("train", *arguments, unchanged=False)
    mentions(message, "step 4", "the critic's loss is nan", "no checkpoint was written yet")


@pytest.mark.parametrize("method", ["wgan-gp", "gan"])
def test_learning_rate_that_explodes_is_reported_as_divergence(refused, method):
    arguments = [*TINY, "--method", method, "--learning-rate", "1e30", "--steps", "50", "--out", "run"]
    message = refused("train", *arguments, unchanged=False)
    mentions(message, "training diverged at step")


@pytest.mark.usefixtures("networks")
def test_diverged_run_goes_on_from_its_last_good_checkpoint(workplace, refused):
    arguments = [*FEW, "--model", "bad_networks:diverges_in_its_own_step", "--checkpoint-every", "2", "--out", "run"]
    message = refused("train", *arguments, unchanged=False)
    mentions(message, "go on with: wgan-fast train --resume run --on-divergence rewind")
    (workplace / "bad_networks.py").write_text(NETWORKS.replace("broken_call = 8", "broken_call = None"))
    sys.modules.pop("bad_networks")
    shutil.rmtree(workplace / "__pycache__", ignore_errors=True)
    main(["train", "--resume", "run"])
    assert [record["step"] for record in metrics_of(Path("run"))] == list(range(1, 10))
    assert newest_checkpoint(Path("run")).name == "step-00000009.safetensors"


# sample and evaluate


@pytest.mark.parametrize("grid", ["3", "x4", "3x", "0x4", "4x0", "3x-1", "axb", "3 x 4", "3x4x5", "3,4", "", "10000x1"])
def test_bad_grid_is_refused(run, refused, grid):
    mentions(refused("sample", run, f"--grid={grid}"), "grid must be ROWSxCOLUMNS", repr(grid))


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--n", "0", "--out", "a.npy"], ["n must be at least 1, got 0"]),
        (["--n", "-2", "--out", "a.npy"], ["n must be at least 1, got -2"]),
        (["--n", "2"], ["n needs --out", ".npy"]),
        (["--n", "2", "--grid", "1x2", "--out", "a.npy"], ["grid is for a picture", "n writes"]),
        (["--n", "2", "--scores", "--out", "a.npy"], ["scores is for a picture", "n writes"]),
        (["--n", "2", "--interpolate", "--out", "a.npy"], ["interpolate is for a picture", "n writes"]),
        (["--n", "2", "--out", "a.png"], ["out must be a new folder", ".npy or .npz", "a.png"]),
        (["--n", "2", "--out", "a.csv"], ["out must be a new folder", ".npy or .npz", "a.csv"]),
        (["--n", str(10**15), "--out", "a.npy"], ["n 1000000000000000 needs 256000000.0 GB", "left"]),
        (["--n", "2", "--seed", "-1", "--out", "images"], ["seed", "-1"]),
        (["--n", "2", "--out", "run"], ["out run is there already"]),
        (["--n", "2", "--out", "/proc/a.npy"], ["out /proc/a.npy cannot be written"]),
        (["--n", "2", "--out", "/proc/images"], ["out /proc/images cannot be written"]),
        (["--n", "2", "--out", "run/config.json/images"], ["out run/config.json/images cannot be written"]),
        (["--out", "a.npy"], ["out must end in .png", "--n"]),
        (["--interpolate", "--scores"], ["scores", "interpolation"]),
        (["--interpolate", "--grid", "1x5"], ["grid must have at least 2 rows", "1x5"]),
        (["--interpolate", "--out", "walk.gif"], ["out must end in .png", "walk.gif"]),
    ],
)
def test_samples_that_cannot_be_written_so_are_refused(run, refused, arguments, fragments):
    mentions(refused("sample", "run", *arguments), *fragments)


def test_samples_that_are_no_images_are_refused_as_such(workplace, refused):
    main(["train", "--data", "8gaussians", "--width", "4", "--batch-size", "8", "--steps", "1", "--out", "points"])
    message = refused("sample", "points", "--n", "2", "--out", "images")
    mentions(message, "out must end in .npy or .npz", "shape [2]", "got images")
    mentions(refused("sample", "points", "--interpolate"), "interpolate is for images", "shape [2]")


def test_export_that_cannot_be_written_is_refused(run, refused):
    mentions(refused("export", "run", "--out", "/proc/export"), "out /proc/export cannot be written")


@pytest.mark.parametrize("command", [["sample"], ["evaluate"], ["export"], ["train", "--resume"]])
def test_folder_that_holds_no_run_is_refused(workplace, refused, command):
    (workplace / "empty").mkdir()
    for folder in ("empty", "missing"):
        mentions(refused(*command, folder), f"{folder} holds no run", "config.json")


@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
def test_run_without_a_checkpoint_is_refused(run, refused, command):
    shutil.rmtree(run / "checkpoints")
    mentions(refused(command, run), "has no checkpoint yet")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}', b'{"format": 99, "config": {}}',
     b'{"format": 2, "config": [], "sample_shape": [1], "kind": "images"}',
     b'{"format": 2, "config": {"bogus": 1}, "sample_shape": [1], "kind": "images"}',
     b'{"format": 2, "config": {"steps": -1}, "sample_shape": [1], "kind": "images"}'],
)  # fmt: skip
@pytest.mark.parametrize("command", [["sample"], ["train", "--resume"]])
def test_damaged_description_of_a_run_is_refused(run, refused, command, content):
    (run / "config.json").write_bytes(content)
    mentions(refused(*command, run), f"{run / 'config.json'} cannot be read")


@pytest.mark.parametrize("samples", [1, 0, -5])
def test_too_few_samples_to_evaluate_are_refused(run, refused, samples):
    mentions(refused("evaluate", run, "--samples", samples), "samples must be at least 2", samples)


@pytest.mark.parametrize("seed", [-1, 2**64])
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_seed_out_of_range_is_refused(run, refused, command, seed):
    mentions(refused(command, run, "--seed", seed), "seed", seed)


def test_evaluation_without_held_out_data_is_refused(workplace, refused):
    main(["train", *TINY, "--holdout", "0", "--steps", "1", "--out", "run"])
    mentions(refused("evaluate", "run"), "holdout 0")


def test_evaluation_of_data_that_is_gone_is_refused(workplace, refused):
    array(with_values())(workplace / "data.npy")
    main(["train", "--data", "data.npy", "--width", "4", "--batch-size", "5", "--steps", "1", "--out", "run"])
    (workplace / "data.npy").unlink()
    mentions(refused("evaluate", "run"), "data.npy")
    main(["sample", "run", "--grid", "1x1"])


# Resuming


@pytest.mark.parametrize(
    ("flag", "value", "before"),
    [
        ("seed", 1, 0), ("method", "gan", "'wgan-gp'"), ("model", "mlp", "'article'"), ("width", 2, 1),
        ("latent-dim", 4, 3), ("init", "he", None), ("optimizer", "rmsprop", "'adam'"), ("ema", 0, 0.999),
        ("holdout", 0.2, 0.1), ("init-from", "elsewhere", None), ("augment", "cutout", "()"),
    ],
)  # fmt: skip
def test_resuming_with_another_setting_is_refused(run, refused, flag, value, before):
    message = refused("train", "--resume", run, f"--{flag}", value)
    mentions(message, f"{flag.replace('-', '_')} was {before}, got", value, "what may change", "steps")


@pytest.mark.parametrize("steps", [1, 3])
def test_resuming_to_fewer_steps_than_were_taken_is_refused(run, refused, steps):
    mentions(refused("train", "--resume", run, "--steps", steps), f"steps is {steps}", "step 4 already")
    main(["train", "--resume", str(run), "--steps", "5"])
    assert newest_checkpoint(run).name == "step-00000005.safetensors"


def test_resuming_into_another_folder_is_refused(run, refused):
    mentions(refused("train", "--resume", run, "--out", "elsewhere"), f"out is the resumed folder {run}", "elsewhere")


def test_refused_resume_through_python_leaves_the_run_as_it_was(run):
    before = tree(run)
    for changes in ({"steps": 3}, {"seed": 1}):
        with pytest.raises(InputError):
            Trainer.from_run(run, **changes).fit(resume=True)
    assert tree(run) == before


# Values out of range

OUT_OF_RANGE = [
    *((name, value) for name in ("steps", "epochs", "batch_size", "n_critic", "log_every", "sample_every",
                                 "checkpoint_every", "keep", "penalty_every", "penalty_samples", "image_size", "width",
                                 "latent_dim") for value in (0, -1)),
    *((name, value) for name in ("learning_rate", "generator_learning_rate", "clip", "clip_gradients")
      for value in (0.0, -1.0, math.nan, math.inf)),
    *((name, value) for name in ("beta1", "beta2", "ema", "holdout") for value in (-0.1, 1.0, math.nan)),
    *(("penalty_weight", value) for value in (-1.0, math.nan, math.inf)),
    *(("seed", value) for value in (-1, 2**32)), ("workers", -1), ("max_rewinds", -1), ("track", -1),
    ("channels", 2), ("augment", "other"),
    *((name, "other") for name in ("method", "init", "optimizer", "schedule", "engine", "precision", "on_divergence")),
]  # fmt: skip


def test_every_setting_with_a_range_is_tried():
    others = {"data", "model", "loss", "device", "out", "init_from", "spectral_norm", "conditional"}
    others |= {"compile", "cuda_graph", "fused", "generate_ahead", "channels_last", "flip"}
    assert {name for name, _ in OUT_OF_RANGE} | others == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_value_out_of_range_is_refused(refused, name, value):
    with pytest.raises(InputError, match=rf"^{name} must be .*{value}"):
        TrainConfig(**{name: value})
    flag = f"--{name.replace('_', '-')}"
    message = refused("train", "--data", "digits", "--out", "run", f"{flag}={value}")
    assert name in message or flag in message
    assert str(value) in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "3"), ("steps", 3.0), ("steps", True), ("epochs", "3"), ("log_every", 1.5),
        ("learning_rate", "0.1"), ("seed", None),
        ("out", 3), ("data", Path("folder")), ("spectral_norm", 1), ("ema", None), ("clip", True),
        ("batch_size", 0.5), ("method", None), ("model", None), ("device", torch.device("cpu")),
        ("augment", ("other",)),
    ],
)  # fmt: skip
def test_setting_of_another_type_is_refused(name, value):
    with pytest.raises(InputError, match=f"^{name} must be one of"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--method", "gan", "--penalty-weight", "1"], ["penalty_weight", "gan"]),
        (["--method", "wgan-gp", "--clip", "0.1"], ["clip", "wgan-gp", "wgan-clip"]),
        (["--augment", "cutout", "color", "cutout"], ["augment must name every change once, got cutout color cutout"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps"], ["--steps"]),
        (["--no-such-flag", "1"], ["--no-such-flag"]),
        (["positional"], ["positional"]),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(refused, arguments, fragments):
    mentions(refused("train", *TINY, "--out", "run", *arguments), *fragments)


@pytest.mark.parametrize("arguments", [["--flip"], ["--augment", "cutout"]])
def test_augmentation_of_what_is_no_image_is_refused(refused, arguments):
    message = refused("train", "--data", "8gaussians", "--out", "run", *arguments)
    assert message == f"{arguments[0].removeprefix('--')} is for images, and 8gaussians holds vectors of [2]"


@pytest.mark.parametrize(("arguments", "fragment"), [([], "train"), (["bogus"], "bogus"), (["sample"], "RUN")])
def test_bad_command_is_refused(refused, arguments, fragment):
    mentions(refused(*arguments), fragment)


def test_same_errors_reach_python_callers():
    with pytest.raises(InputError, match="holds no run"):
        Run.load(Path("/proc"))
    with pytest.raises(InputError, match="device"):
        Trainer.from_config(TrainConfig(device="gpu"))
    assert issubclass(InputError, ValueError)
