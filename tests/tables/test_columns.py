"""Columns are told apart as a person would, and a file that is no table is refused in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from wgan_fast.errors import InputError
from wgan_fast.tables import Preparation, columns_of, read_table

N = 40
DRAW = np.random.default_rng(0)
WORD = ["nurse", "cook", "driver"]
LONG = "a sentence of some length that nobody else has written, number"


def column(values: Any, **options: Any) -> str:
    table = pd.DataFrame({"x": values, "other": DRAW.random(len(values))})
    return columns_of(table, **options)[0].kind


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (DRAW.normal(size=N), "number"),
        (DRAW.integers(0, 90, N), "integer"),
        (np.where(DRAW.random(N) < 0.2, np.nan, DRAW.normal(size=N)), "number"),
        (pd.array([1, 2, None, 2] * 10, dtype="Int64"), "integer"),
        (DRAW.choice(WORD, N), "category"),
        ([True, False] * 20, "yes/no"),
        ([True, None, False, True] * 10, "yes/no"),
        (pd.date_range("2024-01-01", periods=N), "date"),
        ([pd.Timestamp("2024-01-01", tz="UTC"), pd.NaT] * 20, "date"),
        (["same"] * N, "constant"),
        ([np.nan] * N, "constant"),
        ([1.5] * N, "constant"),
        ([1.0, np.nan] * 20, "number"),
        (np.arange(N), "identifier"),
        (np.arange(N)[::-1] + 1000, "identifier"),
        (np.arange(N) * 7, "integer"),
        ([f"user-{i}" for i in range(N)], "identifier"),
        (pd.Categorical(DRAW.choice(["low", "high"], N), ordered=True), "category"),
        ([1, "1", None, 2.5] * 10, "category"),
    ],
)
def test_a_column_is_what_a_person_would_say(values: Any, kind: str) -> None:
    assert column(values) == kind


def test_text_is_refused_and_told_what_to_do() -> None:
    with pytest.raises(InputError, match=r"column 'x' is text .* \(--column x=identifier; .*kinds={'x': 'category'}"):
        column([f"{LONG} {i}" for i in range(N)])


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.arange(N), "integer"),
        (DRAW.integers(0, 3, N), "category"),
        (DRAW.integers(0, 9, N), "number"),
        ([1.0, 2.0] * 20, "integer"),
        (["ja", "nein"] * 20, "yes/no"),
        ([f"{LONG} {i}" for i in range(N)], "identifier"),
        ([f"{LONG} {i}" for i in range(N)], "category"),
    ],
)
def test_a_kind_may_be_asked_for(values: Any, kind: str) -> None:
    assert column(values, kinds={"x": kind}) == kind


@pytest.mark.parametrize(
    ("values", "kinds", "message"),
    [
        (WORD * 10, {"x": "number"}, "column 'x' cannot be number: its values look like category"),
        ([0.5, 1.0] * 20, {"x": "integer"}, "cannot be integer"),
        (WORD * 10, {"x": "yes/no"}, "cannot be yes/no"),
        (WORD * 10, {"x": "constant"}, "cannot be constant"),
        (WORD * 10, {"x": "date"}, "cannot be date"),
        (WORD * 10, {"x": "colour"}, "column 'x' cannot be 'colour': there are number, integer"),
        (WORD * 10, {"y": "number"}, "there is no column 'y'; there are 'x', 'other'"),
        ([[1]] * N, {}, "holds a list"),
        (np.ones(N) * 1j + np.arange(N), {}, "complex128"),
        ([1, 2, 3], {}, "the table has 3 rows, and at least 10 are needed"),
    ],
)
def test_what_does_not_fit_is_refused(values: Any, kinds: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        column(values, kinds=kinds)


def test_a_table_without_anything_to_learn_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to learn"):
        columns_of(pd.DataFrame({"id": np.arange(N), "same": 1}))


def test_a_thousand_categories_and_two_hundred_columns_are_prepared() -> None:
    table = pd.DataFrame({f"c{i}": DRAW.choice(WORD, 3000) for i in range(200)})
    table["many"] = [f"category {i % 1000}" for i in range(3000)]
    preparation = Preparation.fit(table)
    assert preparation.width == 200 * 3 + 1000
    pd.testing.assert_frame_equal(preparation.inverse(preparation.transform(table)), table)


def test_files_are_read_as_pandas_reads_them(tmp_path: Path) -> None:
    table = pd.DataFrame({"job": WORD * 5, "pay": np.arange(15) / 4, "née": ["é"] * 15})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    table.to_csv(tmp_path / "t.csv.gz", index=False)
    for name in ("t.csv", "t.tsv", "t.csv.gz"):
        pd.testing.assert_frame_equal(read_table(tmp_path / name), table)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a,b\n1,2\n\xff\xfe,3\n", "is not UTF-8"),
        (b"a,b\n1,2\n1,2,3\n", "has 3 values in line 3, and 2 before it"),
        (b"a,b\n1,2,3\n1,2,3\n", "more values than the header has names"),
        (b"a;b\n1;2\n", "not separated by commas"),
    ],
)
def test_a_bad_file_is_told_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_table(tmp_path / "bad.csv")
    assert "\n" not in str(error.value)


def test_dates_of_a_file_are_dates(tmp_path: Path) -> None:
    days = [f"2024-01-{day:02}" for day in range(1, 29)]
    times = [f"{day} 10:30:00" for day in days]
    table = pd.DataFrame({"day": days, "time": times, "code": [f"{day}-x" for day in days], "n": range(28)})
    table.loc[3, "day"] = None
    table.to_csv(tmp_path / "T.CSV", index=False)
    read = read_table(tmp_path / "T.CSV")
    assert [column.kind for column in columns_of(read)] == ["date", "date", "identifier", "identifier"]
    preparation = Preparation.fit(read)
    pd.testing.assert_frame_equal(preparation.inverse(preparation.transform(read)), read[["day", "time"]])


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"is no table: \.csv, \.tsv, \.parquet are read"):
        read_table(tmp_path / "t.xlsx")
    (tmp_path / "head.csv").write_text("a,b\n")
    with pytest.raises(InputError, match="has 0 rows"):
        columns_of(read_table(tmp_path / "head.csv"))
