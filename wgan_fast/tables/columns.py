"""What the columns of a table are: a kind each, told by pandas and by the values, or by the user."""

import contextlib
import datetime
import decimal
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from ..errors import InputError
from ..training.files import written_atomically
from .config import SUFFIXES

Kind = Literal["number", "integer", "category", "yes/no", "date", "constant", "identifier"]
KINDS: tuple[str, ...] = get_args(Kind)

MOST_CATEGORIES = 10_000
WORDS = 40
"""Characters from which on values that hardly repeat are text."""
LEAST_ROWS = 10
SURE = 20
"""Repetitions that are expected of integers, from which on it is no accident that there is none."""
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zip": "zip", ".zst": "zstd"}
IN_MEMORY = 4
"""Bytes that a byte of a file takes, about, once it is read."""
_STRICT: dict[str, Any] = {"index_col": False, "low_memory": False}
"""Otherwise pandas takes what is too much in a row for the table's index, and tells types part by part."""
_CATEGORIES = str | bool | int | float | pd.Timestamp | datetime.date
"""What may be a category: what can be written down and read back as it was."""


@dataclass(frozen=True)
class Column:
    """A column, by its position in the table.

    Attributes:
        name: As the table has it; several may have one name.
        kind: What it is learned as. A constant and an identifier are not learned: one is put back as it was, the other
            is left out.
        dtype: Of pandas, as text.
        why: In a clause, where the kind is not evident.
        levels: All categories of a pandas categorical, also those that no row has.
        levels_dtype: Of the levels.
        ordered: Whether they have an order.
    """

    name: Any
    kind: Kind
    dtype: str
    why: str = ""
    levels: tuple[Any, ...] | None = None
    levels_dtype: str = ""
    ordered: bool = False

    def pandas_dtype(self) -> Any:
        """Return the dtype of pandas."""
        if self.levels is None:
            return self.dtype
        return pd.CategoricalDtype(pd.Index(list(self.levels), dtype=self.levels_dtype), self.ordered)


def read_table(
    path: str | os.PathLike[str],
    *,
    kinds: Mapping[str, str] | None = None,
    rows: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Read a table from a ".csv", ".tsv" or ".parquet" file, compressed or not.

    Of a text file, dates in ISO 8601 become dates, and numbers that begin with a zero, as postal codes do, stay text.

    Args:
        path: The file.
        kinds: By the name of a column, the kind that it is to be: categories and identifiers are read as they are
            written, and dates in whatever form pandas understands.
        rows: How many to draw, each as likely, in the order of the file, which may be larger than memory; None reads
            all.
        seed: Of what is drawn.

    Raises:
        InputError: In one line, what is wrong with the file.
    """
    path = Path(path).expanduser()
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() in SUFFIXES]
    if not suffixes:
        raise InputError(f"{path} is no table: {', '.join(SUFFIXES)} are read")
    try:
        needed, free = path.stat().st_size * IN_MEMORY / 2**30, _free_memory() / 2**30
        if rows is None and needed > free:
            raise InputError(
                f"{path} would take {needed:.0f} GiB or so, and {free:.0f} GiB are free: learn from some of its rows "
                "(--rows 1000000; read_table(path, rows=1_000_000))"
            )
        if suffixes[-1] == ".parquet":
            return pd.read_parquet(path) if rows is None else _drawn(_batches(path), rows, seed)
        options: dict[str, Any] = {"sep": "\t" if suffixes[-1] == ".tsv" else ","}
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            source: Any = path
            if rows is not None:
                # As text: what a column is must be told by all the rows that are drawn.
                text = pd.read_csv(path, **options, **_STRICT, dtype=str, keep_default_na=False, chunksize=100_000)
                drawn = _drawn(text, rows, seed)
                options, source = {}, io.StringIO(drawn.to_csv(index=False))
            first = pd.read_csv(source, **options, index_col=False, nrows=1000, dtype=str)
            if rows is not None:
                source.seek(0)
            as_text = [name for name in first if first[name].str.match(r"[+-]?0\d").any()]
            as_text += [name for name, kind in (kinds or {}).items() if kind in ("category", "identifier")]
            table = pd.read_csv(source, **options, **_STRICT, dtype=dict.fromkeys(as_text, str))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except ImportError:
        raise InputError(f"{path} cannot be read: .parquet needs pip install pyarrow") from None
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty") from None
    except pd.errors.ParserWarning:
        raise InputError(f"{path} has rows with more values than the header has names") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8: save it as UTF-8") from None
    except InputError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {_line(error)}") from None
    if table.shape[1] == 1 and any(mark in str(table.columns[0]) for mark in ";\t|"):
        raise InputError(f"{path} is not separated by commas: read it with pandas.read_csv(path, sep=...)")
    for name, kind in (kinds or {}).items():
        if kind == "date" and name in table.columns:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that values have no form in common
                    table[name] = pd.to_datetime(table[name])
            except ValueError as error:
                raise InputError(f"column {name!r} cannot be date: {_line(error)}") from None
    return table.apply(_with_dates)


@contextlib.contextmanager
def write_table(path: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Check that a table can be written to a path, and give what writes it, whole or not at all.

    Raises:
        InputError: The path has no suffix of a table, or cannot be written.
    """
    kind = next((s.lower() for s in reversed(path.suffixes) if s.lower() in SUFFIXES), None)
    if kind is None:
        raise InputError(f"out must end in {', '.join(SUFFIXES)}, got {path}")

    def write(table: pd.DataFrame) -> None:
        with written_atomically(path) as file:
            if kind == ".parquet":
                table.to_parquet(file, index=False)
            else:
                packed: Any = _PACKED.get(path.suffix.lower())
                table.to_csv(file, index=False, sep="\t" if kind == ".tsv" else ",", compression=packed, mode="wb")

    try:
        if kind == ".parquet":
            import pyarrow  # noqa: F401
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.tmp").open("wb").close()
        yield write
    except ImportError:
        raise InputError(f"out {path} cannot be written: .parquet needs pip install pyarrow") from None
    except OSError as error:
        raise InputError(f"out {path} cannot be written: {error.strerror or error}") from error
    finally:
        path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)


