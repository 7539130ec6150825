"""The generator's samples and its step as programs: what autograd gives, or nothing at all."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from wgan_fast.losses import AdversarialLoss, get_loss
from wgan_fast.ops.run_program import AVAILABLE
from wgan_fast.training import TrainConfig, Trainer
from wgan_fast.training.generator_step import GeneratorStep

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the extension is not built")


def networks(*more: nn.Module) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 33), nn.LeakyReLU(0.2), nn.Linear(33, 3), *more
    )
    return generator, nn.Sequential(nn.Linear(3, 50), nn.LeakyReLU(0.1), nn.Linear(50, 1))


def step_of(generator, critic, loss="wasserstein"):
    trained = [p for p in generator.parameters() if p.requires_grad]
    return GeneratorStep(generator, critic, loss if isinstance(loss, AdversarialLoss) else get_loss(loss), trained)


def by_autograd(generator, critic, loss, noise):
    value = loss(critic(generator(noise)))
    parameters = [p for p in generator.parameters() if p.requires_grad]
    return value.detach(), torch.autograd.grad(value, parameters)


def assert_same(step, generator, critic, loss, noise):
    with torch.no_grad():
        torch.testing.assert_close(step.samples(noise), generator(noise))
    value, expected = by_autograd(generator, critic, loss, noise)
    generator.zero_grad()
    made, backward = step.differentiate(noise)
    backward()
    assert not made.requires_grad
    torch.testing.assert_close(made, value)
    found = [p.grad for p in generator.parameters() if p.requires_grad]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["wasserstein", "least_squares"])
@pytest.mark.parametrize("rows", [1, 16, 200])
def test_it_is_what_autograd_does(name, rows):
    generator, critic = networks()
    loss = get_loss(name).generator
    assert_same(step_of(generator, critic, name), generator, critic, loss, torch.randn(rows, 8))


def test_the_critic_stays_as_it_is():
    generator, critic = networks()
    critic[0].bias.requires_grad_(False)
    critic[0].weight.grad = before = torch.randn_like(critic[0].weight)
    kept = before.clone()
    step = step_of(generator, critic)
    _, backward = step.differentiate(torch.randn(16, 8))
    backward()
    assert [p.requires_grad for p in critic.parameters()] == [True, False, True, True]
    assert critic[0].weight.grad is before
    assert torch.equal(before, kept)
    assert critic[2].weight.grad is None


def test_it_follows_what_is_changed():
    """Parameters, frozen ones, hooks, layers, the size of the batch."""
    generator, critic = networks()
    loss = get_loss("wasserstein").generator
    step = step_of(generator, critic)
    same = lambda rows=16: assert_same(step, generator, critic, loss, torch.randn(rows, 8))  # noqa: E731
    same()
    with torch.no_grad():
        generator[0].weight.mul_(2)
        critic[2].weight.data = torch.randn(1, 50)
    same()
    generator[3].negative_slope = 0.5
    same()
    handle = generator[1].register_forward_hook(lambda module, args, output: output * 3)
    same()
    handle.remove()
    same(17)
    critic[1] = nn.ReLU()
    same()
    seen = []
    generator[0].weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    generator.zero_grad()
    _, backward = step.differentiate(torch.randn(16, 8))
    backward()
    assert torch.equal(seen[0], generator[0].weight.grad)


@pytest.mark.parametrize(
    "change",
    [
        lambda generator, critic: generator.append(nn.Tanh()),
        lambda generator, critic: generator.insert(1, nn.BatchNorm1d(40)),
        lambda generator, critic: (generator.double(), critic.double()),
        lambda generator, critic: critic.insert(1, nn.Dropout(0.5)),
    ],
)
def test_what_it_cannot_run_is_left(change):
    generator, critic = networks()
    change(generator, critic)
    step = step_of(generator, critic)
    noise = torch.randn(16, 8).to(generator[0].weight)
    for _ in range(2):
        made, samples = step.differentiate(noise), step.samples(noise)
    assert made is None
    assert samples is None
    assert all(p.requires_grad for p in critic.parameters())


def test_a_loss_that_is_no_program_is_left():
    generator, critic = networks()
    step = step_of(generator, critic, "non_saturating")
    step.differentiate(torch.randn(16, 8))  # is what it is, as it was prepared already
    assert step.differentiate(torch.randn(16, 8)) is None
    assert step.samples(torch.randn(16, 8)) is not None


def test_a_critic_that_is_detached_is_the_usual_error():
    generator, critic = networks()
    critic.register_forward_hook(lambda module, args, output: output.detach())
    assert step_of(generator, critic).differentiate(torch.randn(4, 8)) is None


def test_a_loss_of_ones_own_is_left_since_it_may_change():
    generator, critic = networks()
    own = AdversarialLoss("own", lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean())
    step = step_of(generator, critic, own)
    assert step.differentiate(torch.randn(16, 8)) is None
    assert step.samples(torch.randn(16, 8)) is not None


def test_parameters_that_the_critic_shares_are_trained():
    generator = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    critic = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    critic[0].weight = generator[0].weight
    assert_same(step_of(generator, critic), generator, critic, get_loss("wasserstein").generator, torch.randn(16, 8))
    assert critic[2].weight.requires_grad


def test_a_parameter_that_is_frozen_later_is_the_usual_ways():
    generator, critic = networks()
    step = step_of(generator, critic)
    generator[2].bias.requires_grad_(False)
    assert step.differentiate(torch.randn(16, 8)) is None
    generator[2].bias.requires_grad_(True)
    assert step.differentiate(torch.randn(16, 8)) is not None


def test_what_a_forward_changes_is_changed_once():
    """Also where it turns out to be no program."""
    generator, critic = networks()
    counts = {"calls": 0}

    def count(module, args, output):
        counts["calls"] += 1
        return output.tanh()

    generator[4].register_forward_hook(count)
    step, noise = step_of(generator, critic), torch.randn(16, 8)
    for calls in (1, 2, 3):
        made = step.samples(noise)
        with torch.no_grad():
            made = generator(noise) if made is None else made
        assert counts["calls"] == calls
    with torch.no_grad():
        torch.testing.assert_close(made, generator(noise))


def test_a_batch_of_another_size_too_many_is_left_and_others_are_not():
    generator, critic = networks()
    step = step_of(generator, critic)
    made = [step.samples(torch.randn(rows, 8)) for rows in range(3, 12)]
    assert any(samples is None for samples in made)
    assert step.samples(torch.randn(3, 8)) is not None


@pytest.mark.parametrize("options", [{"generate_ahead": True}, {"generate_ahead": False}, {"cuda_graph": True}])
def test_training_takes_it_and_learns_the_same(tmp_path, monkeypatch, options):
    monkeypatch.setattr("wgan_fast.training.iteration.PLANNED_AFTER", 2)
    config = TrainConfig(data="8gaussians", model="toy-mlp", batch_size=16, n_critic=2, steps=6, **options)
    trained, taken = {}, []
    differentiate = GeneratorStep.differentiate

    def counted(self, noise):
        made = differentiate(self, noise)
        taken.append(made is not None)
        return made

    monkeypatch.setattr(GeneratorStep, "differentiate", counted)
    for engine in ("auto", "autograd"):
        run = Trainer.from_config(dataclasses.replace(config, engine=engine, out=tmp_path / engine, device="cpu"))
        begun = copy.deepcopy(run.generator.state_dict())
        run.fit()
        trained[engine] = {name: value - begun[name] for name, value in run.generator.state_dict().items()}
    assert taken == [True] * 4
    # Adam moves a weight by its learning rate at every step, however small its gradient.
    difference = sum((trained["auto"][n] - trained["autograd"][n]).square().sum() for n in begun)
    assert difference < 1e-3 * sum(value.square().sum() for value in trained["autograd"].values())


@pytest.mark.parametrize("stopped", [1, 2, 4])
def test_a_run_that_was_resumed_computes_what_one_in_a_piece_does(tmp_path, monkeypatch, stopped):
    monkeypatch.setattr("wgan_fast.training.iteration.PLANNED_AFTER", 2)
    config = TrainConfig(data="8gaussians", model="toy-mlp", batch_size=16, n_critic=2, device="cpu")
    whole = Trainer.from_config(dataclasses.replace(config, steps=6, out=tmp_path / "whole"))
    whole.fit()
    Trainer.from_config(dataclasses.replace(config, steps=stopped, out=tmp_path / "parts")).fit()
    resumed = Trainer.from_run(tmp_path / "parts", steps=6)
    resumed.fit(resume=True)
    for ours, theirs in zip(resumed.generator.parameters(), whole.generator.parameters(), strict=True):
        assert torch.equal(ours, theirs)
