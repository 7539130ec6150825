"""Epochs, settings by other names and from files, runs that go on with other settings, elsewhere, on other data."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import (
    EXAMPLES,
    TINY,
    assert_same_checkpoint,
    assert_same_run,
    config_of,
    metrics_of,
    newest_checkpoint,
    read_checkpoint,
    run_process,
    same_bits,
    tensors_of,
)

from wgan_fast.training import TrainConfig
from wgan_fast.training.cli import main

pytestmark = pytest.mark.usefixtures("no_curves", "workplace")

TRAINED_ON = 1617
"""Digits that are not held out."""


def train(*arguments: object) -> None:
    main(["train", *map(str, arguments)])


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command line, check that it refuses in one line, and return the line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line.removeprefix("wgan-fast: error: ")


def saved(out: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (out / "checkpoints").glob("*.json"))


def history_of(out: Path) -> list[dict[str, object]]:
    return json.loads((out / "config.json").read_text())["history"]


# Epochs


def test_article_is_one_line():
    """The line of the README, on fewer digits and for fewer epochs."""
    line = next(line for line in (EXAMPLES.parent / "README.md").read_text().splitlines() if "--epochs" in line)
    arguments = line.partition("#")[0].split()
    assert arguments[:2] == ["wgan-fast", "train"]
    arguments[arguments.index("--data") + 1] = "digits"
    arguments[arguments.index("--epochs") + 1] = "4"
    arguments[arguments.index("--checkpoint-every") + 1] = "2ep"
    train(*arguments[2:], "--log-every", "1ep", "--width", "2", "--out", "run")
    # Every epoch is 1617 digits, a step 5 batches of 128 of them.
    assert saved(Path("run")) == [math.ceil(epochs * TRAINED_ON / (5 * 128)) for epochs in (2, 4)]
    records = metrics_of(Path("run"))
    assert [record["step"] for record in records] == [math.ceil(epochs * TRAINED_ON / 640) for epochs in (1, 2, 3, 4)]
    assert [round(record["epoch"], 6) for record in records] == [
        round(record["step"] * 640 / TRAINED_ON, 6) for record in records
    ]
    config = config_of(Path("run"))
    expected = {
        "method": "wgan-clip", "model": "article", "clip": 0.01, "optimizer": "rmsprop", "learning_rate": 5e-5,
        "batch_size": 128, "n_critic": 5, "epochs": 4, "steps": None, "checkpoint_every": "2ep",
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected


def test_epochs_train_what_as_many_steps_train():
    options = [*TINY, "--batch-size", "100", "--schedule", "cosine"]
    train(*options, "--epochs", "1", "--out", "epochs")
    train(*options, "--steps", math.ceil(TRAINED_ON / 200), "--out", "steps")
    assert_same_checkpoint(newest_checkpoint(Path("epochs")), newest_checkpoint(Path("steps")))


def test_epochs_interrupted_and_resumed_end_as_undisturbed():
    options = [*TINY, "--batch-size", "300", "--checkpoint-every", "1ep", "--sample-every", "1ep"]
    train(*options, "--epochs", "3", "--out", "whole")
    train(*options, "--epochs", "1", "--out", "parts")
    train("--resume", "parts", "--epochs", "3")
    assert_same_run(Path("parts"), Path("whole"))
    assert saved(Path("parts")) == [3, 6, 9]


def test_epochs_shorter_than_a_step_are_due_at_every_step():
    train(*TINY, "--batch-size", "1000", "--steps", "2", "--checkpoint-every", "1ep", "--out", "run")
    assert saved(Path("run")) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "2", "--steps", "3"], "steps and epochs exclude each other, got steps 3 and epochs 2"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--data", "8gaussians", "--epochs", "2"], "epochs was 2, but data 8gaussians is drawn without end: count"),
        (["--data", "8gaussians", "--log-every", "2ep"], "log_every was 2ep, but data 8gaussians is drawn without"),
        (["--track", "5e"], "track must be steps or epochs, such as 500 or 25ep, got '5e'"),
        (["--sample-every", "0ep"], "sample_every must be steps or epochs, such as 500 or 25ep, got '0ep'"),
        (["--checkpoint-every", "0"], "checkpoint_every must be at least 1, got 0"),
    ],
)
def test_epochs_that_cannot_be_are_refused(arguments, message, capfd):
    assert refused(capfd, "train", *arguments, "--out", "run").startswith(message)
    assert not Path("run").exists()


@pytest.mark.parametrize("written", ["500", 500])
def test_intervals_are_read_from_text_and_numbers(written):
    assert TrainConfig(log_every=written).log_every == 500
    config = TrainConfig(checkpoint_every="25 epochs", track="1epoch", epochs=3)
    assert (config.checkpoint_every, config.track) == ("25ep", "1ep")
    assert TrainConfig.from_json(config.to_json()) == config


# Names that people type


def test_learning_rate_has_a_short_name():
    train(*TINY, "--lr", "0.25", "--steps", "1", "--out", "a")
    train(*TINY, "--lr=0.5", "--steps", "1", "--out", "b")
    assert [config_of(Path(out))["learning_rate"] for out in "ab"] == [0.25, 0.5]


def test_changes_are_given_as_the_papers_code_takes_them():
    train(*TINY, "--augment", "translation,cutout", "--steps", "1", "--out", "a")
    assert config_of(Path("a"))["augment"] == ["translation", "cutout"]


def test_a_file_takes_the_short_name_too():
    Path("a.yaml").write_text("lr: 0.125\n")
    train(*TINY, "--config", "a.yaml", "--steps", "1", "--out", "a")
    assert config_of(Path("a"))["learning_rate"] == 0.125


def test_learning_rate_is_given_once(capfd):
    message = refused(capfd, "train", *TINY, "--lr", "0.25", "--learning-rate=0.5", "--out", "a")
    assert "--lr is --learning-rate: give one of the two" in message
    assert not Path("a").exists()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("epoch", "epochs"), ("batch", "batch-size"), ("bs", "batch-size"), ("iterations", "steps"), ("iters", "steps"),
        ("gpu", "device"), ("z-dim", "latent-dim"), ("z_dim", "latent-dim"), ("nz", "latent-dim"),
        ("n-critics", "n-critic"), ("critic-iters", "n-critic"), ("lambda", "penalty-weight"),
        ("lambda_gp", "penalty-weight"), ("gp-weight", "penalty-weight"), ("dataset", "data"), ("output", "out"),
        ("num-workers", "workers"), ("worker", "workers"), ("save-every", "checkpoint-every"),
        ("pretrained", "init-from"), ("learn-rate", "learning-rate"), ("resum", "resume"),
    ],
)  # fmt: skip
def test_other_names_are_answered_with_the_right_one(typed, meant, capfd):
    message = refused(capfd, "train", f"--{typed}", "3")
    assert message == f"Unrecognized options: --{typed}, 3; did you mean --{meant}?"


# Settings from a file


def test_file_gives_defaults_and_options_win():
    Path("settings.yaml").write_text(
        "data: digits\nmodel: article\nwidth: 1\nlatent-dim: 3\nbatch_size: 5\nn_critic: 2\nlearning_rate: 1e-3\n"
        "epochs: 7\ncheckpoint_every: 1ep\nspectral_norm: true\nout: run\n"
    )
    train("--config", "settings.yaml", "--steps", "2", "--batch-size", "6")
    config = config_of(Path("run"))
    expected = {
        "data": "digits", "width": 1, "latent_dim": 3, "batch_size": 6, "learning_rate": 1e-3, "epochs": None,
        "steps": 2, "checkpoint_every": "1ep", "spectral_norm": True,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected


def test_configuration_of_a_run_makes_the_same_run(run):
    train("--config", run / "config.json", "--out", "again")
    assert_same_run(Path("again"), run)
    assert config_of(Path("again")) == {**config_of(run), "out": "again"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "lr: 1\nlearning_rate: 1", "config a.yaml has an unknown setting lr; did you mean learning_rate?"),
        ("a.json", '{"batchsize": 1}', "config a.json has an unknown setting batchsize; did you mean batch_size?"),
        ("a.yaml", "zzzz: 1", "config a.yaml has an unknown setting zzzz"),
        ("a.yaml", "steps: many", "config a.yaml: steps must be one of int, NoneType, got 'many'"),
        ("a.yaml", "steps: 1\nepochs: 1", "config a.yaml: steps and epochs exclude each other, got steps 1 and epochs"),
        ("a.yaml", "- steps", "config a.yaml must hold settings by their names, such as steps: 2000"),
        ("a.yaml", "", "config a.yaml must hold settings by their names, such as steps: 2000"),
        ("a.json", "{", "config a.json cannot be read: Expecting property name"),
        ("a.yaml", "{", "config a.yaml cannot be read: "),
        ("a.yaml", b"\xff", "config a.yaml cannot be read: "),
        ("a.yaml", None, "config a.yaml cannot be read: No such file or directory"),
    ],
)
def test_file_that_cannot_be_used_is_refused(name, text, message, capfd):
    if text is not None:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refused(capfd, "train", "--config", name, "--out", "run").startswith(message)
    assert not Path("run").exists()


def test_file_for_a_resumed_run_is_refused(run, capfd):
    assert refused(capfd, "train", "--resume", run, "--config", run / "config.json").startswith("config is for a new")


# Networks from another run


def test_run_begins_with_the_networks_of_another(run):
    # At a rate so small that nothing moves.
    train("--data", "digits", "--init-from", run, "--batch-size", "5", "--lr", "1e-30", "--seed", "7", "--steps", "1",
          "--out", "tuned")  # fmt: skip
    before, after = tensors_of(run), tensors_of(Path("tuned"))
    parameters = [
        name for name in before if name.startswith(("generator.", "critic.")) and name.endswith(("weight", "bias"))
    ]
    assert len(parameters) > 8
    assert all(same_bits(after[name], before[name]) for name in parameters)
    # Fresh moments, of one step.
    assert all(value == 1 for name, value in after.items() if name.startswith("generator_optimizer") and "step" in name)
    config = config_of(Path("tuned"))
    assert (config["model"], config["width"], config["latent_dim"]) == ("article", 1, 3)
    assert (config["init_from"], config["seed"]) == (str(run), 7)


def test_average_begins_with_the_average_of_the_other_run(run, monkeypatch):
    monkeypatch.setattr("wgan_fast.training.iteration.update_ema_", lambda *arguments: None)
    train("--data", "digits", "--init-from", run, "--batch-size", "5", "--steps", "1", "--out", "tuned")
    before, after = tensors_of(run, "ema."), tensors_of(Path("tuned"), "ema.")
    assert before.keys() == after.keys()
    assert before
    assert all(same_bits(after[name], before[name]) for name in before)
    assert not all(same_bits(before[name], value) for name, value in tensors_of(run, "generator.").items())


def test_run_that_began_with_another_resumes_without_it(run):
    options = ["--data", "digits", "--init-from", "run", "--batch-size", "5", "--log-every", "1"]
    train(*options, "--steps", "4", "--out", "whole")
    train(*options, "--steps", "2", "--out", "parts")
    shutil.rmtree(run)
    train("--resume", "parts", "--steps", "4")
    assert_same_checkpoint(newest_checkpoint(Path("parts")), newest_checkpoint(Path("whole")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "digits", "--width", "2"], "another architecture of the generator: 0.weight has shape [4, 3], the"),
        (["--data", "digits", "--model", "mlp"], "holds another architecture of the generator: "),
        (["--data", "mnist5k"], "makes samples of shape [1, 8, 8], data mnist5k has [1, 28, 28]"),
    ],
)
def test_networks_that_do_not_fit_are_refused(run, options, message, capfd):
    assert message in refused(capfd, "train", *options, "--init-from", run, "--steps", "1", "--out", "tuned")
    assert not Path("tuned").exists()


def test_networks_of_no_run_are_refused(run, capfd):
    assert "nowhere holds no run" in refused(capfd, "train", "--init-from", "nowhere", "--out", "tuned")
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet" in refused(capfd, "train", "--data", "digits", "--init-from", run, "--out", "tuned")
    assert not Path("tuned").exists()


# Resuming with other settings


def test_resumed_run_takes_other_settings_and_records_them(run, capfd):
    train("--resume", run, "--steps", "6", "--lr", "0.5", "--batch-size", "8", "--precision", "bf16")
    said = capfd.readouterr().err
    line = "from step 5 on: steps 6 (was 4), batch_size 8 (was 5), learning_rate 0.5 (was 0.0001), precision bf16 (was"
    assert line in said
    assert history_of(run) == [
        {"step": 4, "changed": {"steps": [4, 6], "batch_size": [5, 8], "learning_rate": [0.0001, 0.5],
                                "precision": ["fp32", "bf16"]}}
    ]  # fmt: skip
    assert [record["learning_rate"] for record in metrics_of(run)] == 4 * [0.0001] + 2 * [0.5]
    assert read_checkpoint(newest_checkpoint(run))[1]["seen"] == 4 * 2 * 5 + 2 * 2 * 8
    train("--resume", run)
    assert "from step" not in capfd.readouterr().err
    assert len(history_of(run)) == 1


SETTINGS = {
    "n-critic": "1", "generator-learning-rate": "0.5", "beta1": "0.1", "beta2": "0.5", "schedule": "linear",
    "penalty-weight": "3", "penalty-every": "2", "penalty-samples": "1", "ema": "0.5", "engine": "autograd",
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_run_trains_otherwise_with(name, run):
    train("--resume", run, "--steps", "6", f"--{name}", SETTINGS[name])
    assert [record["step"] for record in metrics_of(run)] == [1, 2, 3, 4, 5, 6]
    assert history_of(run)[0]["changed"].keys() == {"steps", name.replace("-", "_")}


def test_changes_that_the_method_does_not_know_are_refused(run, capfd):
    before = (run / "config.json").read_bytes()
    assert "does not clip weights" in refused(capfd, "train", "--resume", run, "--clip", "0.1")
    assert "penalty_samples must divide the batch_size of 7" in refused(
        capfd, "train", "--resume", run, "--batch-size", "7", "--penalty-samples", "2"
    )
    assert (run / "config.json").read_bytes() == before


def test_changed_run_killed_before_its_next_checkpoint_goes_on_as_if_it_had_not_been(run):
    """The samples seen are those of the checkpoint, whatever the batch size is called meanwhile."""
    again = Path(shutil.copytree(run, "again"))
    train("--resume", run, "--steps", "7", "--batch-size", "7", "--checkpoint-every", "100")
    config = json.loads((again / "config.json").read_text())
    config["config"] |= {"steps": 7, "batch_size": 7, "checkpoint_every": 100}
    (again / "config.json").write_text(json.dumps(config))
    train("--resume", again)
    assert_same_run(again, run)


def test_longer_course_of_the_learning_rate_is_that_of_a_run_planned_so():
    options = [*TINY, "--schedule", "cosine", "--sample-every", "4"]
    train(*options, "--steps", "4", "--out", "longer")
    train("--resume", "longer", "--steps", "8")
    train(*options, "--steps", "8", "--out", "planned")
    rates = [[record["learning_rate"] for record in metrics_of(Path(out))] for out in ("longer", "planned")]
    assert rates[0][4:] == rates[1][4:]
    assert rates[0][:4] != rates[1][:4]


def test_steps_take_the_place_of_epochs_and_the_other_way(capfd):
    train(*TINY, "--batch-size", "400", "--epochs", "1", "--out", "run")
    assert saved(Path("run")) == [3]
    train("--resume", "run", "--steps", "4")
    assert (config_of(Path("run"))["steps"], config_of(Path("run"))["epochs"]) == (4, None)
    train("--resume", "run", "--epochs", "2", "--batch-size", "100")
    # 3200 of 3234 samples seen; 200 a step now.
    assert newest_checkpoint(Path("run")).name == "step-00000005.safetensors"
    message = refused(capfd, "train", "--resume", "run", "--epochs", "1")
    assert message.startswith("epochs is 1, but run/checkpoints/step-00000005.safetensors is at epoch 2.1 already")


# Moved


@pytest.fixture
def moved(workplace: Path) -> Path:
    """A run on a file that lies elsewhere since, and the file."""
    np.save("x.npy", np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32))
    train("--data", "x.npy", "--width", "4", "--batch-size", "5", "--n-critic", "1", "--steps", "2", "--out", "run")
    (workplace / "new").mkdir()
    return Path("x.npy").rename(workplace / "new" / "y.npy")


@pytest.mark.parametrize("command", [["train", "--steps", "3", "--resume"], ["evaluate"]])
def test_data_that_was_moved_is_asked_for_and_found(moved, command, capfd):
    message = refused(capfd, *command, "run")
    assert message.endswith("x.npy is not there: give --data and where the run's data lies now")
    main([*command, "run", "--data", "new/y.npy"])
    if command[0] == "train":
        assert config_of(Path("run"))["data"] == str(moved)
        train("--resume", "run", "--steps", "4")


@pytest.mark.parametrize("command", [["train", "--steps", "3", "--resume"], ["evaluate"]])
def test_other_data_is_not_taken_for_what_was_moved(moved, command, capfd):
    np.save("other.npy", np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32))
    np.save("fewer.npy", np.load(moved)[:30])
    for name, reason in (("other", "with other values"), ("fewer", "27 and 3"), ("gone", "is not there")):
        assert reason in refused(capfd, *command, "run", "--data", f"{name}.npy")
    assert saved(Path("run")) == [2]


OWN = ["--data", "digits", "--engine", "autograd", "--batch-size", "8", "--n-critic", "1"]


def test_networks_of_ones_own_are_found_again_from_another_folder(workplace):
    """Also where the run was moved, and the module lies in a package."""
    (workplace / "code" / "mine").mkdir(parents=True)
    shutil.copy(EXAMPLES / "own_model.py", workplace / "code" / "mine" / "nets.py")
    (workplace / "elsewhere").mkdir()
    arguments = ["--model", "mine.nets:build", "--steps", "1", "--out", "run"]
    assert run_process("train", *OWN, *arguments, cwd=workplace / "code").returncode == 0
    (workplace / "code" / "run").rename(workplace / "elsewhere" / "run")
    for command in (["sample", "run", "--grid", "1x1"], ["train", "--resume", "run", "--steps", "2"]):
        ended = run_process(*command, cwd=workplace / "elsewhere")
        assert ended.returncode == 0, ended.stderr
    # The module itself moved: asked for, and found where the command runs.
    (workplace / "code" / "mine").rename(workplace / "mine")
    ended = run_process("sample", "elsewhere/run", "--grid", "1x1", cwd=workplace / "elsewhere")
    assert ended.returncode == 2
    ended = run_process("sample", "run", "--grid", "1x1", cwd=workplace / "elsewhere")
    assert ended.returncode == 2
    assert "run this where mine lies, put that folder on PYTHONPATH, or give the name that it has now" in ended.stderr
    ended = run_process("sample", "elsewhere/run", "--grid", "1x1", cwd=workplace)
    assert ended.returncode == 0, ended.stderr


def test_module_of_another_name_goes_on_with_the_same_networks(workplace, capfd):
    shutil.copy(EXAMPLES / "own_model.py", "first_name.py")
    train(*OWN, "--model", "first_name:build", "--steps", "1", "--out", "run")
    Path("first_name.py").rename("second_name.py")
    sys.modules.pop("first_name")
    shutil.rmtree("__pycache__", ignore_errors=True)
    assert "cannot import 'first_name'" in refused(capfd, "train", "--resume", "run", "--steps", "2")
    assert "cannot import 'first_name'" in refused(capfd, "sample", "run", "--grid", "1x1")
    for command in (["sample", "run", "--grid", "1x1"], ["evaluate", "run"], ["export", "run"]):
        main([*command, "--model", "second_name:build"])
    assert "model is for a run with networks of module:function, and this one's are" in refused(
        capfd, "sample", "run", "--model", "mlp"
    )
    train("--resume", "run", "--steps", "2", "--model", "second_name:build")
    assert saved(Path("run"))[-1] == 2
