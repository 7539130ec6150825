"""A table as numbers that a network learns, and back: mode-specific normalisation and one-hot categories.

As CTGAN has it (Xu et al. 2019, arXiv:1907.00503): a number is the mode of a mixture that it belongs to, and its place
in that mode; what is missing or infinite is a mode of its own. A category is one of so many. Nothing is random but the
choice between modes that overlap, and whatever is chosen, the way back gives the number.
"""

import datetime
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from .columns import Column, columns_of, key, plain

FITTED_ROWS = 5_000
"""Of a column, on which its mixture is fitted."""
MODES, KNOTS = 10, 1_000
NARROW = 80
"""How many deviations of a mode lie between two numbers that are a mode each."""
MOST_DECIMALS = 12
LEAST_WEIGHT = 0.005
SPREAD = 4.0
"""Standard deviations from the middle of a mode to the end of its range."""
Array = np.ndarray[Any, Any]
NumbersBy = Literal["modes", "quantiles"]
_SPECIAL = {"missing": math.nan, "inf": math.inf, "-inf": -math.inf}


class Span(NamedTuple):
    """Neighbouring columns of the matrix that a network activates as one: a value in [-1, 1], or one of several."""

    kind: Literal["value", "choice"]
    width: int


@dataclass
class Numbers:
    """A column of numbers, integers or dates: v = unit · x for numbers, v = origin + step · unit · x for the others.

    Attributes:
        means: Of the modes of x.
        deviations: Of the modes of x.
        weights: Of the modes.
        special: Which of "missing", "inf" and "-inf" there are; each a mode.
        low: Least finite x; so small is anything that is given back.
        high: Largest finite x.
        unit: A power of two, in which no x is larger than 1.
        decimals: To which numbers are rounded; None for none.
        origin: The least integer, or date in its own unit.
        step: By multiples of which they differ; 0 for numbers.
        steps: From the origin to the largest integer or date. Past 2^53 they are not told apart.
        knots: Of x, where it is brought to a uniform distribution in place of modes; none with modes.
        ranks: Of the knots, from -1 to 1.
    """

    means: list[float]
    deviations: list[float]
    weights: list[float]
    special: list[str]
    low: float
    high: float
    unit: float
    decimals: int | None
    origin: int = 0
    step: int = 0
    steps: int = 0
    knots: list[float] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    spans: list[Span] = field(init=False)

    def __post_init__(self) -> None:
        self.spans = [Span("value", 1), Span("choice", len(self.means) + len(self.special))]

    def forward(self, v: Array, random: np.random.Generator) -> tuple[Array, Array]:
        """Return of numbers ``[N]`` their places in their modes ``[N]`` and the modes ``[N]``.

        Integers and dates are numbers from the origin and in steps.
        """
        finite, rows = np.isfinite(v), np.arange(len(v))
        x = np.where(finite, v / self.unit, self.low)
        if self.knots:
            return np.where(finite, np.interp(x, self.knots, self.ranks), 0.0), self._with_special(v, np.zeros(len(v)))
        means, deviations = np.array(self.means), np.array(self.deviations)
        away = (x[:, None] - means) / deviations  # [N, modes]
        likely = np.log(self.weights) - np.log(deviations) - away**2 / 2
        # The largest of log-probabilities with Gumbel's noise is a draw from them.
        mode = (likely + random.gumbel(size=likely.shape)).argmax(axis=1)
        # Far out in what was drawn a network could not follow: the nearest mode holds it best.
        mode = np.where(np.abs(away[rows, mode]) > SPREAD, np.abs(away).argmin(axis=1), mode)
        return np.where(finite, away[rows, mode] / SPREAD, 0.0), self._with_special(v, mode)

    def _with_special(self, v: Array, mode: Array) -> Array:
        for i, name in enumerate(self.special):
            there = np.isnan(v) if name == "missing" else v == _SPECIAL[name]
            mode = np.where(there, len(self.means) + i, mode)
        return mode.astype(np.int32)

    def backward(self, place: Array, mode: Array) -> Array:
        """Return the numbers ``[N]`` of which ``forward`` made this."""
        normal = np.minimum(mode, len(self.means) - 1)
        if self.knots:
            x = np.interp(place, self.ranks, self.knots)
        else:
            x = place * SPREAD * np.array(self.deviations)[normal] + np.array(self.means)[normal]
        v: Array = np.clip(x, self.low, self.high) * self.unit
        if self.step:
            v = np.round(v)
        elif self.decimals is not None:
            v = np.round(v, self.decimals)
        for i, name in enumerate(self.special):
            v = np.where(mode == len(self.means) + i, _SPECIAL[name], v)
        return v


