"""Training in several processes at once: who they are, which rows each takes, and how their gradients meet.

Every process holds both networks and takes its share of every batch. The noise and α of a whole batch are drawn by
every process from one stream, and each keeps its rows: k processes do what one does with the same batch.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError


class LostProcessError(RuntimeError):
    """Another process of the same training is gone; the message says which one noticed."""


class Replicas:
    """The processes that train together; a process of its own where there are no others.

    Attributes:
        rank: This process's number; 0 writes the run's folder.
        world: How many there are.
    """

    def __init__(self) -> None:
        many = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if many else 0
        self.world = dist.get_world_size() if many else 1
        self._buckets: dict[str, _Bucket] = {}

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Where this process computes: on a GPU of its own, where no number was given."""
        if self.world == 1 or device.type != "cuda" or device.index is not None:
            return device
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))
        if own.index >= torch.cuda.device_count():
            raise InputError(
                f"there are {torch.cuda.device_count()} GPUs here, and this is process {own.index} of this machine: "
                "start no more processes than GPUs"
            )
        torch.cuda.set_device(own)
        return own

    def check_shared(self, **sizes: int | None) -> None:
        """Raise unless as many samples can be shared out.

        Raises:
            InputError: The processes do not divide a size, which is named.
        """
        for name, size in sizes.items():
            if size is not None and size % self.world:
                raise InputError(f"{name} must be a multiple of the {self.world} processes, got {size}")

    def rows(self, batch_size: int) -> slice:
        """Return the rows of a whole batch that are this process's."""
        share = batch_size // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    @torch.no_grad()
    def average_gradients(
        self, name: str, parameters: Sequence[nn.Parameter], figures: Iterable[Tensor]
    ) -> Sequence[Tensor]:
        """Replace gradients by their mean over the processes, all in one message, figures with them.

        Args:
            name: What the bucket is kept under.
            parameters: Their ``.grad`` is replaced; one without a gradient keeps none.
            figures: 0-dim tensors.

        Returns:
            The figures' means. A figure that is not finite on one process is finite on none.

        Raises:
            LostProcessError: Another process is gone.
        """
        figures = tuple(figures)
        if self.world == 1:
            return figures
        if name not in self._buckets:
            self._buckets[name] = _Bucket(parameters, len(figures))
        bucket = self._buckets[name]
        bucket.fill([parameter.grad for parameter in parameters], figures)
        with self.reaching_others():
            dist.all_reduce(bucket.flat)
        bucket.flat.div_(self.world)
        for parameter, mean in zip(parameters, bucket.parts):
            if parameter.grad is not None:
                parameter.grad = mean
        return [figure.to(like.dtype) for figure, like in zip(bucket.figures(), figures)]

    @torch.no_grad()
    def share_buffers(self, *networks: nn.Module) -> None:
        """Give every process rank 0's buffers, such as batch norm's running statistics, which are what is saved."""
        if self.world == 1:
            return
        for buffer in (buffer for network in networks for buffer in network.buffers()):
            with self.reaching_others():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            with self.reaching_others():
                dist.barrier()

    @contextlib.contextmanager
    def reaching_others(self) -> Iterator[None]:
        """Turn what a broken connection raises into one line.

        Raises:
            LostProcessError: Another process is gone.
        """
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise LostProcessError(f"process {self.rank} of {self.world} lost another one: {reason}") from error


class _Bucket:
    """Gradients and figures side by side in one tensor.

    Args:
        parameters: Whose gradients.
        count: How many figures.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], count: int) -> None:
        first = parameters[0]
        size = sum(parameter.numel() for parameter in parameters)
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.flat = torch.zeros(size + count, dtype=dtype, device=first.device)
        sizes = [*(parameter.numel() for parameter in parameters), count]
        *pieces, self._figures = torch.split(self.flat, sizes)
        self.parts = [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters)]

    def fill(self, gradients: Sequence[Tensor | None], figures: Sequence[Tensor]) -> None:
        """Copy everything in; a missing gradient counts as zeros."""
        given = [(part, gradient) for part, gradient in zip(self.parts, gradients) if gradient is not None]
        if len(given) < len(self.parts):
            self.flat.zero_()
        torch._foreach_copy_([part for part, _ in given], [gradient for _, gradient in given])
        self._figures.copy_(torch.stack([figure.to(self.flat.dtype) for figure in figures]))

    def figures(self) -> tuple[Tensor, ...]:
        """Return the figures as they are now, in memory of their own: the bucket is filled again."""
        return tuple(self._figures.clone().unbind())


def launched() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun started this process again after one of the processes had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _attempt() -> str:
    """Return what keeps apart, in torchrun's store, the addresses of restarted processes and those of the dead.

    Its count of restarts is the same for all processes of one machine only.
    """
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "any"


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started: NCCL between GPUs, gloo between CPUs; nothing for a single process.

    Raises:
        LostProcessError: They could not be reached.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    options: dict[str, Any] = {}
    if device.type == "cuda":
        options["device_id"] = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    rank, world = os.environ.get("RANK", "?"), os.environ["WORLD_SIZE"]
    try:
        store, number, count = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        store = dist.PrefixStore(f"attempt-{_attempt()}", store)  # type: ignore[attr-defined]
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, **options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LostProcessError(f"process {rank} of {world} could not join the others: {reason}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()
