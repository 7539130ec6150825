"""The folder of a run: found, made, and held against every other process."""

import contextlib
import fcntl
import itertools
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from .checkpoint import CHECKPOINTS
from .description import CONFIG_FILE

LOCK_FILE = ".lock"
"""What the process that trains in a folder holds locked."""


def new_folder(data: str, method: str) -> Path:
    """Name a folder under runs/ that is not there yet."""
    names = (
        f"{Path(data).stem}-{method}{suffix}" for suffix in itertools.chain([""], map("-{}".format, itertools.count(2)))
    )
    return next(path for name in names if not (path := Path("runs") / name).exists())


def make_folder(path: Path) -> None:
    """Make the folder of a new run.

    Raises:
        InputError: It holds a run already, or cannot be written.
    """
    _check_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def make_new_folder(data: str, method: str) -> Path:
    """Make a folder under runs/ that no other run has, and return it.

    Raises:
        InputError: It cannot be written.
    """
    while True:
        path = new_folder(data, method)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue  # another run has taken the name since it was chosen
        except OSError as error:
            raise _unwritable(path, error) from error
        return path


@contextlib.contextmanager
def held(path: Path, *, new: bool) -> Iterator[None]:
    """Hold the lock of a run's folder.

    Raises:
        InputError: Another process trains in it, it cannot be written, or a run began in it meanwhile.
    """
    try:
        lock = (path / LOCK_FILE).open("w")
    except OSError as error:
        raise _unwritable(path, error) from error
    with lock:
        try:
            # A record lock: the kernel lets go when this process dies, and worker processes do not inherit it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"out {path} is being trained by another process") from error
        if new:
            _check_free(path)
        yield


def _check_free(path: Path) -> None:
    if any((path / name).exists() for name in (CONFIG_FILE, CHECKPOINTS)):
        raise InputError(f"out {path} already holds a run: give another folder, or go on with --resume {path}")
    if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise InputError(f"out {path} already holds something else: give a new or an empty folder")


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"out {path} cannot be written: {error.strerror}")