def _drawn(parts: Iterable[pd.DataFrame], rows: int, seed: int) -> pd.DataFrame:
    """Draw rows of a table that comes in parts: those with the smallest of random numbers."""
    random = np.random.default_rng(seed)
    kept, keys = pd.DataFrame(), np.empty(0)
    for part in parts:
        kept = part if kept.empty else pd.concat([kept, part], ignore_index=True)
        keys = np.concatenate([keys, random.random(len(part))])
        if len(kept) > rows:
            chosen = np.sort(np.argpartition(keys, rows)[:rows])
            kept, keys = kept.iloc[chosen], keys[chosen]
    return kept.reset_index(drop=True)


def _batches(path: Path) -> Iterator[pd.DataFrame]:
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(path).iter_batches(100_000):
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


def columns_of(table: pd.DataFrame, kinds: Mapping[Any, str] | None = None) -> list[Column]:
    """Tell the columns of a table apart.

    Args:
        table: At least ten rows.
        kinds: By the name of a column, the kind that it is to be, one of ``KINDS``.

    Raises:
        InputError: There are too few rows, or nothing to learn; a column holds text, or what is no value of a table; a
            column cannot be what it is said to be.
    """
    if not isinstance(kinds or {}, Mapping):
        raise InputError(f"kinds are kinds by the names of columns, got {kinds!r}")
    kinds = dict(kinds or {})
    unknown = [name for name in kinds if name not in set(table.columns)]
    if unknown:
        raise InputError(f"there is no column {unknown[0]!r}; there are {_listed(table.columns)}")
    for name, kind in kinds.items():
        if kind not in KINDS:
            raise InputError(f"column {name!r} cannot be {kind!r}: there are {', '.join(KINDS)}")
    if len(table) < LEAST_ROWS:
        raise InputError(f"the table has {len(table)} rows, and at least {LEAST_ROWS} are needed to learn from")
    columns = [_column(table.iloc[:, i], kinds.get(name)) for i, name in enumerate(table.columns)]
    if all(column.kind in ("constant", "identifier") for column in columns):
        raise InputError("the table has nothing to learn: every column is constant or an identifier")
    return columns


