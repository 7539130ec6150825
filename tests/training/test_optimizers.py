"""Optimizers by name and of one's own, clipped gradients, losses of one's own: exact, resumed, refused."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, assert_same_checkpoint, config_of, metrics_of, newest_checkpoint, tensors_of
from torch import Tensor, nn

from wgan_fast.errors import InputError
from wgan_fast.losses import AdversarialLoss, hinge
from wgan_fast.training import TrainConfig, Trainer
from wgan_fast.training.cli import main
from wgan_fast.training.optimizers import _CLASSES

pytestmark = pytest.mark.usefixtures("no_curves")

SHORT = ["train", *TINY, "--engine", "autograd"]


def networks(bias: bool = True) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(5)
    generator = nn.Sequential(nn.Linear(3, 6, bias=bias), nn.ReLU(), nn.Linear(6, 4, bias=bias))
    generator.latent_dim = 3
    return generator, nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 1, bias=bias))


def points() -> Tensor:
    return torch.randn(40, 4, generator=torch.Generator().manual_seed(1))


def trainer_of(out: Path, *, bias: bool = True, own: Any = None, loss: Any = None, **settings: Any) -> Trainer:
    given = {"batch_size": 5, "n_critic": 2, "steps": 4, "log_every": 1, "engine": "autograd", **settings}
    return Trainer(*networks(bias), points(), TrainConfig(out=out, **given), optimizer=own, loss=loss)


# By name


@pytest.mark.parametrize("name", sorted({*_CLASSES, "sgd,momentum=0.9"} - {"sgd"}))
def test_every_optimizer_of_torch_trains_and_resumes_bit_for_bit(tmp_path, name):
    settings = {"optimizer": name, "bias": name != "muon"}  # Muon is for matrices alone.
    trainer_of(tmp_path / "whole", **settings).fit()
    trainer_of(tmp_path / "run", **settings, steps=2).fit()
    trainer_of(tmp_path / "run", **settings).fit(resume=True)
    assert_same_checkpoint(newest_checkpoint(tmp_path / "run"), newest_checkpoint(tmp_path / "whole"))
    assert config_of(tmp_path / "run")["optimizer"] == name


def test_settings_of_an_optimizer_are_given_after_commas_and_kept(tmp_path):
    out = tmp_path / "run"
    given = ["--optimizer", "sgd,momentum=0.9,nesterov=true", "--learning-rate", "0.01"]
    main([*SHORT, *given, "--steps", "2", "--out", str(out)])
    trainer = Trainer.from_run(out, steps=3)
    for optimizer in trainer._iteration.optimizers.values():
        assert type(optimizer) is torch.optim.SGD
        group = optimizer.param_groups[0]
        assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, True, 0.01)
    trainer.fit(resume=True)
    main([*SHORT, *given, "--steps", "3", "--out", str(tmp_path / "whole")])
    assert_same_checkpoint(newest_checkpoint(out), newest_checkpoint(tmp_path / "whole"))
    assert any("momentum_buffer" in name for name in tensors_of(out, "critic_optimizer."))


def test_moments_are_the_methods_where_the_optimizer_has_them(tmp_path):
    betas = {
        name: trainer_of(tmp_path / name, optimizer=name)._iteration.optimizers["critic"].param_groups[0].get("betas")
        for name in ("adam", "adamw", "nadam", "sgd")
    }
    assert betas == {"adam": (0.5, 0.9), "adamw": (0.5, 0.9), "nadam": (0.5, 0.9), "sgd": None}
    rmsprop = trainer_of(tmp_path / "rmsprop", optimizer="rmsprop")._iteration.optimizers["critic"]
    assert rmsprop.param_groups[0]["alpha"] == 0.9
    averaged = trainer_of(tmp_path / "asgd", optimizer="asgd,alpha=0.5")._iteration.optimizers["critic"]
    assert averaged.param_groups[0]["alpha"] == 0.5  # another alpha: not a decay rate


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--optimizer", "lion"], r"optimizer must be one of adadelta, .*sgd, got 'lion'"),
        (["--optimizer", "lbfgs"], r"optimizer must be one of .* got 'lbfgs'"),
        (["--optimizer", "sgd,momentun=0.9"], r"optimizer sgd takes .*momentum.*, got 'momentun=0.9'"),
        (["--optimizer", "sgd,lr=0.9"], r"optimizer sgd takes .*, got 'lr=0.9'"),
        (["--optimizer", "sgd,momentum=much"], r"optimizer's momentum must be a number, true or false, got 'much'"),
        (["--optimizer", "adamw,weight_decay=-1"], r"optimizer adamw,weight_decay=-1 cannot be built: Invalid"),
        (["--optimizer", "muon"], r"optimizer muon cannot be built: "),
        (["--optimizer", "sgd", "--beta2", "0.5"], r"beta2 was given, but optimizer sgd takes none"),
        (["--optimizer", "rmsprop", "--beta1", "0.5"], r"beta1 was given, but optimizer rmsprop takes none"),
        (["--optimizer", "custom"], r"optimizer custom is one of your own: give Trainer\(\.\.\., optimizer="),
        (["--loss", "mine"], r"loss must be one of wasserstein, .*, got 'mine'; one of your own is given to Trainer"),
    ],
)
def test_what_an_optimizer_or_a_loss_does_not_take_is_refused(tmp_path, capfd, given, message):
    with pytest.raises(SystemExit) as end:
        main([*SHORT, *given, "--out", str(tmp_path / "run")])
    assert end.value.code == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


# Of one's own


def make_adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    first, *rest = parameters
    return torch.optim.AdamW([{"params": [first], "lr": 0.5}, {"params": rest, "lr": 0.25}], betas=(0.1, 0.2))


def test_an_optimizer_of_ones_own_trains_by_its_groups_and_the_schedule(tmp_path):
    trainer = trainer_of(tmp_path / "run", own=make_adamw, schedule="linear")
    trainer.fit()
    for optimizer in trainer._iteration.optimizers.values():
        assert type(optimizer) is torch.optim.AdamW
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 / 4, 0.25 / 4]  # in the last of four steps
    assert [record["learning_rate"] for record in metrics_of(tmp_path / "run")] == [0.5, 0.375, 0.25, 0.125]
    assert config_of(tmp_path / "run")["optimizer"] == "custom"


class Counting(torch.optim.SGD):
    """Keeps what changes among its settings, as schedule-free optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["momentum"] = 0.1 * group["count"]
        return super().step(closure)


