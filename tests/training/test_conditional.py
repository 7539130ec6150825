"""Networks that are told the class: labels go beside their samples, and what is asked for is what is made."""

import dataclasses
import json
import os
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TINY, assert_same_run, config_of
from torch import Tensor, nn

from wgan_fast import CriticStep
from wgan_fast.errors import InputError
from wgan_fast.training import Run, TrainConfig, Trainer, quality
from wgan_fast.training.cli import main
from wgan_fast.training.conditional import ConditionalGenerator, ProjectionCritic
from wgan_fast.training.data import has_labels, load_data, load_labels
from wgan_fast.training.models import MODELS, build
from wgan_fast.training.plots import save_grid

pytestmark = pytest.mark.usefixtures("no_curves")

GREYS = {"ash": 0, "bone": 255, "coal": 90}
"""Classes whose images have one grey each."""

SMALL = ["--model", "mlp", "--width", "8", "--latent-dim", "2", "--batch-size", "6", "--n-critic", "2"]
SMALL += ["--log-every", "1", "--engine", "autograd"]


def greys(n: int = 42, size: int = 5) -> tuple[Any, Any]:
    """Images ``[n, size, size]`` uint8 and the names of their classes."""
    names = np.array(sorted(GREYS))[np.random.default_rng(0).integers(3, size=n)]
    levels = np.array([GREYS[name] for name in names], np.uint8)
    return np.broadcast_to(levels[:, None, None], (n, size, size)).copy(), names


def write_folder(path: Path) -> None:
    for index, (image, name) in enumerate(zip(*greys())):
        (path / name / "deeper").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / name / "deeper" / f"{index}.png")


def write_npz(path: Path) -> None:
    images, names = greys()
    np.savez(path, images=images, y=names[:, None])


def write_idx(path: Path) -> None:
    images, names = greys()
    path.mkdir()
    for kind, array in (("images-idx3", images), ("labels-idx1", np.unique(names, return_inverse=True)[1])):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape)
        (path / f"train-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


SOURCES = {"folder": write_folder, "set.npz": write_npz, "idx": write_idx}


def class_of(images: Tensor) -> Tensor:
    """The class whose grey is nearest, ``[N]``."""
    levels = torch.tensor([GREYS[name] for name in sorted(GREYS)]) / 127.5 - 1
    return (images.flatten(1).mean(1)[:, None] - levels).abs().argmin(1)


# Labels


@pytest.mark.parametrize("name", SOURCES)
def test_labels_are_found_and_are_those_of_the_samples(name: str, tmp_path: Path) -> None:
    SOURCES[name](tmp_path / name)
    assert has_labels(tmp_path / name)
    data, labels = (load(tmp_path / name, holdout=0.3, seed=4) for load in (load_data, load_labels))
    assert labels.names == (("0", "1", "2") if name == "idx" else tuple(sorted(GREYS)))
    for samples, theirs in ((data.train, labels.train), (data.held_out, labels.held_out)):
        n = len(samples)
        assert torch.equal(class_of(samples.take(n, seed=1)), theirs.take(n, seed=1))


@pytest.mark.parametrize(
    "y", [np.zeros(42), np.zeros((42, 3), int), np.array([{}] * 42)], ids=["real", "rows", "objects"]
)
def test_arrays_that_are_no_classes_are_no_labels(y: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=greys()[0], y=y)
    assert not has_labels(tmp_path / "set.npz")
    assert load_labels(tmp_path / "set.npz") is None


# Networks


def test_projection_adds_a_direction_for_the_class() -> None:
    layers = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 1))
    critic = ProjectionCritic(layers, 4)
    x, labels = torch.randn(5, 3), torch.tensor([3, 0, 3, 2, 1])
    features = layers[:2](x)
    weight = layers[2].weight + critic.projection.weight[labels]
    torch.testing.assert_close(critic(x, labels), (weight * features).sum(1) + layers[2].bias)


