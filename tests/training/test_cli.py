"""What the commands print and leave behind."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import (
    ENVIRONMENT,
    EXAMPLES,
    TINY,
    command,
    config_of,
    metrics_of,
    newest_checkpoint,
    run_process,
    same_bits,
    tensors_of,
    tree,
)

import wgan_fast
from wgan_fast.training import Run
from wgan_fast.training.cli import main
from wgan_fast.training.data import load_data
from wgan_fast.training.metrics import mode_coverage, sliced_wasserstein
from wgan_fast.training.run import draw_noise


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    main(["train", *TINY, "--steps", "4", "--learning-rate", "0.01", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "run"
    main(["train", "--data", "8gaussians", "--width", "16", "--steps", "20", "--batch-size", "64", "--out", str(out)])
    return out


# As a process of its own


def test_package_runs_as_a_module_from_any_folder(tmp_path):
    ended = run_process("train", *TINY, "--steps", "2", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    out = tmp_path / "runs" / "digits-wgan-gp"
    assert newest_checkpoint(out).name == "step-00000002.safetensors"
    assert ended.stdout == (out / "summary.txt").read_text()
    for line in ended.stdout.splitlines():
        name, _, value = line.rpartition("  ")
        if name.strip() in ("samples", "curves", "checkpoint"):
            assert (tmp_path / value).is_file()
    ended = run_process("sample", "runs/digits-wgan-gp", "--grid", "2x3", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "runs/digits-wgan-gp/samples/grid-2x3.png\n"
    assert (tmp_path / ended.stdout.strip()).is_file()


def test_networks_of_ones_own_train_resume_and_sample(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_bytes((EXAMPLES / "own_model.py").read_bytes())
    ended = run_process(
        "train", "--data", "digits", "--model", "own_model:build", "--steps", "2", "--batch-size", "8", "--out", "run",
        cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert config_of(tmp_path / "run")["model"] == "own_model:build"
    assert tensors_of(tmp_path / "run", "generator.")["layers.0.weight"].shape == (64, 16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    main(["train", "--resume", "run", "--steps", "3"])
    assert newest_checkpoint(tmp_path / "run").name == "step-00000003.safetensors"
    main(["sample", "run", "--grid", "1x1"])


def test_interrupted_training_says_how_to_go_on_and_goes_on(tmp_path):
    arguments = [*TINY, "--steps", "100000", "--checkpoint-every", "1", "--out", "run"]
    process = subprocess.Popen(
        command("train", *arguments), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    last = error.splitlines()[-1]
    assert re.fullmatch(
        r"wgan-fast: error: stopped after step \d+ of \d+; go on with: wgan-fast train --resume run", last
    )
    assert "Traceback" not in error
    reached = int(newest_checkpoint(tmp_path / "run").stem.removeprefix("step-"))
    main(["train", "--resume", str(tmp_path / "run"), "--steps", str(reached + 2)])
    assert newest_checkpoint(tmp_path / "run").name == f"step-{reached + 2:08d}.safetensors"


# Help

FIXED_FLAGS = {
    "train": [
        "--data", "--method", "--model", "--steps", "--batch-size", "--n-critic", "--seed", "--device", "--engine",
        "--precision", "--out", "--resume",
    ],
    "sample": ["RUN", "--grid", "--scores", "--interpolate", "--n", "--seed", "--out", "--device"],
    "evaluate": ["RUN", "--samples", "--seed", "--device"],
    "export": ["RUN", "--out"],
    "info": ["--json"],
}  # fmt: skip


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert not end.value.code
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


@pytest.mark.parametrize("name", FIXED_FLAGS)
def test_help_mentions_every_flag(name, capsys):
    text = help_of([name], capsys)
    for flag in FIXED_FLAGS[name]:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), flag


def test_help_of_train_explains_every_option(capsys):
    text = " ".join(help_of(["train"], capsys).replace("│", " ").split())
    for method in ("wgan-gp", "wgan-lp", "wgan-clip", "r1", "dragan", "gan", "lsgan", "hinge"):
        assert method in text
    flags = re.findall(r"(--[\w-]+) (?:STR|INT|FLOAT|PATH|\{[^}]*\}\S*) (.{12})", text)
    assert len(flags) >= 30
    for flag, beginning in flags:
        assert not beginning.startswith(("--", "(default")), flag


def test_help_lists_the_commands(capsys):
    text = help_of([], capsys)
    for name in FIXED_FLAGS:
        assert re.search(rf"\b{name}\b", text)


# Output


def ascii_output_of(arguments: list[str]) -> str:
    """What the command prints where standard output takes ASCII alone."""
    written = io.BytesIO()
    output = io.TextIOWrapper(written, encoding="ascii", write_through=True)
    with contextlib.redirect_stdout(output):
        main(arguments)
    return written.getvalue().decode("ascii")


@pytest.mark.parametrize("arguments", [[], *([name] for name in FIXED_FLAGS), ["bench"]], ids=" ".join)
def test_help_is_shown_where_the_output_is_ascii(arguments):
    with pytest.raises(SystemExit) as end:
        ascii_output_of([*arguments, "--help"])
    assert not end.value.code


def test_help_is_shown_where_the_locale_is_ascii(tmp_path):
    environment = {**ENVIRONMENT, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    ended = subprocess.run(command("train", "--help"), env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"--penalty-weight" in ended.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", *TINY, "--engine", "autograd", "--steps", "1", "--out", "rún"],
        ["sample", "rún", "--grid", "1x2", "--scores"],
        ["evaluate", "rún", "--samples", "5"],
        ["export", "rún"],
        ["info"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_print_what_an_ascii_output_can_show(arguments, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] != "train":
        shutil.copytree(finished, "rún")
    text = ascii_output_of(arguments)
    assert arguments[0] == "info" or "r?n/" in text


def test_names_of_files_that_are_no_text_are_printed_as_they_are(tmp_path, capfdbinary):
    out = os.fsencode(tmp_path) + b"/r\xff"
    main(["train", *TINY, "--engine", "autograd", "--steps", "1", "--out", os.fsdecode(out)])
    assert out + b"/samples/" in capfdbinary.readouterr().out


def test_warnings_are_shown_in_one_line(tmp_path):
    (tmp_path / "own_model.py").write_bytes((EXAMPLES / "own_model.py").read_bytes())
    warns = "import warnings, own_model\ndef build(shape):\n    warnings.warn('slow:\\nno compiler', RuntimeWarning)\n"
    (tmp_path / "warns.py").write_text(warns + "    return own_model.build(shape)\n")
    arguments = ["--data", "8gaussians", "--model", "warns:build", "--engine", "autograd", "--batch-size", "8"]
    ended = run_process("train", *arguments, "--steps", "1", "--out", "run", cwd=tmp_path)
    assert ended.returncode == 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("wgan-fast: ")]
    assert said[0] == "wgan-fast: warning: slow: no compiler"
    assert [line.partition("makes")[0] for line in said[1:]] == ["wgan-fast: warning: the generator ends in tanh and "]
    before = warnings.formatwarning
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--batchsize", "3"], "Unrecognized options: --batchsize, 3; did you mean --batch-size?"),
        (["train", "--zzzz"], "Unrecognized options: --zzzz"),
        (["trian"], "Unrecognized options: trian; the commands are train, sample, evaluate, export, bench, info"),
        (["train", "--steps", "ten"], "--steps must be a whole number, got 'ten'"),
        (["train", "--learning-rate", "low"], "--learning-rate must be a number, got 'low'"),
        (["train", "--schedule", "cos"], "--schedule must be one of 'constant', 'linear', 'cosine', got 'cos'"),
        (["train", "--steps"], "Missing value for argument '--steps'."),
        ([], "Expected one of {train, sample, evaluate, export, bench, info}."),
    ],
)
def test_mistyped_command_is_answered_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"wgan-fast: error: {message}\n"


# train


def test_flags_of_a_run_can_be_given_again_and_taken_back(tmp_path):
    out = tmp_path / "run"
    main(["train", *TINY, "--engine", "autograd", "--steps", "1", "--channels-last", "--no-fused", "--out", str(out)])
    assert (config_of(out)["channels_last"], config_of(out)["fused"]) == (True, False)
    main(["train", "--resume", str(out), "--steps", "2", "--channels-last", "--fused"])
    assert (config_of(out)["channels_last"], config_of(out)["fused"]) == (True, True)
    main(["train", "--resume", str(out), "--steps", "3", "--no-channels-last"])
    assert (config_of(out)["channels_last"], config_of(out)["fused"]) == (False, True)


def test_settings_of_the_command_line_reach_the_run(tmp_path):
    out = tmp_path / "run"
    main(["train", *TINY, "--method", "wgan-lp", "--steps", "2", "--seed", "3", "--engine", "autograd", "--precision",
          "bf16", "--schedule", "cosine", "--penalty-weight", "2.5", "--spectral-norm", "--init", "he",
          "--ema", "0.5", "--beta1", "0.25", "--out", str(out)])  # fmt: skip
    config = config_of(out)
    expected = {
        "method": "wgan-lp", "steps": 2, "seed": 3, "engine": "autograd", "precision": "bf16", "schedule": "cosine",
        "penalty_weight": 2.5, "spectral_norm": True, "init": "he", "ema": 0.5, "beta1": 0.25, "data": "digits",
        "n_critic": 2, "batch_size": 5, "out": str(out), "beta2": 0.9, "learning_rate": 1e-4,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert metrics_of(out)[-1]["step"] == 2


def test_resumed_run_takes_its_own_settings(tmp_path):
    out = tmp_path / "run"
    main(["train", *TINY, "--method", "r1", "--steps", "1", "--seed", "3", "--out", str(out)])
    before = config_of(out)
    main(["train", f"--resume={out}", "--steps", "2", "--checkpoint-every", "1", "--keep", "1", "--log-every", "2"])
    assert config_of(out) == {**before, "steps": 2, "checkpoint_every": 1, "keep": 1, "log_every": 2}
    assert [path.name for path in (out / "checkpoints").glob("*.json")] == ["step-00000002.json"]


# sample


def test_sample_writes_a_picture_of_the_asked_size(finished, tmp_path, capsys):
    path = tmp_path / "new folder" / "grid.png"
    main(["sample", str(finished), "--grid", "3x4", "--out", str(path)])
    assert capsys.readouterr().out == f"{path}\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]
    with Image.open(path) as picture:
        picture.load()
        width, height = picture.size
    # Four columns and three rows of 8 x 8 images, enlarged to 64 x 64 at most, with gaps.
    assert 4 * 8 <= width <= 4 * 80
    assert 3 * 8 <= height <= 3 * 80
    assert width / height == pytest.approx(4 / 3, rel=0.05)


def test_scores_are_the_critics_and_sorted(finished, tmp_path, capsys):
    path = tmp_path / "grid.png"
    main(["sample", str(finished), "--grid", "3x4", "--scores", "--seed", "7", "--out", str(path)])
    assert capsys.readouterr().out == f"{path}\n{tmp_path / 'grid.csv'}\n"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "grid.csv").read_text())))
    assert len(rows) == 12
    assert [int(row["rank"]) for row in rows] == list(range(1, 13))
    assert sorted(int(row["sample"]) for row in rows) == list(range(12))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1

    run = Run.load(finished)
    noise = draw_noise(12, 3, seed=7)
    with torch.no_grad():
        samples = run.generator(noise)
        expected = run.critic(samples).flatten()
    assert same_bits(run.sample(12, seed=7), samples)
    assert torch.allclose(run.score(samples), expected)
    for row in rows:
        # Six decimals are written.
        assert float(row["score"]) == pytest.approx(expected[int(row["sample"])].item(), abs=6e-7)


def test_samples_without_an_out_lie_in_the_run(finished, capsys):
    main(["sample", str(finished), "--grid", "2x2", "--scores"])
    lines = capsys.readouterr().out.split()
    assert lines == [str(finished / "samples" / f"grid-2x2.{suffix}") for suffix in ("png", "csv")]
    assert all(Path(line).is_file() for line in lines)


def test_same_seed_samples_the_same_picture_and_another_seed_another(finished, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main(["sample", str(finished), "--grid", "2x2", "--seed", seed, "--out", str(tmp_path / f"{name}.png")])
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_sampling_does_not_depend_on_the_global_generator(finished):
    run = Run.load(finished)
    torch.manual_seed(1)
    first = run.sample(3)
    torch.manual_seed(2)
    assert same_bits(run.sample(3), first)


def test_points_are_sampled_into_a_scatter_plot(toy, tmp_path):
    path = tmp_path / "points.png"
    main(["sample", str(toy), "--grid", "5x5", "--scores", "--out", str(path)])
    with Image.open(path) as picture:
        assert min(picture.size) > 100
    assert len((tmp_path / "points.csv").read_text().splitlines()) == 26


# evaluate


KEYS = {
    "step", "samples", "wasserstein_held_out", "wasserstein_train", "sliced_wasserstein", "sliced_wasserstein_floor",
}  # fmt: skip


def test_evaluate_reports_distances_beside_their_floor(finished, capsys):
    with pytest.warns(UserWarning, match="50 samples on each side are few, and most differences chance"):
        main(["evaluate", str(finished), "--samples", "50"])
    printed, said = capsys.readouterr()
    assert said == ""
    report = json.loads((finished / "evaluation.json").read_text())
    assert report.keys() >= KEYS
    assert (report["step"], report["samples"]) == (4, 50)
    for key in report:
        assert key.replace("_", " ") in printed
        assert isinstance(report[key], int | float)
    assert printed.splitlines()[-1] == str(finished / "evaluation.json")

    # Recomputed from the run: 50 samples each, of which the real ones were never trained on.
    run, data = Run.load(finished), load_data("digits", seed=0)
    held_out, train = data.held_out.take(50, seed=0), data.train.take(50, seed=0)
    fake = run.sample(50, seed=0)
    with torch.no_grad():
        scores = {name: run.critic(x).double().mean().item() for name, x in
                  (("held_out", held_out), ("train", train), ("fake", fake))}  # fmt: skip
    for name in ("held_out", "train"):
        assert report[f"wasserstein_{name}"] == pytest.approx(scores[name] - scores["fake"], abs=1e-6)
    assert report["sliced_wasserstein"] == pytest.approx(sliced_wasserstein(fake, held_out, seed=0), rel=1e-9)
    assert report["sliced_wasserstein_floor"] == pytest.approx(sliced_wasserstein(train, held_out, seed=0), rel=1e-9)
    # Barely trained, the generator is further from the data than data from data.
    assert 0 < report["sliced_wasserstein_floor"] < report["sliced_wasserstein"]


def test_evaluate_of_toy_data_counts_modes(toy, capsys):
    main(["evaluate", str(toy), "--samples", "400", "--seed", "1"])
    report = json.loads((toy / "evaluation.json").read_text())
    assert report.keys() == KEYS | {"modes", "modes_covered", "high_quality"}
    assert report["modes"] == 8
    data = load_data("8gaussians")
    coverage = mode_coverage(Run.load(toy).sample(800, seed=1), data.modes, data.mode_std)
    assert report["modes_covered"] == coverage.covered <= 8
    assert report["high_quality"] == pytest.approx(coverage.high_quality)
    assert "modes covered" in capsys.readouterr().out


def test_evaluate_is_reproducible(finished):
    reports = []
    for _ in range(2):
        main(["evaluate", str(finished), "--samples", "30", "--seed", "5"])
        reports.append((finished / "evaluation.json").read_bytes())
    assert reports[0] == reports[1]


def test_reading_commands_leave_the_run_resumable(finished):
    before = {name: content for name, content in tree(finished).items() if name.startswith(("checkpoints", "config"))}
    main(["evaluate", str(finished), "--samples", "5"])
    main(["sample", str(finished), "--grid", "1x1"])
    after = tree(finished)
    assert {name: after[name] for name in before} == before


# info


def test_info_is_the_build_information(capsys):
    main(["info", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(wgan_fast.build_info()))
    main(["info"])
    text = capsys.readouterr().out
    for name, value in wgan_fast.build_info().items():
        assert re.search(rf"^{name}\b", text, re.MULTILINE)
        if isinstance(value, str):
            assert value in text


def test_info_says_why_a_part_is_not_active(tmp_path):
    environment = {**ENVIRONMENT, "CXX": "no-such-compiler"}
    ended = subprocess.run(
        command("info", "--json"), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    info = json.loads(ended.stdout)
    assert info["compiler"]["active"] is False
    assert "no-such-compiler" in info["compiler"]["reason"]


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["train", "--help"], ["train", "--stepz", "3"], ["trian"], ["bench", "--model"]],
)
def test_questions_and_mistakes_are_answered_before_pytorch_is_imported(arguments):
    code = (
        "import sys\n"
        "from wgan_fast.training.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    status = end.code\nelse:\n    status = 0\n"
        "heavy = {'torch', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "print(status, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    status = 0 if {"--version", "--help"} & set(arguments) else 2
    assert done.stdout.splitlines()[-1] == f"{status} []"


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"wgan-fast {wgan_fast.__version__}\n"