def test_an_optimizer_of_ones_own_resumes_bit_for_bit(tmp_path):
    own = lambda parameters: Counting(parameters, lr=0.01, momentum=0.1)  # noqa: E731
    trainer_of(tmp_path / "whole", own=own).fit()
    trainer_of(tmp_path / "run", own=own, steps=2).fit()
    trainer_of(tmp_path / "run", own=own).fit(resume=True)
    assert_same_checkpoint(newest_checkpoint(tmp_path / "run"), newest_checkpoint(tmp_path / "whole"))
    with pytest.raises(InputError, match="optimizer was 'custom', got 'adam'"):
        trainer_of(tmp_path / "run").fit(resume=True)


@pytest.mark.parametrize(
    ("own", "settings", "message"),
    [
        (lambda parameters: None, {}, "optimizer must return a torch.optim.Optimizer, got NoneType"),
        (torch.optim.LBFGS, {}, "optimizer must step from gradients alone, LBFGS needs a closure"),
        (make_adamw, {"learning_rate": 0.1}, "learning_rate was given, but optimizer custom takes none"),
        (make_adamw, {"generator_learning_rate": 0.1}, "generator_learning_rate was given, but optimizer custom"),
        (make_adamw, {"optimizer": "sgd"}, "optimizer was given twice: as sgd"),
    ],
)
def test_what_cannot_be_an_optimizer_is_refused(tmp_path, own, settings, message):
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path / "run", own=own, **settings)
    assert not (tmp_path / "run").exists()


