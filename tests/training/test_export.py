"""An exported generator makes the run's samples without this package."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ENVIRONMENT, TINY, same_bits, tensors_of, tree
from safetensors.torch import load_file
from torch import Tensor, nn

from wgan_fast.errors import InputError
from wgan_fast.training import Run, TrainConfig, Trainer, models
from wgan_fast.training.cli import main
from wgan_fast.training.export import export_generator
from wgan_fast.training.run import draw_noise

pytestmark = pytest.mark.usefixtures("no_curves")

FILES = ["generator.json", "generator.pt2", "generator.safetensors"]

PLAIN = """
import sys
sys.modules["wgan_fast"] = None  # importing it fails
import numpy as np, torch
torch.set_num_threads(1)
program = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    for name in sys.argv[2:]:
        np.save(name + ".out.npy", program(torch.from_numpy(np.load(name))).numpy())
try:
    import wgan_fast
except ImportError:
    print("without")
"""

SPECIAL = """
import math, torch
from torch import nn

class Special(nn.Module):
    latent_dim = 2

    def __init__(self, shape, forward):
        super().__init__()
        self.linear, self.shape, self.own = nn.Linear(2, math.prod(shape)), shape, forward

    def forward(self, z):
        return self.own(self.linear(z)).view(-1, *self.shape)

def pair(shape, forward):
    return Special(shape, forward), nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 1))

def tied(shape):
    generator, critic = pair(shape, torch.tanh)
    generator.again = generator.linear
    return generator, critic

def grainy(shape):
    return pair(shape, lambda x: x + torch.randn_like(x))

def branches(shape):
    return pair(shape, lambda x: x if x.sum() > 0 else -x)

def counts_its_calls(shape):
    calls = []
    return pair(shape, lambda x: calls.append(1) or x * len(calls))
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "special", raising=False)
    (tmp_path / "special.py").write_text(SPECIAL)
    return tmp_path


def train(out: str, *arguments: str) -> None:
    main(["train", "--batch-size", "8", "--n-critic", "1", "--steps", "2", "--engine", "autograd", *arguments,
          "--out", out])  # fmt: skip


def samples_elsewhere(program: Path, *noises: Tensor) -> list[Tensor]:
    """What plain PyTorch makes of the program, in a process where this package cannot be imported."""
    names = [f"noise-{number}.npy" for number in range(len(noises))]
    for name, noise in zip(names, noises):
        np.save(name, noise.numpy())
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    arguments = [sys.executable, "-c", PLAIN, str(program), *names]
    ended = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "without\n"), ended.stderr
    return [torch.from_numpy(np.load(f"{name}.out.npy")) for name in names]


RUNS = {
    "batch norm": ["--data", "digits", "--model", "article", "--width", "1"],
    "bfloat16": ["--data", "digits", "--model", "mlp", "--width", "4", "--precision", "bf16"],
    "points": ["--data", "8gaussians", "--width", "4"],
}


@pytest.mark.parametrize("name", RUNS)
def test_program_makes_the_samples_of_the_run_without_this_package(workplace, capsys, name):
    train("run", *RUNS[name])
    capsys.readouterr()
    main(["export", "run"])
    folder = Path("run/export")
    assert sorted(capsys.readouterr().out.split()) == [str(folder / file) for file in FILES]
    run = Run.load("run")
    sizes = (1, 2, 7, 256)
    made = samples_elsewhere(folder / "generator.pt2", *(draw_noise(n, run.latent_dim, 0) for n in sizes))
    for n, samples in zip(sizes, made):
        assert same_bits(samples, run.sample(n))


def test_weights_are_those_that_are_sampled(workplace):
    train("run", "--data", "digits", "--model", "article", "--width", "2", "--learning-rate", "0.05")
    main(["export", "run", "--out", "out/ünï ☃"])
    assert sorted(tree(Path("out/ünï ☃"))) == FILES
    weights = load_file("out/ünï ☃/generator.safetensors")
    average, trained = tensors_of(Path("run"), "ema."), tensors_of(Path("run"), "generator.")
    assert weights.keys() == average.keys()
    assert all(same_bits(weights[name], value) for name, value in average.items())
    assert any(not same_bits(weights[name], value) for name, value in trained.items())