@dataclass
class Choices:
    """A column of categories.

    Attributes:
        values: The categories, the most frequent first; None for what is missing.
        counts: How often each is in the table.
    """

    values: list[Any]
    counts: list[int]
    spans: list[Span] = field(init=False)

    def __post_init__(self) -> None:
        self.spans = [Span("choice", len(self.values))]


Fitted = Numbers | Choices


@dataclass
class Preparation:
    """What is known of a table: how it becomes numbers and how numbers become rows.

    Attributes:
        columns: Of the table, in its order.
        fitted: For every column that is learned what was fitted to it, for a constant its value; by position.
    """

    columns: list[Column]
    fitted: dict[int, Fitted]
    constants: dict[int, Any]

    @classmethod
    def fit(
        cls,
        table: pd.DataFrame,
        kinds: Any = None,
        *,
        columns: Sequence[Column] | None = None,
        numbers: NumbersBy = "modes",
        seed: int = 0,
    ) -> "Preparation":
        """Fit to a table.

        Args:
            table: As ``columns_of`` takes it.
            kinds: Likewise.
            columns: What ``columns_of`` returned of it, or of a table that it is a part of; None asks.
            numbers: What a number becomes: its place in a mode of a mixture, or its quantile.
            seed: Of what is drawn.

        Raises:
            InputError: As ``columns_of``.
        """
        columns = list(columns or columns_of(table, kinds))
        fitted: dict[int, Fitted] = {}
        constants: dict[int, Any] = {}
        for i, column in enumerate(columns):
            values = table.iloc[:, i]
            if column.kind in ("number", "integer", "date"):
                fitted[i] = _fit_numbers(values, column, numbers, np.random.default_rng((seed, i)))
            elif column.kind in ("category", "yes/no"):
                fitted[i] = _fit_choices(values)
            elif column.kind == "constant":
                present = values.dropna()
                constants[i] = None if present.empty else plain(present.iloc[0])
        return cls(columns, fitted, constants)

    def said(self, i: int) -> str:
        """Say of a column what is learned of it: its range, or its most frequent categories."""
        if i in self.constants:
            return repr(self.constants[i])
        if i not in self.fitted:
            return ""
        fitted = self.fitted[i]
        if isinstance(fitted, Choices):
            shown = ", ".join("(missing)" if v is None else " ".join(str(v).split()) for v in fitted.values[:5])
            return f"{len(fitted.values)}: {shown}{', ...' if len(fitted.values) > 5 else ''}"
        ends = _numbers_restored(np.array([fitted.low, fitted.high]) * fitted.unit, fitted, self.columns[i])
        days = [end for end in ends if isinstance(end, pd.Timestamp) and end == end.normalize()]
        low, high = (str(end.date()) if len(days) == 2 else str(end) for end in ends)
        return ", ".join([f"{low} to {high}", *(f"some {name}" for name in fitted.special)])

    @property
    def spans(self) -> list[Span]:
        """The spans of the matrix, column after column."""
        return [span for fitted in self.fitted.values() for span in fitted.spans]

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return sum(span.width for span in self.spans)

    @property
    def placed(self) -> list[tuple[int, Span]]:
        """The spans, and where in the matrix each begins."""
        return list(zip(itertools.accumulate((span.width for span in self.spans), initial=0), self.spans))

    @property
    def categories(self) -> list[tuple[int, int, Choices]]:
        """The columns of categories: where in the matrix each begins, which of the choices it is, and what it is."""
        choices = itertools.count()
        numbered = [(start, next(choices)) for start, span in self.placed if span.kind == "choice"]
        of = zip(numbered, self.fitted.values())  # a column has one choice, be it a category or a mode
        return [(start, n, fitted) for (start, n), fitted in of if isinstance(fitted, Choices)]

    def coded(self, table: pd.DataFrame, *, seed: int = 0, dtype: type = np.float64) -> tuple[Array, Array]:
        """Return the rows of a table in little memory: for every span of values its value, of choices what is chosen.

        Returns:
            Values ``[N, values]`` of ``dtype`` and choices ``[N, choices]`` int32, both in the order of the spans.

        Raises:
            ValueError: The table has other columns, or categories that the fitted one has not.
        """
        if list(table.columns) != [column.name for column in self.columns]:
            raise ValueError("the table has other columns than the one that was fitted")
        values: list[Array] = []
        choices: list[Array] = []
        for i, fitted in self.fitted.items():
            given = table.iloc[:, i]
            if isinstance(fitted, Numbers):
                v = _in_steps(given, fitted.origin, fitted.step) if fitted.step else _as_floats(given)
                place, mode = fitted.forward(v, np.random.default_rng((seed, i)))
                values.append(place.astype(dtype))
                choices.append(mode)
            else:
                choices.append(_codes(given, fitted))
        return _side_by_side(values, len(table), dtype), _side_by_side(choices, len(table), np.int32)

    def coded_parts(self, parts: Iterable[pd.DataFrame], *, seed: int = 0) -> tuple[Array, Array, int]:
        """Return as ``coded`` does, in float32, the rows of a table that comes in parts, and how many were passed over.

        Those are rows with what the fitted rows have not: a category, a gap or an infinity, or a number beyond theirs.
        """
        values: list[Array] = []
        choices: list[Array] = []
        passed_over = 0
        for number, part in enumerate(parts):
            known = self._known(part)
            passed_over += len(part) - int(known.sum())
            coded = self.coded(part[known], seed=seed + number, dtype=np.float32)
            values.append(coded[0])
            choices.append(coded[1])
        return np.concatenate(values), np.concatenate(choices), passed_over

    def _known(self, table: pd.DataFrame) -> Array:
        known = np.ones(len(table), dtype=bool)
        for i, fitted in self.fitted.items():
            given = table.iloc[:, i]
            if isinstance(fitted, Choices):
                there = {key(value) for value in fitted.values}
                known &= [key(value) in there for value in _objects(given)]
                continue
            v = _in_steps(given, fitted.origin, fitted.step) if fitted.step else _as_floats(given)
            x = v / fitted.unit
            special = [np.isnan(v) if name == "missing" else v == _SPECIAL[name] for name in fitted.special]
            known &= np.any([(x >= fitted.low) & (x <= fitted.high), *special], axis=0)
        return known

    def transform(self, table: pd.DataFrame, *, seed: int = 0) -> Array:
        """Return the rows of a table ``[N, width]``, float64: ``coded``, with 1 at what is chosen."""
        values, choices = self.coded(table, seed=seed)
        out = np.zeros((len(table), self.width))
        at = {kind: [start for start, span in self.placed if span.kind == kind] for kind in ("value", "choice")}
        out[:, at["value"]] = values
        np.put_along_axis(out, choices + np.array(at["choice"], dtype=np.int64), 1.0, axis=1)
        return out

    def inverse(self, matrix: Array) -> pd.DataFrame:
        """Return the table of rows ``[N, width]``: of their largest modes and categories; identifiers are left out."""
        made, first = [], 0
        for i, column in enumerate(self.columns):
            if i in self.constants:
                made.append(_restored([self.constants[i]] * len(matrix), column))
            elif i in self.fitted:
                fitted = self.fitted[i]
                width = sum(span.width for span in fitted.spans)
                part = matrix[:, first : first + width]
                first += width
                if isinstance(fitted, Numbers):
                    v = fitted.backward(part[:, 0], part[:, 1:].argmax(axis=1))
                    made.append(_numbers_restored(v, fitted, column))
                else:
                    values = np.empty(len(fitted.values), dtype=object)
                    values[:] = fitted.values
                    made.append(_restored(list(values[part.argmax(axis=1)]), column))
        table = pd.concat(made, axis=1) if made else pd.DataFrame(index=range(len(matrix)))
        table.columns = pd.Index([c.name for c in self.columns if c.kind != "identifier"])
        return table

    def state(self) -> dict[str, Any]:
        """Return everything as what JSON holds."""
        return {
            "columns": [
                {**vars(c), "name": written(c.name), "levels": None if c.levels is None else written(c.levels)}
                for c in self.columns
            ],
            "fitted": {
                str(i): {k: v for k, v in vars(fitted).items() if k != "spans"}
                if isinstance(fitted, Numbers)
                else {"values": [written(value) for value in fitted.values], "counts": fitted.counts}
                for i, fitted in self.fitted.items()
            },
            "constants": {str(i): written(value) for i, value in self.constants.items()},
        }

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Preparation":
        """Make a preparation of what ``state`` returned."""
        columns = [Column(**{**c, "name": read(c["name"]), "levels": read(c["levels"])}) for c in state["columns"]]
        fitted: dict[int, Fitted] = {
            int(i): Choices([read(value) for value in kept["values"]], kept["counts"])
            if "values" in kept
            else Numbers(**kept)
            for i, kept in state["fitted"].items()
        }
        return cls(columns, fitted, {int(i): read(value) for i, value in state["constants"].items()})


