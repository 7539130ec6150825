"""Callbacks are told what happens, may end training, and nothing of theirs is swallowed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import assert_same_checkpoint, newest_checkpoint
from torch import Tensor, nn

from wgan_fast.errors import DivergenceError, InputError
from wgan_fast.training import Callback, InterruptedTraining, TrainConfig, Trainer

pytestmark = pytest.mark.usefixtures("no_curves")


def points() -> Tensor:
    return torch.randn(40, 4, generator=torch.Generator().manual_seed(1))


def trainer_of(out: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    torch.manual_seed(5)
    generator = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))
    critic = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    given = {"batch_size": 5, "n_critic": 2, "steps": 4, "log_every": 2, "engine": "autograd", "latent_dim": 3}
    return Trainer(generator, critic, points(), TrainConfig(out=out, **given | settings), callbacks=callbacks)


class Notes(Callback):
    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def on_begin(self, trainer):
        self.heard.append(("begin", trainer.step))

    def on_step(self, trainer, result):
        self.heard.append(("step", trainer.step, result.critic.loss.isfinite().item()))

    def on_log(self, trainer, record):
        self.heard.append(("log", record["step"], "wasserstein" in record))

    def on_picture(self, trainer, samples, path):
        self.heard.append(("picture", list(samples.shape), path.exists()))

    def on_checkpoint(self, trainer, path):
        self.heard.append(("checkpoint", path.name, path.exists()))

    def on_end(self, trainer, error):
        self.heard.append(("end", error))


def test_everything_is_told_in_its_order(tmp_path):
    notes = Notes()
    trainer_of(tmp_path / "run", notes, sample_every=4, checkpoint_every=3).fit()
    assert notes.heard == [
        ("begin", 0),
        ("step", 1, True), ("step", 2, True), ("log", 2, True),
        ("step", 3, True), ("checkpoint", "step-00000003.safetensors", True),
        ("step", 4, True), ("log", 4, True), ("picture", [64, 4], True),
        ("checkpoint", "step-00000004.safetensors", True),
        ("end", None),
    ]  # fmt: skip


def test_a_callback_may_end_training_which_is_saved_and_goes_on_exactly(tmp_path):
    class Stop(Callback):
        def on_step(self, trainer, result):
            if trainer.step == 3:
                trainer.stop()

    summary = trainer_of(tmp_path / "run", Stop()).fit()
    assert summary.steps == 3
    assert summary.grid.exists()
    assert newest_checkpoint(tmp_path / "run").name == "step-00000003.safetensors"
    trainer_of(tmp_path / "run").fit(resume=True)
    trainer_of(tmp_path / "whole").fit()
    assert_same_checkpoint(newest_checkpoint(tmp_path / "run"), newest_checkpoint(tmp_path / "whole"))


def test_what_a_callback_raises_comes_out_of_fit(tmp_path):
    class Broken(Callback):
        def on_log(self, trainer, record):
            raise LookupError("mine")

    notes = Notes()
    with pytest.raises(LookupError, match="mine"):
        trainer_of(tmp_path / "run", Broken(), notes).fit()
    assert isinstance(notes.heard[-1][1], LookupError)


def test_going_back_after_a_divergence_begins_again(tmp_path):
    class Poison(Notes):
        poisoned = False

        def on_log(self, trainer, record):
            if trainer.step == 2 and not self.poisoned:
                self.poisoned = True
                trainer.critic[0].weight.data[0, 0] = torch.nan

    poison = Poison()
    trainer_of(tmp_path / "run", poison, checkpoint_every=1, on_divergence="rewind", log_every=1).fit()
    assert [entry for entry in poison.heard if entry[0] == "begin"] == [("begin", 0), ("begin", 1)]
    assert poison.heard[-1] == ("end", None)


def test_the_end_is_told_with_what_interrupted(tmp_path):
    class Interrupt(Notes):
        def on_step(self, trainer, result):
            raise InterruptedTraining("enough", 15)

    notes = Interrupt()
    with pytest.raises(InterruptedTraining):
        trainer_of(tmp_path / "run", notes).fit()
    assert isinstance(notes.heard[-1][1], InterruptedTraining)


def test_callbacks_of_a_divergence_hear_of_it(tmp_path):
    class Poison(Notes):
        def on_step(self, trainer, result):
            trainer.critic[0].weight.data[0, 0] = torch.inf

    notes = Poison()
    with pytest.raises(DivergenceError):
        trainer_of(tmp_path / "run", notes).fit()
    assert isinstance(notes.heard[-1][1], DivergenceError)


def test_what_is_no_callback_is_refused(tmp_path):
    with pytest.raises(InputError, match="callbacks must be instances of Callback, got <built-in function print>"):
        trainer_of(tmp_path / "run", print)
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_the_pictures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer_of(tmp_path / "run", sample_every=2).fit()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    images = events.Images("samples")
    assert [image.step for image in images] == [2, 4]
    from PIL import Image

    with Image.open(tmp_path / "run" / "samples" / "step-00000004.png") as picture:
        assert (images[-1].width, images[-1].height) == picture.size
    assert np.isfinite([event.value for event in events.Scalars("critic_loss")]).all()
