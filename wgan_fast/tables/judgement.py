"""How good made rows are: against rows that were held out, and every measure beside what real rows reach."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..errors import InputError
from .columns import Column, columns_of, key, plain

MOST_ROWS = 50_000
"""Of the training rows, among which the closest record is looked for, and on which a model is trained."""
MOST_LEVELS = 50
"""Categories that are told apart in pairs and by a model; the others are one."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class View:
    """The learned columns of a table as arrays.

    Attributes:
        numbers: Numbers, integers and dates by their position, float64 ``[N]``, NaN for what is missing.
        codes: Categories by their position, int64 ``[N]``.
        levels: What the codes of a column stand for, as ``key`` tells them apart; None for what is missing.
        names: Of all columns, as text.
    """

    numbers: dict[int, Array]
    codes: dict[int, Array]
    levels: dict[int, list[tuple[str, Any] | None]]
    names: dict[int, str]

    def __len__(self) -> int:
        return len(next(iter((self.numbers | self.codes).values())))

    def take(self, which: Array) -> "View":
        """Return some of the rows."""
        numbers, codes = ({i: v[which] for i, v in of.items()} for of in (self.numbers, self.codes))
        return View(numbers, codes, self.levels, self.names)

    def some(self, n: int, seed: int) -> "View":
        """Return ``n`` of the rows, drawn; all where there are no more."""
        if n >= len(self):
            return self
        return self.take(np.random.default_rng(seed).choice(len(self), n, replace=False))


def views(tables: Sequence[pd.DataFrame], columns: Sequence[Column], like: View | None = None) -> list[View]:
    """Return tables of the same columns as arrays of one coding.

    Args:
        tables: They may lack the identifiers, as made ones do.
        columns: Of the tables.
        like: Whose codes mean the same; None numbers the categories by how frequent they are.
    """
    made = [View({}, {}, {}, {}) for _ in tables]
    for i, column in enumerate(columns):
        if column.kind in ("identifier", "constant"):
            continue
        series = [_of(table, columns, i) for table in tables]
        for view in made:
            view.names[i] = str(column.name)
        if column.kind in ("number", "integer", "date"):
            for view, values in zip(made, series):
                view.numbers[i] = _floats(values)
            continue
        keys = [[None if gone else key(plain(v)) for v, gone in zip(s.astype(object), s.isna())] for s in series]
        frequent = (k for k, _ in Counter(itertools.chain(*keys)).most_common())
        ordered = list(dict.fromkeys([*(like.levels[i] if like else ()), *frequent]))
        position = {k: n for n, k in enumerate(ordered)}
        for view, found in zip(made, keys):
            view.codes[i] = np.array([position[k] for k in found], dtype=np.int64)
            view.levels[i] = ordered
    return made


