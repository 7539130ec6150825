"""A checkpoint is whole or it is recognised as damaged, and the one before it is used; nothing is unpickled."""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, assert_same_run, same_bits, tree
from torch import nn

from wgan_fast.errors import InputError
from wgan_fast.training import Run, Trainer
from wgan_fast.training.checkpoint import load_checkpoint, load_module, load_optimizer, optimizer_state, save_checkpoint
from wgan_fast.training.cli import main

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    out = tmp_path_factory.mktemp("finished") / "run"
    main(["train", *TINY, "--steps", "6", "--checkpoint-every", "2", "--keep", "3", "--out", str(out)])
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def part(run: Path, step: int, suffix: str) -> Path:
    return run / "checkpoints" / f"step-{step:08d}.{suffix}"


def save(run: Path, step: int, keep: int = 3) -> None:
    save_checkpoint(run, step, {"value": torch.full((3,), float(step))}, keep=keep)


def steps_in(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").glob("*.json"))


# What is saved comes back


def exotic_state() -> dict[str, Any]:
    shared = torch.randn(4, 3)
    return {
        "float64": torch.randn(2, 3, dtype=torch.float64),
        "bfloat16": torch.randn(63).bfloat16(),
        "int64": torch.tensor([2**62 + 1, -1]),
        "uint8": torch.arange(100, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(0.1),
        "empty": torch.empty(0, 3),
        "nan and -0": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "transposed": torch.randn(3, 5).t(),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "tied": [shared, shared, shared[1:]],
        "requires grad": nn.Parameter(torch.randn(3)),
        "nested": {"a.b": [{"c": torch.ones(1)}, None, "text", True, 0.1 + 0.2, 2**53 + 1, []], "d": {}},
    }


def assert_same_tree(actual: Any, expected: Any) -> None:
    assert type(actual) is (torch.Tensor if isinstance(expected, torch.Tensor) else type(expected))
    if isinstance(expected, torch.Tensor):
        assert same_bits(actual, expected.detach())
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same_tree(actual[key], expected[key])
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected):
            assert_same_tree(a, e)
    else:
        assert actual == expected


def test_every_kind_of_value_comes_back_bit_for_bit(tmp_path):
    state = exotic_state()
    save_checkpoint(tmp_path, 7, state, keep=1)
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.step, checkpoint.skipped) == (7, ())
    assert_same_tree(checkpoint.state, state)


def test_loaded_tensors_own_their_memory(tmp_path):
    save(tmp_path, 1)
    value = load_checkpoint(tmp_path).state["value"]
    part(tmp_path, 1, "safetensors").write_bytes(b"")
    value += 1
    assert value.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
def test_optimizer_continues_as_if_it_had_not_been_saved(tmp_path, name):
    def optimizer_and_weight() -> tuple[torch.optim.Optimizer, nn.Parameter]:
        weight = nn.Parameter(torch.arange(3.0))
        return getattr(torch.optim, name)([weight], lr=0.1), weight

    def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
        weight.grad = weight.detach().sin() + 0.3
        optimizer.step()

    optimizer, weight = optimizer_and_weight()
    for _ in range(3):
        step(optimizer, weight)
    save_checkpoint(tmp_path, 3, {"weight": weight, "optimizer": optimizer_state(optimizer)}, keep=1)
    state = load_checkpoint(tmp_path).state
    resumed, resumed_weight = optimizer_and_weight()
    with torch.no_grad():
        resumed_weight.copy_(state["weight"])
    load_optimizer(resumed, state["optimizer"])
    for _ in range(3):
        step(optimizer, weight)
        step(resumed, resumed_weight)
    assert same_bits(resumed_weight.detach(), weight.detach())


# Writing


def test_the_newest_are_kept(tmp_path):
    for step in (1, 3, 63, 100, 1000):
        save(tmp_path, step, keep=3)
    assert steps_in(tmp_path) == [63, 100, 1000]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6
    assert load_checkpoint(tmp_path).state["value"].tolist() == [1000.0] * 3


def test_a_run_keeps_as_many_as_it_is_told(finished):
    assert steps_in(finished) == [2, 4, 6]


