"""Tensors and Datasets of whatever form, told apart and brought to the form that training takes."""

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import InputError, users_level
from . import splits
from .splits import HOLDOUT, Array, Data, DatasetSplit, Kind, TensorSplit, permutation

Source = str | os.PathLike[str] | Array | Tensor | Dataset[Any]


# A 4-D array is a set of pictures when one of its ends counts grey, RGB or RGBA channels.
_PICTURE_CHANNELS = (1, 3, 4)


BYTES, _UNIT = 127.5, 0.5  # divisors that bring 0..255 and [0, 1] to [0, 2], before 1 is taken off


_PROBED_ITEMS = 64  # of a Dataset, to tell [0, 1] from [-1, 1]


_PROBED_VALUES = 1 << 22  # of vectors, to see their scales


_SCANNED_VALUES = 1 << 24  # at a time, so that a file larger than memory can be checked


class Form(NamedTuple):
    """What all samples of a set have in common."""

    sample_shape: tuple[int, ...]
    kind: Kind
    divisor: float | None

    def __str__(self) -> str:
        scaling = {BYTES: "uint8 images", _UNIT: "images in [0, 1]", None: "images in [-1, 1]"}
        return f"{scaling[self.divisor] if self.kind == 'images' else 'vectors'} of shape {self.sample_shape}"


@dataclass(frozen=True)
class Options:
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
        order = permutation(size, self.seed, HOLDOUT)
        return order[held_out:], order[:held_out]


def _classify(data: Tensor, what: str) -> tuple[Tensor, Form]:
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
        return data, Form(tuple(data.shape[1:]), "vectors", None)
    elif data.ndim == 3:
        images = data[:, None]
    else:
        raise InputError(
            f"{what} is uint8 of shape {tuple(data.shape)}; uint8 means images [N, H, W], [N, C, H, W] or "
            f"[N, H, W, C] with C in {_PICTURE_CHANNELS}"
        )
    shape = tuple(images.shape[1:])
    if data.dtype == torch.uint8:
        return images, Form(shape, "images", BYTES)
    low, high = _finite_range(data, what)
    if low < -1 or high > 1:
        raise InputError(
            f"{what} holds float images with values from {low:g} to {high:g}; scale them to [0, 1] or "
            "[-1, 1], or pass uint8"
        )
    return images, Form(shape, "images", _UNIT if low >= 0 else None)


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


def fit(samples: Tensor, form: Form, what: str, options: Options) -> Tensor:
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


def tensor_data(name: str, data: Tensor, options: Options, held_out: int | None = None) -> Data:
    """Split a tensor `[N, ...]`, of which the last `held_out` samples may be set apart already."""
    data, form = _classify(data, name)
    data = fit(data, form, name, options)
    if data.nbytes <= splits.RESIDENT_BYTES:
        data = data.contiguous() if data.dtype == torch.uint8 else data.to(torch.float32).contiguous()
    if held_out is None:
        rows, held_rows = options.split(name, len(data))
    else:
        rows, held_rows = torch.arange(len(data)).tensor_split([len(data) - held_out])
    train, held = (TensorSplit(data, part, form.divisor) for part in (rows, held_rows))
    return Data(name, tuple(data.shape[1:]), form.kind, train, held)


def warn_of_scales(data: Data) -> None:
    """Warn where columns of vectors are far from values around 1, which is what networks make and critics can tell."""
    if data.kind == "images" or not isinstance(data.train, TensorSplit):
        return
    rows = data.train.take(min(len(data.train), max(2, _PROBED_VALUES // math.prod(data.sample_shape)))).double()
    mean = rows.mean(0)
    size, reach = rows.square().mean(0).sqrt(), (rows - mean).abs().amax(0)
    odd = ((size > 10) | ((reach > 0) & (reach < 0.1))).nonzero().tolist()
    if odd:
        worst = max(odd, key=lambda place: abs(math.log(size[tuple(place)])))
        where, std = tuple(worst), rows[(slice(None), *worst)].std(correction=0).item()
        more = f", and so on in {len(odd)} columns" * (len(odd) > 1)
        table = ", or learn the table with wgan_fast.tables.TableSynthesizer, which does both" * (len(worst) == 1)
        warnings.warn(
            f"{data.name}: column {', '.join(map(str, worst))} has mean {mean[where]:.3g} and standard deviation "
            f"{std:.3g}{more}; networks learn values around 1: standardise the columns first, (x - mean) / std, and "
            f"undo it on samples{table}",
            RuntimeWarning,
            stacklevel=users_level(),
        )


class Items(Dataset[Tensor | InputError]):
    """The items of a Dataset, checked to be samples of one form, read a batch at a time."""

    def __init__(self, dataset: Any, name: str, options: Options, form: Form | None = None) -> None:
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

    def _read(self, index: int) -> tuple[Tensor, Form]:
        what = f"{self.name}[{index}]"
        item = self.dataset[index]
        if isinstance(item, tuple | list) and item:
            item = item[0]
        if isinstance(item, np.ndarray):
            item = from_numpy(item, what)
        if not isinstance(item, Tensor):
            raise InputError(f"{what} is {type(item).__name__}, it must be a tensor, an array or begin with one")
        samples, form = _classify(dense(item, what)[None], what)
        sample = fit(samples, form, what, self.options)[0]
        return sample, form._replace(sample_shape=tuple(sample.shape))

    def _probed_form(self) -> Form:
        size = len(self.dataset)
        if not size:
            raise InputError(f"{self.name} holds no samples")
        _, form = self._read(0)
        if form.divisor == _UNIT:
            spread = range(0, size, -(-size // _PROBED_ITEMS))
            if any(self._read(index)[1].divisor is None for index in spread):
                return form._replace(divisor=None)
        return form


def items_data(items: Items, options: Options) -> Data:
    """Split a Dataset's items."""
    rows, held_rows = options.split(items.name, len(items.dataset))
    train, held_out = DatasetSplit(items, rows), DatasetSplit(items, held_rows)
    return Data(items.name, items.form.sample_shape, items.form.kind, train, held_out)


def dense(data: Tensor, what: str) -> Tensor:
    """Return a tensor that holds a value for every index, apart from any graph; refuse the others."""
    if isinstance(data, torch.masked.MaskedTensor):
        raise InputError(f"{what} is a masked tensor, it must be a dense tensor that holds its values")
    form = "meta" if data.is_meta else "nested" if data.is_nested else str(data.layout).removeprefix("torch.")
    if form != "strided":
        raise InputError(f"{what} is {form}, it must be a dense tensor that holds its values")
    return data.detach()


def from_numpy(array: Array, what: str) -> Tensor:
    """Take over an array, whatever its byte order and strides."""
    if np.ma.is_masked(array):
        masked = np.ma.getmaskarray(array).sum()
        raise InputError(f"{what} has {masked} masked values, it must have none: fill them first")
    if array.dtype != np.uint8 and not (array.dtype.kind == "f" and array.dtype.itemsize <= 8):
        raise InputError(f"{what} has dtype {array.dtype}, it must be uint8 or floating point")
    # torch takes neither foreign byte orders, nor negative strides, nor read-only memory; no copy otherwise.
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
