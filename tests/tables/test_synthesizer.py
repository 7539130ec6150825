"""A table is learned and rows like its own are made, in scikit-learn's conventions."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from wgan_fast.errors import InputError
from wgan_fast.tables import TableSynthesizer
from wgan_fast.tables.training import Training
from wgan_fast.training import checkpoint

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 60, "hidden": (32, 32), "latent_dim": 16}


def people(n: int = 300) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    job = draw.choice(["nurse", "cook", "driver"], n, p=[0.7, 0.25, 0.05])
    pay = np.where(job == "nurse", draw.normal(3000, 100, n), draw.normal(1000, 100, n)).round(2)
    gap = np.where(draw.random(n) < 0.3, np.nan, draw.normal(size=n).round(3))
    day = pd.Timestamp("2024-01-01") + pd.to_timedelta(draw.integers(0, 365, n), "D")
    return pd.DataFrame(
        {"id": range(n), "job": job, "pay": pay, "age": draw.integers(18, 90, n), "gap": gap, "day": day, "site": "A"}
    )


@pytest.fixture(scope="module")
def fitted() -> TableSynthesizer:
    return TableSynthesizer(**QUICK).fit(people())


def test_rows_have_the_types_ranges_and_categories_of_the_table(fitted: TableSynthesizer) -> None:
    table, made = people().drop(columns="id"), fitted.sample(200, seed=0)
    assert len(made) == 200
    assert made.dtypes.equals(table.dtypes)
    assert set(made["job"]) <= set(table["job"])
    assert (made["site"] == "A").all()
    for name in ("pay", "age", "gap", "day"):
        assert made[name].min() >= table[name].min()
        assert made[name].max() <= table[name].max()
    assert np.array_equal(made["pay"].round(2), made["pay"])
    assert (made["day"] == made["day"].dt.normalize()).all()


def test_a_seed_gives_the_same_rows_and_leaves_the_generator_of_pytorch(fitted: TableSynthesizer) -> None:
    state = torch.get_rng_state()
    pd.testing.assert_frame_equal(fitted.sample(50, seed=3), fitted.sample(50, seed=3))
    assert not fitted.sample(50, seed=3).equals(fitted.sample(50, seed=4))
    again = TableSynthesizer(**QUICK).fit(people())
    pd.testing.assert_frame_equal(again.sample(50, seed=3), fitted.sample(50, seed=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_meet_every_condition(fitted: TableSynthesizer) -> None:
    assert (fitted.sample(30, where={"job": "driver"}, seed=0)["job"] == "driver").all()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"job": "pilot"}, "column 'job' has no 'pilot'; there are 'nurse', 'cook', 'driver'"),
        ({"pay": 3}, "there is no column of categories 'pay'; there are 'job'"),
        ({"colour": "red"}, "there is no column of categories 'colour'; there are 'job'"),
        ({"job": ["nurse"]}, r"column 'job' has no \['nurse'\]; there are"),
        ("job", "where is categories by the names of columns, got 'job'"),
    ],
)
def test_a_condition_that_cannot_be_met_is_refused(
    where: dict[str, Any], message: str, fitted: TableSynthesizer
) -> None:
    with pytest.raises(InputError, match=message):
        fitted.sample(3, where=where)


def test_no_rows_are_a_table_too(fitted: TableSynthesizer) -> None:
    made = fitted.sample(0)
    assert list(made.columns) == ["job", "pay", "age", "gap", "day", "site"]
    assert len(made) == 0
    assert len(fitted.sample(1)) == 1


def test_a_folder_alone_makes_the_same_rows_in_another_process(fitted: TableSynthesizer, tmp_path: Path) -> None:
    fitted.save(tmp_path / "learned")
    program = (
        "from wgan_fast.tables import TableSynthesizer; import sys;"
        "TableSynthesizer.load(sys.argv[1]).sample(40, seed=5).to_csv(sys.argv[2], index=False)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "learned", tmp_path / "rows.csv"], check=True)
    fitted.sample(40, seed=5).to_csv(tmp_path / "ours.csv", index=False)
    assert (tmp_path / "rows.csv").read_bytes() == (tmp_path / "ours.csv").read_bytes()
    assert not [path for path in (tmp_path / "learned").rglob("*") if path.is_file() and b"pickle" in path.read_bytes()]


def test_it_keeps_scikit_learns_conventions() -> None:
    made = TableSynthesizer(epochs=7, kinds={"a": "category"})
    assert clone(made).get_params() == made.get_params()
    assert made.set_params(epochs=9).epochs == 9
    with pytest.raises(NotFittedError):
        made.sample(3)
    with pytest.raises(InputError, match="holds no table that was learned"):
        TableSynthesizer.load("nowhere")


@pytest.mark.parametrize("columns", [["pay", "age"], ["job"], ["job", "site"], ["gap"]])
def test_tables_of_numbers_or_of_categories_alone(columns: list[str]) -> None:
    table = people()[columns]
    made = TableSynthesizer(**QUICK).fit(table).sample(20, seed=0)
    assert made.dtypes.equals(table.dtypes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"batch_size": 5}, "a batch of 5 rows has no group of 10"),
        ({"kinds": {"nothing": "number"}}, "there is no column 'nothing'"),
        ({"kinds": "number"}, "kinds are kinds by the names of columns, got 'number'"),
        ({"hidden": ()}, r"hidden must be the widths of the hidden layers, got \(\)"),
        ({"hidden": 8}, "hidden must be the widths of the hidden layers, got 8"),
        ({"seed": None}, "seed must be a whole number of at least 0, got None"),
        ({"epochs": True}, "epochs must be a whole number of at least 1, got True"),
        ({"device": "nowhere"}, "device 'nowhere' is not there"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TableSynthesizer(**{**QUICK, **options}).fit(people())


def test_what_was_learned_outlives_a_fit_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = TableSynthesizer(**QUICK)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.fit(people())
    with pytest.raises(NotFittedError):
        made.sample(1)
    before = made.fit(people()).sample(9, seed=1)
    monkeypatch.setattr(Training, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.fit(people()[["job"]])
    pd.testing.assert_frame_equal(made.sample(9, seed=1), before)


def test_what_is_missing_and_numpys_values_are_conditions_too() -> None:
    table = pd.DataFrame({"job": ["nurse", None, "cook"] * 30, "flag": [0, 1, 1] * 30})
    made = TableSynthesizer(**QUICK, kinds={"flag": "yes/no"}).fit(table)
    assert made.sample(5, where={"job": np.nan}, seed=0)["job"].isna().all()
    assert (made.sample(np.int64(5), where={"flag": np.int64(1)}, seed=0)["flag"] == 1).all()


def test_a_damaged_folder_is_told(fitted: TableSynthesizer, tmp_path: Path) -> None:
    folder = tmp_path / "learned"
    fitted.set_params(learning_rate=np.float32(1e-3)).save(folder)
    assert TableSynthesizer.load(folder).get_params()["hidden"] == (32, 32)
    (seal,), (body,) = folder.rglob("*.json"), folder.rglob("*.safetensors")
    told, whole = seal.read_text(), body.read_bytes()
    for text, raw in [(told[:-9], whole), ("{}", whole), (told, whole[:-9]), (told, whole[:-1] + b"?")]:
        seal.write_text(text)
        body.write_bytes(raw)
        with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
            TableSynthesizer.load(folder)
    with pytest.raises(InputError, match="holds no table that was learned"):
        TableSynthesizer.load(seal)
    with pytest.raises(InputError, match="is a file, not a folder"):
        fitted.save(seal)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds a run of training: save into another folder"):
        fitted.save(folder)


def test_a_saving_that_is_cut_off_leaves_the_one_before(
    fitted: TableSynthesizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = tmp_path / "learned", fitted.sample(5, seed=1)
    fitted.save(folder)
    other = TableSynthesizer(**{**QUICK, "epochs": 1}, kinds={"age": "number"}).fit(people())
    write = checkpoint.write_atomically

    def cut_off(path: Path, body: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, body)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", cut_off)
        with pytest.raises(KeyboardInterrupt):
            other.save(folder)
    pd.testing.assert_frame_equal(TableSynthesizer.load(folder).sample(5, seed=1), rows)
    other.save(folder)
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 2
    assert TableSynthesizer.load(folder).get_params() == other.get_params()


@pytest.mark.slow
def test_it_learns_which_job_earns_what() -> None:
    table = people(3000)
    made = TableSynthesizer(epochs=150, batch_size=300).fit(table).sample(2000, seed=0)
    assert abs(made["job"].value_counts(normalize=True) - table["job"].value_counts(normalize=True)).max() < 0.1
    nurses, cooks = (made.loc[made["job"] == job, "pay"].median() for job in ("nurse", "cook"))
    assert abs(nurses - 3000) < 300
    assert abs(cooks - 1000) < 300