def _fit_numbers(values: pd.Series, column: Column, by: NumbersBy, random: np.random.Generator) -> Numbers:
    origin = step = steps = 0
    if column.kind == "number":
        v = _as_floats(values)
    else:
        present = _as_integers(values.dropna())
        origin = int(present.min()) if len(present) else 0
        step = int(np.gcd.reduce(present.astype(object) - origin)) if len(present) else 0
        step = max(step, 1)
        steps = (int(present.max()) - origin) // step if len(present) else 0
        v = _in_steps(values, origin, step)
    finite = v[np.isfinite(v)] if np.isfinite(v).any() else np.zeros(1)
    special = [name for name, there in zip(_SPECIAL, (np.isnan(v), v == math.inf, v == -math.inf)) if there.any()]
    unit = math.ldexp(1.0, math.frexp(float(np.abs(finite).max()) or 1.0)[1] - 1) * 2 if finite.any() else 1.0
    if not math.isfinite(unit):
        unit = math.ldexp(1.0, 1023)
    x = finite / unit
    means, deviations, weights = ([0.0], [1.0], [1.0]) if by == "quantiles" else _modes(x, random)
    knots, ranks = _quantiles(x) if by == "quantiles" else ([], [])
    decimals = _decimals(finite) if column.kind == "number" else None
    low, high = float(x.min()), float(x.max())
    return Numbers(
        means, deviations, weights, special, low, high, unit, decimals, origin, step, steps, knots, ranks
    )  # fmt: skip


