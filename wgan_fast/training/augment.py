"""Augmentation of what the critic is shown.

Differentiable augmentation (DiffAugment, Zhao et al. 2020, arXiv:2006.10738) changes real and generated images alike
before the critic rates them, in the critic's steps and in the generator's. The critic cannot learn few images by
heart, and the generator, whose gradient flows back through the change, still learns images as they were before it. A
flip of the real images alone is the usual augmentation: the generator learns flipped images, too.

The critic's step gets changed images, so the penalty is on points between changed real and changed generated images: on
what the critic is compared on, and without a derivative through the change. The paper's code has the penalty there
(ns_r1_DiffAugment in its loss.py) and, as an alternative, at the images before the change.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def augment(images: Tensor, names: Sequence[str], draws: Tensor) -> Tensor:
    """Change every image by itself.

    Args:
        images: ``[N, C, H, W]``, floating point, in [-1, 1].
        names: Changes of ``CHANGES``, in the order in which they are made.
        draws: ``[N, numbers(names)]``, uniform in [0, 1): what decides the changes.

    Returns:
        The changed images, of the same shape and dtype; their derivative by ``images`` is exact. "color" may leave
        [-1, 1].
    """
    draws = draws.to(images.dtype)[:, :, None, None, None]
    for name in names:
        count, change = CHANGES[name]
        images = change(images, *draws[:, :count].unbind(1))
        draws = draws[:, count:]
    return images


def numbers(names: Sequence[str]) -> int:
    """Count the random numbers that the changes of one image take."""
    return sum(CHANGES[name][0] for name in names)


def _flip(images: Tensor, side: Tensor) -> Tensor:
    return torch.where(side < 0.5, images.flip(3), images)


def _color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add -0.5 to 0.5; multiply the distance to grey by 0 to 2, and that to the image's mean by 0.5 to 1.5."""
    images = images + (brightness - 0.5)
    for dims, factor in (((1,), saturation * 2), ((1, 2, 3), contrast + 0.5)):
        mean = images.mean(dims, keepdim=True)
        images = mean + (images - mean) * factor
    return images


def _translation(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Move by up to an eighth of height and width; what comes in is 0, mid-grey."""
    for dim, draw in ((2, down), (3, right)):
        size = images.shape[dim]
        most = size // 8
        source = _places(images, dim) - (_whole(draw, 2 * most + 1) - most)
        inside = (source >= 0) & (source < size)
        images = images.gather(dim, source.clamp(0, size - 1).expand_as(images)) * inside
    return images


def _cutout(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Set to 0 a rectangle of half the height and width, whose centre lies anywhere in the image."""
    hole = torch.ones((), dtype=torch.bool, device=images.device)
    for dim, draw in ((2, top), (3, left)):
        size = images.shape[dim]
        cut = size // 2
        place = _places(images, dim) - _whole(draw, size + 1 - cut % 2) + cut // 2
        hole = hole & (place >= 0) & (place < cut)
    return images.masked_fill(hole, 0)


def _places(images: Tensor, dim: int) -> Tensor:
    """0, 1, ... along height (2) or width (3)."""
    places = torch.arange(images.shape[dim], device=images.device)
    return places[:, None] if dim == 2 else places


def _whole(draw: Tensor, count: int) -> Tensor:
    """Turn a number in [0, 1) into one of 0 to count - 1."""
    return (draw * count).long().clamp_(max=count - 1)  # the product may round up to count


CHANGES: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "flip": (1, _flip),
    "color": (3, _color),
    "translation": (2, _translation),
    "cutout": (2, _cutout),
}
"""Each with the random numbers that it takes for an image."""
