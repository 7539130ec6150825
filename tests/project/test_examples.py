"""The examples do what they show, on little data in little time."""

import importlib
import inspect
import json
import re
import socket
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from runs import ENVIRONMENT, EXAMPLES

from wgan_fast import gradient_penalty
from wgan_fast.training.data import load_data
from wgan_fast.training.metrics import sliced_wasserstein

pytest.importorskip("ot")


@pytest.fixture
def example(monkeypatch):
    """Import an example as its own folder would."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str, needs: str | None = None) -> ModuleType:
        if needs is not None:
            pytest.importorskip(needs, reason=f"{needs} is not installed")
        return importlib.import_module(name)

    return load


@pytest.fixture
def points():
    return load_data("8gaussians").train.take(2560)


@torch.no_grad()
def improvement(generator, untrained, real, latent) -> float:
    """The distance of a trained generator's samples to the data, over that of an untrained one's."""
    noise = torch.randn(min(len(real), 1000), latent)
    trained, before = (
        sliced_wasserstein(network(noise), real[:1000], projections=64) for network in (generator, untrained)
    )
    return trained / before


def test_plain_loop_with_its_line_changed_trains_the_same_networks(example, points):
    module = example("plain_loop")
    loop = inspect.getsource(module.train)
    before = loop.replace("+ wgan_fast.gradient_penalty(", "+ compute_gradient_penalty(")
    assert [line for line in before.splitlines() if line not in loop.splitlines()] == [
        "            loss = loss + compute_gradient_penalty(critic, real, fake, weight=WEIGHT)"
    ]
    ours, theirs = [], []
    for source, networks in ((loop, ours), (before, theirs)):
        namespace = dict(vars(module))
        exec(source, namespace)
        torch.manual_seed(1)
        networks.extend(namespace["train"](points.double(), 10))
    for network, expected in zip(ours, theirs):
        for parameter, like in zip(network.parameters(), expected.parameters()):
            # Adam divides by the root of small second moments: rounding grows from 1e-16 over 60 steps.
            torch.testing.assert_close(parameter, like, rtol=1e-7, atol=1e-9)


def test_plain_loop_moves_to_the_data(example, points):
    module = example("plain_loop")
    generator, _ = module.train(points, 60)
    assert improvement(generator, module.networks()[0], points, module.LATENT) < 0.6


def test_lightning_module_moves_to_the_data(example, points):
    module = example("lightning_module", "lightning")
    trained = module.fit(points, steps=60)
    assert trained.trainer.global_step == 6 * 60
    assert improvement(trained.generator, module.networks()[0], points, module.LATENT) < 0.6


def test_accelerate_loop_moves_to_the_data(example, points):
    module = example("accelerate_loop", "accelerate")
    generator = module.train(points, 60, module.Accelerator(cpu=True))
    assert improvement(generator, module.networks()[0], points, module.LATENT) < 0.6


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_train_what_one_does(example, monkeypatch, capsys):
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = free.getsockname()[1], other.getsockname()[1]
    places = [
        {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[world - 1])}
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]
    command = [sys.executable, EXAMPLES / "ddp_loop.py", "5"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**ENVIRONMENT, **place})
        for place in places[:2]
    ]
    for name, value in places[2].items():
        monkeypatch.setenv(name, value)
    example("ddp_loop").main(5)
    one, two = capsys.readouterr().out, processes[0].communicate(timeout=120)[0]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    expected, found = ([float(number) for number in re.findall(r"\d+\.\d{12}", text)] for text in (one, two))
    assert len(expected) == 2
    assert found == pytest.approx(expected, rel=1e-10)


def test_packed_penalty_is_that_of_the_rows_side_by_side(example):
    module = example("tabular_packing", "sklearn")
    rows = module.table().double()[:100]
    critic, fake = module.PackedCritic(30).double(), torch.randn(100, 30).double()
    alpha = torch.rand(10).double()
    penalty = gradient_penalty(critic, rows, fake, group_size=module.PACK, alpha=alpha)
    side_by_side = gradient_penalty(
        critic.layers, rows.view(10, 300), fake.view(10, 300), alpha=alpha, engine="autograd"
    )
    assert penalty.item() == pytest.approx(side_by_side.item(), rel=1e-12)


def test_table_moves_to_the_data(example):
    module = example("tabular_packing", "sklearn")
    rows = module.table()
    assert abs(rows.mean()) < 1e-5
    generator = module.train(rows, 150)
    assert improvement(generator, module.train(rows, 0), rows[:500], module.LATENT) < 0.7


def test_conditional_generator_draws_the_digit_that_it_is_told(example):
    module = example("conditional_digits", "sklearn")
    generator = module.train(*module.digits(), steps=400, batch_size=64)
    wanted = torch.arange(10).repeat(30)
    right = (module.nearest_class(module.generate(generator, wanted)) == wanted).double().mean()
    assert right > 0.5  # by chance: 0.1


def test_augmentation_compares_on_digits_that_no_network_saw(example, monkeypatch):
    module = example("data_augmentation", "sklearn")
    images, _ = module.digits()
    tested, trained = [], []
    train, accuracy = module.train, module.accuracy
    monkeypatch.setattr(module, "train", lambda *all, **options: trained.append(all) or train(*all, **options))
    monkeypatch.setattr(module, "accuracy", lambda *all: tested.append(all) or accuracy(*all))
    alone, helped = module.compare(per_class=5, seed=0, gan_steps=20, classifier_steps=150)
    assert min(alone, helped) > 0.6  # by chance: 0.1
    (real, classes), (plain, augmented) = trained[0], tested
    assert torch.bincount(classes).tolist() == [5] * 10
    seen = {image.numpy().tobytes() for image in real}
    for without_or_with in tested:
        assert len(without_or_with[2]) == len(images) - 50
        assert not seen & {image.numpy().tobytes() for image in without_or_with[2]}
    assert (len(plain[0]), len(augmented[0])) == (50, 100)
    assert torch.equal(augmented[1], torch.cat((classes, classes)))


def test_sequences_move_to_the_data(example):
    module = example("sequences", "matplotlib")
    real = module.profiles()
    assert real.shape[1:] == (1, 64)
    assert real.shape[0] > 2000
    generator = module.train(real, 60)
    assert improvement(generator, module.networks()[0], real, module.LATENT) < 0.9  # 0.8 after 60 steps, 0.35 after 150


def test_forces_that_are_fitted_explain_energies_and_forces(example):
    module = example("force_matching")
    torch.manual_seed(0)
    energy, force = module.errors(module.train(200))
    torch.manual_seed(0)
    energy_alone, force_alone = module.errors(module.train(200, weight=0.0))
    assert energy < 0.9 * energy_alone
    assert force < 0.9 * force_alone


def test_the_distance_to_a_surface_is_learned_from_its_points(example):
    module = example("signed_distance")
    on_surface = module.surface(100)
    assert module.true_distance(on_surface).abs().max() < 1e-6
    assert module.error(module.train(200)) < 0.3 * module.error(module.SignedDistance())


def test_path_lengths_even_out_what_a_style_changes(example):
    module = example("path_length", "sklearn")
    images = module.torch.from_numpy(module.load_digits().images).float()[:, None] / 8 - 1
    spreads, errors = [], []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        error, spread = module.measure(*module.train(images, 300, weight), images)
        errors.append(error)
        spreads.append(spread)
    assert spreads[1] < 0.95 * spreads[0]
    assert errors[1] < 1.1 * errors[0]


def test_features_that_look_alike_read_digits_that_are_turned(example):
    module = example("domain_adaptation", "sklearn")
    torch.manual_seed(0)
    labelled, others, test = module.domains()
    seen = {image.numpy().tobytes() for image in (*module.turned(labelled[0]), *others)}
    assert not seen & {image.numpy().tobytes() for image in test[0]}
    alone, adapted = (module.accuracy(module.train(labelled, others, 250, weight), *test) for weight in (0.0, 0.1))
    assert adapted > alone + 0.1  # 0.35 and 0.6


def test_molecules_are_told_from_other_graphs(example):
    module = example("molecules")
    torch.manual_seed(0)
    bonds, atoms = graphs = module.molecules(50)
    assert module.valid(graphs).all()
    assert torch.equal(bonds, bonds.transpose(1, 2))
    assert module.measure(graphs, graphs)[::2] == (1.0, 0.0)  # valid, and none of them new
    # Nothing where carbon was, and an oxygen where nothing was: few still hang together.
    assert module.valid((bonds, atoms.roll(1, 2))).sum() < 5


def test_molecules_penalty_is_that_of_bonds_and_atoms_side_by_side(example):
    module = example("molecules")
    critic = module.Critic().double()
    real, fake = (
        tuple(part.double() for part in graphs) for graphs in (module.molecules(7), module.draw(module.Generator(), 7))
    )
    flat, flat_fake = (torch.cat([part.flatten(1) for part in graphs], 1) for graphs in (real, fake))
    alpha, size = torch.rand(7).double(), real[0][0].numel()

    def flat_critic(x):
        return critic((x[:, :size].view_as(real[0]), x[:, size:].view_as(real[1])))

    expected = gradient_penalty(flat_critic, flat, flat_fake, alpha=alpha, engine="autograd")
    assert gradient_penalty(critic, real, fake, alpha=alpha).item() == pytest.approx(expected.item(), rel=1e-12)


def test_molecules_that_are_learned_are_valid(example):
    module = example("molecules")
    torch.manual_seed(0)
    graphs = module.molecules(500)
    untrained, trained = (module.measure(module.draw(module.train(graphs, steps)), graphs) for steps in (0, 80))
    assert untrained[0] < 0.01
    assert trained[0] > 0.1
    # After so few steps between 0.45 and 0.9, by how sums round; of a generator that has collapsed next to none differ.
    assert trained[1] > 0.2


def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    plt = pytest.importorskip("matplotlib.pyplot", reason="Matplotlib is not installed")
    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPS", "5")
    cells = json.loads((EXAMPLES / "first_minute.ipynb").read_text())["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["summary"].steps == 5
    assert [len(plt.figure(number).axes) for number in plt.get_fignums()] == [2, 60]
    plt.close("all")
    assert names["report"]["sliced_wasserstein"] > names["report"]["sliced_wasserstein_floor"]


def test_every_example_is_tested():
    with open(__file__) as file:
        text = file.read()
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"own_model"}  # tests/training/test_cli.py
    assert [name for name in sorted(names) if name not in text] == []
