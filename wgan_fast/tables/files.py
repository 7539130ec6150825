"""Tables in files: .csv, .tsv and .parquet, compressed or not."""

import contextlib
import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..errors import InputError
from ..training.files import as_path, written_atomically
from .config import SUFFIXES

IN_MEMORY = 4
"""Bytes that a byte of a file takes, about, once it is read."""
Array = np.ndarray[Any, Any]
PART = 100_000
"""Rows that are read at once of a file that is read in parts."""
LOOKED_AT = 1_000
"""Rows of a text file by which it is told how its columns are written."""
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zip": "zip", ".zst": "zstd"}
_STRICT: dict[str, Any] = {"index_col": False, "low_memory": False}
"""Otherwise pandas takes what is too much in a row for the table's index, and tells types part by part."""


def read_table(
    path: str | os.PathLike[str],
    *,
    kinds: Mapping[str, str] | None = None,
    sep: str | None = None,
    decimal: str = ".",
    rows: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Read a table from a ".csv", ".tsv" or ".parquet" file, compressed or not.

    Of a text file, dates in ISO 8601 become dates, integers with gaps stay integers, and numbers that begin with a
    zero, as postal codes do, stay text.

    Args:
        path: The file.
        kinds: By the name of a column, the kind that it is to be: categories and identifiers are read as they are
            written, and dates in whatever form all of them have, or in that of "date:%d/%m/%Y".
        sep: What stands between values; a comma, in a .tsv file a tab, by default.
        decimal: What stands before decimals.
        rows: How many to draw, each as likely, in the order of the file, which may be larger than memory; None reads
            all.
        seed: Of what is drawn.

    Raises:
        InputError: In one line, what is wrong with the file.
    """
    return read_with_positions(path, kinds=kinds, sep=sep, decimal=decimal, rows=rows, seed=seed)[0]


def is_too_large(path: Path) -> bool:
    """Whether a file does not fit into memory once it is read."""
    return path.exists() and path.stat().st_size * IN_MEMORY > _free_memory()


def read_with_positions(
    path: str | os.PathLike[str],
    *,
    kinds: Mapping[str, str] | None,
    sep: str | None,
    decimal: str,
    rows: int | None,
    seed: int,
) -> tuple[pd.DataFrame, Array]:
    """Read a table as ``read_table`` does, and say which rows of the file its rows are ``[rows]``."""
    path, kinds = as_path(path), kinds or {}
    try:
        suffix, options = _form(path, sep, decimal)
        if rows is None and is_too_large(path):
            needed, free = path.stat().st_size * IN_MEMORY / 2**30, _free_memory() / 2**30
            raise InputError(
                f"{path} would take {needed:.0f} GiB or so, and {free:.0f} GiB are free: read it in parts "
                "(--stream), or learn from some of its rows (--rows 1000000; read_table(path, rows=1_000_000))"
            )
        if suffix == ".parquet":
            table, positions = (pd.read_parquet(path), None) if rows is None else _drawn(_batches(path), rows, seed)
        else:
            table, positions = _read_text(path, kinds, options, rows, seed)
            table = table.apply(_with_dates)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except ImportError:
        raise InputError(f"{path} cannot be read: .parquet needs pip install pyarrow") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8: save it as UTF-8") from None
    except InputError:
        raise
    except (pd.errors.ParserWarning, ValueError, OSError) as error:
        if other := _other_separator(path, sep):
            raise InputError(other) from None
        if isinstance(error, pd.errors.ParserWarning):
            raise InputError(f"{path} has rows with more values than the header has names") from None
        if ragged := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error)):
            raise InputError(f"{path} has {ragged[3]} values in line {ragged[2]}, and {ragged[1]} before it") from None
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if table.shape[1] == 1 and (other := _other_separator(path, sep)):
        raise InputError(other)
    for name, kind in kinds.items():
        if kind.startswith("date") and name in table.columns:
            table[name] = _dates(table[name], kind.partition(":")[2])
    return table, np.arange(len(table)) if positions is None else positions


def read_parts(
    path: Path, like: pd.DataFrame, *, kinds: Mapping[str, str], sep: str | None, decimal: str
) -> Iterator[pd.DataFrame]:
    """Read a table of any size part by part, in the types of ``like``, rows that ``read_table`` drew from it.

    What is not of its column's type is missing.
    """
    suffix, options = _form(path, sep, decimal)
    if suffix == ".parquet":
        yield from _batches(path)
        return
    forms = {name: kind.partition(":")[2] for name, kind in kinds.items()}
    for part in pd.read_csv(path, **options, index_col=False, dtype=str, chunksize=PART):
        yield pd.DataFrame({name: _as(part[name], like[name], forms.get(name, ""), decimal) for name in part})


def _form(path: Path, sep: str | None, decimal: str) -> tuple[str, dict[str, str]]:
    """Return the suffix of a table, and how its text is written."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() in SUFFIXES]
    if not suffixes:
        raise InputError(f"{path} is no table: {', '.join(SUFFIXES)} are read")
    return suffixes[-1], {"sep": sep or ("\t" if suffixes[-1] == ".tsv" else ","), "decimal": decimal}


def _as(values: pd.Series, like: pd.Series, form: str, decimal: str) -> pd.Series:
    """Return text as what ``like`` holds, and as missing what is nothing of the kind."""
    present = like.dropna()
    if pd.api.types.is_datetime64_any_dtype(like.dtype):
        return pd.to_datetime(values, format=form or "ISO8601", errors="coerce").astype(like.dtype)
    if pd.api.types.is_bool_dtype(like.dtype) or (len(present) and present.map(lambda v: isinstance(v, bool)).all()):
        return values.str.lower().map({"true": True, "false": False}).astype(object)
    if pd.api.types.is_numeric_dtype(like.dtype):
        return pd.to_numeric(values if decimal == "." else values.str.replace(decimal, "."), errors="coerce")
    return values


def _read_text(
    path: Path, kinds: Mapping[str, str], options: dict[str, Any], rows: int | None, seed: int
) -> tuple[pd.DataFrame, Array | None]:
    positions = None
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        source: Any = path
        if rows is not None:
            # As text: what a column is must be told by all the rows that are drawn.
            text = pd.read_csv(path, **options, **_STRICT, dtype=str, keep_default_na=False, chunksize=PART)
            drawn, positions = _drawn(text, rows, seed)
            source = io.StringIO(drawn.to_csv(index=False, sep=options["sep"]))
        first = pd.read_csv(source, **options, index_col=False, nrows=LOOKED_AT, dtype=str)
        if rows is not None:
            source.seek(0)
        as_text = [name for name in first if first[name].str.match(r"[+-]?0\d").any()]
        as_text += [name for name, kind in kinds.items() if kind in ("category", "identifier")]
        table = pd.read_csv(source, **options, **_STRICT, dtype=dict.fromkeys(as_text, str))
    for name in table.columns:
        values = table[name]
        whole = values.dtype == float and values.isna().any() and (values.dropna() % 1 == 0).all()
        if whole and first[name].dropna().str.fullmatch(r"[+-]?\d+").all() and values.abs().max() < 2**53:
            table[name] = values.astype("Int64")
    return table, positions


def _other_separator(path: Path, sep: str | None) -> str | None:
    """Say that another separator than the comma was meant, if the header shows it."""
    with contextlib.suppress(OSError, UnicodeDecodeError), path.open() as file:
        header = file.readline()
        mark = max(";\t|", key=header.count)
        if sep is None and header.count(mark) > header.count(","):
            shown = {"\t": "$'\\t'"}.get(mark, f"'{mark}'")
            return f"{path} is not separated by commas: give --sep {shown}, and --decimal , where decimals have one"
    return None


def _dates(values: pd.Series, form: str) -> pd.Series:
    """Return strings as dates.

    Raises:
        InputError: They have no form in common, or may be read in two ways.
    """
    if not pd.api.types.is_string_dtype(values.dtype):
        return values
    name = values.name
    hint = f"say how they are written, such as --column '{name}=date:%d/%m/%Y'"
    if form:
        try:
            return pd.to_datetime(values, format=form)
        except ValueError:
            raise InputError(f"column {name!r} has dates that are not written as {form}") from None
    read = []
    for options in ({"format": "ISO8601"}, {"dayfirst": False}, {"dayfirst": True}):
        with contextlib.suppress(ValueError, UserWarning), warnings.catch_warnings():
            warnings.simplefilter("error")  # that values have no form in common, or another than was asked for
            read.append(pd.to_datetime(values, **options))
    if not read:
        raise InputError(f"column {name!r} cannot be date: its values have no form in common, or need one: {hint}")
    if not all(found.equals(read[0]) for found in read):
        raise InputError(f"column {name!r} has dates of which day and month are not told apart: {hint}")
    return read[0]


def check_out(path: Path) -> str:
    """Return the suffix of the table that is to be written to a path.

    Raises:
        InputError: It has none, or what it needs is not installed.
    """
    kind = next((suffix.lower() for suffix in reversed(path.suffixes) if suffix.lower() in SUFFIXES), None)
    if kind is None:
        raise InputError(f"out must end in {', '.join(SUFFIXES)}, got {path}")
    if kind == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise InputError(f"out {path} cannot be written: .parquet needs pip install pyarrow") from None
    return kind


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table, whole or not at all, in the form that the path's suffixes say.

    Raises:
        InputError: As ``check_out``; the path cannot be written.
    """
    kind = check_out(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as file:
            if kind == ".parquet":
                table.to_parquet(file, index=False)
            else:
                packed: Any = _PACKED.get(path.suffix.lower())
                table.to_csv(file, index=False, sep="\t" if kind == ".tsv" else ",", compression=packed, mode="wb")
    except OSError as error:
        raise InputError(f"out {path} cannot be written: {error.strerror or error}") from error


def _drawn(parts: Iterable[pd.DataFrame], rows: int, seed: int) -> tuple[pd.DataFrame, Array]:
    """Draw rows of a table that comes in parts: those with the smallest of random numbers; and say which they are."""
    random = np.random.default_rng(seed)
    kept, keys, positions, seen = pd.DataFrame(), np.empty(0), np.empty(0, np.int64), 0
    for part in parts:
        kept = part if kept.empty else pd.concat([kept, part], ignore_index=True)
        keys = np.concatenate([keys, random.random(len(part))])
        positions = np.concatenate([positions, np.arange(seen, seen := seen + len(part))])
        if len(kept) > rows:
            chosen = np.sort(np.argpartition(keys, rows)[:rows])
            kept, keys, positions = kept.iloc[chosen], keys[chosen], positions[chosen]
    return kept.reset_index(drop=True), positions


def _batches(path: Path) -> Iterator[pd.DataFrame]:
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(path).iter_batches(PART):
        yield batch.to_pandas()


def _free_memory() -> int:
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as lines:
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _with_dates(values: pd.Series) -> pd.Series:
    """Return dates where strings are written as ISO 8601 has them, which a CSV file cannot tell from strings."""
    present = values.dropna()
    strings = pd.api.types.is_string_dtype(present.dtype) and not present.empty
    if not strings or not present.astype(str).str.match(r"\d{4}-\d{2}-\d{2}([T ]|$)").all():
        return values
    try:
        return pd.to_datetime(values, format="ISO8601")
    except ValueError:
        return values
