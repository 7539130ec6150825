"""A table through the command line as a user types it: in, out, going on after a kill, and judged."""

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.runs import ENVIRONMENT, command, newest_checkpoint, read_checkpoint, run_process, same_bits
from wgan_fast.errors import InputError
from wgan_fast.tables import Preparation, TableSynthesizer, files, judgement
from wgan_fast.tables import columns as columns_module
from wgan_fast.tables import run as run_module
from wgan_fast.tables.config import pairs
from wgan_fast.training.cli import main

QUICK = ["--epochs", "2", "--batch-size", "50", "--width", "16", "--latent-dim", "8"]
Refused = Callable[..., str]


def people(n: int = 300) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "id": np.arange(n) + 1000,
            "job": draw.choice(["nurse", "cook", "Fahrer/in"], n, p=[0.6, 0.3, 0.1]),
            "pay": draw.normal(3000, 500, n).round(2),
            "rooms": draw.integers(1, 6, n),
            "owner": draw.choice([True, False], n),
            "since": (pd.Timestamp("2020-01-01") + pd.to_timedelta(draw.integers(0, 900, n), "D")).strftime("%Y-%m-%d"),
            "gap": np.where(draw.random(n) < 0.3, np.nan, draw.normal(size=n).round(3)),
            "zip": draw.choice(["01067", "80331", "20095"], n),
            "country": "DE",
        }
    )


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    people().to_csv("people.csv", index=False)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    people().to_csv(folder / "people.csv", index=False)
    main(["train", "--data", str(folder / "people.csv"), *QUICK, "--out", str(folder / "run")])
    return folder / "run"


