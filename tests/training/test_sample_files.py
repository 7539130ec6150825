"""Samples as files, walks between latents, and runs loaded from Python."""

import copy
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import EXAMPLES, TINY, same_bits, tree
from torch import Tensor, nn

from wgan_fast.errors import InputError
from wgan_fast.training import Run, TrainConfig, Trainer, curves, plots
from wgan_fast.training import run as runs_module
from wgan_fast.training.cli import main
from wgan_fast.training.data import load_data
from wgan_fast.training.description import Description
from wgan_fast.training.run import great_circles

DATA = {
    "grey": np.random.default_rng(0).integers(0, 256, (20, 5, 7), dtype=np.uint8),
    "colours": np.random.default_rng(0).integers(0, 256, (20, 5, 7, 3), dtype=np.uint8),
    "transparent": np.random.default_rng(0).integers(0, 256, (20, 5, 7, 4), dtype=np.uint8),
    "audio": np.random.default_rng(0).normal(size=(20, 1, 33)).astype(np.float32),
    "volumes": np.random.default_rng(0).normal(size=(20, 1, 3, 4, 5)).astype(np.float32),
    "points": np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32),
}
SHAPES = {
    "grey": (1, 5, 7), "colours": (3, 5, 7), "transparent": (4, 5, 7), "audio": (1, 33), "volumes": (1, 3, 4, 5),
    "points": (2,),
}  # fmt: skip
MODES = {"grey": "L", "colours": "RGB", "transparent": "RGBA"}