def _quantiles(x: Array) -> tuple[list[float], list[float]]:
    """Return knots among numbers ``[N]`` and their ranks, from -1 to 1, between which ranks are linear."""
    ordered = np.sort(x)
    knots = np.unique(ordered[np.linspace(0, len(x) - 1, min(len(x), KNOTS)).round().astype(int)])
    ranks = (np.searchsorted(ordered, knots, side="left") + np.searchsorted(ordered, knots, side="right")) / 2
    if len(knots) == 1:
        return knots.tolist(), [0.0]
    return knots.tolist(), ((ranks - ranks[0]) / (ranks[-1] - ranks[0]) * 2 - 1).tolist()


def _modes(x: Array, random: np.random.Generator) -> tuple[list[float], list[float], list[float]]:
    """Return means, deviations and weights of a mixture that is fitted to numbers ``[N]``.

    Few numbers that repeat are a mode each, narrow beside what lies between them.
    """
    values, counts = np.unique(x, return_counts=True)
    if 1 < len(values) <= MODES:
        narrow = max(float(np.diff(values).min()) / NARROW, 1e-100)
        return values.tolist(), [narrow] * len(values), (counts / len(x)).tolist()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import BayesianGaussianMixture
    from sklearn.utils._testing import ignore_warnings

    sample = x if len(x) <= FITTED_ROWS else random.choice(x, FITTED_ROWS, replace=False)
    middle, scale = float(sample.mean()), float(sample.std())
    distinct = len(np.unique(sample))
    if distinct > 1 and scale > 0:
        mixture = BayesianGaussianMixture(
            n_components=min(MODES, distinct), weight_concentration_prior=0.001, max_iter=100,
            random_state=int(random.integers(2**31)),
        )  # fmt: skip
        ignore_warnings(category=ConvergenceWarning)(mixture.fit)(((sample - middle) / scale)[:, None])
        kept = mixture.weights_ > LEAST_WEIGHT
        weights, means = mixture.weights_[kept], mixture.means_[kept, 0] * scale + middle
        deviations = np.sqrt(mixture.covariances_[kept, 0, 0]) * scale
    else:
        weights, means, deviations = np.ones(1), np.array([middle]), np.array([scale or 1.0])
    return means.tolist(), deviations.tolist(), (weights / weights.sum()).tolist()


