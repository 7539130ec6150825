"""Files that are never seen half-written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return a path as people write it, ``~`` for a home folder, as a ``Path``."""
    return Path(os.path.expanduser(path))  # Path.expanduser fails where there is no such user


def write_atomically(path: Path, body: bytes) -> None:
    """Write a file so that at every instant either the old or the new content is there, also after a power cut."""
    with written_atomically(path) as file:
        file.write(body)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Write a file piece by piece with the promise of ``write_atomically``; an error leaves the old content."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
