"""The two sides of a data set, as endless batches that resume exactly.

Batch k is a pure function of (split, batch size, seed, k): a run that has seen k batches continues with ``start=k`` and
needs no other state, and the global random generators are neither read nor advanced.
"""

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import InputError

if TYPE_CHECKING:
    from .named import Toy
    from .samples import Items

RESIDENT_BYTES = 3 << 30
"""Largest set, in bytes as stored, that is kept whole on the device: CelebA at 64 x 64 (2.5e9) fits."""


Kind = Literal["images", "vectors"]


Array = np.ndarray[Any, np.dtype[Any]]


WHOLE = slice(None)


_TOY_BLOCK = 64  # batches per draw: one call and one copy to the device for all of them


# The first word of a random stream's key, so that no two purposes share their draws.
HOLDOUT, _EPOCH, _TAKE, _WORKERS = range(4)


class Reading(NamedTuple):
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
        check_at_least(1, n=n)
        check_at_least(0, seed=seed)
        check_at_most_split(self, n=n)
        return self._take(n, seed)

    @abstractmethod
    def _take(self, n: int, seed: int) -> Tensor: ...

    @abstractmethod
    def _batches(
        self, batch_size: int, seed: int, start: int, device: torch.device, reading: "Reading"
    ) -> Iterator[Tensor]: ...

    def resident(self, device: torch.device) -> "Resident | None":
        """Bring the split to a device whole, for batches that are read there by their rows; None if it is not kept."""
        return None


@dataclass(frozen=True)
class Resident:
    """A split that lies on a device whole.

    Attributes:
        data: ``[M, *sample_shape]``, as stored.
        divisor: What brings bytes to [0, 2]; None for what stays as it is.
        indices: The rows of the split, ``[len(split)]`` int64.
    """

    data: Tensor
    divisor: float | None
    indices: Tensor

    def rows(self, batch_size: int, *, seed: int, start: int = 0, part: slice = WHOLE) -> Iterator[Tensor]:
        """Name the rows of the batches that `batches` draws with the same settings: ``[N]`` int64 each."""
        for rows in _index_batches(self.indices, batch_size, seed, start, self.data.device):
            yield rows[part]

    def read(self, rows: Tensor) -> Tensor:
        """Gather rows ``[N]`` as `batches` gives them, without the host."""
        return _normalise(self.data.index_select(0, rows), self.divisor)


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


def check_at_least(least: int, **settings: int) -> None:
    """Raise unless every setting is an integer of at least that."""
    for name, value in settings.items():
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name}={value!r} must be an integer of at least {least}")


def check_at_most_split(split: Split, **settings: int) -> None:
    """Raise unless no setting exceeds the size of a split."""
    for name, value in settings.items():
        if value > len(split):
            raise InputError(f"{name}={value} must be at most the size of the split, {len(split)} samples")


def _rng(seed: int, *key: int) -> np.random.Generator:
    # torch.Generator keeps only 32 bits of its seed on the CPU, too few to tell millions of blocks apart.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def permutation(size: int, seed: int, *key: int) -> Tensor:
    """Permute ``range(size)`` by the random stream that the seed and the key name."""
    return torch.from_numpy(_rng(seed, *key).permutation(size))


def _index_batches(indices: Tensor, batch_size: int, seed: int, start: int, device: torch.device) -> Iterator[Tensor]:
    """Cut the epochs' permutations of `indices` into batches, from batch `start` on."""

    def permuted(epoch: int) -> Tensor:
        return indices[permutation(len(indices), seed, _EPOCH, epoch)].to(device)

    epoch, offset = divmod(start * batch_size, len(indices))
    order = permuted(epoch)[offset:]
    while True:
        if len(order) < batch_size:
            epoch += 1
            order = torch.cat((order, permuted(epoch)))
        yield order[:batch_size]
        order = order[batch_size:]


def _normalise(fresh: Tensor, divisor: float | None) -> Tensor:
    """Return float32, for images in [-1, 1]; `fresh` belongs to the caller and may be overwritten.

    Labels, which are the only integers of 64 bits, stay as they are.
    """
    if fresh.dtype == torch.int64:
        return fresh
    fresh = fresh.to(torch.float32)
    return fresh if divisor is None else fresh.div_(divisor).sub_(1)


class TensorSplit(Split):
    """Rows `indices` of a tensor in memory or of a memory-mapped file."""

    def __init__(self, data: Tensor, indices: Tensor, divisor: float | None) -> None:
        self.data, self.indices, self.divisor = data, indices, divisor

    def __len__(self) -> int:
        return len(self.indices)

    def _take(self, n: int, seed: int) -> Tensor:
        rows = self.indices[permutation(len(self), seed, _TAKE)[:n]]
        return _normalise(self.data.index_select(0, rows.to(self.data.device)).cpu(), self.divisor)

    def _batches(
        self, batch_size: int, seed: int, start: int, device: torch.device, reading: "Reading"
    ) -> Iterator[Tensor]:
        resident = self.resident(device)
        if resident is not None:
            yield from map(resident.read, resident.rows(batch_size, seed=seed, start=start, part=reading.part))
            return
        pin = device.type == "cuda" and self.data.device.type == "cpu"
        for rows in _index_batches(self.indices, batch_size, seed, start, self.data.device):
            batch = self.data.index_select(0, rows[reading.part])
            batch = batch.pin_memory() if pin else batch
            yield _normalise(batch.to(device, non_blocking=True), self.divisor)

    def resident(self, device: torch.device) -> Resident | None:
        """As for every split; up to ``RESIDENT_BYTES`` it is kept."""
        if self.data.nbytes > RESIDENT_BYTES:
            return None
        return Resident(self.data.to(device), self.divisor, self.indices)


def _leave_the_group(worker: int) -> None:
    """Keep Ctrl-C and signals to the whole group from a worker: whoever reads from it may want to finish first."""
    os.setpgid(0, 0)


class DatasetSplit(Split):
    """Items `indices` of a Dataset."""

    def __init__(self, items: "Items", indices: Tensor) -> None:
        self.items, self.indices = items, indices

    def __len__(self) -> int:
        return len(self.indices)

    def _take(self, n: int, seed: int) -> Tensor:
        rows = self.indices[permutation(len(self), seed, _TAKE)[:n]]
        samples = torch.stack([self.items.read(row) for row in rows.tolist()])
        return _normalise(samples, self.items.form.divisor)

    def _batches(
        self, batch_size: int, seed: int, start: int, device: torch.device, reading: "Reading"
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


class ToySplit(Split):
    """Endless draws from a distribution; `side` keeps those of the two splits apart."""

    def __init__(self, toy: "Toy", side: int) -> None:
        self.toy, self.side = toy, side

    def __len__(self) -> int:
        return sys.maxsize

    def _take(self, n: int, seed: int) -> Tensor:
        return torch.from_numpy(self.toy.draw(_rng(seed, _TAKE, self.side), n).astype(np.float32))

    def _batches(
        self, batch_size: int, seed: int, start: int, device: torch.device, reading: "Reading"
    ) -> Iterator[Tensor]:
        block, skipped = divmod(start, _TOY_BLOCK)
        while True:
            points = self.toy.draw(_rng(seed, _EPOCH, self.side, block), _TOY_BLOCK * batch_size)
            on_device = torch.from_numpy(points.astype(np.float32)).to(device)
            yield from on_device.view(_TOY_BLOCK, batch_size, 2)[skipped:, reading.part].unbind()
            block, skipped = block + 1, 0
