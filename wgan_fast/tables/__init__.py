"""Tables: typed columns, and numbers that a network learns in their place, exactly inverted."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .columns import KINDS, Column, columns_of
    from .files import read_table
    from .judgement import judge
    from .preparation import Preparation
    from .synthesizer import TableSynthesizer

__all__ = ["KINDS", "Column", "Preparation", "TableSynthesizer", "columns_of", "judge", "read_table"]

_HOME = {
    "KINDS": "columns",
    "Column": "columns",
    "Preparation": "preparation",
    "TableSynthesizer": "synthesizer",
    "columns_of": "columns",
    "judge": "judgement",
    "read_table": "files",
}


def __getattr__(name: str) -> Any:
    """Import what a table needs when it is asked for: the command line's questions need less."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import pandas  # noqa: F401
        import safetensors  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"tables need {error.name}: pip install 'wgan_fast[tables]'") from error
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
