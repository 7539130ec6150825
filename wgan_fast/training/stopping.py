"""Stopping when asked to: Ctrl-C and SIGTERM end training between two iterations, with everything saved."""

import shlex
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from .config import OWN

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedTraining(KeyboardInterrupt):
    """Training was stopped by a signal; the message says where it is saved.

    Attributes:
        signal: The signal's number; a program that it stops exits with 128 more.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class StopRequests:
    """Notes the first Ctrl-C or SIGTERM inside its ``with``; a second one interrupts at once.

    Outside the main thread, where Python allows no handlers, it notes nothing.

    Attributes:
        signal: The number of the signal that came; None before.
        nothing_to_save: Whether already the first one interrupts at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.nothing_to_save = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def number(self) -> int:
        """The signal that stops training here; SIGTERM where another process was told."""
        return self.signal or signal.SIGTERM

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None or self.nothing_to_save:
            raise InterruptedTraining("stopped before there was anything to save", number)
        self.signal = number


def way_on(folder: Path, model: str = "") -> str:
    """Say how a run that stopped is gone on with."""
    if model == OWN:
        return f"go on with fit(resume=True) of a Trainer whose out is {folder}"
    return f"go on with: wgan-fast train --resume {shlex.quote(str(folder))}"
