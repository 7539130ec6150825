"""Quality of generated images, seen through a small classifier that was trained on the same real data.

Inception's features say little about digits. A classifier of the data itself gives features in which a Fréchet
distance, precision, recall, density and coverage mean something, and tells which classes the generator reaches. Every
figure comes with what two sets of real samples give, of the same size, neither of which the classifier has seen.

`Judge.load` finds the classifier (trained once per data set, then kept in the user's cache folder), `tracker` what
training can measure as it goes.
"""

import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from . import metrics
from .data import Data, Labels
from .files import write_atomically

FEATURES = 64
"""Length of the classifier's feature vectors."""

NEAREST = 5
"""Neighbours that make a neighbourhood, as in Naeem et al. 2020."""

COVERED = 0.1
"""A class is covered when its share of the generated samples is at least this much of its share of real ones."""

_STEPS, _BATCH, _RATE = 600, 128, 2e-3  # of the classifier's training
_MOST, _MOST_BYTES = 20_000, 2**30  # samples that the classifier is trained on
_TRACKED = 2_000  # samples on each side of a tracked distance
_RECIPE = f"1 {FEATURES} {_STEPS} {_BATCH} {_RATE}"  # part of the cache's key: another recipe is another classifier


class Classifier(nn.Module):
    """Two convolutions of stride 2, a layer of features, and the classes.

    Args:
        sample_shape: `(C, H, W)`.
        classes: Number of classes.
    """

    def __init__(self, sample_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = sample_shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * math.ceil(height / 4) * math.ceil(width / 4), FEATURES),
            # One scale for every sample and data set: a distance would otherwise be ruled by the few largest.
            nn.LayerNorm(FEATURES, elementwise_affine=False),
        )
        self.head = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` to features `[N, FEATURES]`, of mean 0 and variance 1 within each sample."""
        return cast(Tensor, self.body(images))

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` to the logits of the classes, `[N, K]`."""
        return cast(Tensor, self.head(F.relu(self.features(images))))


def train_classifier(images: Tensor, labels: Tensor, classes: int) -> Classifier:
    """Train a classifier, always the same one for the same data on the same machine.

    Adam with a learning rate that falls linearly to 0. A fixed number of steps bounds the time: some ten seconds on
    one core for 28 x 28 images.

    Args:
        images: `[N, C, H, W]` float32 in [-1, 1].
        labels: `[N]` int64.
        classes: Number of classes.

    Returns:
        The classifier, in eval mode. The default generator of torch is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier(tuple(images.shape[1:]), classes)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=_STEPS)
    draw = torch.Generator().manual_seed(0)
    for _ in range(_STEPS):
        rows = torch.randint(len(images), (_BATCH,), generator=draw)
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(classifier(images[rows]), labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return classifier.eval()


def cache_folder() -> Path:
    """Where classifiers are kept: wgan_fast under $XDG_CACHE_HOME, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wgan_fast"


def load_classifier(images: Tensor, labels: Tensor, classes: int) -> Classifier:
    """Read the classifier of this data from the user's cache folder; train it, and keep it there, where it is not.

    A file that is damaged is replaced, and a folder that cannot be written is done without.

    Args:
        images: `[N, C, H, W]` float32 in [-1, 1].
        labels: `[N]` int64.
        classes: Number of classes.

    Returns:
        The classifier, in eval mode.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError("the classifier's cache needs safetensors: pip install 'wgan_fast[train]'") from error
    key = hashlib.sha256(f"{_RECIPE} {classes} {list(images.shape)}".encode())
    key.update(images.contiguous().numpy().data)
    key.update(labels.contiguous().numpy().data)
    path = cache_folder() / f"classifier-{key.hexdigest()[:32]}.safetensors"
    kept = _read(path, tuple(images.shape[1:]), classes)
    if kept is not None:
        return kept
    if sys.stderr.isatty():
        print("wgan-fast: training a classifier of this data, once", file=sys.stderr)
    classifier = train_classifier(images, labels, classes)
    state = classifier.state_dict()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{path.name}.{os.getpid()}")  # several processes may train it at once
        write_atomically(own, save(state, {"sha256": _digest(state)}))
        own.replace(path)
    return classifier


def _read(path: Path, sample_shape: tuple[int, ...], classes: int) -> Classifier | None:
    """Load a kept classifier; None where there is no whole one."""
    from safetensors import SafetensorError, safe_open

    with torch.device("meta"):  # which draws no random numbers
        classifier = Classifier(sample_shape, classes)
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if file.metadata() != {"sha256": _digest(state)}:
                return None
        classifier.load_state_dict(state, assign=True)
    except (OSError, SafetensorError, RuntimeError):
        return None
    return classifier.eval()


def _digest(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().data)
    return digest.hexdigest()


class _Seen(NamedTuple):
    """What the classifier says about samples."""

    features: Tensor
    classes: Tensor  # one a sample
    shares: Tensor  # of the classes


@dataclass(frozen=True)
class Judge:
    """A classifier and two sets of real samples that it has not seen, to rate generated ones with.

    Attributes:
        classifier: In eval mode, on the CPU.
        accuracy: Its share of right answers on the real samples that neither it nor the generator has seen.
        held_out: Those samples, `[N, C, H, W]`.
        reference: As many others, that only the generator was trained on.
    """

    classifier: Classifier
    accuracy: float
    held_out: Tensor
    reference: Tensor

    @classmethod
    def load(cls, data: Data, labels: Labels, *, samples: int = 2000, seed: int = 0) -> "Judge | None":
        """Get the classifier of a data set, training it if need be, and draw the real samples.

        The training split is parted: a quarter of it, at most as much as was held out, stays unseen by the classifier.

        Args:
            data: Images, `[C, H, W]` each, with held-out samples.
            labels: Its classes.
            samples: Real samples on each side of a comparison, at most; fewer where there are not as many.
            seed: Chooses them. The classifier does not depend on it.

        Returns:
            The judge; None for what is no image, and where fewer than two samples would be left on a side.

        Raises:
            InputError: The labels are not as many as the samples.
        """
        labels.check(data)
        if data.kind != "images":
            return None
        unseen = min(len(data.held_out), len(data.train) // 4)
        compared = min(samples, unseen)
        if compared < 2:
            return None
        most = min(_MOST, _MOST_BYTES // (4 * math.prod(data.sample_shape)))
        rows = min(len(data.train), unseen + most)
        images, classes = data.train.take(rows), labels.train.take(rows)
        classifier = load_classifier(images[unseen:], classes[unseen:], len(labels.names))
        held_out = data.held_out.take(compared, seed=seed)
        right = _logits(classifier, held_out).argmax(1) == labels.held_out.take(compared, seed=seed)
        order = torch.randperm(unseen, generator=torch.Generator().manual_seed(seed))[:compared]
        return cls(classifier, float(right.double().mean()), held_out, images[:unseen][order])

    def rate(self, fake: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        """Compare generated samples with the held-out ones, and as many real ones with them as well.

        Args:
            fake: Generated samples, `[N, C, H, W]`; as many as there are real ones are used.
            labels: The classes that they were asked to be of, `[N]`; None where none was.

        Returns:
            ``frechet_distance``, ``precision``, ``recall``, ``density``, ``coverage``, ``classes_covered`` and
            ``class_entropy`` (in nats); the distance with ``_floor`` and the others with ``_real`` behind it for what
            the other real samples give; and ``classes``, ``classifier_accuracy`` and ``compared_samples``. With
            labels ``label_agreement`` too: the share of the samples that the classifier takes for what they were asked
            to be, which for real ones is its accuracy.
        """
        n = min(len(fake), len(self.held_out))
        held_out, reference, generated = (
            self._see(samples[:n]) for samples in (self.held_out, self.reference, fake.float().cpu())
        )
        real, made = (self._compare(seen, held_out) for seen in (reference, generated))
        agreement = {}
        if labels is not None:
            agreement["label_agreement"] = float((generated.classes == labels[:n].cpu()).double().mean())
        return {
            "compared_samples": n,
            **agreement,
            "classifier_accuracy": self.accuracy,
            "classes": len(held_out.shares),
            **{
                name: value
                for key in made
                for name, value in ((key, made[key]), (f"{key}_{'floor' if key == _DISTANCE else 'real'}", real[key]))
            },
        }

    def _see(self, samples: Tensor) -> _Seen:
        with torch.no_grad():
            features = torch.cat([self.classifier.features(part) for part in torch.split(samples, 256)])
            predicted = self.classifier.head(F.relu(features)).argmax(1)
        counts = torch.bincount(predicted, minlength=self.classifier.head.out_features)
        return _Seen(features, predicted, counts / len(predicted))

    def _compare(self, seen: _Seen, held_out: _Seen) -> dict[str, Any]:
        n = len(seen.features)
        present = seen.shares[seen.shares > 0].double()
        return {
            _DISTANCE: metrics.frechet_distance(seen.features, held_out.features),
            **metrics.manifold(held_out.features, seen.features, nearest=min(NEAREST, n - 1))._asdict(),
            "classes_covered": int(((seen.shares > 0) & (seen.shares >= COVERED * held_out.shares)).sum()),
            "class_entropy": float((present * -present.log()).sum()),
        }


_DISTANCE = "frechet_distance"


@torch.no_grad()
def _logits(classifier: Classifier, images: Tensor) -> Tensor:
    return torch.cat([classifier(part) for part in torch.split(images, 256)])


class Tracker(NamedTuple):
    """What training can measure as it goes.

    Attributes:
        samples: How many generated samples it takes.
        rate: Takes them, `[samples, *sample_shape]` float32 on the CPU, and returns figures to log.
        labels: The classes that the samples are to be of, `[samples]`; None where none is asked for.
    """

    samples: int
    rate: Callable[[Tensor], dict[str, Any]]
    labels: Tensor | None = None


def tracker(data: Data, labels: Labels | None, *, seed: int = 0, conditional: bool = False) -> Tracker:
    """Prepare to rate samples again and again, all against the same held-out ones.

    Args:
        data: What is trained on.
        labels: Its classes, or None.
        seed: Of the real samples and of the projections.
        conditional: Whether the samples are generated of the classes of the held-out ones.

    Returns:
        For images with classes a tracker that gives ``frechet_distance``, ``coverage`` and ``classes_covered``, with
        ``label_agreement`` where classes are asked for; for toy mixtures ``sliced_wasserstein``, ``modes_covered`` and
        ``high_quality``; for everything else ``sliced_wasserstein``.

    Raises:
        InputError: Nothing was held out, or the labels are not as many as the samples.
    """
    if not len(data.held_out):
        raise InputError("track needs held-out samples to compare with: none were held out (holdout 0)")
    judge = None if labels is None else Judge.load(data, labels, samples=_TRACKED, seed=seed)
    n = min(_TRACKED, len(data.held_out)) if judge is None else len(judge.held_out)
    asked = labels.held_out.take(n, seed=seed) if labels is not None and conditional else None
    if judge is not None:

        def rate(fake: Tensor) -> dict[str, Any]:
            rating = judge.rate(fake, asked)
            tracked = (_DISTANCE, "coverage", "classes_covered", "label_agreement")
            return {name: rating[name] for name in tracked if name in rating}

        return Tracker(n, rate, asked)
    held_out = data.held_out.take(n, seed=seed)

    def measure(fake: Tensor) -> dict[str, Any]:
        figures: dict[str, Any] = {"sliced_wasserstein": metrics.sliced_wasserstein(fake, held_out, seed=seed)}
        if data.modes is not None and data.mode_std is not None:
            coverage = metrics.mode_coverage(fake, data.modes, data.mode_std)
            figures |= {"modes_covered": coverage.covered, "high_quality": coverage.high_quality}
        return figures

    return Tracker(n, measure, asked)
