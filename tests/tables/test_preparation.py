"""A table goes through numbers and comes back as it was: types, gaps, infinities, decimals, dates, categories."""

import json
import math
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wgan_fast.errors import InputError
from wgan_fast.tables import Preparation, columns_of

ROWS = 14
EXACT = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LOOK_ALIKE = ["1", "01", "1.0", "True", "nan", "", " ", "é", "e\u0301", "名前", "\U0001f600", "null", "a,b", '"']


def gaps(draw: Any, values: list[Any], missing: Any) -> list[Any]:
    return [missing if draw(st.integers(0, 4)) == 0 else value for value in values]


def listed(draw: Any, values: st.SearchStrategy[Any]) -> list[Any]:
    return draw(st.lists(values, min_size=ROWS, max_size=ROWS))


@st.composite
def numbers(draw: Any) -> pd.Series:
    decimals = draw(st.integers(0, 6))
    made: list[Any] = listed(draw, st.integers(-(10**8), 10**8).map(lambda i: round(i / 10**decimals, decimals)))
    if draw(st.booleans()):
        made[:4] = [math.nan, math.inf, -math.inf, math.nan]
    return pd.Series(made, dtype=draw(st.sampled_from(["float64", "Float64"])))


@st.composite
def any_floats(draw: Any) -> pd.Series:
    return pd.Series(listed(draw, st.floats(allow_nan=True, allow_infinity=True)), dtype="float64")


@st.composite
def integers(draw: Any) -> pd.Series:
    dtype = draw(st.sampled_from(["int64", "int8", "uint16", "uint64", "Int64", "UInt8"]))
    info = np.iinfo(dtype.lower())
    low, high = max(info.min, -(2**62)), min(info.max, 2**64 - 1)
    near = draw(st.integers(low, high))
    spread = draw(st.sampled_from([3, 1000, 2**40]))
    made: list[Any] = listed(draw, st.integers(max(low, near - spread), min(high, near + spread)))
    return pd.Series(gaps(draw, made, pd.NA) if dtype[0] in "IU" else made, dtype=dtype)


@st.composite
def dates(draw: Any) -> pd.Series:
    unit = draw(st.sampled_from(["s", "ms", "us", "ns"]))
    first = draw(st.integers(-(10**9), 2 * 10**9))
    step = draw(st.sampled_from([1, 3600, 86400]))
    made = [np.datetime64(first + step * k, "s") for k in listed(draw, st.integers(0, 5000))]
    series = pd.Series(gaps(draw, made, pd.NaT), dtype=f"datetime64[{unit}]")
    zone = draw(st.sampled_from([None, "Europe/Berlin", "UTC"]))
    return series if zone is None else series.dt.tz_localize("UTC").dt.tz_convert(zone)


@st.composite
def categories(draw: Any) -> pd.Series:
    values = st.one_of(st.sampled_from(LOOK_ALIKE), st.text(max_size=3))
    few = draw(st.lists(values, min_size=1, max_size=5, unique=True))
    made = gaps(draw, listed(draw, st.sampled_from(few)), None)
    form = draw(st.sampled_from(["str", "object", "category", "ordered", "string"]))
    if form in ("category", "ordered"):
        levels = draw(st.permutations([*few, "never"])) if "never" not in few else few
        return pd.Series(pd.Categorical(made, categories=levels, ordered=form == "ordered"))
    return pd.Series(made, dtype=form)


@st.composite
def mixed(draw: Any) -> pd.Series:
    values = st.sampled_from([True, False, 1, 0, 1.0, "1", "True", None, -0.5])
    return pd.Series(listed(draw, values), dtype=object)


@st.composite
def truths(draw: Any) -> pd.Series:
    made: list[Any] = listed(draw, st.booleans())
    nullable = draw(st.booleans())
    return pd.Series(gaps(draw, made, pd.NA) if nullable else made, dtype="boolean" if nullable else "bool")


NAMES = st.one_of(st.text(max_size=3), st.integers(-3, 3), st.sampled_from(["twice", "twice", "naïve"]))


@st.composite
def tables(draw: Any, *, of: Any = None) -> pd.DataFrame:
    kinds = of if of is not None else st.one_of(numbers(), integers(), dates(), categories(), mixed(), truths())
    made = draw(st.lists(kinds, min_size=1, max_size=4))
    table = pd.concat(made, axis=1)
    table.columns = pd.Index([draw(NAMES) for _ in made], dtype=object)
    return table


