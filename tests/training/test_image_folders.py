"""A folder of images is read as its owner means it; arrays that would train to nothing in silence are pointed at."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import TINY, metrics_of

from wgan_fast.errors import InputError
from wgan_fast.training import TrainConfig, Trainer
from wgan_fast.training.cli import main
from wgan_fast.training.data import load_data

pytestmark = pytest.mark.usefixtures("no_curves")

Image = pytest.importorskip("PIL.Image")


def write(path: Path, value: int = 0, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path)
    return path


def values(folder: Path, **options: object) -> list[int]:
    """The grey of every image that is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        split = load_data(folder, holdout=0, **options).train
    return sorted(((split.take(len(split))[:, 0, 0, 0].double() + 1) * 127.5).round().int().tolist())


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".tga", ".avif", ".apng", ".qoi", ".mpo", ".JPG"])
def test_what_pillow_reads_is_read_beside_a_png(tmp_path, suffix):
    write(tmp_path / "a.png", 0)
    other = write(tmp_path / "b.jpg", 255)
    if suffix in (".tga", ".avif", ".qoi"):
        if suffix not in Image.registered_extensions():
            pytest.skip("this Pillow does not read it")
        Image.open(other).save(tmp_path / f"c{suffix}")
        other.unlink()
    else:
        other.rename(tmp_path / f"c{suffix}")
    assert values(tmp_path) == [0, 255]


def test_what_is_left_out_is_said(tmp_path):
    for number in range(9):
        write(tmp_path / "set" / f"{number}.png", number)
    for name in ("a.txt", "b.TXT", "LICENSE", "film.mpg", ".DS_Store", "paper.pdf"):
        (tmp_path / "set" / name).write_bytes(b"")
    write(tmp_path / "set" / ".thumbnails" / "0.png", 200)
    write(tmp_path / "set" / "more" / ".ipynb_checkpoints" / "0.png", 201)
    command = ["--data", str(tmp_path / "set"), "--engine", "autograd", "--steps", "1", "--out", str(tmp_path / "run")]
    with pytest.warns(RuntimeWarning) as said:
        main(["train", *TINY, *command])
    assert [str(warning.message) for warning in said] == [
        f"folder {tmp_path / 'set'}: 9 images; left out: 2 .txt, 1 .mpg, 1 .pdf, 1 without an ending, .thumbnails, "
        "more/.ipynb_checkpoints"
    ]
    assert values(tmp_path / "set") == list(range(9))


def test_nothing_is_said_where_nothing_is_left_out(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "b" / "c.png")
    (tmp_path / ".DS_Store").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(tmp_path)


def test_a_folder_that_is_hidden_itself_can_be_given(tmp_path):
    write(tmp_path / ".cache" / "a.png", 7)
    assert values(tmp_path / ".cache") == [7]


def test_a_folder_of_other_files_says_what_it_holds(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no images and no IDX files \(but 1 \.heic\)"):
        load_data(tmp_path)


def test_links_are_followed_and_every_folder_is_read_once(tmp_path):
    data = tmp_path / "data"
    write(data / "a.png", 1)
    write(data / "real" / "b.png", 2)
    write(tmp_path / "elsewhere" / "c.png", 3)
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "again").symlink_to(data / "real")
    (data / "real" / "loop").symlink_to(data)
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    (data / "d.png").symlink_to(write(tmp_path / "outside.png", 4))
    # Through the link "up" all of tmp_path is part of the data: outside.png once more, under its own name.
    assert values(data) == [1, 2, 3, 4, 4]


def test_a_link_to_nothing_is_named(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"cannot read image .*b\.png"):
        load_data(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(InputError, match=r"folder .*locked cannot be read"):
        load_data(tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_are_white_whatever_colour_lies_below(tmp_path, mode, channels):
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))  # black, fully transparent
    picture.paste((255, 0, 0, 128), (0, 0, 2, 4))
    picture.paste((0, 0, 0, 255), (2, 0, 3, 4))
    if mode == "P":  # one transparent colour of a palette
        picture = Image.new("P", (4, 4), 0)
        picture.putpalette([0, 0, 0, 9, 9, 9])
        picture.paste(1, (2, 0, 3, 4))
        picture.info["transparency"] = 0
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / "a.png")
    (got,) = ((load_data(tmp_path, holdout=0, channels=channels).train.take(1) + 1) * 127.5).round()
    assert (got[:, :, 3] == 255).all()
    assert (got[:, :, 2] == (9 if mode == "P" else 0)).all()
    if mode == "RGBA" and channels == 3:
        assert got[:, 0, 0].tolist() == [255, 127, 127]