SHAPES = {"mlp": (1, 5, 3), "toy-mlp": (3,), "mnist-dcgan": (1, 28, 28), "cifar-dcgan": (3, 32, 32),
          "cifar-resnet": (3, 32, 32), "dcgan64": (3, 64, 64), "dcgan": (1, 16, 16), "article": (1, 8, 8)}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_named_networks_take_labels_and_four_passes(name: str) -> None:
    generator, critic = (network.double() for network in build(name, SHAPES[name], width=2, num_classes=3))
    assert isinstance(generator, ConditionalGenerator)
    labels = torch.tensor([2, 0, 2, 1])
    fake = generator(torch.randn(4, generator.latent_dim, dtype=torch.float64), labels).detach()
    real, alpha = torch.randn_like(fake), torch.rand(4, dtype=torch.float64)
    gradients = {}
    for engine in ("four_pass", "autograd"):
        CriticStep(critic, engine=engine)(real, fake, alpha, critic_args=(labels,))
        gradients[engine] = [parameter.grad.clone() for parameter in critic.parameters()]
    for ours, truth in zip(gradients["four_pass"], gradients["autograd"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)
    assert gradients["autograd"][-1].shape[0] == 3  # of the projection


def test_every_named_network_is_tried() -> None:
    assert SHAPES.keys() == MODELS.keys()


# Training

OWN = """
import torch
from torch import nn

class Told(nn.Module):
    latent_dim = 2
    def __init__(self, shape, classes, out):
        super().__init__()
        self.shape, self.levels = shape, nn.Parameter(torch.arange(classes) / classes)
        self.out = out
    def forward(self, x, labels):
        assert labels.dtype == torch.int64
        level = self.levels[labels]
        if self.out:
            return level[:, None, None, None].expand(-1, *self.shape) + 0 * x.sum()
        return x.flatten(1).mean(1) * level

def build(shape, num_classes):
    return Told(shape, num_classes, True), Told(shape, num_classes, False)

def unaware(shape):
    return build(shape, 3)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with networks of one's own and labelled data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "told", raising=False)
    (tmp_path / "told.py").write_text(OWN)
    write_npz(tmp_path / "set.npz")
    return tmp_path


def test_real_and_fake_of_a_step_are_of_the_same_classes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    call = CriticStep.__call__

    def spy(self: CriticStep, real: Tensor, fake: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append((real, fake, *kwargs["critic_args"]))
        return call(self, real, fake, *args, **kwargs)

    monkeypatch.setattr(CriticStep, "__call__", spy)
    arguments = ["--data", "set.npz", "--conditional", "--model", "told:build", "--engine", "autograd"]
    main(["train", *arguments, "--batch-size", "7", "--n-critic", "3", "--steps", "4", "--out", "run"])
    real, fake, labels = (torch.cat(parts) for parts in zip(*steps[1:]))  # the first one tries the networks
    assert len(labels) == 3 * 4 * 7
    assert torch.equal(class_of(real), labels)
    assert torch.equal(fake[:, 0, 0, 0].mul(3).round().long(), labels)


def test_what_is_asked_for_is_made(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(place / "photos")
    arguments = ["--data", "photos", "--channels", "1", "--conditional", *SMALL, "--width", "64", "--n-critic", "5"]
    arguments += ["--batch-size", "12", "--learning-rate", "0.002", "--ema", "0.9", "--engine", "four_pass"]
    main(["train", *arguments, "--steps", "120", "--out", "run"])
    assert (place / "run" / "samples" / "step-00000120.png").is_file()
    run = Run.load(Path("run"))
    assert run.description.classes == ("ash", "bone", "coal")
    for index, name in enumerate(sorted(GREYS)):
        labels = run.labels(30, name)
        assert torch.equal(labels, torch.full((30,), index))
        assert (class_of(run.sample(30, labels=labels)) == index).double().mean() > 0.8
    capsys.readouterr()
    main(["sample", "run", "--label", "bone", "--grid", "2x3"])
    by_name = Path(capsys.readouterr().out.strip())
    assert by_name.name == "grid-2x3-bone.png"
    main(["sample", "run", "--label", "1", "--grid", "2x3", "--out", "one.png"])
    assert by_name.read_bytes() == Path("one.png").read_bytes()
    main(["sample", "run", "--label", "0", "--grid", "2x3", "--out", "zero.png"])
    assert by_name.read_bytes() != Path("zero.png").read_bytes()


def test_pictures_have_a_row_for_each_class(place: Path) -> None:
    main(["train", "--data", "set.npz", "--conditional", *SMALL, "--steps", "1", "--out", "run"])
    main(["sample", "run", "--out", "grid.png"])
    main(["sample", "run", "--grid", "3x12", "--scores", "--out", "same.png"])
    run = Run.load(Path("run"))
    labels = torch.arange(3).repeat_interleave(12)
    samples = run.sample(36, labels=labels)
    save_grid(samples, "expected.png", columns=12)
    assert Path("grid.png").read_bytes() == Path("expected.png").read_bytes()
    scores = sorted(run.score(samples, labels).tolist(), reverse=True)
    lines = Path("same.csv").read_text().splitlines()[1:]
    assert [float(line.split(",")[2]) for line in lines] == pytest.approx(scores, abs=1e-5)
    ratio = [image.width / image.height for image in map(Image.open, ("grid.png", "run/samples/step-00000001.png"))]
    assert ratio == pytest.approx([12 / 3, 8 / 3], rel=0.05)


def test_files_walks_and_exports_are_of_the_asked_class_too(place: Path) -> None:
    main(["train", "--data", "set.npz", "--conditional", *SMALL, "--steps", "1", "--out", "run"])
    run = Run.load(Path("run"))
    main(["sample", "run", "--n", "7", "--label", "coal", "--out", "coal.npy"])
    coal = run.sample(7, labels=torch.full((7,), 2))
    assert np.array_equal(np.load("coal.npy"), coal.numpy())
    main(["sample", "run", "--n", "7", "--out", "all.npy"])
    assert np.array_equal(np.load("all.npy"), run.sample(7, labels=torch.tensor([0, 0, 0, 1, 1, 2, 2])).numpy())
    main(["sample", "run", "--n", "3", "--out", "images"])
    told = Path("images/labels.csv").read_text()
    assert told == "file,label\n00000.png,ash\n00001.png,bone\n00002.png,coal\n"
    assert len(list(Path("images").iterdir())) == 4
    found = load_labels("images")
    assert found.names == ("ash", "bone", "coal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data("images", channels=1)
    main(["sample", "run", "--interpolate", "--label", "coal", "--grid", "2x3", "--out", "walk.png"])
    save_grid(run.walk(2, 3, labels=torch.full((6,), 2)), "expected.png", columns=3)
    assert Path("walk.png").read_bytes() == Path("expected.png").read_bytes()
    main(["export", "run"])
    program = torch.export.load("run/export/generator.pt2").module()
    noise, labels = torch.randn(5, 2), torch.tensor([2, 0, 1, 1, 2])
    with torch.no_grad():
        torch.testing.assert_close(program(noise, labels), run.generator(noise, labels))
    assert json.loads(Path("run/export/generator.json").read_text())["classes"] == ["ash", "bone", "coal"]


OPTIONS = {
    "default": [],
    "part": ["--penalty-samples", "3", "--penalty-every", "2"],
    "hinge": ["--method", "hinge"],
    "graph": ["--cuda-graph", "--no-generate-ahead"],
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resumed_run_equals_an_undisturbed_one(options: list[str], place: Path) -> None:
    arguments = ["--data", "set.npz", "--conditional", *SMALL, *options, "--sample-every", "2"]
    main(["train", *arguments, "--steps", "4", "--out", "whole"])
    main(["train", *arguments, "--steps", "2", "--out", "parted"])
    main(["train", "--resume", "parted", "--steps", "4"])
    assert_same_run(place / "parted", place / "whole")


@pytest.mark.parametrize("model", ["mlp", "article"])
def test_samples_of_several_steps_are_the_same_generated_at_once(model: str, place: Path) -> None:
    arguments = ["--data", "set.npz", "--conditional", *SMALL, "--model", model, "--steps", "3"]
    main(["train", *arguments, "--out", "ahead"])
    main(["train", *arguments, "--no-generate-ahead", "--out", "apart"])
    ahead, apart = (Run.load(place / name).sample(9) for name in ("ahead", "apart"))
    torch.testing.assert_close(ahead, apart, rtol=1e-4, atol=1e-5)


def test_classifier_says_how_often_it_agrees(place: Path) -> None:
    pytest.importorskip("sklearn")
    main(["train", *TINY, "--conditional", "--steps", "2", "--track", "2", "--out", "run"])
    tracked = json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= tracked["label_agreement"] <= 1
    main(["evaluate", "run"])
    report = json.loads((place / "run" / "evaluation.json").read_text())
    data, labels = load_data("digits"), load_labels("digits")
    asked = labels.held_out.take(180)
    judge = quality.Judge.load(data, labels)
    fake = Run.load(Path("run")).sample(180, labels=asked)
    agree = (judge.classifier(fake).argmax(1) == asked).double().mean().item()
    assert report["label_agreement"] == pytest.approx(agree)
    real = judge.rate(data.held_out.take(180), asked)
    assert real["label_agreement"] == pytest.approx(judge.accuracy)
    assert "label_agreement" not in judge.rate(fake)


def test_classes_of_any_name_are_written_beside_their_images(place: Path) -> None:
    for folder in (os.fsdecode(b"odd/\xff"), 'odd/a, "b"'):
        for index in range(20):
            os.makedirs(folder, exist_ok=True)
            Image.fromarray(greys()[0][index]).save(os.path.join(folder, f"{index}.png"))
    main(["train", "--data", "odd", "--channels", "1", "--conditional", *SMALL, "--steps", "1", "--out", "run"])
    main(["sample", "run", "--n", "4", "--out", "images"])
    assert load_labels("images").names == load_labels("odd").names


def test_a_table_that_leaves_an_image_out_is_no_table_of_labels(place: Path) -> None:
    write_folder(place / "flat")
    for path in (place / "flat").rglob("*.png"):
        path.rename(place / "flat" / f"{path.parent.name}{path.name}")
    for table in ("file,label\nash0.png,3\n", "id,kind\nash0.png,3\n", ""):
        (place / "flat" / "labels.csv").write_text(table)
        with pytest.raises(InputError, match=r"for flat: labels.csv has no label of .* in its columns file and label"):
            Trainer.from_config(TrainConfig(data="flat", channels=1, conditional=True, out=place / "run"))


def test_a_table_as_spreadsheets_write_it_is_read(place: Path) -> None:
    (place / "flat").mkdir()
    for index in range(4):
        Image.fromarray(greys()[0][index]).save(f"flat/{index}.png")
    rows = "".join(f"{index}.png,{'ab'[index % 2]}\r\n" for index in range(4))
    Path("flat/labels.csv").write_text("file,label\r\n" + rows, encoding="utf-8-sig", newline="")
    assert load_labels("flat").names == ("a", "b")


def test_reasons_are_those_of_what_was_given(place: Path) -> None:
    (place / "array" / "inner").mkdir(parents=True)
    for index in range(8):
        Image.fromarray(greys()[0][index]).save(f"array/inner/{index}.png")
    pair = build("mlp", (1, 5, 5), width=4, num_classes=3)
    config = TrainConfig(conditional=True, steps=1, batch_size=6, out=place / "run")
    with pytest.raises(InputError, match="none were found for array: give them as labels="):
        Trainer(*pair, greys()[0], config)
    with pytest.raises(InputError, match="all images lie in one subfolder, inner"):
        Trainer(*build("mlp", (3, 5, 5), width=4, num_classes=3), "array", dataclasses.replace(config, holdout=0.0))


def test_arrays_bring_their_labels(place: Path) -> None:
    images, names = greys()
    settings = TrainConfig(conditional=True, steps=2, batch_size=6, out=Path("run"), engine="autograd")
    trainer = Trainer(*build("mlp", (1, 5, 5), width=4, num_classes=3), images, settings, labels=names)
    trainer.fit()
    assert trainer.classes == ("ash", "bone", "coal")


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "8gaussians"], "conditional needs labels, and none were found for 8gaussians: IDX images"),
        (["--data", "plain.npy"], "none were found for plain.npy: IDX images have them in their file of labels beside"),
        (
            ["--data", "stray", "--channels", "1"],
            "none were found for stray: a.png lies in none of its subfolders, each",
        ),
        (["--data", "strays", "--channels", "1"], "for strays: a.png and 1 more lie in none of its subfolders"),
        (
            ["--data", "lone", "--channels", "1"],
            "all images lie in one subfolder, inner, and every subfolder is a class",
        ),
        (["--data", "flat", "--channels", "1"], "all images lie in the folder itself, and every subfolder would be a"),
        (["--data", "few.npz"], "there are 34 labels for 38 samples of few.npz"),
        (["--data", "one.npz"], "conditional needs two or more classes, and one.npz has 7 alone"),
        (["--model", "told:unaware"], "model 'told:unaware' takes no labels: conditional training calls"),
    ],
)
def test_conditional_training_without_what_it_needs_is_refused(
    arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, names = greys()
    np.save("plain.npy", images)
    np.savez("few.npz", images=images, y=names[:-4])
    np.savez("one.npz", images=images, y=np.full(42, 7))
    folders = {"stray": "a inner/b other/c", "strays": "a inner/b c", "lone": "inner/a inner/b", "flat": "a b c"}
    for folder, names in folders.items():
        for name in names.split():
            path = place / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[0]).save(path)
    with pytest.raises(SystemExit) as end:
        main(["train", "--data", "set.npz", *arguments, "--conditional", "--batch-size", "2", "--out", "run"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("run").exists()


def test_label_that_is_no_class_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--data", "set.npz", "--conditional", *SMALL, "--steps", "1", "--out", "run"])
    main(["train", "--data", "set.npz", *SMALL, "--steps", "1", "--out", "plain"])
    note = "set.npz has labels, which this training does not use: --conditional does"
    assert capsys.readouterr().err.splitlines().count(note) == 1
    assert [config_of(place / name)["conditional"] for name in ("run", "plain")] == [True, False]
    for folder, label, message in (
        ("run", "soot", "label must be one of the classes ash, bone, coal, got 'soot'"),
        ("run", "3", "label must be one of the classes ash, bone, coal, got '3'"),
        ("plain", "ash", "label is for conditional runs, and plain was trained without --conditional"),
    ):
        with pytest.raises(SystemExit):
            main(["sample", folder, "--label", label])
        assert message in capsys.readouterr().err


def test_run_does_not_go_on_with_other_classes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--data", "set.npz", "--conditional", *SMALL, "--steps", "1", "--out", "run"])
    images, names = greys()
    np.savez("set.npz", images=images, y=np.where(names == "ash", "soot", names))
    with pytest.raises(SystemExit):
        main(["train", "--resume", "run", "--steps", "2"])
    assert "its classes were ash, bone, coal, they are now bone, coal, soot" in capsys.readouterr().err


def test_labels_that_do_not_fit_are_refused(place: Path) -> None:
    main(["train", "--data", "set.npz", "--conditional", *SMALL, "--steps", "1", "--out", "run"])
    main(["train", "--data", "set.npz", *SMALL, "--steps", "1", "--out", "plain"])
    run, plain = Run.load("run"), Run.load("plain")
    samples = run.sample(4)
    for labels in (torch.zeros(3, dtype=torch.int64), torch.full((4,), 3), torch.full((4,), -1), torch.zeros(4)):
        with pytest.raises(InputError, match="labels must be 4 integers from 0 to 2, one a sample"):
            run.score(samples, labels)
    with pytest.raises(InputError, match="this run is not conditional"):
        plain.score(plain.sample(4), torch.zeros(4, dtype=torch.int64))


def test_networks_of_other_classes_are_no_beginning(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--data", "set.npz", "--conditional", *SMALL, "--steps", "1", "--out", "run"])
    pixels, names = greys()
    np.savez(place / "other.npz", images=pixels, y=np.char.replace(names.astype(str), "ash", "dust"))
    with pytest.raises(SystemExit):
        main(["train", "--data", "other.npz", "--conditional", *SMALL, "--steps", "1", "--init-from", "run"])
    assert "is conditional on classes ash, bone, coal; here they are bone, coal, dust" in capsys.readouterr().err


def test_many_samples_keep_their_classes(place: Path) -> None:
    main(["train", "--data", "set.npz", "--conditional", *SMALL, "--steps", "1", "--out", "run"])
    main(["sample", "run", "--n", "7", "--out", "all.npz"])
    main(["sample", "run", "--n", "5", "--label", "coal", "--out", "coal.npz"])
    run = Run.load("run")
    with np.load("all.npz") as found:
        assert sorted(found.files) == ["x", "y"]
        assert found["y"].tolist() == [run.description.classes[i] for i in run.labels(7)]
        assert torch.equal(torch.from_numpy(found["x"]), run.sample(7, labels=run.labels(7)))
    assert np.load("coal.npz")["y"].tolist() == ["coal"] * 5
    labels = load_labels("all.npz")
    assert labels is not None
    assert labels.names == ("ash", "bone", "coal")
