"""What one's own code may do while a run trains, and what the package itself does that way: TensorBoard."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .iteration import IterationResult
from .log import Board

if TYPE_CHECKING:
    from .trainer import Trainer


class Callback:
    """Base of what ``Trainer(..., callbacks=[...])`` takes: override what you want to be told.

    Everything is called in order between two iterations. The trainer's ``step``, ``config``, ``out``, ``generator``,
    ``critic`` and ``ema`` may be read; ``trainer.stop()`` ends training there, saved and drawn as at its end. What a
    method raises ends training too, and comes out of ``fit``. Leave the networks' mode and the default random
    generators as they were, or the run is another one than without. Where several processes train together, each calls
    its own, except that pictures are process 0's alone: let all of them stop at the same step, as figures that
    are the same everywhere decide it.

    Examples:
        >>> class Patience(Callback):
        ...     def on_log(self, trainer, record):
        ...         if record["step"] >= 1000 and abs(record["wasserstein"]) < 0.01:
        ...             trainer.stop()
    """

    def on_begin(self, trainer: "Trainer") -> None:
        """Act when training begins after ``trainer.step``: new, resumed, or gone back after a divergence."""

    def on_step(self, trainer: "Trainer", result: IterationResult) -> None:
        """Act after an iteration. Its figures are tensors on the device: to read one waits for it."""

    def on_log(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Act on a line of metrics; None stands for figures that are not finite."""

    def on_picture(self, trainer: "Trainer", samples: Tensor, path: Path) -> None:
        """Act on samples ``[N, *D]``, float32 on the CPU, that were drawn into the PNG file at ``path``."""

    def on_checkpoint(self, trainer: "Trainer", path: Path) -> None:
        """Act on a checkpoint, whose safetensors file ``path`` is; process 0 writes it, and the others do not wait."""

    def on_end(self, trainer: "Trainer", error: BaseException | None) -> None:
        """Act when ``fit`` is over: without an error at its end or by ``stop``, else with what interrupted it."""


class TensorBoard(Callback):
    """Shows a run's figures and pictures in TensorBoard, if it is installed."""

    def __init__(self) -> None:
        self._board: Board | None = None

    def on_begin(self, trainer: "Trainer") -> None:
        """Open the events, of which later ones of an interrupted run are dropped."""
        if self._board is not None:
            self._board.close()
        self._board = Board(trainer.out, trainer.step)

    def on_log(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """Write the figures."""
        if self._board is not None:
            self._board.write(record)

    def on_picture(self, trainer: "Trainer", samples: Tensor, path: Path) -> None:
        """Write the picture."""
        if self._board is not None:
            self._board.show("samples", path, trainer.step)

    def on_end(self, trainer: "Trainer", error: BaseException | None) -> None:
        """Close the events. Where the disk is full this fails as writing did: the first error is the one to tell."""
        if self._board is not None:
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                self._board.close()