def test_left_over_temporary_files_and_orphans_go_with_the_next_save(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000002.safetensors.tmp").write_bytes(b"half")
    (folder / ".step-00000002.json.tmp").write_bytes(b"{")
    (folder / "step-00000002.safetensors").write_bytes(b"not sealed")
    assert load_checkpoint(tmp_path).step == 1
    save(tmp_path, 3)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-00000001.json",
        "step-00000001.safetensors",
        "step-00000003.json",
        "step-00000003.safetensors",
    ]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_temporary_file(tmp_path, monkeypatch, function, call):
    save(tmp_path, 1)
    original, calls = getattr(os, function), []

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        # fsync is called twice for a file: for its content and for its folder.
        if len(calls) == (call if function == "replace" else 2 * call - 1):
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert load_checkpoint(tmp_path).step == 1
    assert load_checkpoint(tmp_path).skipped == ()
    save(tmp_path, 2)
    assert load_checkpoint(tmp_path).step == 2


def test_content_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    """Else a power cut could leave a sealed checkpoint without its content."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"-> {Path(b).name}"), replace(a, b)))
    save(tmp_path, 1)
    assert events == [
        ".step-00000001.safetensors.tmp",
        "-> step-00000001.safetensors",
        "checkpoints",
        ".step-00000001.json.tmp",
        "-> step-00000001.json",
        "checkpoints",
    ]


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(position: float) -> Callable[[Path], None]:
    def flip_one_bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 0x10
        path.write_bytes(content)

    return flip_one_bit


def hash_of_another_file(path: Path) -> None:
    path.write_text(path.read_text().replace(json.loads(path.read_text())["sha256"], "0" * 64))


def json_of(value: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(value))


DAMAGE = {
    "tensors truncated": ("safetensors", truncate),
    "tensors empty": ("safetensors", empty),
    "tensors missing": ("safetensors", Path.unlink),
    "tensors a folder": ("safetensors", lambda path: (path.unlink(), path.mkdir())),
    "tensors, first byte": ("safetensors", flip(0)),
    "tensors, in the header": ("safetensors", flip(0.02)),
    "tensors, in the middle": ("safetensors", flip(0.5)),
    "tensors, last byte": ("safetensors", flip(1)),
    "JSON truncated": ("json", truncate),
    "JSON empty": ("json", empty),
    "JSON, first byte": ("json", flip(0)),
    "JSON, last byte": ("json", flip(1)),
    "JSON with another hash": ("json", hash_of_another_file),
    "JSON is a list": ("json", json_of([])),
    "JSON is null": ("json", json_of(None)),
    "JSON without a hash": ("json", json_of({"format": 1, "step": 6})),
    "JSON of another format": ("json", json_of({"format": 99, "step": 6})),
    "JSON is not text": ("json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
}


def damage(run: Path, step: int, kind: str) -> None:
    suffix, spoil = DAMAGE[kind]
    spoil(part(run, step, suffix))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_passed_over_and_named(run, kind):
    damage(run, 6, kind)
    checkpoint = load_checkpoint(run)
    assert checkpoint.step == 4
    assert len(checkpoint.skipped) == 1
    assert checkpoint.skipped[0].startswith("step-00000006 (")
    assert len(checkpoint.skipped[0]) > len("step-00000006 ()")


@pytest.mark.parametrize("percent", range(0, 100, 3))
def test_no_flipped_bit_in_the_seal_changes_what_is_loaded(run, finished, percent):
    """A flip is found, or it hit a byte that nothing depends on."""
    content = bytearray(part(run, 6, "json").read_bytes())
    content[len(content) * percent // 100] ^= 0x02
    part(run, 6, "json").write_bytes(content)
    checkpoint = load_checkpoint(run)
    assert checkpoint.step in (4, 6)
    if checkpoint.step == 6:
        assert_same_tree(checkpoint.state, load_checkpoint(finished).state)


def test_missing_json_means_that_the_checkpoint_was_never_finished(run):
    part(run, 6, "json").unlink()
    checkpoint = load_checkpoint(run)
    assert (checkpoint.step, checkpoint.skipped) == (4, ())


def test_checkpoint_under_another_steps_name_is_passed_over(run):
    for suffix in ("safetensors", "json"):
        part(run, 4, suffix).rename(part(run, 8, suffix))
    checkpoint = load_checkpoint(run)
    assert checkpoint.step == 6
    assert "disagree about the step" in checkpoint.skipped[0]


def test_two_damaged_checkpoints_are_both_named(run):
    damage(run, 6, "tensors truncated")
    damage(run, 4, "JSON empty")
    checkpoint = load_checkpoint(run)
    assert checkpoint.step == 2
    assert [text.split()[0] for text in checkpoint.skipped] == ["step-00000006", "step-00000004"]


@pytest.mark.parametrize("kind", ["tensors truncated", "tensors, in the middle", "JSON truncated", "tensors missing"])
def test_resume_from_before_the_damage_ends_where_the_whole_run_did(run, finished, kind, capfd):
    damage(run, 6, kind)
    main(["train", "--resume", str(run)])
    error = capfd.readouterr().err
    assert "passed over a damaged checkpoint: step-00000006" in error
    assert "resuming after step 4" in error
    assert_same_run(run, finished)


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_commands_name_the_damaged_checkpoint_and_use_the_one_before(run, command, capfd):
    damage(run, 6, "tensors, in the middle")
    arguments = ["--grid", "2x2"] if command == "sample" else ["--samples", "20"]
    main([command, str(run), *arguments])
    error = capfd.readouterr().err
    assert "step-00000006 (its SHA-256 differs" in error
    assert "using step 4" in error


@pytest.mark.parametrize("command", [["train", "--resume"], ["sample"], ["evaluate"]])
def test_run_with_no_whole_checkpoint_is_refused_and_left_alone(run, command, capfd):
    damage(run, 2, "JSON empty")
    damage(run, 4, "tensors, last byte")
    damage(run, 6, "tensors missing")
    before = tree(run)
    with pytest.raises(SystemExit) as end:
        main([*command, str(run)])
    assert end.value.code == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    for step in (2, 4, 6):
        assert f"step-{step:08d}" in error
    assert tree(run) == before


def test_new_checkpoint_is_not_pruned_in_favour_of_a_later_damaged_one(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    damage(tmp_path, 6, "tensors truncated")
    assert load_checkpoint(tmp_path).step == 4
    save(tmp_path, 5, keep=1)
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.step, checkpoint.skipped) == (5, ())
    assert steps_in(tmp_path) == [5]


# Other architectures


def linear(features: int, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 2, bias=bias), nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("model", "state", "difference"),
    [
        (linear(3), linear(4), "0.weight has shape [2, 4], the model's is [2, 3]"),
        (linear(3), linear(3, bias=False), "0.bias is missing"),
        (linear(3, bias=False), linear(3), "0.bias is not in the model"),
    ],
)
def test_state_of_another_architecture_is_refused_with_the_first_difference(model, state, difference):
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(InputError) as error:
        load_module(model, state.state_dict(), "critic", Path("some/checkpoint"))
    assert str(error.value) == f"some/checkpoint holds another architecture of the critic: {difference}"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("command", [["train", "--resume"], ["sample", "--grid", "1x1"], ["evaluate"]])
@pytest.mark.parametrize(("setting", "value"), [("width", 2), ("latent_dim", 4), ("model", "mlp")])
def test_checkpoint_of_another_architecture_is_refused(run, command, setting, value, capfd):
    description = json.loads((run / "config.json").read_text())
    description["config"][setting] = value
    (run / "config.json").write_text(json.dumps(description))
    before = tree(run)
    with pytest.raises(SystemExit) as end:
        main([*command, str(run)])
    assert end.value.code == 2
    error = capfd.readouterr().err
    assert "holds another architecture of the generator: 0.weight has shape [4, 3]" in error
    assert error.count("\n") == 1
    assert tree(run) == before


# Pickle


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("written_by", ["pickle", "torch"])
def test_sealed_pickle_is_refused_and_not_executed(run, tmp_path, written_by):
    path, traces = part(run, 6, "safetensors"), tmp_path / "executed"
    if written_by == "pickle":
        path.write_bytes(pickle.dumps(Bomb(traces)))
    else:
        torch.save({"generator": Bomb(traces)}, path)
    body = path.read_bytes()
    seal = {"format": 1, "step": 6, "sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
    part(run, 6, "json").write_text(json.dumps(seal))
    checkpoint = load_checkpoint(run)
    assert checkpoint.step == 4
    assert checkpoint.skipped[0].startswith("step-00000006")
    Run.load(run)
    Trainer.from_run(run).fit(resume=True)
    assert not traces.exists()
    pickle.loads(body) if written_by == "pickle" else torch.load(io.BytesIO(body), weights_only=False)
    assert traces.exists()  # the bomb was live


def test_no_command_unpickles_anything(tmp_path, monkeypatch):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("unpickled")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, refuse)
    out = str(tmp_path / "run")
    main(["train", *TINY, "--steps", "1", "--out", out])
    main(["train", "--resume", out, "--steps", "2"])
    main(["sample", out, "--grid", "1x2"])
    main(["evaluate", out, "--samples", "3"])