def judge(
    made: pd.DataFrame,
    train: pd.DataFrame,
    held_out: pd.DataFrame,
    *,
    columns: Sequence[Column] | None = None,
    target: Any = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare made rows with real ones that were not learned from. Of a hundred times as many floors are a tenth.

    Args:
        made: Rows that were made; a model learns from all of them, the distances are of as many as were held out.
        train: Rows that were learned from.
        held_out: Rows that were not.
        columns: As ``columns_of`` returned them; None asks it of ``train``.
        target: The column that a model is to predict; None takes the last one.
        seed: Of what is drawn.

    Returns:
        ``columns``: the mean distance over the columns (Kolmogorov-Smirnov of numbers, total variation of categories;
        of what is missing the difference of shares, where it is larger) and each column's. ``pairs``: mean differences
        of Pearson's correlation (numbers) and of the correlation ratio (a number and a category), and the total
        variation of contingency tables (categories). ``model``: what gradient boosting scores on held-out rows when it
        learned from made ones and from real ones, R² of a number and balanced accuracy of a category. ``privacy``: the
        share of rows that are copies of training rows, the distance to the closest training row (its 5 % quantile and
        its median), and the share of rows that are closer to a training row than to a held-out one, of as many: 0.5
        gives nothing away. A ``floor`` is the same of real rows: training rows against held-out ones, and for privacy
        held-out rows against training rows.

    Raises:
        InputError: There are too few rows, or no such target.
    """
    columns = columns or columns_of(train)
    many = min(len(made), len(held_out), len(train))
    if many < 2:
        raise InputError(f"at least 2 rows of each are needed to compare, got {many}")
    of_made, of_train, of_held_out = views((made, train, held_out), columns)
    one, real, other = of_made.some(many, seed), of_train.some(many, seed), of_held_out.some(many, seed)
    distances, floors = column_distances(one, other), column_distances(real, other)
    each = {one.names[i]: {"distance": distances[i], "floor": floors[i]} for i in distances}
    pairs, floor = pair_distances(one, other), pair_distances(real, other)
    return {
        "rows": many,
        "columns": {"mean": _mean(distances.values()), "floor": _mean(floors.values()), "each": each},
        "pairs": {name: {"mean": pairs[name], "floor": floor[name]} for name in pairs},
        "model": _model(of_made, of_train, of_held_out, _target(columns, target, one), seed),
        "privacy": _privacy(one, of_train, other, seed),
    }


def column_distances(one: View, other: View) -> dict[int, float]:
    """Return how far apart each column of two tables is, in [0, 1]."""
    found = {}
    for i, values in sorted((one.numbers | one.codes).items()):
        if i in one.codes:
            size = max(values.max(), other.codes[i].max()) + 1
            shares = [np.bincount(codes, minlength=size) / len(codes) for codes in (values, other.codes[i])]
            found[i] = float(np.abs(shares[0] - shares[1]).sum() / 2)
        else:
            present = [np.sort(v[~np.isnan(v)]) for v in (values, other.numbers[i])]
            gaps = abs(len(present[0]) / len(values) - len(present[1]) / len(other))
            places = np.concatenate(present)
            shares = [np.searchsorted(p, places, side="right") / len(p) for p in present if len(p)]
            ks = np.abs(shares[0] - shares[1]).max() if len(shares) == 2 else 0.0
            found[i] = float(max(ks, gaps))
    return found


def pair_distances(one: View, other: View) -> dict[str, float | None]:
    """Return the mean distance of the pairs of each sort; None where there is no pair."""
    between: dict[str, list[float]] = {"correlation": [], "ratio": [], "contingency": []}
    made, real = _products(one), _products(other)
    for n, i in enumerate(made.places):
        for j in list(made.places)[:n]:
            sort = {0: "correlation", 1: "ratio", 2: "contingency"}[(i in one.codes) + (j in one.codes)]
            if sort == "contingency":
                tables = [of.table(i, j) / of.rows for of in (made, real)]
                between[sort].append(float(np.abs(tables[0] - tables[1]).sum() / 2))
            else:
                between[sort].append(abs(made.association(i, j) - real.association(i, j)))
    return {sort: _mean(found) if found else None for sort, found in between.items()}


def associations(view: View) -> Array:
    """Return how much each pair of columns goes together ``[columns, columns]``.

    Pearson's correlation of numbers in [-1, 1], the correlation ratio of a number and a category and Cramér's V of
    categories in [0, 1].
    """
    of = _products(view)
    return np.array([[1.0 if i == j else of.association(i, j) for j in of.places] for i in of.places])


@dataclass(frozen=True)
class _Products:
    """Inner products of the columns, numbers standardised and categories one-hot: all that pairs are told by."""

    rows: int
    places: dict[int, slice]
    matrix: Array
    categories: frozenset[int]

    def table(self, i: int, j: int) -> Array:
        return self.matrix[self.places[i], self.places[j]]

    def association(self, i: int, j: int) -> float:
        block = self.table(i, j)
        if i not in self.categories and j not in self.categories:
            return float(block[0, 0] / self.rows)
        if (i in self.categories) != (j in self.categories):
            sums = block.ravel()  # of the standardised number within each category
            counts = np.diag(self.table(*((i, i) if i in self.categories else (j, j))))
            return float(np.sqrt((sums**2 / np.maximum(counts, 1)).sum() / self.rows))
        sizes = [np.diag(self.table(k, k)) for k in (i, j)]
        expected = np.outer(*sizes) / self.rows
        chi2 = ((block - expected) ** 2 / np.where(expected > 0, expected, 1)).sum()
        freedom = min((size > 0).sum() for size in sizes) - 1
        return float(np.sqrt(chi2 / self.rows / freedom)) if freedom > 0 else 0.0


def _products(view: View) -> _Products:
    parts, places, first = [], {}, 0
    for i in sorted(view.names):
        part = _one_hot(np.minimum(view.codes[i], MOST_LEVELS)) if i in view.codes else _standard(view.numbers[i])
        parts.append(part)
        places[i] = slice(first, first := first + part.shape[1])
    joined = np.concatenate(parts, axis=1)
    return _Products(len(view), places, joined.T @ joined, frozenset(view.codes))


def _one_hot(codes: Array) -> Array:
    return np.eye(MOST_LEVELS + 1)[codes]


def _standard(values: Array) -> Array:
    values = np.where(np.isfinite(values), values, np.nan)
    if np.isnan(values).all():
        return np.zeros((len(values), 1))
    values = values / (np.nanmax(np.abs(values)) or 1.0)  # squares of what is large overflow
    spread = np.nanstd(values)
    return np.nan_to_num((values - np.nanmean(values)) / (spread or 1.0))[:, None]


def _model(made: View, train: View, test: View, target: int, seed: int) -> dict[str, Any]:
    """Train on all made rows and on as many real ones, and test on held-out ones."""
    of_numbers = target in test.numbers
    many = min(len(made), len(train), MOST_ROWS)
    scores = {name: _score(rows.some(many, seed), test, target) for name, rows in (("made", made), ("real", train))}
    return {"target": test.names[target], "score": "R2" if of_numbers else "balanced accuracy", **scores}


def _score(train: View, test: View, target: int) -> float | None:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.metrics import balanced_accuracy_score, r2_score

    sides = []
    for view in (train, test):
        goal = view.numbers[target] if target in view.numbers else view.codes[target]
        known = np.isfinite(goal)
        others = [i for i in sorted(view.names) if i != target]
        columns = [
            view.numbers[i] if i in view.numbers else np.minimum(view.codes[i], MOST_LEVELS).astype(float)
            for i in others
        ]
        sides.append((np.stack(columns, axis=1)[known] if columns else np.zeros((known.sum(), 1)), goal[known]))
    (x, y), (of_test, truth) = sides
    if len(y) < 2 or len(truth) < 2:
        return None
    x, of_test = (np.where(np.isinf(side), np.nan, side) for side in (x, of_test))
    categorical = [i in train.codes for i in others] or None
    if target in test.numbers:
        regressor = HistGradientBoostingRegressor(categorical_features=categorical, random_state=0).fit(x, y)
        return float(r2_score(truth, regressor.predict(of_test)))
    if len(np.unique(y)) == 1:
        return float(balanced_accuracy_score(truth, np.full(len(truth), y[0])))
    classifier = HistGradientBoostingClassifier(categorical_features=categorical, random_state=0).fit(x, y)
    return float(balanced_accuracy_score(truth, classifier.predict(of_test)))


def _privacy(made: View, train: View, held_out: View, seed: int) -> dict[str, Any]:
    from sklearn.neighbors import NearestNeighbors

    reference = train.some(MOST_ROWS, seed)
    spaces = {name: _space(view, reference) for name, view in (("made", made), ("held out", held_out))}
    index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(_space(reference, reference))
    closest = {name: index.kneighbors(space)[0][:, 0] for name, space in spaces.items()}
    sides = [train.some(len(held_out), seed), held_out.some(len(train), seed)]
    to = [NearestNeighbors(n_neighbors=1, algorithm="brute").fit(_space(side, reference)) for side in sides]
    to_train, to_held_out = (side.kneighbors(spaces["made"])[0][:, 0] for side in to)
    nearer = (to_train < to_held_out).mean() + (to_train == to_held_out).mean() / 2
    known = set(_hashes(train))
    return {
        "copies": _share(_hashes(made), known),
        "copies_floor": _share(_hashes(held_out), known),
        "closest_5%": float(np.quantile(closest["made"], 0.05)),
        "closest_5%_floor": float(np.quantile(closest["held out"], 0.05)),
        "closest_median": float(np.median(closest["made"])),
        "closest_median_floor": float(np.median(closest["held out"])),
        "nearer_to_train": float(nearer),
    }


def _space(view: View, reference: View) -> Array:
    """Return rows as points, in which two categories are 1 apart and two numbers as much as real ones lie between."""
    parts = []
    for i in sorted(view.names):
        if i in view.codes:
            parts.append(_one_hot(np.minimum(view.codes[i], MOST_LEVELS)) / np.sqrt(2))
            continue
        values, known = view.numbers[i], np.sort(reference.numbers[i][~np.isnan(reference.numbers[i])])
        missing = np.isnan(values)
        ranks = [np.searchsorted(known, values, side=side) for side in ("left", "right")]
        parts.append(np.where(missing, 0.5, (ranks[0] + ranks[1]) / 2 / max(len(known), 1))[:, None])
        parts.append(missing[:, None] / np.sqrt(2))
    return np.concatenate(parts, axis=1)


def _hashes(view: View) -> Array:
    return np.asarray(pd.util.hash_pandas_object(pd.DataFrame(view.numbers | view.codes), index=False))


def _share(hashes: Array, known: set[Any]) -> float:
    return sum(found in known for found in hashes.tolist()) / len(hashes)


def _target(columns: Sequence[Column], asked: Any, view: View) -> int:
    if asked is None:
        return max(view.names)
    found = [i for i, column in enumerate(columns) if column.name == asked and i in view.names]
    if not found:
        raise InputError(f"target must be one of {', '.join(map(repr, view.names.values()))}, got {asked!r}")
    return found[0]


def _of(table: pd.DataFrame, columns: Sequence[Column], i: int) -> pd.Series:
    """Return a column of a table that has all of them, or all but the identifiers."""
    if len(table.columns) != len(columns):
        i -= sum(column.kind == "identifier" for column in columns[:i])
    return table.iloc[:, i]


def _floats(values: pd.Series) -> Array:
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        values = values.dt.tz_convert("UTC").dt.tz_localize(None) if values.dt.tz is not None else values
        values = values.astype("datetime64[s]")
        return np.where(values.isna(), np.nan, values.to_numpy().astype(np.int64))
    return np.asarray(values.astype("Float64").to_numpy(float, na_value=np.nan))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
