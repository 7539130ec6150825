"""The classes of a data set: where they lie, and splits that draw them as the samples are drawn."""

import contextlib
import csv
import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .files import LABELS_FILE, idx_images, idx_labels, image_files, labels_beside
from .named import PACKAGED, TOYS, packaged
from .samples import Options
from .splits import Array, Data, Split, TensorSplit

_PLACES = (
    "IDX images have them in their file of labels beside, .npz in its array y or labels of integers or strings, a "
    "folder of images as one subfolder for each class, or in labels.csv with the columns file and label"
)


class Labels(NamedTuple):
    """The classes of a data set, as splits that draw the same rows as the samples' for the same number and seed.

    Attributes:
        train: Draws indices of classes, ``[n]`` int64.
        held_out: Likewise.
        names: What each class is called, by its index.
    """

    train: Split
    held_out: Split
    names: tuple[str, ...]

    def check(self, data: Data) -> None:
        """Raise unless there is one label a sample.

        Raises:
            InputError: They are more or fewer.
        """
        for split, theirs in ((data.train, self.train), (data.held_out, self.held_out)):
            if len(split) != len(theirs):
                raise InputError(f"there are {len(theirs)} labels for {len(split)} samples of {data.name}")


def load_labels(source: str | os.PathLike[str], *, holdout: float = 0.1, seed: int = 0) -> Labels | None:
    """Find the classes of a data set that `load_data` knows with the same settings.

    Args:
        source: What the samples were loaded from. "mnist5k" and "digits" have classes, and so have IDX files of
            images beside which lies the file of their labels, as MNIST and Fashion-MNIST are distributed; an .npz
            file with an array y, ``[N]`` or ``[N, 1]``, of integers or strings; a folder whose images all lie in two
            or more subfolders, each of which is a class; and a folder whose images all lie in itself, beside a table
            labels.csv with the columns file and label.
        holdout: As in `load_data`.
        seed: As in `load_data`.

    Returns:
        The labels; None where the source has none.

    Raises:
        InputError: A file of labels cannot be read.
    """
    found = _read(source)
    return None if found is None else split_labels(*found, holdout=holdout, seed=seed)


def has_labels(source: str | os.PathLike[str]) -> bool:
    """Whether a data set that `load_data` can read has classes, without reading its samples."""
    with contextlib.suppress(InputError):
        return source in PACKAGED or _read(source) is not None
    return False


def why_unlabelled(source: str | os.PathLike[str]) -> str:
    """Say why `load_labels` finds no classes in what `load_data` has read; of others than folders, where it looks."""
    if source not in PACKAGED and source not in TOYS:
        path = Path(source).expanduser()
        if path.is_dir() and idx_images(path, "train") is None:
            return _classes_of_folder(path)[1]
    return _PLACES


def split_labels(
    labels: Array | Tensor, set_apart: Array | None = None, *, holdout: float = 0.1, seed: int = 0
) -> Labels:
    """Part labels as `load_data` parts their samples: by their number and the seed alone.

    Args:
        labels: One a sample, ``[N]``, integers or strings; a class for every value that occurs, in sorted order.
        set_apart: Those of samples that were held out already, with which ``holdout`` means nothing.
        holdout: As in `load_data`.
        seed: As in `load_data`.

    Raises:
        InputError: They are neither integers nor strings, or not one a sample.
    """
    known = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if not _are_classes(known):
        raise InputError(f"labels must be integers or strings [N], got {known.dtype} of shape {list(known.shape)}")
    whole = known if set_apart is None else np.concatenate((known, set_apart))
    names, indices = np.unique(whole.reshape(-1), return_inverse=True)
    classes = torch.from_numpy(indices.astype(np.int64))
    if set_apart is None:
        rows, held_rows = Options(None, None, holdout, seed).split("labels", len(classes))
    else:
        rows, held_rows = torch.arange(len(classes)).tensor_split([len(known)])
    train, held_out = (TensorSplit(classes, part, None) for part in (rows, held_rows))
    return Labels(train, held_out, tuple(str(name) for name in names))


def _are_classes(labels: Array) -> bool:
    return labels.dtype.kind in "biuU" and labels.size > 0 and labels.shape in ((len(labels),), (len(labels), 1))


def _read(source: str | os.PathLike[str]) -> tuple[Array, Array | None] | None:
    """Read the labels of a source, and those that were held out by whoever made it; None where it has none."""
    if source in TOYS:
        return None
    if source in PACKAGED:
        return packaged(str(source))[1], None
    path = Path(source).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return _read_npz(path)
    images = idx_images(path, "train") if path.is_dir() else path
    if images is None:
        return _read_folder(path)
    file = labels_beside(images) if images.is_file() else None
    if file is None:
        return None
    test_images = idx_images(path, "t10k") if path.is_dir() else None
    test_file = test_images and labels_beside(test_images)
    return idx_labels(file), idx_labels(test_file) if test_file else None


def _read_npz(path: Path) -> tuple[Array, None] | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = next((arrays[name] for name in ("y", "labels") if name in arrays.files), None)
    except ValueError:  # an array of objects, which may mean anything
        return None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    # Other arrays of this name, such as real numbers to predict, are no classes.
    return None if labels is None or not _are_classes(labels) else (labels, None)


def _read_folder(path: Path) -> tuple[Array, None] | None:
    classes, _ = _classes_of_folder(path)
    return None if classes is None else (classes, None)


def _classes_of_folder(path: Path) -> tuple[Array | None, str]:
    """Return the class of every image of a folder, or None and why there are none."""
    files = image_files(path)[0]
    parts = [file.relative_to(path).parts for file in files]
    classes, loose = {part[0] for part in parts if len(part) > 1}, [part[0] for part in parts if len(part) == 1]
    if not classes:
        told = _told(path / LABELS_FILE)
        if told is None:
            return None, "all images lie in the folder itself, and every subfolder would be a class"
        if missing := [name for name in loose if not told.get(name)]:
            return None, f"{LABELS_FILE} has no label of {missing[0]} in its columns file and label"
        return np.array([told[name] for name in loose]), ""
    if loose:
        stray = f"{loose[0]} and {len(loose) - 1} more lie" if len(loose) > 1 else f"{loose[0]} lies"
        return None, f"{stray} in none of its subfolders, each of which would be a class: leave none there"
    if len(classes) < 2:
        return None, f"all images lie in one subfolder, {min(classes)}, and every subfolder is a class"
    return np.array([part[0] for part in parts]), ""


def _told(path: Path) -> dict[str, str] | None:
    """Read a table of files and their labels; empty where its columns are others, None where there is no table."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            return {row["file"]: row["label"] for row in csv.DictReader(file)}
    except OSError:
        return None
    except (KeyError, csv.Error):
        return {}
