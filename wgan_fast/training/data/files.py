"""Data sets from paths: IDX files, folders of images, .npy and .npz."""

import gzip
import math
import os
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import InputError, users_level

if TYPE_CHECKING:
    from PIL import Image
from . import splits
from .named import SOURCES
from .samples import BYTES, Form, Items, Options, fit, from_numpy, items_data, tensor_data
from .splits import Array, Data


def path_data(path: Path, options: Options) -> Data:
    """Load what lies at a path."""
    what = str(path)
    if path.is_dir():
        train_file, test_file = idx_images(path, "train"), idx_images(path, "t10k")
        if train_file:
            return _idx_pair_data(what, train_file, test_file, options)
        return _folder_data(path, options)
    if path.is_file():
        if path.suffix in (".npy", ".npz"):
            return tensor_data(what, _read_numpy_file(path), options)
        if "idx3-ubyte" in path.name:
            return tensor_data(what, _read_idx_images(path), options)
        if {".csv", ".tsv", ".parquet"} & set(path.suffixes):
            raise InputError(f"{path} is a table: wgan-fast train --data {path} learns it, in Python TableSynthesizer")
        raise InputError(f"file {path} is none of *-images-idx3-ubyte, *-images-idx3-ubyte.gz, *.npy and *.npz")
    raise InputError(f"data {what!r} is neither an existing path nor one of the names {', '.join(SOURCES)}")


def _read_numpy_file(path: Path) -> Tensor:
    mapped: Literal["c"] | None = "c" if path.stat().st_size > splits.RESIDENT_BYTES else None
    try:
        loaded = np.load(path, mmap_mode=mapped, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return from_numpy(loaded, str(path))
        with loaded:
            keys = loaded.files
            if "mask" in keys:
                raise InputError(f"{path} has a mask beside its values: save the values that count, without a mask")
            chosen = keys if len(keys) == 1 else [key for key in ("images", "data", "x") if key in keys]
            if not chosen:
                raise InputError(f"{path} must name one of its arrays images, data or x, it has {', '.join(keys)}")
            return from_numpy(loaded[chosen[0]], f"{path}[{chosen[0]}]")
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
    images, labels_file = _read_idx(path, 3), labels_beside(path)
    if labels_file is not None and (count := len(_read_idx(labels_file, 1))) != len(images):
        raise InputError(f"{labels_file} holds {count} labels for the {len(images)} images of {path}")
    return from_numpy(images, str(path))


def labels_beside(images: Path) -> Path | None:
    """Find the labels that go with a file of images."""
    stem = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    files = (images.with_name(stem + end) for end in ("", ".gz") if "idx1-ubyte" in stem)
    return next((file for file in files if file.is_file()), None)


LABELS_FILE = "labels.csv"
"""Beside images in one folder: their classes, in the columns file and label."""


def idx_labels(path: Path) -> Array:
    """Read labels as ``[N]``."""
    return _read_idx(path, 1)


def idx_images(folder: Path, part: str) -> Path | None:
    """Find the images of "train" or "t10k" in a folder."""
    names = (f"{part}-images{mark}idx3-ubyte{packed}" for mark in "-." for packed in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx_pair_data(name: str, train_file: Path, test_file: Path | None, options: Options) -> Data:
    train = _read_idx_images(train_file)
    if test_file is None:
        return tensor_data(name, train, options)
    test = _read_idx_images(test_file)
    if train.shape[1:] != test.shape[1:]:
        raise InputError(
            f"{test_file} holds images of {tuple(test.shape[1:])}, {train_file} of {tuple(train.shape[1:])}"
        )
    return tensor_data(name, torch.cat((train, test)), options, held_out=len(test))


class _ImageFolder(Dataset[Tensor]):
    """Image files as uint8 `[C, H, W]`."""

    def __init__(self, files: list[Path], options: Options) -> None:
        self.files, self.options = files, options

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        path = self.files[index]
        with _opened_image(path) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"image {path} has more than 8 bits a channel; convert it to 8")
            pixels = np.array(_on_white(image).convert("L" if self.options.channels == 1 else "RGB"))
        sample = torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)
        form = Form(tuple(sample.shape), "images", BYTES)
        return fit(sample[None], form, str(path), self.options)[0]


