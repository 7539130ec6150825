"""Photographs of 128 pixels, from a folder to samples; and runs from before a size had networks of its own."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import config_of, metrics_of

from wgan_fast.errors import InputError
from wgan_fast.training import Run, TrainConfig, Trainer
from wgan_fast.training.cli import main

pytestmark = pytest.mark.usefixtures("no_curves")

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 crops of scikit-image's photographs, of 128 to 300 pixels."""
    data = pytest.importorskip("skimage.data")
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name in ("astronaut", "chelsea", "coffee"):
        photograph = getattr(data, name)()
        for number in range(20):
            side = rng.integers(128, 300)
            y, x = (rng.integers(0, extent - side + 1) for extent in photograph.shape[:2])
            Image.fromarray(photograph[y : y + side, x : x + side]).save(folder / f"{name}-{number}.png")
    return folder


def train(photographs: Path, out: Path, *options: object) -> list[dict[str, float]]:
    command = ["train", "--data", photographs, "--image-size", 128, "--width", 8, "--batch-size", 4, "--n-critic", 1,
               "--log-every", 1, "--out", out, *options]  # fmt: skip
    main([str(argument) for argument in command])
    return metrics_of(out)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_photographs_of_128_pixels_train_and_resume(photographs, tmp_path, precision):
    out = tmp_path / "run"
    train(photographs, out, "--precision", precision, "--steps", 1, "--checkpoint-every", 1)
    assert config_of(out)["model"] == "dcgan"
    main(["train", "--resume", str(out), "--steps", "2"])
    records = metrics_of(out)
    assert [record["step"] for record in records] == [1, 2]
    assert all(math.isfinite(record[name]) for record in records for name in ("critic_loss", "generator_loss"))
    assert Run.load(out).sample(3).shape == (3, 3, 128, 128)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fifty_steps_on_photographs_of_128_pixels_learn_their_brightness(photographs, tmp_path, precision):
    train(photographs, tmp_path / "begun", "--steps", 1, "--ema", 0)
    records = train(photographs, tmp_path / "run", "--precision", precision, "--steps", 50, "--ema", 0,
                    "--learning-rate", 1e-3, "--flip", "--augment", "translation")  # fmt: skip
    assert [record["step"] for record in records] == list(range(1, 51))
    assert all(math.isfinite(record["critic_loss"]) for record in records)
    real = torch.stack([torch.from_numpy(np.array(Image.open(file).convert("RGB"))).float().mean((0, 1)) / 127.5 - 1
                        for file in sorted(photographs.iterdir())]).mean(0)  # fmt: skip
    before, after = (
        (Run.load(tmp_path / name).sample(32).mean((0, 2, 3)) - real).abs().max() for name in ("begun", "run")
    )
    assert after < before / 2


def test_a_size_that_nothing_fits_is_refused_before_anything_is_written(photographs, tmp_path, capsys):
    for size in ("100", "512"):
        with pytest.raises(SystemExit) as end:
            main(["train", "--data", str(photographs), "--image-size", size, "--out", str(tmp_path / "run")])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        advice = {"100": "--image-size 64", "512": "--image-size 256"}[size]
        assert f"model auto has no networks for samples of shape [3, {size}, {size}]: bring images to 16" in line
        assert f"({advice}), or give --model mlp, or networks of your own (--model module:function)" in line
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_format_is_refused(tmp_path):
    np.save(tmp_path / "fields.npy", np.random.default_rng(0).normal(size=(30, 2, 8, 8)))
    out = tmp_path / "run"
    config = TrainConfig(data=str(tmp_path / "fields.npy"), width=4, batch_size=5, steps=1, out=out, engine="autograd")
    Trainer.from_config(config).fit()
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(InputError, match="its format is 1, this version reads 2"):
        Run.load(out)