@pytest.fixture
def refused(workplace: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run the command line, check that it refuses in one line and leaves nothing, and return the line."""

    def run(*arguments: object) -> str:
        before = sorted(workplace.rglob("*"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(map(str, arguments)))
        assert end.value.code == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        assert sorted(workplace.rglob("*")) == before
        lines = captured.err.splitlines()
        assert len(lines) == 1
        return lines[0].removeprefix("wgan-fast: error: ")

    return run


def test_from_a_file_to_rows(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["train", "--data", "people.csv", *QUICK])
    said = capfd.readouterr()
    run = Path("runs/people-ctgan")
    assert f"wgan-fast sample {run} --n 1000 --out rows.csv" in said.out
    for line in [
        "people.csv: 270 rows to learn, 30 held out",
        "  id       left out   (it counts the rows)",
        "  job      category   3: nurse, cook, Fahrer/in",
        "  rooms    integer    1 to 5",
        "  owner    yes/no",
        "  since    date       2020-",
        "some missing",
        "  zip      category   3:",
        "  country  constant   'DE' (it has one value)",
    ]:
        assert line in said.err
    for name in ("marginals.png", "associations.png", "curves.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    main(["sample", str(run), "--n", "40", "--where", "job=Fahrer/in", "--where", "zip=01067", "--out", "rows.csv"])
    rows = pd.read_csv("rows.csv", dtype={"zip": str})
    assert list(rows.columns) == list(people().columns[1:])
    assert len(rows) == 40
    assert (rows["job"] == "Fahrer/in").all()
    assert (rows["zip"] == "01067").all()
    assert rows["since"].str.fullmatch(r"\d{4}-\d{2}-\d{2}").all()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".csv.gz"])
def test_every_form_of_a_table_is_read_and_written(
    suffix: str, workplace: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = people()
    if suffix == ".parquet":
        table.to_parquet("t.parquet")
    else:
        table.to_csv(f"t{suffix}", index=False, sep="\t" if suffix == ".tsv" else ",")
    main(["train", "--data", f"t{suffix}", *QUICK, "--epochs", "1", "--out", "run"])
    first, second = f"a{suffix}", f"b{suffix}"
    for path in (first, second):
        main(["sample", str(trained), "--n", "7", "--seed", "3", "--out", path])
    one, two = (files.read_table(path) for path in (first, second))
    assert len(one) == 7
    pd.testing.assert_frame_equal(one, two)
    assert list(one["job"]) == list(TableSynthesizer.load(trained).sample(7, seed=3)["job"])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", [], "t.csv is empty"),
        ("a,b\n", [], "the table has 0 rows, and at least 10 are needed to learn from"),
        ("a,b\n1,2\n3,4\n5,6\n", [], "the table has 3 rows, and at least 10"),
        ("a,b\n1,2\n1,2,3\n" * 9, [], "t.csv has 3 values in line 3, and 2 before it"),
        (b"a,b\n\xff\xfe,2\n", [], "t.csv is not UTF-8: save it as UTF-8"),
        ("a;b\n1;2\n", [], "t.csv is not separated by commas"),
        ("a\n1\n" + "1\n" * 20, [], "nothing to learn"),
        (None, [], "t.csv does not exist"),
        ("ok", ["--column", "pay=money"], "column 'pay' cannot be 'money': there are number, integer, category"),
        ("ok", ["--column", "wage=number"], "there is no column 'wage'; there are 'id', 'job'"),
        ("ok", ["--column", "job=number"], "column 'job' cannot be number: its values look like category"),
        ("ok", ["--column", "job"], "column must be NAME=KIND, such as pay=number, got 'job'"),
        ("ok", ["--column", "job=date"], "column 'job' cannot be date"),
        ("ok", ["--batch-size", "5"], "a batch of 5 rows has no group of 10"),
        ("ok", ["--epochs", "0"], "epochs must be at least 1, got 0"),
        ("ok", ["--holdout", "1"], "holdout must be in [0, 1), got 1.0"),
        ("ok", ["--n-critic", "5"], "Unrecognized options: --n-critic"),
        ("ok", ["--device", "cuda:77"], "device"),
        ("ok", ["--out", "people.csv"], "out people.csv cannot be written"),
    ],
)
def test_a_table_that_cannot_be_learned_is_refused(
    text: str | bytes | None, options: list[str], message: str, workplace: Path, refused: Refused
) -> None:
    if text == "ok":
        people().to_csv("t.csv", index=False)
    elif text is not None:
        Path("t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused("train", "--data", "t.csv", *options)


def test_text_is_refused_until_it_is_said_what_it_is(workplace: Path, refused: Refused) -> None:
    table = people().assign(note=[f"a sentence that nobody else has written, number {i}" for i in range(300)])
    table.to_csv("t.csv", index=False)
    assert "--column note=identifier" in refused("train", "--data", "t.csv", *QUICK)
    main(["train", "--data", "t.csv", *QUICK, "--column", "note=identifier", "--column", "rooms=category"])
    main(["sample", "runs/t-ctgan", "--n", "5", "--where", "rooms=3", "--out", "rows.csv"])
    rows = pd.read_csv("rows.csv")
    assert "note" not in rows
    assert (rows["rooms"] == 3).all()


def test_a_table_larger_than_memory_is_refused_and_some_of_its_rows_are_learned(
    workplace: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("big.csv", "wb") as file:
        file.truncate(1 << 42)
    assert "learn from some of its rows (--rows 1000000" in refused("train", "--data", "big.csv", "--no-stream")
    monkeypatch.setattr(files, "_free_memory", lambda: 0)
    assert "(--stream)" in refused("train", "--data", "people.csv", "--no-stream")
    assert "stream learns all of them" in refused("train", "--data", "people.csv", "--stream", "--rows", "9")
    main(["train", "--data", "people.csv", *QUICK, "--rows", "100", "--out", "run"])
    assert "people.csv: 90 rows to learn, 10 held out" in capfd.readouterr().err
    assert "01067" in list(TableSynthesizer.load("run").sample(200, seed=0)["zip"])


def test_rows_are_drawn_alike_from_all_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pd.DataFrame({"n": range(250_000), "half": ["a", "b"] * 125_000}).to_csv(tmp_path / "t.csv", index=False)
    drawn = files.read_table(tmp_path / "t.csv", rows=2000, seed=1)
    assert len(drawn) == 2000
    assert drawn["n"].is_monotonic_increasing
    # Means of 2,000 of 250,000 numbers deviate by 250,000 / sqrt(12 · 2,000), five times that is no accident.
    assert abs(drawn["n"].mean() - 125_000) < 5 * 250_000 / np.sqrt(12 * 2000)
    assert len(files.read_table(tmp_path / "t.csv", rows=300_000)) == 250_000


def wide(categories: int, width: int) -> pd.DataFrame:
    draw = np.random.default_rng(1)
    rows = 4 * categories
    table = pd.DataFrame({f"x{i}": draw.normal(size=rows).round(2) for i in range(width - 1)})
    return table.assign(many=[f"kind {i % categories}" for i in range(rows)])


@pytest.mark.parametrize(("categories", "width"), [(1000, 3), (30, 200)])
def test_many_categories_and_many_columns(categories: int, width: int, workplace: Path) -> None:
    wide(categories, width).to_csv("wide.csv", index=False)
    main(["train", "--data", "wide.csv", *QUICK, "--epochs", "1", "--out", "run"])
    main(["sample", "run", "--n", "10", "--where", "many=kind 7", "--out", "rows.csv"])
    assert (pd.read_csv("rows.csv")["many"] == "kind 7").all()


def test_a_run_killed_twice_ends_as_an_undisturbed_one(workplace: Path) -> None:
    options = [*QUICK, "--epochs", "30", "--checkpoint-every", "20", "--log-every", "5"]
    assert run_process("train", "--data", "people.csv", *options, "--out", "calm", cwd=workplace).returncode == 0
    for number, arguments in [
        (signal.SIGKILL, ["--data", "people.csv", *options, "--out", "killed"]),
        (signal.SIGTERM, ["--resume", "killed"]),
    ]:
        seals = len(list(workplace.glob("killed/checkpoints/*.json")))
        process = subprocess.Popen(command("train", *arguments), cwd=workplace, env=ENVIRONMENT, stderr=subprocess.PIPE)
        newest = max(workplace.glob("killed/checkpoints/*.json"), default=None)
        deadline = time.monotonic() + 120
        while max(workplace.glob("killed/checkpoints/*.json"), default=None) == newest and process.poll() is None:
            assert time.monotonic() < deadline, seals
            time.sleep(0.005)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert run_process("train", "--resume", "killed", cwd=workplace).returncode == 0
    (killed, told), (calm_one, expected) = (
        read_checkpoint(newest_checkpoint(workplace / r)) for r in ("killed", "calm")
    )
    assert told == expected
    assert killed.keys() == calm_one.keys()
    assert all(same_bits(tensor, calm_one[name]) for name, tensor in killed.items())

    def figures(run: str) -> list[dict[str, Any]]:
        records = map(json.loads, (workplace / run / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in record.items() if k != "rows_per_second"} for record in records]

    calm = {record["step"]: record for record in figures("calm")}
    # Being asked to stop adds a line where it stopped.
    assert all(calm[record["step"]].items() <= record.items() for record in figures("killed") if record["step"] in calm)
    assert calm.keys() <= {record["step"] for record in figures("killed")}


def test_a_resumed_run_keeps_its_settings_and_its_table(workplace: Path, trained: Path, refused: Refused) -> None:
    assert "width was 16, got 8" in refused("train", "--resume", trained, "--width", "8")
    assert "epochs is 1, but" in refused("train", "--resume", trained, "--epochs", "1")
    people(200).to_csv("other.csv", index=False)
    assert "is not the table that the run" in refused("train", "--resume", trained, "--data", "other.csv")
    shutil.copytree(trained, "moved")
    main(["train", "--resume", "moved", "--epochs", "3", "--data", "people.csv"])
    assert newest_checkpoint(Path("moved")).name > newest_checkpoint(trained).name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "0"], "n must be at least 1, got 0"),
        (["--out", "rows.png"], "out must end in .csv, .tsv, .parquet, got rows.png"),
        (["--where", "job=pilot"], "column 'job' has no 'pilot'; there are 'nurse', 'cook', 'Fahrer/in'"),
        (["--where", "pay=3000"], "there is no column of categories 'pay'"),
        (["--where", "job"], "where must be NAME=CATEGORY"),
        (["--grid", "3x3"], "Unrecognized options: --grid"),
        (["--seed", "-1"], "seed must be a whole number of at least 0, got -1"),
        (["--out", "new/rows.csv", "--where", "job=pilot"], "column 'job' has no 'pilot'"),
    ],
)
def test_rows_that_cannot_be_made_are_refused(
    options: list[str], message: str, trained: Path, refused: Refused
) -> None:
    assert message in refused("sample", trained, *options)


def test_evaluation_stands_beside_what_real_rows_reach(
    trained: Path, capfd: pytest.CaptureFixture[str], refused: Refused
) -> None:
    main(["evaluate", str(trained), "--target", "job"])
    said = capfd.readouterr().out
    assert "balanced accuracy of a model of job" in said
    report = json.loads((trained / "evaluation.json").read_text())
    assert report["rows"] == 30
    assert set(report["columns"]["each"]) == {"job", "pay", "rooms", "owner", "since", "gap", "zip"}
    assert report["columns"]["floor"] < report["columns"]["mean"]
    assert "target must be one of 'job', 'pay'" in refused("evaluate", trained, "--target", "country")
    table = trained.parent / "people.csv"
    moved = table.rename(table.with_name("moved.csv"))
    try:
        assert "say where with --data" in refused("evaluate", trained)
        main(["evaluate", str(trained), "--data", str(moved)])
    finally:
        moved.rename(table)


def test_help_of_train_for_a_table_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--data", "t.csv", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for option in ("--column", "--rows", "--epochs", "--holdout", "--resume"):
        assert option in said
    assert "--n-critic" not in said


def test_a_run_on_a_table_is_not_exported(trained: Path, refused: Refused) -> None:
    message = refused("export", trained)
    assert message.endswith("the run is on a table, which wgan_fast.tables.TableSynthesizer.load reads")


def test_made_and_real_rows_are_compared_in_one_coding() -> None:
    def table(a: int, b: int) -> pd.DataFrame:
        return pd.DataFrame({"x": ["a"] * a + ["b"] * b})

    columns = columns_module.columns_of(table(46, 44))
    (real,) = judgement.views([table(8, 2)], columns)
    (made,) = judgement.views([table(2, 8)], columns, like=real)
    assert judgement.column_distances(made, real) == {0: pytest.approx(0.6)}
    (other,) = judgement.views([table(2, 6).assign(x="c")], columns, like=real)
    assert judgement.column_distances(other, real) == {0: pytest.approx(1.0)}


def test_a_resumed_run_keeps_what_was_fitted(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained, tmp_path / "run")
    before = TableSynthesizer.load(tmp_path / "run").preparation_.state()

    def fitted_anew(*args: Any, **options: Any) -> Any:
        raise AssertionError("fitted again")

    monkeypatch.setattr(Preparation, "fit", fitted_anew)
    main(["train", "--resume", str(tmp_path / "run"), "--epochs", "3"])
    assert TableSynthesizer.load(tmp_path / "run").preparation_.state() == before


def test_rows_are_judged_by_all_of_what_was_held_out(workplace: Path) -> None:
    table = people(400).sort_values("pay")
    table.to_csv("sorted.csv", index=False)
    main(["train", "--data", "sorted.csv", *QUICK, "--epochs", "1", "--holdout", "0.5", "--out", "run"])
    main(["evaluate", "run", "--samples", "100"])
    # 100 and 100 rows of one distribution are further apart than 0.28 once in a thousand times; half a column by 0.5.
    assert json.loads(Path("run/evaluation.json").read_text())["columns"]["each"]["pay"]["floor"] < 0.28


def test_a_table_is_learned_by_one_process(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a table is learned by one process" in refused("train", "--data", "people.csv")


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_table_as_it_is_written_in_germany(
    bom: str, workplace: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{i % 7};{i / 4:.2f}".replace(".", ",") + f";{i % 28 + 1:02}.{i % 12 + 1:02}.2024" for i in range(40)]
    Path("t.csv").write_text(f"{bom}Zahl;Größe;Datum\n" + "\n".join(lines), encoding="utf-8")
    assert "give --sep ';', and --decimal ," in refused("train", "--data", "t.csv")
    options = ["--sep", ";", *QUICK, "--batch-size", "30"]
    assert "such as '0,00'" in refused("train", "--data", "t.csv", *options, "--column", "Größe=number")
    main(["train", "--data", "t.csv", *options, "--out", "commas"])
    assert "(numbers with a decimal comma? --decimal ,)" in capfd.readouterr().err
    given = [*options, "--decimal", ",", "--column", "Datum=date:%d.%m.%Y"]
    main(["train", "--data", "t.csv", *given, "--out", "run"])
    said = capfd.readouterr().err
    assert "Größe  number     0.0 to 9.75" in said
    assert "Datum  date       2024-01-" in said
    main(["train", "--resume", "run", "--epochs", "3"])


def test_dates_that_may_be_read_in_two_ways_are_refused(workplace: Path, refused: Refused) -> None:
    days = [f"{i % 12 + 1:02}/{(i * 5) % 12 + 1:02}/2024" for i in range(40)]
    pd.DataFrame({"day": days, "x": range(0, 400, 10)}).to_csv("t.csv", index=False)
    assert "--column 'day=date:%d/%m/%Y'" in refused("train", "--data", "t.csv", "--column", "day=date")
    assert "not written as %Y" in refused("train", "--data", "t.csv", "--column", "day=date:%Y")
    pd.DataFrame({"day": [*days[1:], "31/01/2024"], "x": range(0, 400, 10)}).to_csv("t.csv", index=False)
    read = files.read_table("t.csv", kinds={"day": "date"})
    assert read["day"].iloc[-1] == pd.Timestamp("2024-01-31")
    assert read["day"].iloc[0] == pd.Timestamp(2024, 6, 2)


def test_integers_with_gaps_stay_integers(workplace: Path, trained: Path) -> None:
    Path("t.csv").write_text(
        "age,pay,kind\n" + "".join(f"{'' if i % 5 == 0 else i},{i}.0,{i % 3}\n" for i in range(60))
    )
    read = files.read_table("t.csv")
    assert [str(dtype) for dtype in read.dtypes] == ["Int64", "float64", "int64"]
    main(["train", "--data", "t.csv", *QUICK, "--batch-size", "40", "--out", "run"])
    main(["sample", "run", "--n", "50", "--out", "rows.csv"])
    assert not [line for line in Path("rows.csv").read_text().splitlines()[1:] if "." in line.split(",")[0]]


def test_names_and_categories_with_an_equals_sign_are_asked_for(workplace: Path, refused: Refused) -> None:
    table = pd.DataFrame({"job title": ["boss = chief", "cook"] * 30, "a": ["b=c", "x"] * 30, "pay": range(0, 600, 10)})
    table.to_csv("t.csv", index=False)
    main(["train", "--data", "t.csv", *QUICK, "--out", "run"])
    for where in ("job title=boss = chief", "a=b=c"):
        main(["sample", "run", "--n", "5", "--where", where, "--out", "rows.csv"])
        name, _, value = where.partition("=")
        assert (pd.read_csv("rows.csv")[name] == value).all()
    assert pairs(("a=b=c",), "where", "", ["a=b"]) == {"a=b": "c"}
    with pytest.raises(InputError, match="may be of the columns 'a' and 'a=b'"):
        pairs(("a=b=c",), "where", "", ["a", "a=b"])


def test_a_model_learns_from_all_rows_however_few_are_held_out() -> None:
    draw = np.random.default_rng(0)
    kind = draw.integers(0, 2, 200)
    table = pd.DataFrame({"x": kind + draw.normal(0, 0.1, 200), "kind": np.where(kind, "a", "b")})
    report = judgement.judge(table[:180], table[:180], table[180:], target="kind")
    assert report["rows"] == 20
    assert report["model"]["real"] == report["model"]["made"] == pytest.approx(1.0)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_larger_than_memory_is_learned_in_parts(
    suffix: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    table = people(500)
    table.loc[499, "job"] = "pilot"
    table["since"] = pd.to_datetime(table["since"])
    path = f"t{suffix}"
    table.to_parquet(path) if suffix == ".parquet" else table.to_csv(path, index=False)
    monkeypatch.setattr(files, "_free_memory", lambda: 0)
    monkeypatch.setattr(files, "PART", 90)
    monkeypatch.setattr(run_module, "STREAMED", 200)
    main(["train", "--data", path, *QUICK, "--epochs", "1", "--out", "run"])
    said = capfd.readouterr().err
    found = re.search(r"(\d+) rows to learn, 20 held out; columns are told by 180 of them(?:, and (\d+) rows)?", said)
    assert found
    # All but those that are held out, and those with what the drawn rows have not.
    assert int(found[1]) + int(found[2] or 0) == 480
    assert int(found[2] or 0) < 20
    before = newest_checkpoint(Path("run"))
    main(["train", "--resume", "run", "--epochs", "2"])
    assert newest_checkpoint(Path("run")).name > before.name
    main(["evaluate", "run"])
    main(["sample", "run", "--n", "20", "--out", "rows.csv"])
    assert set(pd.read_csv("rows.csv")["job"]) <= {"nurse", "cook", "Fahrer/in", "pilot"}


def test_parts_are_coded_as_the_whole_is(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART", 70)
    options: dict[str, Any] = {"kinds": {}, "sep": None, "decimal": "."}
    whole = files.read_table("people.csv")
    preparation = Preparation.fit(whole, numbers="quantiles")  # which draws nothing
    parts = files.read_parts(Path("people.csv"), whole, **options)
    values, choices, passed_over = preparation.coded_parts(parts)
    expected = preparation.coded(whole, dtype=np.float32)
    assert passed_over == 0
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(choices, expected[1])
    drawn, positions = files.read_with_positions("people.csv", rows=50, seed=1, **options)
    pd.testing.assert_frame_equal(drawn, whole.iloc[positions].reset_index(drop=True))


def test_a_folder_alone_makes_rows_also_of_what_one_row_had(workplace: Path) -> None:
    table = people()
    table.loc[7, "job"] = "pilot"
    table.to_csv("t.csv", index=False)
    main(["train", "--data", "t.csv", *QUICK, "--holdout", "0", "--out", "run"])
    Path("t.csv").unlink()
    Path("run").rename("elsewhere")
    ended = run_process("sample", "elsewhere", "--n", "6", "--where", "job=pilot", "--out", "rows.csv", cwd=workplace)
    assert ended.returncode == 0, ended.stderr
    assert pd.read_csv("rows.csv")["job"].tolist() == ["pilot"] * 6


def test_a_table_in_parts_of_which_little_is_known_is_refused(
    workplace: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = [f"{i % 28 + 1:02}/{i % 12 + 1:02}/2024" for i in range(300)]
    people().assign(day=days).to_csv("t.csv", index=False)
    monkeypatch.setattr(run_module, "STREAMED", 100)
    arguments = ["train", "--data", "t.csv", *QUICK, "--stream", "--column"]
    # Other dates than in ISO 8601 need their form, here as anywhere.
    assert "say how dates are written" in refused(*arguments, "day=date")
    main([*arguments, "day=date:%d/%m/%Y", "--out", "run"])