def _on_white(image: "Image.Image") -> "Image.Image":
    """Lay an image with transparency on white: the colours below it are whatever a program left there."""
    if image.mode[-1] not in "Aa" and "transparency" not in image.info:
        return image
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _readable_suffixes() -> set[str]:
    """Return the endings of the formats that Pillow decodes by itself."""
    try:
        from PIL import Image, ImageFile
    except ImportError as error:
        raise InputError("reading image files needs pillow: pip install 'wgan_fast[train]'") from error

    def decodes(name: str) -> bool:
        if name in ("EPS", "IPTC", "MPEG"):  # needs Ghostscript; a letter about an image; a film
            return False
        factory = Image.OPEN.get(name, (None,))[0]
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        return name == "MPO" or (factory is not None and not stub)  # MPO is opened as JPEG

    return {suffix for suffix, name in Image.registered_extensions().items() if decodes(name)}


@contextmanager
def _opened_image(path: Path) -> "Iterator[Image.Image]":
    from PIL import Image, ImageOps

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


def _is_run(folder: str) -> bool:
    from ..description import CONFIG_FILE
    from ..folder import LOCK_FILE  # which needs this package

    return all(os.path.exists(os.path.join(folder, name)) for name in (CONFIG_FILE, LOCK_FILE))


def image_files(path: Path) -> tuple[list[Path], list[str]]:
    """Find the images below a folder, in the order of their samples, and say what else lies there.

    Links are followed, each folder once. Hidden files and folders are left out, and so are runs of training, whose
    pictures of samples would become data.
    """

    def unreadable(error: OSError) -> None:
        raise InputError(f"folder {error.filename} cannot be read: {error.strerror}") from error

    readable = _readable_suffixes()
    files: list[Path] = []
    others: Counter[str] = Counter()
    passed: list[str] = []
    been = {os.path.realpath(path)}
    for folder, folders, names in os.walk(path, followlinks=True, onerror=unreadable):
        below = []
        for name in sorted(folders):
            whole = os.path.join(folder, name)
            if name.startswith(".") or _is_run(whole):
                passed.append(os.path.relpath(whole, path))
            elif (place := os.path.realpath(whole)) not in been:
                been.add(place)
                below.append(name)
        folders[:] = below
        for name in names:
            if not name.startswith("."):
                suffix = os.path.splitext(name)[1].lower()
                if suffix in readable:
                    files.append(Path(folder, name))
                elif name != LABELS_FILE:
                    others[suffix or "without an ending"] += 1
    left_out = [f"{count} {suffix}" for suffix, count in sorted(others.items(), key=lambda item: (-item[1], item[0]))]
    left_out += sorted(passed)
    return sorted(files), left_out


def _folder_data(path: Path, options: Options) -> Data:
    files, left_out = image_files(path)
    said = ", ".join(left_out[:8]) + ", ..." * (len(left_out) > 8)
    if not files:
        raise InputError(f"folder {path} holds no images and no IDX files" + f" (but {said})" * bool(said))
    if left_out:
        message = f"folder {path}: {len(files)} images; left out: {said}"
        warnings.warn(message, RuntimeWarning, stacklevel=users_level())
    size = options.image_size
    height, width = (size, size) if size else _common_size(files)
    shape = (options.channels or 3, height, width)
    images = _ImageFolder(files, options)
    as_read = replace(options, image_size=None, channels=None)
    if len(files) * math.prod(shape) > splits.RESIDENT_BYTES:
        return items_data(Items(images, str(path), as_read, Form(shape, "images", BYTES)), options)

    pixels = torch.empty((len(files), *shape), dtype=torch.uint8)

    def decode(row: int) -> None:
        pixels[row] = images[row]

    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        for _ in pool.map(decode, range(len(files))):
            pass
    return tensor_data(str(path), pixels, as_read)
