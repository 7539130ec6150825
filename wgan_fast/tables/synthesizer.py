"""A table learned by CTGAN's method, with the critic's step in four passes."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..errors import InputError
from ..training.checkpoint import Tree, load_checkpoint, save_checkpoint
from ..training.description import CONFIG_FILE
from ..training.files import as_path
from ..training.models import PackedCritic
from .columns import Column, key, plain
from .networks import Conditions, Rows, TableGenerator
from .preparation import Choices, NumbersBy, Preparation, read, written
from .training import Training

PIECE = 10_000
"""Rows that are made at once."""
MOST_TRIES = 100
"""How many rows are generated for one that is asked for with a condition, before giving up."""


class TableSynthesizer(BaseEstimator):  # type: ignore[misc]
    """Learns a table and makes rows like its own.

    CTGAN (Xu et al. 2019, arXiv:1907.00503): numbers by modes, categories with a condition, a critic of ten rows at a
    time, Wasserstein loss with gradient penalty. Conventions are scikit-learn's.

    Args:
        epochs: How often as many rows are drawn as the table has.
        batch_size: Rows in a batch; rounded down to whole groups.
        latent_dim: Length of the generator's noise.
        hidden: Widths of both networks' hidden layers; the critic's are all as wide as the first.
        group_size: Rows that the critic rates together.
        learning_rate: Of both Adams, with betas of 0.5 and 0.9.
        weight_decay: Of both.
        penalty_weight: Of the gradient penalty.
        numbers: What a number becomes: its place in a mode of a mixture ("modes"), or its quantile ("quantiles").
        kinds: By the name of a column, what it is: "number", "integer", "category", "yes/no", "date", "constant" or
            "identifier", which is left out.
        precision: Of the critic's step: "fp32", "tf32" or "bf16".
        device: Where to train, and to sample.
        seed: Of everything that is drawn.

    Attributes:
        preparation_: The columns, and how they become numbers.
        generator_: Trained.
        critic_: Likewise.
        history_: The loss of the critic and of the generator, the last ones of every epoch.
        n_iter_: Steps taken.

    Examples:
        >>> import pandas
        >>> table = pandas.DataFrame({"job": ["nurse", "cook"] * 50, "pay": [12.5, 9.25, 13.0, 8.75] * 25})
        >>> made = TableSynthesizer(epochs=1, batch_size=50).fit(table).sample(3, where={"job": "nurse"})
        >>> list(made["job"])
        ['nurse', 'nurse', 'nurse']
    """

    def __init__(
        self,
        *,
        epochs: int = 300,
        batch_size: int = 500,
        latent_dim: int = 128,
        hidden: Sequence[int] = (256, 256),
        group_size: int = 10,
        learning_rate: float = 2e-4,
        weight_decay: float = 1e-6,
        penalty_weight: float = 10.0,
        numbers: NumbersBy = "modes",
        kinds: Mapping[Any, str] | None = None,
        precision: str = "fp32",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.epochs = epochs
        self.batch_size = batch_size
        self.latent_dim = latent_dim
        self.hidden = hidden
        self.group_size = group_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.penalty_weight = penalty_weight
        self.numbers = numbers
        self.kinds = kinds
        self.precision = precision
        self.device = device
        self.seed = seed

    def fit(self, table: pd.DataFrame, y: None = None) -> "TableSynthesizer":
        """Learn a table, from the beginning.

        Raises:
            InputError: As ``columns_of``; an option is out of range.
        """
        before = dict(self.__dict__)
        try:
            with torch.random.fork_rng():
                training = self.begin(table)
                while training.step < self.epochs * training.steps_per_epoch:
                    training()
            self.n_iter_ = training.step
            self.generator_.eval()
        except BaseException:  # what was learned before is still there
            self.__dict__ = before
            raise
        return self

    def begin(
        self,
        table: pd.DataFrame,
        columns: Sequence[Column] | None = None,
        preparation: Preparation | None = None,
        parts: Iterable[pd.DataFrame] | None = None,
    ) -> Training:
        """Prepare a table and build networks: what ``fit`` does before its first step. Seeds PyTorch's generators.

        Args:
            table: To learn.
            columns: Of it, where they are known of a table that it is a part of.
            preparation: That was fitted to it before; None fits one.
            parts: Of a larger table, of which ``table`` are some rows: what is learned in its place, part by part.

        Raises:
            InputError: As ``fit``.
        """
        if not isinstance(table, pd.DataFrame):
            raise InputError(f"a table is a pandas.DataFrame, got {type(table).__name__}")
        self._check_options()
        self.preparation_ = preparation or Preparation.fit(
            table, self.kinds, columns=columns, numbers=self.numbers, seed=self.seed
        )
        rows = min(self.batch_size, len(table))
        if (N := rows // self.group_size * self.group_size) == 0:
            raise InputError(f"a batch of {rows} rows has no group of {self.group_size}")
        self.passed_over_ = 0
        if parts is None:
            values, choices = self.preparation_.coded(table, seed=self.seed, dtype=np.float32)
        else:
            values, choices, self.passed_over_ = self.preparation_.coded_parts(parts, seed=self.seed)
            if self.passed_over_ > len(values):
                raise InputError(
                    f"{self.passed_over_} of {self.passed_over_ + len(values)} rows have what none of the {len(table)} "
                    "drawn ones has: leave out columns of rare values (--column NAME=identifier), and say how dates "
                    "are written (--column NAME=date:%d/%m/%Y)"
                )
        torch.manual_seed(self.seed)
        self._build(torch.from_numpy(choices[:, [n for _, n, _ in self.preparation_.categories]]))
        training = Training(
            self.generator_,
            self.critic_,
            self.conditions_,
            Rows(torch.from_numpy(values), torch.from_numpy(choices), self.preparation_.spans).to(self.device),
            batch_size=N,
            options={"lr": self.learning_rate, "betas": (0.5, 0.9), "weight_decay": self.weight_decay},
            penalty_weight=self.penalty_weight,
            precision=self.precision,
        )
        self.history_ = training.history
        return training

    def _check_options(self) -> None:
        for name in ("epochs", "batch_size", "latent_dim", "group_size"):
            _whole(name, getattr(self, name), 1)
        _whole("seed", self.seed, 0)
        if self.numbers not in get_args(NumbersBy):
            raise InputError(f"numbers must be one of {', '.join(get_args(NumbersBy))}, got {self.numbers!r}")
        for name in ("learning_rate", "weight_decay", "penalty_weight"):
            value = getattr(self, name)
            if not isinstance(value, int | float | np.number) or not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be finite and at least 0, got {value!r}")
        if isinstance(self.hidden, str | int) or not self.hidden:
            raise InputError(f"hidden must be the widths of the hidden layers, got {self.hidden!r}")
        for width in self.hidden:
            _whole("hidden", width, 1)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {self.device!r} is not there: {str(error).splitlines()[0]}") from None

    def sample(self, n: int, *, where: Mapping[Any, Any] | None = None, seed: int | None = None) -> pd.DataFrame:
        """Make ``n`` rows.

        Args:
            n: How many.
            where: By the name of a column of categories, the category that the rows are to have. The first is the
                generator's condition; rows that miss any are made anew.
            seed: Of the rows; the same seed gives the same rows. None draws it from PyTorch's generator.

        Raises:
            InputError: There is no such column or category, or rows that have all of ``where`` are too rare.
        """
        check_is_fitted(self, "generator_")
        _whole("n", n, 0)
        if seed is not None:
            _whole("seed", seed, 0)
        if not isinstance(where or {}, Mapping):
            raise InputError(f"where is categories by the names of columns, got {where!r}")
        asked = [self._condition(name, value) for name, value in (where or {}).items()]
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            tables, have, tried = [self.preparation_.inverse(np.empty((0, self.preparation_.width)))], 0, 0
            while have < n:
                made = self._rows(min(max(n, 2), PIECE), asked[:1])
                tried += len(made)
                for column, category in asked:
                    start = self.conditions_.starts[column]
                    one_of = made[:, start : start + self.conditions_.sizes[column]]
                    made = made[one_of.argmax(dim=1) == category]
                made = made[: n - have]
                have += len(made)
                if len(made):
                    tables.append(self.preparation_.inverse(made.double().cpu().numpy()))
                if tried > MOST_TRIES * n + 10_000 and have < n:
                    raise InputError(f"of {tried} rows {have} have what `where` asks for: the combination is too rare")
        return pd.concat(tables[min(1, n) :], ignore_index=True)

    def state(self) -> Tree:
        """Return everything that ``sample`` needs, as a checkpoint holds it."""
        kinds = [[written(name), kind] for name, kind in (self.kinds or {}).items()]
        options = {name: plain(value) for name, value in self.get_params().items()}
        return {
            "options": {**options, "hidden": [plain(width) for width in self.hidden], "kinds": kinds},
            "preparation": self.preparation_.state(),
            "history": self.history_,
            "generator": self.generator_.state_dict(),
            "critic": self.critic_.state_dict(),
            "conditions": self.conditions_.state_dict(),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that ``sample`` needs into a folder, which is made: safetensors and JSON, no pickle.

        Raises:
            InputError: The folder is a file, or that of a run.
        """
        check_is_fitted(self, "n_iter_")
        folder = as_path(path)
        if (folder / CONFIG_FILE).exists():  # whose checkpoints would go
            raise InputError(f"{folder} holds a run of training: save into another folder")
        try:
            save_checkpoint(folder, self.n_iter_, self.state(), keep=1)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{folder} is a file, not a folder") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str = "cpu") -> "TableSynthesizer":
        """Read what ``save`` wrote, or the newest checkpoint of a run.

        Raises:
            InputError: There is no such folder, or what it holds is damaged.
        """
        checkpoint = load_checkpoint(as_path(path))
        if checkpoint is None or "preparation" not in checkpoint.state:
            raise InputError(f"{path} holds no table that was learned")
        state = checkpoint.state
        kinds = {read(name): kind for name, kind in state["options"]["kinds"]} or None
        hidden = tuple(state["options"]["hidden"])
        made = cls(**{**state["options"], "hidden": hidden, "kinds": kinds, "device": device})
        made._check_options()
        made.preparation_ = Preparation.of_state(state["preparation"])
        made._build(torch.zeros(0, len(made.preparation_.categories), dtype=torch.int32))
        made.history_, made.n_iter_ = [], checkpoint.step
        made.load_state(state)
        made.generator_.eval()
        return made

    def load_state(self, state: Tree) -> None:
        """Load the networks and the history of what ``state`` returned, in place."""
        self.history_[:] = state["history"]
        self.generator_.load_state_dict(state["generator"])
        self.critic_.load_state_dict(state["critic"])
        self.conditions_.load_state_dict(state["conditions"])

    def _build(self, codes: Tensor) -> None:
        of = self.preparation_
        sizes, starts = [len(fitted.values) for *_, fitted in of.categories], [start for start, *_ in of.categories]
        self.conditions_ = Conditions(codes, sizes, starts).to(self.device)
        condition = self.conditions_.width
        self.generator_ = TableGenerator(of.spans, self.latent_dim, condition, self.hidden).to(self.device)
        self.critic_ = PackedCritic(of.width + condition, self.hidden[0], group_size=self.group_size).to(self.device)

    @torch.no_grad()
    def _rows(self, count: int, asked: list[tuple[int, int]]) -> Tensor:
        columns, categories = self.conditions_.draw(count, balanced=False)
        for column, category in asked:
            columns, categories = torch.full_like(columns, column), torch.full_like(categories, category)
        return self.generator_.make(self.conditions_.encoded(columns, categories))[1]

    def categories_of(self, where: Mapping[str, str]) -> dict[Any, Any]:
        """Return what ``where`` of ``sample`` takes for names and categories that are written as text.

        Raises:
            InputError: There is no such column or category.
        """
        found: dict[Any, Any] = {}
        of = self.preparation_
        for name, text in where.items():
            columns = [i for i, fitted in of.fitted.items() if isinstance(fitted, Choices)]
            column = next((i for i in columns if str(of.columns[i].name) == name), None)
            values = of.fitted[column].values if column is not None else []  # type: ignore[union-attr]
            value = next((v for v in values if v is not None and str(v) == text), None if text == "" else text)
            found[name if column is None else of.columns[column].name] = value
        for name, value in found.items():
            self._condition(name, value)
        return found

    def _condition(self, name: Any, value: Any) -> tuple[int, int]:
        """Return which column of categories, and which of its categories, is meant."""
        of = self.preparation_
        named = list(enumerate(i for i, fitted in of.fitted.items() if isinstance(fitted, Choices)))
        found = [(n, of.fitted[i]) for n, i in named if of.columns[i].name == name]
        if not found:
            there = ", ".join(repr(of.columns[i].name) for _, i in named) or "none"
            raise InputError(f"there is no column of categories {name!r}; there are {there}")
        n, fitted = found[0]
        assert isinstance(fitted, Choices)
        position = {key(kept): i for i, kept in enumerate(fitted.values)}
        value = None if pd.api.types.is_scalar(value) and pd.isna(value) else plain(value)
        if not pd.api.types.is_scalar(value) or key(value) not in position:
            shown = ", ".join(repr(kept) for kept in fitted.values[:20])
            raise InputError(f"column {name!r} has no {value!r}; there are {shown}")
        return n, position[key(value)]


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value < 2**63:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
