"""What the columns of a table are: a kind each, told by pandas and by the values, or by the user."""

import datetime
import decimal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from ..errors import InputError

Kind = Literal["number", "integer", "category", "yes/no", "date", "constant", "identifier"]
KINDS: tuple[str, ...] = get_args(Kind)

MOST_CATEGORIES = 10_000
WORDS = 40
"""Characters from which on values that hardly repeat are text."""
LEAST_ROWS = 10
SURE = 20
"""Repetitions that are expected of integers, from which on it is no accident that there is none."""
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
        commas = present.str.fullmatch(r"[+-]?[\d.]*,\d+").mean() > 0.5
        hint = "numbers with a decimal comma? --decimal ," if commas else ""
        if distinct == len(present) and distinct > LEAST_ROWS:
            long = float(present.str.len().mean()) >= WORDS
            return ("text", "long values that never repeat") if long else ("identifier", hint or "no value repeats")
        if distinct > len(present) / 2 and float(present.str.len().mean()) >= WORDS:
            return "text", "long values that hardly repeat"
        return "category", hint
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
        numbers = pd.to_numeric(present, errors="coerce") if asked in ("number", "integer") else present
        odd = f", such as {present[numbers.isna()].iloc[0]!r}" if numbers.isna().any() else ""
        raise InputError(f"column {name!r} cannot be {asked}: its values look like {kind}{odd}{more}")


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
