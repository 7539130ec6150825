"""Augmentation: DiffAugment's changes, made to what the critic is shown and to nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wgan_fast.training import TrainConfig, Trainer
from wgan_fast.training.augment import CHANGES, augment, numbers
from wgan_fast.training.models import build
from wgan_fast.training.randomness import TRAINING, seed_everything

ALL = ("flip", "color", "translation", "cutout")


def flipped(image: Tensor, side: float) -> Tensor:
    return torch.stack([image[:, :, -1 - x] for x in range(image.shape[2])], 2) if side < 0.5 else image


def coloured(image: Tensor, brightness: float, saturation: float, contrast: float) -> Tensor:
    image = image + brightness - 0.5
    grey = image.mean(0)
    image = torch.stack([grey + 2 * saturation * (channel - grey) for channel in image])
    return image.mean() + (0.5 + contrast) * (image - image.mean())


def moved(image: Tensor, down: float, right: float) -> Tensor:
    _, height, width = image.shape
    y, x = (int(draw * (2 * (side // 8) + 1)) - side // 8 for draw, side in ((down, height), (right, width)))
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - y < height and 0 <= column - x < width:
                out[:, row, column] = image[:, row - y, column - x]
    return out


def cut_out(image: Tensor, top: float, left: float) -> Tensor:
    """A window of half the size around a centre in the image or, for even windows, on its far edge."""
    out = image.clone()
    _, height, width = image.shape
    tall, wide = height // 2, width // 2
    y, x = int(top * (height + 1 - tall % 2)) - tall // 2, int(left * (width + 1 - wide % 2)) - wide // 2
    out[:, max(y, 0) : y + tall, max(x, 0) : x + wide] = 0
    return out


REFERENCE = {"flip": flipped, "color": coloured, "translation": moved, "cutout": cut_out}


@pytest.mark.parametrize("shape", [(7, 3, 9, 17), (5, 1, 16, 16), (1, 4, 3, 8)])
@pytest.mark.parametrize("names", [("flip",), ("color",), ("translation",), ("cutout",), ALL, ALL[::-1]])
def test_every_image_is_changed_as_the_paper_says_by_its_own_numbers(names, shape):
    images = torch.rand(shape, dtype=torch.float64) * 2 - 1
    draws = torch.rand(shape[0], numbers(names))
    expected = []
    for image, row in zip(images, draws.double().tolist()):
        for name in names:
            count = CHANGES[name][0]
            image, row = REFERENCE[name](image, *row[:count]), row[count:]
        expected.append(image)
    torch.testing.assert_close(augment(images, names, draws), torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["translation", "cutout"])
def test_numbers_at_both_ends_stay_in_range(name):
    """The largest number below 1 in float32 times a count may round up to the count."""
    image = torch.rand(1, 1, 2056, 8) + 0.1
    for draw in (0.0, float(np.nextafter(np.float32(1), np.float32(0)))):
        changed = augment(image, [name], torch.full((1, 2), draw))
        assert 0 < changed.count_nonzero() < image.numel()


@pytest.mark.parametrize("names", [*[(name,) for name in ALL], ALL])
def test_gradients_flow_through_every_change(names):
    images = (torch.rand(3, 3, 8, 9, dtype=torch.float64) * 2 - 1).requires_grad_()
    draws = torch.rand(3, numbers(names))
    assert torch.autograd.gradcheck(lambda x: augment(x, names, draws), images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_does_not_change_the_values_and_the_dtype_stays(dtype):
    images = (torch.rand(5, 3, 9, 8) * 2 - 1).to(dtype)
    draws = torch.rand(5, numbers(ALL))
    plain = augment(images, ALL, draws)
    assert plain.dtype == dtype
    # Means over another layout are summed in another order.
    error = 2 * torch.finfo(dtype).eps * plain.abs().max()
    assert (augment(images.to(memory_format=torch.channels_last), ALL, draws) - plain).abs().max() <= error


PIXELS = np.full((18, 3, 16, 16), 255, np.uint8)
PIXELS[..., :4] = 0  # dark at the left


class Seen:
    """Runs one iteration, and keeps what the critic was given in it."""

    def __init__(self, folder: Path, **settings: object) -> None:
        generator, critic = build("dcgan", (3, 16, 16), width=2)
        torch.nn.init.constant_(generator[-2].bias, 0.3)  # no pixel is 0 by itself
        config = TrainConfig(out=folder, batch_size=18, n_critic=2, holdout=0.0, device="cpu", **settings)
        self.generator = generator
        iteration = Trainer(generator, critic, PIXELS, config)._iteration
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.alone: list[Tensor] = []
        step = iteration.critic_step

        def kept(real: Tensor, fake: Tensor, alpha: Tensor, critic_args: tuple[()]) -> object:
            self.steps.append((real, fake))
            return step(real, fake, alpha, critic_args=critic_args)

        iteration.critic_step = kept
        critic.register_forward_pre_hook(lambda _, inputs: self.alone.append(inputs[0]))
        iteration.seed()
        iteration([torch.from_numpy(PIXELS) / 127.5 - 1] * 2)


def dark_columns(images: Tensor) -> set[tuple[int, ...]]:
    return {tuple((image[0, 0] == -1).nonzero().flatten().tolist()) for image in images}


def test_flip_mirrors_about_half_of_the_real_images_and_no_generated_one(tmp_path):
    seen = Seen(tmp_path / "run", flip=True)
    plain = Seen(tmp_path / "plain")
    for (real, _), (whole, _) in zip(seen.steps, plain.steps):
        assert dark_columns(real) == {(0, 1, 2, 3), (12, 13, 14, 15)}
        assert dark_columns(whole) == {(0, 1, 2, 3)}
    # Each image of a batch and each batch has numbers of its own.
    assert not torch.equal(seen.steps[0][0], seen.steps[1][0])


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "channels_last": True}, {"cuda_graph": True}])
def test_critic_sees_changed_images_alone_in_both_steps(tmp_path, settings):
    seen = Seen(tmp_path / "run", augment=("cutout",), engine="autograd", **settings)
    batches = [*(batch for step in seen.steps for batch in step), seen.alone[-1].detach()]
    assert len(batches) == 5  # real and generated of two steps, and generated ones of the generator's
    holes = [(batch == 0).all(1) for batch in batches]
    for hole in holes:
        # Half the height and the width, less what lies outside the image: at least a quarter of that is inside.
        assert ((hole.sum((1, 2)) >= 16) & (hole.sum((1, 2)) <= 64)).all()
    different = {tuple(hole.flatten(1).int().tolist()[0]) for hole in holes}
    assert len(different) > 1
    if settings.get("channels_last"):
        assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    gradient = torch.cat([p.grad.flatten() for p in seen.generator.parameters()])
    assert gradient.isfinite().all()
    assert gradient.any()


def test_random_numbers_are_what_they_were_where_nothing_is_changed(tmp_path):
    states = []
    for name, settings in (("plain", {}), ("augmented", {"augment": ("color",)})):
        Seen(tmp_path / name, **settings)
        states.append(torch.get_rng_state())
    seed_everything(0, TRAINING)
    for _ in range(2):
        torch.randn(18, 128), torch.rand(18)
    torch.randn(18, 128)
    assert torch.equal(states[0], torch.get_rng_state())
    assert not torch.equal(*states)