# Clipped gradients


def test_gradients_are_clipped_to_their_norm_over_a_network(tmp_path, monkeypatch):
    """By plain SGD a step is as long as the learning rate times the clipped norm."""
    trainer = trainer_of(tmp_path / "run", optimizer="sgd", learning_rate=1.0, clip_gradients=0.01, n_critic=1, steps=1)
    before = {name: [p.detach().clone() for p in net.parameters()] for name, net in
              (("critic", trainer.critic), ("generator", trainer.generator))}  # fmt: skip
    trainer.fit()
    for name, network in (("critic", trainer.critic), ("generator", trainer.generator)):
        moved = torch.cat([(a - b).flatten() for a, b in zip(network.parameters(), before[name])]).norm()
        assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_gradients_below_the_norm_are_left_alone(tmp_path):
    for name, norm in (("clipped", 1e6), ("plain", None)):
        trainer_of(tmp_path / name, clip_gradients=norm).fit()
    a, b = (tensors_of(tmp_path / name, "critic.") for name in ("clipped", "plain"))
    assert all(torch.equal(a[key], b[key]) for key in a)


# Losses


def test_another_loss_by_name_is_that_methods(tmp_path):
    trainer_of(tmp_path / "named", method="gan", learning_rate=1e-3).fit()
    trainer = trainer_of(tmp_path / "other", method="lsgan", learning_rate=1e-3)
    config = dataclasses.replace(trainer.config, loss="non_saturating")
    Trainer(*networks(), points(), config).fit()
    a, b = (tensors_of(tmp_path / name, "critic.") for name in ("named", "other"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_loss_of_ones_own_trains_as_the_packages_does(tmp_path):
    mine = AdversarialLoss("mine", lambda real, fake: (1 - real).relu().mean() + (1 + fake).relu().mean(),
                           lambda fake: -fake.mean())  # fmt: skip
    trainer_of(tmp_path / "mine", method="hinge", spectral_norm=False, loss=mine).fit()
    trainer_of(tmp_path / "ours", method="hinge", spectral_norm=False).fit()
    a, b = (tensors_of(tmp_path / name) for name in ("mine", "ours"))
    assert all(torch.allclose(a[key], b[key], rtol=1e-5, atol=1e-7) for key in a if key.startswith("critic."))
    assert config_of(tmp_path / "mine")["loss"] == "mine"
    with pytest.raises(InputError, match="loss was 'mine', got 'hinge'"):
        trainer_of(tmp_path / "mine", method="hinge", spectral_norm=False).fit(resume=True)


def test_scores_of_a_loss_of_ones_own_are_those_of_the_critic(tmp_path):
    shapes = set()

    def critic(real: Tensor, fake: Tensor) -> Tensor:
        shapes.update([tuple(real.shape), tuple(fake.shape)])
        return (fake - real).mean()

    def generator(fake: Tensor) -> Tensor:
        shapes.add(tuple(fake.shape))
        return -fake.mean()

    trainer = trainer_of(tmp_path / "run", loss=AdversarialLoss("paired", critic, generator))
    shapes.clear()
    trainer.fit()
    assert shapes == {(5, 1)}


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        ("hinge", {}, "loss must be an AdversarialLoss, got str"),
        (AdversarialLoss("hinge", hinge.critic, hinge.generator), {}, "loss must have a name of its own, hinge is"),
        (AdversarialLoss("mine", lambda real, fake: fake - real, hinge.generator), {},
         r"loss.critic must return a 0-dim tensor .*, got a tensor of shape \[3\]"),
        (AdversarialLoss("mine", hinge.critic, lambda fake: 1.0), {}, "loss.generator must return .*, got float"),
        (AdversarialLoss("mine", hinge.critic, lambda fake: fake[:, 7].mean()), {}, r"loss.generator fails on scores"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_loss_is_refused(tmp_path, loss, settings, message):
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path / "run", loss=loss, **settings)
    assert not (tmp_path / "run").exists()