def there_and_back(table: pd.DataFrame, numbers: Any = "modes") -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table without what is left out, and what came back through a file and float64."""
    preparation = Preparation.fit(table, numbers=numbers)
    matrix = preparation.transform(table, seed=3)
    assert matrix.shape == (len(table), preparation.width)
    assert np.isfinite(matrix).all()
    again = Preparation.of_state(json.loads(json.dumps(preparation.state(), allow_nan=False)))
    kept = [i for i, column in enumerate(preparation.columns) if column.kind != "identifier"]
    return table.iloc[:, kept], again.inverse(matrix)


def assert_same(made: pd.DataFrame, table: pd.DataFrame) -> None:
    assert list(made.columns) == list(table.columns)
    for i in range(table.shape[1]):
        one, other = made.iloc[:, i], table.iloc[:, i]
        assert one.dtype == other.dtype
        assert (one.isna() == other.isna()).all()
        there = ~other.isna()
        for actual, expected in zip(one[there].astype(object), other[there].astype(object), strict=True):
            assert (type(actual), actual) == (type(expected), expected)


def learnable(table: pd.DataFrame) -> bool:
    try:
        columns_of(table)
    except InputError as error:
        if "nothing to learn" not in str(error):
            raise
        return False
    return True


@EXACT
@given(tables(), st.sampled_from(["modes", "quantiles"]))
def test_a_table_comes_back_as_it_was(table: pd.DataFrame, numbers: str) -> None:
    if learnable(table):
        expected, made = there_and_back(table, numbers)
        assert_same(made, expected)


@EXACT
@given(tables(of=any_floats()), st.sampled_from(["modes", "quantiles"]))
def test_floats_of_any_size_come_back_to_rounding(table: pd.DataFrame, numbers: str) -> None:
    if learnable(table):
        expected, made = there_and_back(table, numbers)
        for i in range(expected.shape[1]):
            one, other = made.iloc[:, i].to_numpy(), expected.iloc[:, i].to_numpy()
            finite = np.isfinite(other)
            assert (np.isfinite(one) == finite).all()
            np.testing.assert_array_equal(one[~finite], other[~finite])
            largest = np.abs(other[finite]).max(initial=0)
            assert (np.abs(one[finite] / 2 - other[finite] / 2) <= 1e-14 * largest).all()


def test_integers_too_far_apart_for_a_float_stay_in_their_range() -> None:
    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "far": draw.choice([-(2**63), 2**63 - 1, 0], 200),
            "large": draw.integers(2**62, 2**63 - 1, 200),
            "unsigned": draw.integers(2**63, 2**64 - 1, 200, dtype=np.uint64),
        }
    )
    expected, made = there_and_back(table)
    for name in table.columns:
        assert made[name].dtype == expected[name].dtype
        assert expected[name].min() <= made[name].min()
        assert made[name].max() <= expected[name].max()
        apart = [abs(int(a) - int(b)) for a, b in zip(made[name], expected[name])]
        assert max(apart) <= 2**-49 * (int(expected[name].max()) - int(expected[name].min()))


def test_a_long_table_comes_back_as_it_was() -> None:
    """As long as to have roundings of every kind."""
    draw = np.random.default_rng(0)
    n = 4000
    table = pd.DataFrame(
        {
            "whole": draw.integers(-(10**6), 10**6, n),
            "small": draw.integers(0, 5, n).astype("int8"),
            "cents": draw.lognormal(8, 2, n).round(2),
            "places": (10 ** draw.uniform(-3, 3, n)).round(6),
            "single": draw.integers(0, 1000, n).astype("float32") / 8,
            "second": pd.Timestamp("1969-12-31 23:59:59") + pd.to_timedelta(draw.integers(0, 10**9, n), "s"),
            "nano": pd.to_datetime(draw.integers(1_700_000_000_000_000_000, 1_700_000_000_010_000_000, n)),
        }
    )
    expected, made = there_and_back(table)
    assert_same(made, expected)


def test_quantiles_are_spread_evenly_whatever_the_numbers_are() -> None:
    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        {"pay": np.exp(3 * draw.normal(size=5000)), "gap": np.where(draw.random(5000) < 0.2, np.nan, 1.0)}
    )
    preparation = Preparation.fit(table, numbers="quantiles")
    values, choices = preparation.coded(table)
    # Of 5,000 uniform numbers, a share below any bound deviates by 0.7 % at most; five times that is no accident.
    for bound in (-0.5, 0.0, 0.5):
        assert abs((values[:, 0] < bound).mean() - (bound + 1) / 2) < 0.035
    assert np.array_equal(choices[:, 1] == 1, table["gap"].isna())
    np.testing.assert_allclose(
        preparation.inverse(preparation.transform(table))["pay"], table["pay"], rtol=0, atol=1e-12 * table["pay"].max()
    )
