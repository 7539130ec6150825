"""Many samples as files: images one by one, or everything as one array."""

import csv
import itertools
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import InputError
from .data.files import LABELS_FILE
from .files import written_atomically
from .plots import to_pixels

ARRAY = "x"
"""Name of the array in an .npz file, which ``load_data`` knows."""


def save_images(pieces: Iterable[Tensor], n: int, folder: Path, classes: NDArray[np.str_] | None = None) -> None:
    """Write images into a new folder, one PNG file each: 00000.png, 00001.png, ...

    Pixels are those of ``plots.to_pixels``. The folder is there once all of them are.

    Args:
        pieces: Images ``[K, C, H, W]`` with values in [-1, 1], n in all; C is 1 (grey), 3 (RGB) or 4 (RGBA).
        n: Number of images.
        folder: What is made; its parent exists.
        classes: The name of each image's class, ``[n]``, for a table beside them, labels.csv with the columns file and
            label, which ``load_labels`` reads; None writes none.

    Raises:
        InputError: The folder is there already.
        OSError: It cannot be written.
    """
    if folder.exists():
        raise InputError(f"out {folder} is there already: images go into a new folder, or give a .npy or .npz file")
    digits = max(5, len(str(n - 1)))
    numbers = itertools.count()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        unfinished = Path(aside, folder.name)  # whose mode is that of any new folder
        unfinished.mkdir()
        for piece in pieces:
            for pixels in to_pixels(piece):
                Image.fromarray(pixels).save(unfinished / f"{next(numbers):0{digits}d}.png")
        if classes is not None:
            with open(unfinished / LABELS_FILE, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                rows = ((f"{number:0{digits}d}.png", name) for number, name in enumerate(classes))
                csv.writer(file, lineterminator="\n").writerows([("file", "label"), *rows])
        unfinished.rename(folder)


def save_array(
    pieces: Iterable[Tensor], shape: tuple[int, ...], path: Path, classes: NDArray[np.str_] | None = None
) -> None:
    """Write samples into one .npy file, or into an .npz file as its array "x": float32, row-major.

    The file is there once it is whole.

    Args:
        pieces: Samples ``[K, *D]``, N in all.
        shape: ``(N, *D)``.
        path: What is written; its folder exists.
        classes: The name of each sample's class, ``[N]``, which an .npz file holds as its array "y"; None for none.

    Raises:
        InputError: The disk has no room.
        OSError: The file cannot be written.
    """
    needed, free = 4 * math.prod(shape), shutil.disk_usage(path.parent).free
    if needed > free > 0:  # a file system that does not say has 0
        raise InputError(f"n {shape[0]} needs {needed / 1e9:.1f} GB, and {path.parent} has {free / 1e9:.1f} GB left")
    with written_atomically(path) as file:
        if path.suffix == ".npy":
            _write_array(pieces, shape, file)
        else:
            with zipfile.ZipFile(file, "w") as archive:
                with archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as member:
                    _write_array(pieces, shape, member)
                if classes is not None:
                    with archive.open("y.npy", "w") as member:
                        np.lib.format.write_array(member, classes)


def _write_array(pieces: Iterable[Tensor], shape: tuple[int, ...], file: IO[bytes]) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for piece in pieces:
        file.write(np.ascontiguousarray(piece.float().numpy(), dtype="<f4").data)