def _column(values: pd.Series, asked: str | None) -> Column:
    dtype, name = values.dtype, values.name
    present = values.dropna()
    if pd.api.types.is_object_dtype(dtype):
        _check_values(present, name)
    kind, why = _kind(values, present)
    if asked is not None:
        _check(present, name, asked, kind)
        kind, why = asked, "as asked for"
    if kind == "text":
        raise InputError(
            f"column {name!r} is text ({why}), which cannot be learned: have it left out "
            f"(--column {name}=identifier; kinds={{{name!r}: 'identifier'}}) or taken as a category "
            f"(--column {name}=category; kinds={{{name!r}: 'category'}})"
        )
    if kind in ("category", "constant"):
        _check_values(present, name)
        if (distinct := _distinct(present)) > MOST_CATEGORIES:
            raise InputError(f"column {name!r} has {distinct} categories, more than {MOST_CATEGORIES}: group them")
    if isinstance(dtype, pd.CategoricalDtype):
        levels = dtype.categories
        _check_values(pd.Series(levels), name)
        return Column(name, kind, "category", why, tuple(levels.tolist()), str(levels.dtype), bool(dtype.ordered))  # type: ignore[arg-type]
    return Column(name, kind, str(dtype), why)  # type: ignore[arg-type]


def _kind(values: pd.Series, present: pd.Series) -> tuple[str, str]:
    dtype, rows = values.dtype, len(values)
    if present.empty:
        return "constant", "it has no values"
    distinct = _distinct(present)
    if distinct == 1 and len(present) == rows:
        return "constant", "it has one value"
    if pd.api.types.is_bool_dtype(dtype):
        return "yes/no", ""
    if isinstance(dtype, pd.CategoricalDtype):
        return "category", ""
    if pd.api.types.is_datetime64_any_dtype(dtype):
        return "date", ""
    if pd.api.types.is_complex_dtype(dtype) or pd.api.types.is_timedelta64_dtype(dtype):
        raise InputError(f"column {values.name!r} is {dtype}, which is no kind of column here: make it a number")
    if pd.api.types.is_integer_dtype(dtype):
        if distinct == rows and (why := _identifies(present)):
            return "identifier", why
        return "integer", ""
    if pd.api.types.is_float_dtype(dtype):
        return "number", ""
    if all(isinstance(plain(value), bool) for value in present):
        return "yes/no", ""
    strings = present.map(lambda value: isinstance(value, str))
    if strings.all():
        if distinct == len(present) and distinct > LEAST_ROWS:
            long = float(present.str.len().mean()) >= WORDS
            return ("text", "long values that never repeat") if long else ("identifier", "no value repeats")
        if distinct > len(present) / 2 and float(present.str.len().mean()) >= WORDS:
            return "text", "long values that hardly repeat"
    return "category", ""


def _identifies(present: pd.Series) -> str:
    """Say why integers of which none repeats tell rows apart and nothing else; nothing if they may mean more."""
    n, spread = len(present), int(present.max()) - int(present.min()) + 1
    if n > LEAST_ROWS and spread == n:
        return "it counts the rows"
    # Of numbers that mean something some would repeat: n²/2 pairs, each equal in one of so many cases.
    return "no value repeats" if n * n / 2 / spread > SURE else ""


def _distinct(present: pd.Series) -> int:
    return len({key(plain(value)) for value in present}) if present.dtype == object else int(present.nunique())


def _check(present: pd.Series, name: Any, asked: str, kind: str) -> None:
    numeric = pd.api.types.is_numeric_dtype(present.dtype) and not pd.api.types.is_bool_dtype(present.dtype)
    fits = {
        "number": numeric,
        "integer": numeric and bool(np.isfinite(present.astype(float)).all() and (present % 1 == 0).all()),
        "date": pd.api.types.is_datetime64_any_dtype(present.dtype),
        "yes/no": _distinct(present) <= 2,
        "constant": _distinct(present) <= 1,
    }
    if not fits.get(asked, True):
        more = "; make dates of strings with pandas.to_datetime" if asked == "date" else ""
        raise InputError(f"column {name!r} cannot be {asked}: its values look like {kind}{more}")


def _check_values(present: pd.Series, name: Any) -> None:
    for value in map(plain, present.astype(object)):
        if not isinstance(value, _CATEGORIES) or isinstance(value, decimal.Decimal):
            raise InputError(f"column {name!r} holds a {type(value).__name__}, which is no value of a table: {value!r}")


def plain(value: Any) -> Any:
    """Return a value of NumPy's as Python has it."""
    return value.item() if isinstance(value, np.generic) and not isinstance(value, np.datetime64) else value


def key(value: Any) -> tuple[str, Any]:
    """Tell values apart that Python takes for equal, such as True, 1 and 1.0."""
    return type(value).__name__, value


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _listed(names: Sequence[Any]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown if len(shown) <= 20 else [*shown[:20], "..."])
