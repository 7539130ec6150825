"""The course of a run: where it ends, and when something is due, in steps or in epochs.

An epoch is as many samples seen by the critic as there are to train on. A generator step takes ``n_critic`` batches, so
that epochs are what the usual code counts, in which one pass over a data loader feeds the critic.
"""

import sys

from ..errors import InputError
from .config import Interval, TrainConfig, epochs_of
from .data import Split


class Course:
    """Counts the samples that the critic has seen.

    Args:
        config: The resolved configuration.
        train: What is trained on.

    Attributes:
        steps: The generator step at which the run ends.

    Raises:
        InputError: The configuration counts epochs, and the data has no end.
    """

    def __init__(self, config: TrainConfig, train: Split) -> None:
        self._config, self._samples = config, len(train)
        self._per_step = (config.batch_size or 0) * (config.n_critic or 0)
        endless = self._samples == sys.maxsize
        for name in ("epochs", "log_every", "sample_every", "track", "checkpoint_every"):
            value = getattr(config, name)
            if endless and (isinstance(value, str) or (name == "epochs" and value)):
                raise InputError(f"{name} was {value}, but data {config.data} is drawn without end: count in steps")
        self.begin(0, 0)

    def begin(self, step: int, seen: int) -> None:
        """Go on after ``step``, at which the critic had seen ``seen`` samples."""
        self._step, self._seen = step, seen
        to_come = (self._config.epochs or 0) * self._samples - seen
        self.steps = self._config.steps or step - (-to_come // self._per_step)

    def seen(self, step: int) -> int:
        """Return how many samples the critic has seen at the end of ``step``."""
        return self._seen + (step - self._step) * self._per_step

    def next_batch(self, step: int, batch_size: int) -> int:
        """Index of the batch after ``step``; part of one is passed over where the batch size was changed."""
        return -(-self.seen(step) // batch_size)

    def due(self, interval: Interval, step: int) -> bool:
        """Whether something is due at the end of ``step``: the last of so many steps, or that completes the epochs."""
        epochs = epochs_of(interval)
        if epochs is None:
            return bool(interval) and step % int(interval) == 0
        samples = epochs * self._samples
        return self.seen(step) // samples > self.seen(step - 1) // samples

    def epoch(self, step: int) -> float:
        """Return how often the critic has seen the training samples at the end of ``step``."""
        return self.seen(step) / self._samples