@pytest.fixture(scope="module", autouse=True)
def _curves_are_not_drawn() -> Iterator[None]:
    """Drawing them takes most of the time of runs as small as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "save_curves", lambda records, path, **options: path.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on each kind of data, under its name; one of them in bfloat16."""
    folder = tmp_path_factory.mktemp("trained")
    for name, samples in DATA.items():
        np.save(folder / f"{name}.npy", samples)
        precision = "bf16" if name == "colours" else "fp32"
        main(["train", "--data", str(folder / f"{name}.npy"), "--model", "mlp", "--width", "4", "--latent-dim", "3",
              "--batch-size", "5", "--n-critic", "1", "--steps", "1", "--engine", "autograd", "--precision", precision,
              "--out", str(folder / name)])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose generator has batch norm."""
    out = tmp_path_factory.mktemp("digits") / "run"
    main(["train", *TINY, "--steps", "2", "--learning-rate", "0.01", "--engine", "autograd", "--out", str(out)])
    return out


# Files


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_array_holds_what_the_run_samples(trained, tmp_path, capsys, name, suffix):
    path = tmp_path / f"new folder/ünï ☃{suffix}"
    main(["sample", str(trained / name), "--n", "9", "--seed", "4", "--out", str(path)])
    assert capsys.readouterr().out == f"{path}\n"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    loaded = np.load(path)
    if suffix == ".npz":
        assert loaded.files == ["x"]
        loaded = loaded["x"]
    assert (loaded.dtype, loaded.shape) == (np.float32, (9, *SHAPES[name]))
    assert loaded.flags.c_contiguous
    assert same_bits(torch.from_numpy(loaded), Run.load(trained / name).sample(9, seed=4))


@pytest.mark.parametrize("name", MODES)
def test_images_lie_in_a_folder_one_file_each(trained, tmp_path, capsys, name):
    out = tmp_path / "ünï ☃" / "samples"
    main(["sample", str(trained / name), "--n", "11", "--seed", "4", "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    assert [entry.name for entry in out.parent.iterdir()] == ["samples"]
    assert sorted(path.name for path in out.iterdir()) == [f"{number:05d}.png" for number in range(11)]
    for sample, path in zip(Run.load(trained / name).sample(11, seed=4), sorted(out.iterdir())):
        with Image.open(path) as image:
            assert (image.mode, image.size) == (MODES[name], (7, 5))
            pixels = torch.from_numpy(np.array(image)).view(5, 7, -1).permute(2, 0, 1)
        assert torch.equal(pixels.float(), ((sample + 1) * 127.5).round().clamp(0, 255))


def test_mode_of_the_folder_is_that_of_any_new_one(trained, tmp_path):
    main(["sample", str(trained / "grey"), "--n", "1", "--out", str(tmp_path / "samples")])
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "samples").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_pixels_are_the_inverse_of_how_data_is_read(tmp_path):
    every = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    read = load_data(every, holdout=0).train.take(4, seed=0)
    assert sorted(plots.to_pixels(read).flatten().tolist()) == list(range(256))


def test_folder_is_data_to_train_on(trained, tmp_path):
    main(["sample", str(trained / "grey"), "--n", "6", "--out", str(tmp_path / "images")])
    main(["sample", str(trained / "audio"), "--n", "6", "--out", str(tmp_path / "audio.npz")])
    assert load_data(tmp_path / "images", channels=1).sample_shape == SHAPES["grey"]
    assert load_data(tmp_path / "audio.npz").sample_shape == SHAPES["audio"]


def test_more_samples_than_a_piece_are_generated_piece_by_piece(digits, tmp_path, monkeypatch):
    sizes = []
    generate = runs_module.generate

    def noting(network: nn.Module, noise: Tensor) -> Tensor:
        sizes.append(len(noise))
        return generate(network, noise)

    monkeypatch.setattr(runs_module, "generate", noting)
    main(["sample", str(digits), "--n", "1003", "--out", str(tmp_path / "a.npy")])
    assert sizes == [256, 256, 256, 235]
    written = np.load(tmp_path / "a.npy")
    assert len(np.unique(written.reshape(1003, -1), axis=0)) == 1003
    assert same_bits(torch.from_numpy(written), Run.load(digits).sample(1003))


class Grainy(nn.Module):
    """A generator with noise of its own: what is drawn for one piece must not be drawn again for the next."""

    def __init__(self, latent_dim: int = 2) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * torch.randn(len(z), 2)


def test_pieces_draw_on_and_leave_the_default_generator(tmp_path):
    critic = nn.Linear(2, 1)
    config = TrainConfig(steps=1, batch_size=4, n_critic=1, engine="autograd", generate_ahead=False, out=tmp_path / "r")
    Trainer(Grainy(), critic, torch.randn(40, 2), config).fit()
    run = Run.load(tmp_path / "r", generator=Grainy())
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    samples = run.sample(600, seed=1)
    assert same_bits(torch.randn(3), expected)
    assert len(samples.unique(dim=0)) == 600
    assert same_bits(run.sample(600, seed=1), samples)


def test_array_is_replaced_and_a_folder_is_not(trained, tmp_path, capsys):
    path, folder = tmp_path / "a.npy", tmp_path / "images"
    for n in (3, 2):
        main(["sample", str(trained / "grey"), "--n", str(n), "--out", str(path)])
    assert len(np.load(path)) == 2
    for make in (folder.mkdir, lambda: (folder / "other.txt").write_text("kept")):
        make()
        before = tree(tmp_path)
        with pytest.raises(SystemExit) as end:
            main(["sample", str(trained / "grey"), "--n", "2", "--out", str(folder)])
        assert end.value.code == 2
        assert f"out {folder} is there already" in capsys.readouterr().err
        assert tree(tmp_path) == before


@pytest.mark.parametrize("out", ["a.npy", "a.npz", "images"])
@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 2)])
def test_nothing_half_written_is_left(digits, tmp_path, monkeypatch, capsys, out, error, status):
    (tmp_path / "a.npy").write_bytes(b"old")
    before = tree(tmp_path)
    generate, calls = runs_module.generate, []

    def failing(network: nn.Module, noise: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return generate(network, noise)

    monkeypatch.setattr(runs_module, "generate", failing)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["sample", str(digits), "--n", "900", "--out", out])
    assert end.value.code == status
    said = "interrupted" if status == 130 else f"out {out} cannot be written: No space left"
    assert capsys.readouterr().err == f"wgan-fast: error: {said}\n"
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("out", ["a.npy", "images"])
def test_read_only_folder_is_refused(trained, tmp_path, capsys, out):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        main(["sample", str(trained / "grey"), "--n", "2", "--out", str(tmp_path / out)])
    assert "cannot be written: Permission denied" in capsys.readouterr().err


# Walks


def test_great_circles_turn_evenly_and_close():
    latents = torch.randn(5, 64, dtype=torch.float64)
    walk = great_circles(latents, 7)
    assert walk.shape == (35, 64)
    assert torch.allclose(walk[::7], latents, rtol=0, atol=1e-14)
    directions = torch.cat((walk, walk[:1])) / torch.cat((walk, walk[:1])).norm(dim=1, keepdim=True)
    ends = nn.functional.normalize(torch.cat((latents, latents[:1])))
    for k, angle in enumerate((ends[1:] * ends[:-1]).sum(1).acos()):
        # In the plane of both ends, and of latents of one length by equal angles.
        plane = torch.linalg.qr(torch.stack((ends[k], ends[k + 1]), 1)).Q
        row = directions[7 * k : 7 * k + 8]
        assert torch.allclose(row @ plane @ plane.T, row, atol=1e-12)
        assert math.isclose((row[0] @ row[-1]).acos(), angle, rel_tol=1e-9)
    sphere = great_circles(ends[:-1], 7)
    steps = (torch.cat((sphere, sphere[:1]))[1:] * sphere).sum(1).acos().view(5, 7)
    assert torch.allclose(steps, steps.mean(1, keepdim=True), atol=1e-7)
    assert torch.allclose(sphere.norm(dim=1), torch.ones(35, dtype=torch.float64))


def test_latents_on_one_line_are_walked_straight():
    assert great_circles(torch.tensor([[1.0], [3.0], [-2.0]]), 2).flatten().tolist() == [1, 2, 3, 0.5, -2, -0.5]
    same = torch.ones(2, 3)
    assert torch.equal(great_circles(same, 4), torch.ones(8, 3))


@pytest.mark.parametrize("name", ["grey", "colours"])
def test_interpolation_is_a_grid_and_an_animation_of_the_same_images(trained, tmp_path, capsys, name):
    out = tmp_path / "walk.png"
    main(["sample", str(trained / name), "--interpolate", "--grid", "3x4", "--seed", "2", "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n{tmp_path / 'walk.gif'}\n"
    run = Run.load(trained / name)
    samples = run.walk(3, 4, seed=2)
    assert samples.shape == (12, *SHAPES[name])
    # A row begins where a sample of the same seed is.
    assert torch.allclose(samples[::4], run.sample(3, seed=2), atol=1e-6)
    plots.save_grid(samples, tmp_path / "expected.png", columns=4)
    assert out.read_bytes() == (tmp_path / "expected.png").read_bytes()
    with Image.open(tmp_path / "walk.gif") as animation:
        assert animation.n_frames == 12
        assert animation.info["loop"] == 0
        for number, sample in enumerate(samples):
            animation.seek(number)
            width, height = animation.size
            assert (width % 7, height % 5, width / height) == (0, 0, 7 / 5)
            frame = np.array(animation.convert(MODES[name]))[:: height // 5, :: width // 7].astype(int)
            # A GIF has 256 colours: all greys, and those of 35 pixels.
            assert np.abs(frame - plots.to_pixels(sample[None])[0]).max() <= 1


def test_interpolation_without_an_out_lies_in_the_run(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "grey", tmp_path / "run")
    main(["sample", str(run), "--interpolate"])
    expected = [run / "samples" / f"interpolation-12x12.{suffix}" for suffix in ("png", "gif")]
    assert capsys.readouterr().out.split() == [str(path) for path in expected]
    assert all(path.is_file() for path in expected)


# Runs from Python


def test_a_run_is_loaded_by_any_path(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "grey", tmp_path / "runs" / "x")
    expected = Run.load(tmp_path / "runs" / "x").sample(2)
    for path in ("runs/x", "~/runs/x", Path("~/runs/x")):
        assert same_bits(Run.load(path).sample(2), expected)
        assert Description.read(path).sample_shape == SHAPES["grey"]
        assert Trainer.from_run(path, steps=2).out.resolve() == tmp_path / "runs" / "x"
    assert TrainConfig(out="~/runs/y").out == TrainConfig(out=Path("~/runs/y")).out == tmp_path / "runs" / "y"
    assert TrainConfig(out="~nobody-of-this-name/y").out == Path("~nobody-of-this-name/y")


def test_home_is_found_where_the_shell_leaves_it(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "grey", tmp_path / "x")
    main(["train", "--resume=~/x", "--steps", "2"])
    main(["sample", "~/x", "--n", "2", "--out=~/a.npy"])
    main(["sample", "~/x", "--grid", "1x2"])
    main(["evaluate", "~/x", "--samples", "2"])
    assert {"a.npy", "x/evaluation.json", "x/samples/grid-1x2.png", "x/checkpoints/step-00000002.json"} <= {
        *tree(tmp_path)
    }
    assert not (tmp_path / "~").exists()


def networks() -> tuple[nn.Module, nn.Module]:
    generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    generator.latent_dim = 3
    return generator, nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))


@pytest.mark.parametrize("method", ["wgan-gp", "hinge"])  # hinge parametrises the critic that it is given
def test_run_of_objects_is_loaded_into_objects(tmp_path, method):
    generator, critic = networks()
    config = TrainConfig(method=method, steps=2, batch_size=8, n_critic=1, engine="autograd", out=tmp_path / "run")
    trainer = Trainer(generator, critic, torch.randn(40, 2), config)
    trainer.fit()
    own_generator, own_critic = networks()
    run = Run.load(tmp_path / "run", generator=own_generator, critic=own_critic)
    assert run.generator is own_generator
    assert run.critic is own_critic
    assert not own_generator.training
    assert not own_critic.training
    for name, value in trainer.ema.state_dict().items():
        assert same_bits(own_generator.state_dict()[name], value)
    samples = run.sample(4)
    with torch.no_grad():
        assert torch.allclose(run.score(samples), trainer.critic.eval()(samples).flatten())


def test_run_of_objects_is_sampled_without_its_critic(tmp_path):
    generator, critic = networks()
    config = TrainConfig(steps=1, batch_size=8, n_critic=1, engine="autograd", out=tmp_path / "run")
    Trainer(generator, critic, torch.randn(40, 2), config).fit()
    run = Run.load(tmp_path / "run", generator=networks()[0])
    assert run.sample(3).shape == (3, 2)
    with pytest.raises(InputError, match=r"give Run\.load the critic"):
        run.score(run.sample(3))
    with pytest.raises(InputError, match=r"give Run\.load the critic"):
        run.evaluate()
    with pytest.raises(InputError, match=re.escape("Run.load(folder, generator=..., critic=...)")):
        Run.load(tmp_path / "run", critic=networks()[1])
    other = nn.Linear(3, 2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InputError, match="another architecture of the generator"):
        Run.load(tmp_path / "run", generator=other)
    assert all(same_bits(other.state_dict()[name], value) for name, value in before.items())


def test_named_run_is_loaded_into_an_object_beside_its_own_critic(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "own_model.py").write_bytes((EXAMPLES / "own_model.py").read_bytes())
    main(["train", "--data", "digits", "--model", "own_model:build", "--steps", "1", "--batch-size", "8", "--n-critic",
          "1", "--engine", "autograd", "--out", "run"])  # fmt: skip
    named = Run.load("run")
    own = type(named.generator)((1, 8, 8))
    run = Run.load("run", generator=own)
    assert run.generator is own
    assert same_bits(run.sample(3), named.sample(3))
    assert same_bits(run.score(run.sample(3)), named.score(named.sample(3)))


@pytest.mark.parametrize("n", [0, -3])
def test_no_samples_are_refused(trained, n):
    with pytest.raises(InputError, match=f"n must be at least 1, got {n}"):
        Run.load(trained / "grey").sample(n)