def _decimals(finite: Array) -> int | None:
    """Return how many decimals write all the numbers; None where it takes more than twelve."""
    some = finite if len(finite) <= FITTED_ROWS else finite[:: len(finite) // FITTED_ROWS]
    with np.errstate(over="ignore"):  # what is so large has no decimals
        for decimals in range(MOST_DECIMALS + 1):
            if np.array_equal(np.round(some, decimals), some) and np.array_equal(np.round(finite, decimals), finite):
                return decimals
    return None


def _side_by_side(columns: list[Array], rows: int, dtype: type) -> Array:
    return np.stack(columns, axis=1) if columns else np.empty((rows, 0), dtype)


def _fit_choices(values: pd.Series) -> Choices:
    counts: dict[tuple[str, Any], int] = {}
    for value in _objects(values):
        counts[key(value)] = counts.get(key(value), 0) + 1
    ordered = sorted(counts, key=lambda k: (-counts[k], k[0], str(k[1])))
    return Choices([value for _, value in ordered], [counts[k] for k in ordered])


def _codes(values: pd.Series, fitted: Choices) -> Array:
    position = {key(value): i for i, value in enumerate(fitted.values)}
    try:
        return np.array([position[key(value)] for value in _objects(values)], dtype=np.int32)
    except KeyError as error:
        raise ValueError(f"column {values.name!r} has a category that the fitted table has not: {error}") from None


def _objects(values: pd.Series) -> list[Any]:
    """Return the values as plain Python, None for what is missing."""
    return [None if missing else plain(value) for value, missing in zip(values.astype(object), values.isna())]


def _as_floats(values: pd.Series) -> Array:
    """Return numbers as float64, NaN for what is missing."""
    return np.asarray(values.astype("Float64" if values.isna().any() else float).to_numpy(float, na_value=math.nan))


def _as_integers(present: pd.Series) -> Array:
    """Return integers, or dates as the distance from 1970 in their own unit, of a width that holds them."""
    if pd.api.types.is_datetime64_any_dtype(present.dtype):
        present = present.dt.tz_convert("UTC").dt.tz_localize(None) if present.dt.tz is not None else present
        return np.asarray(present.to_numpy().astype(np.int64))
    if str(present.dtype).lower() == "uint64":
        return np.array([int(value) for value in present], dtype=object)
    return np.asarray(present.to_numpy(np.int64))


def _in_steps(values: pd.Series, origin: int, step: int) -> Array:
    """Return how many steps from the origin the values are, NaN for what is missing."""
    out = np.full(len(values), math.nan)
    there = ~values.isna().to_numpy()
    out[there] = ((_as_integers(values[there]).astype(object) - origin) // step).astype(float)
    return out


def _numbers_restored(v: Array, fitted: Numbers, column: Column) -> pd.Series:
    missing = np.isnan(v)
    if not fitted.step:
        made = pd.Series(v).astype("Float64" if column.dtype[:1] in "IUF" else float)
        made[missing] = pd.NA if made.dtype == "Float64" else math.nan
        return made.astype(column.dtype)
    whole = [0 if gone else min(max(int(value), 0), fitted.steps) for value, gone in zip(v.tolist(), missing)]
    wide = np.array(whole, dtype=object) * fitted.step + fitted.origin
    if column.kind == "date":
        unit, zone = _unit_and_zone(column.dtype)
        dates = pd.Series(wide.astype(np.int64).astype(f"datetime64[{unit}]"))
        dates[missing] = pd.NaT
        return dates if zone is None else dates.dt.tz_localize("UTC").dt.tz_convert(zone)
    if column.dtype[:1] in "fF":  # integers in the values alone
        floats = wide.astype(float)
        floats[missing] = math.nan
        return pd.Series(floats).astype(column.dtype)
    if not missing.any():
        return pd.Series(wide).astype(column.dtype)
    nullable = column.dtype if column.dtype[:1] in "IU" else "Int64"
    return pd.Series([pd.NA if gone else value for value, gone in zip(wide, missing)], dtype=nullable)


def _unit_and_zone(dtype: str) -> tuple[str, str | None]:
    unit, _, zone = dtype.removeprefix("datetime64[").removesuffix("]").partition(", ")
    return unit, zone or None


def _restored(values: Sequence[Any], column: Column) -> pd.Series:
    made = pd.Series(values, dtype=object)
    return made if column.dtype == "object" else made.astype(column.pandas_dtype())


def written(value: Any) -> Any:
    """Write a value down so that JSON gives back its type."""
    if isinstance(value, tuple):
        return {"tuple": [written(part) for part in value]}
    if isinstance(value, pd.Timestamp):
        return {"time": value.isoformat()}
    if isinstance(value, datetime.date):
        return {"date": value.isoformat()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return plain(value)


def read(value: Any) -> Any:
    """Read what ``written`` wrote."""
    if not isinstance(value, dict):
        return value
    ((kind, given),) = value.items()
    if kind == "tuple":
        return tuple(read(part) for part in given)
    return {"time": pd.Timestamp, "date": datetime.date.fromisoformat, "float": float}[kind](given)