def test_a_run_in_its_own_data_resumes_on_the_data_alone(tmp_path):
    data = tmp_path / "photos"
    for number in range(12):
        write(data / f"{number}.png", 20 * number)
    command = ["train", *TINY, "--data", str(data), "--engine", "autograd", "--sample-every", "1"]
    main([*command, "--steps", "2", "--out", str(data / "runs" / "one")])
    assert list((data / "runs" / "one" / "samples").glob("*.png"))
    assert values(data) == [20 * number for number in range(12)]
    with pytest.warns(RuntimeWarning, match="12 images; left out: runs/one"):
        main(["train", "--resume", str(data / "runs" / "one"), "--steps", "3"])
    assert metrics_of(data / "runs" / "one")[-1]["step"] == 3
    with pytest.warns(RuntimeWarning, match="12 images; left out: runs/one"):
        main([*command, "--steps", "1", "--out", str(data / "runs" / "two")])
    assert values(data) == [20 * number for number in range(12)]


@pytest.mark.parametrize("spelling", ["photos", "photos/", "photos/../photos"])
def test_a_run_is_not_written_into_the_folder_of_its_data(tmp_path, monkeypatch, capsys, spelling):
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        write(tmp_path / "photos" / f"{number}.png", number)
    with pytest.raises(SystemExit) as end:
        main(["train", *TINY, "--data", "photos", "--out", spelling])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("wgan-fast: error: out must be another folder than data, got photos")
    assert len(list((tmp_path / "photos").iterdir())) == 12
    networks = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)
    with pytest.raises(InputError, match="out must be another folder than data"):
        Trainer(*networks, "photos", TrainConfig(out=Path(spelling)))


# Arrays


def test_raw_scales_of_columns_are_warned_of_with_what_to_do(tmp_path):
    rng = np.random.default_rng(0)
    table = np.stack([rng.normal(size=500), rng.normal(5e4, 1e4, 500), rng.integers(0, 2, 500)], axis=1)
    np.save(tmp_path / "table.npy", table)
    with pytest.warns(
        RuntimeWarning, match=r"column 1 has mean \S*e\+04 and standard deviation \S*e\+03; .*: standardise"
    ):
        load_data(tmp_path / "table.npy")
    with pytest.warns(RuntimeWarning, match="column 0 has mean .* and so on in 2 columns"):
        load_data(np.stack([table[:, 0] * 1e-3, table[:, 1] / 1e3, table[:, 2]], axis=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data((table - table.mean(0)) / table.std(0))
        load_data(np.stack([table[:, 2], np.zeros(500)], axis=1))  # an indicator, and a column that is constant
        load_data(rng.normal(0, 3, (60, 2, 8, 8)))


def test_a_mask_beside_the_values_is_refused(tmp_path):
    values = np.ones((4, 3))
    np.savez(tmp_path / "masked.npz", data=values, mask=values > 0)
    with pytest.raises(InputError, match=r"masked\.npz has a mask beside its values"):
        load_data(tmp_path / "masked.npz")


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_masked_tensors_are_refused():
    masked = torch.masked.masked_tensor(torch.ones(4, 3), torch.eye(4, 3) > 0)
    with pytest.raises(InputError, match="tensor is a masked tensor"):
        load_data(masked)


def test_fields_beyond_one_are_learned_by_a_generator_that_reaches_them(tmp_path):
    fields = np.random.default_rng(0).normal(0, 3, (40, 2, 8, 8))
    np.save(tmp_path / "fields.npy", fields)
    trainer = Trainer.from_config(
        TrainConfig(data=str(tmp_path / "fields.npy"), out=tmp_path / "run", width=4, batch_size=8, steps=1)
    )
    assert not any(isinstance(layer, torch.nn.Tanh) for layer in trainer.generator)
    trainer.fit()
    main(["sample", str(tmp_path / "run"), "--grid", "1x1"])