def test_description_is_enough_to_build_the_generator_again(workplace):
    train("run", "--data", "digits", "--model", "article", "--width", "2", "--latent-dim", "5")
    main(["export", "run"])
    told = json.loads(Path("run/export/generator.json").read_text())
    expected = {
        "generator": "wgan_fast.training.models.Generator", "weights": "moving average", "step": 2,
        "latent_dim": 5,
        "noise": "standard normal", "dtype": "float32", "sample_shape": [1, 8, 8], "kind": "images", "range": [-1, 1],
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected
    for name, digest in told["sha256"].items():
        assert hashlib.sha256(Path("run/export", name).read_bytes()).hexdigest() == digest
    assert told["config"] == json.loads(Path("run/config.json").read_text())["config"]
    config = TrainConfig.from_json(told["config"])
    generator, _ = models.build(config.model, told["sample_shape"], latent_dim=told["latent_dim"], width=config.width)
    generator.load_state_dict(load_file("run/export/generator.safetensors"))
    with torch.no_grad():
        assert same_bits(generator.eval()(draw_noise(3, 5, 0)), Run.load("run").sample(3))


def test_samples_that_are_no_images_have_no_range(workplace):
    train("run", "--data", "8gaussians", "--width", "4", "--ema", "0")
    main(["export", "run"])
    told = json.loads(Path("run/export/generator.json").read_text())
    assert (told["kind"], told["range"], told["weights"], told["sample_shape"]) == ("vectors", None, "last", [2])


def test_export_replaces_an_earlier_one_and_leaves_the_run(workplace):
    train("run", *TINY, "--steps", "1")
    main(["export", "run"])
    before = tree(Path("run"))
    main(["train", "--resume", "run", "--steps", "2"])
    main(["export", "run"])
    assert json.loads(Path("run/export/generator.json").read_text())["step"] == 2
    assert {name for name in tree(Path("run")) if "export" in name} == {name for name in before if "export" in name}


def test_tied_weights_and_networks_of_ones_own_are_exported(workplace):
    train("run", "--data", "digits", "--model", "special:tied")
    main(["export", "run"])
    assert json.loads(Path("run/export/generator.json").read_text())["generator"] == "special.Special"
    run = Run.load("run")
    [made] = samples_elsewhere(Path("run/export/generator.pt2"), draw_noise(5, 2, 0))
    assert same_bits(made, run.sample(5))


def test_noise_that_a_generator_draws_is_drawn_by_its_program(workplace):
    train("run", "--data", "digits", "--model", "special:grainy")
    main(["export", "run"])
    program = torch.export.load("run/export/generator.pt2").module()
    noise = draw_noise(4, 2, 0)
    with torch.no_grad():
        assert not torch.equal(program(noise), program(noise))


def test_run_of_objects_is_exported_from_python_in_another_precision(workplace):
    (workplace / "out").mkdir()
    generator = nn.Sequential(nn.Linear(3, 2)).double()
    generator.latent_dim = 3
    config = TrainConfig(steps=1, batch_size=8, n_critic=1, engine="autograd", out="run")
    Trainer(generator, nn.Linear(2, 1), torch.randn(40, 2), config).fit()
    own = nn.Sequential(nn.Linear(3, 2)).double()
    own.latent_dim = 3
    run = Run.load("run", generator=own)
    paths = export_generator(run, Path("out"))
    assert sorted(path.name for path in paths) == FILES
    assert json.loads(Path("out/generator.json").read_text())["dtype"] == "float64"
    [made] = samples_elsewhere(Path("out/generator.pt2"), draw_noise(4, 3, 0).double())
    assert same_bits(made, run.sample(4))
    assert run.generator is own


@pytest.mark.parametrize("model", ["branches", "counts_its_calls"])
def test_generator_that_is_not_a_program_is_refused_and_nothing_is_written(workplace, capsys, model):
    train("run", "--data", "digits", "--model", f"special:{model}")
    before = tree(workplace)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["export", "run"])
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("wgan-fast: error: torch.export does not take the generator: ")
    assert output.err.count("\n") == 1
    assert tree(workplace) == before
    run = Run.load("run")
    with pytest.raises(InputError, match=r"torch\.export does not take the generator"):
        export_generator(run, workplace / "out")
