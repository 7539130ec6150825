"""A table learned by CTGAN's method, with the critic's step in four passes."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ..critic_step import CriticStep
from ..errors import InputError
from ..points import PenaltyConfig
from ..training.files import write_atomically
from ..training.models import PackedCritic
from .columns import key, plain
from .networks import Conditions, TableGenerator
from .preparation import Choices, Preparation, read, written

_TOLD = "table.json"
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

    Example:
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
        self.kinds = kinds
        self.precision = precision
        self.device = device
        self.seed = seed

    def fit(self, table: pd.DataFrame, y: None = None) -> "TableSynthesizer":
        """Learn a table, from the beginning.

        Raises:
            InputError: As ``columns_of``; an option is out of range.
        """
        if not isinstance(table, pd.DataFrame):
            raise InputError(f"a table is a pandas.DataFrame, got {type(table).__name__}")
        self._check_options()
        before = dict(self.__dict__)
        try:
            self.preparation_ = Preparation.fit(table, self.kinds, seed=self.seed)
            matrix = self.preparation_.transform(table, seed=self.seed)
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self._build(_codes(self.preparation_, matrix))
                self._train(torch.from_numpy(matrix).float().to(self.device))
        except BaseException:  # what was learned before is still there
            self.__dict__ = before
            raise
        return self

    def _check_options(self) -> None:
        for name in ("epochs", "batch_size", "latent_dim", "group_size"):
            _whole(name, getattr(self, name), 1)
        _whole("seed", self.seed, 0)
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
            rows, have, tried = [], 0, 0
            while have < n:
                made = self._rows(min(max(n, 2), 10_000), asked[:1])
                tried += len(made)
                for column, category in asked:
                    start = self.conditions_.starts[column]
                    one_of = made[:, start : start + self.conditions_.sizes[column]]
                    made = made[one_of.argmax(dim=1) == category]
                rows.append(made)
                have += len(made)
                if tried > MOST_TRIES * n + 10_000 and have < n:
                    raise InputError(f"of {tried} rows {have} have what `where` asks for: the combination is too rare")
            matrix = torch.cat(rows)[:n] if rows else torch.empty(0, self.preparation_.width)
        return self.preparation_.inverse(matrix.double().cpu().numpy())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that ``sample`` needs into a folder, which is made: JSON and safetensors, no pickle."""
        from safetensors.torch import save

        check_is_fitted(self, "generator_")
        folder = Path(path).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise InputError(f"{folder} is a file, not a folder") from None
        tensors = {f"generator.{k}": v for k, v in self.generator_.state_dict().items()}
        tensors |= {f"critic.{k}": v for k, v in self.critic_.state_dict().items()}
        tensors["conditions.counts"] = self.conditions_.counts
        body = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
        digest = hashlib.sha256(body).hexdigest()
        kinds = [[written(name), kind] for name, kind in (self.kinds or {}).items()]
        options = {**self.get_params(), "hidden": list(self.hidden), "kinds": kinds}
        told = {"options": options, "preparation": self.preparation_.state(), "history": self.history_}
        told["networks"] = digest
        # What is told names its networks: whenever this is cut off, one of both savings is whole.
        write_atomically(folder / _networks(digest), body)
        write_atomically(folder / _TOLD, json.dumps(told, default=plain).encode())
        for other in set(folder.glob(_networks("*"))) - {folder / _networks(digest)}:
            other.unlink()

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str = "cpu") -> "TableSynthesizer":
        """Read what ``save`` wrote.

        Raises:
            InputError: There is no such folder, or what it holds is damaged.
        """
        from safetensors.torch import load

        folder = Path(path).expanduser()
        try:
            told = json.loads((folder / _TOLD).read_text())
            body = (folder / _networks(told["networks"])).read_bytes()
            if told["networks"] != hashlib.sha256(body).hexdigest():
                raise ValueError("the networks are not what was saved")
            tensors = load(body)
            options = {**told["options"], "hidden": tuple(told["options"]["hidden"]), "device": device}
            options["kinds"] = {read(name): kind for name, kind in options["kinds"]} or None
            made = cls(**options)
            made.preparation_ = Preparation.of_state(told["preparation"])
            made.history_ = told["history"]
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{folder} holds no table that was learned, or not all of it") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"what {folder} holds is damaged: {error}") from None
        made._build(torch.zeros(0, len(_choices(made.preparation_)), dtype=torch.int64))
        for name in ("generator", "critic", "conditions"):
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            getattr(made, f"{name}_").load_state_dict(own)
        made.generator_.eval()
        return made

    def _build(self, codes: Tensor) -> None:
        choices = _choices(self.preparation_)
        sizes = [len(fitted.values) for _, fitted in choices]
        self.conditions_ = Conditions(codes, sizes, [start for start, _ in choices]).to(self.device)
        spans, width = self.preparation_.spans, self.preparation_.width + self.conditions_.width
        self.generator_ = TableGenerator(spans, self.latent_dim, self.conditions_.width, self.hidden).to(self.device)
        self.critic_ = PackedCritic(width, self.hidden[0], group_size=self.group_size).to(self.device)

    def _train(self, rows: Tensor) -> None:
        N = min(self.batch_size, len(rows)) // self.group_size * self.group_size
        if N == 0:
            raise InputError(f"a batch of {min(self.batch_size, len(rows))} rows has no group of {self.group_size}")
        penalty = PenaltyConfig(weight=self.penalty_weight, group_size=self.group_size)
        step = CriticStep(self.critic_, penalty=penalty, precision=self.precision)  # type: ignore[arg-type]
        options: dict[str, Any] = {"lr": self.learning_rate, "betas": (0.5, 0.9), "weight_decay": self.weight_decay}
        of_critic = torch.optim.Adam(self.critic_.parameters(), **options, fused=True)
        of_generator = torch.optim.Adam(self.generator_.parameters(), **options, fused=True)
        self.history_: list[dict[str, float]] = []
        self.generator_.train(), self.critic_.train()
        for _ in range(self.epochs):
            for _ in range(max(1, len(rows) // N)):
                columns, categories = self._drawn(N)
                with torch.no_grad():
                    fake = self._fake(N, columns, categories)[1]
                shuffled = torch.randperm(N, device=rows.device)
                result = step(self._real(rows, columns[shuffled], categories[shuffled]), fake)
                of_critic.step()

                columns, categories = self._drawn(N)
                raw, fake = self._fake(N, columns, categories)
                loss = -self.critic_(fake).mean()
                if self.conditions_.width:
                    loss = loss + self.conditions_.loss(raw, columns, categories)
                of_generator.zero_grad()
                loss.backward(inputs=list(self.generator_.parameters()))
                of_generator.step()
            self.history_.append({"critic": result.loss.item(), "generator": loss.item()})
        self.generator_.eval()

    def _drawn(self, count: int, *, balanced: bool = True) -> tuple[Tensor, Tensor]:
        if self.conditions_.width:
            return self.conditions_.draw(count, balanced=balanced)
        nothing = torch.zeros(count, dtype=torch.int64, device=self.device)
        return nothing, nothing

    def _real(self, rows: Tensor, columns: Tensor, categories: Tensor) -> Tensor:
        if not self.conditions_.width:
            return rows[torch.randint(len(rows), (len(columns),), device=rows.device)]
        drawn = rows[self.conditions_.rows_of(columns, categories)]
        return torch.cat([drawn, self.conditions_.encoded(columns, categories)], dim=1)

    def _fake(self, count: int, columns: Tensor, categories: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn(count, self.latent_dim, device=self.device)
        condition = self.conditions_.encoded(columns, categories) if self.conditions_.width else noise[:, :0]
        raw = self.generator_(noise, condition)
        return raw, torch.cat([self.generator_.activated(raw), condition], dim=1)

    @torch.no_grad()
    def _rows(self, count: int, asked: list[tuple[int, int]]) -> Tensor:
        columns, categories = self._drawn(count, balanced=False)
        for column, category in asked:
            columns, categories = torch.full_like(columns, column), torch.full_like(categories, category)
        return self._fake(count, columns, categories)[1][:, : self.preparation_.width]

    def _condition(self, name: Any, value: Any) -> tuple[int, int]:
        """Return which column of categories, and which of its categories, is meant."""
        of = self.preparation_
        named = [(n, i) for n, i in enumerate(i for i, f in of.fitted.items() if isinstance(f, Choices))]
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


def _networks(digest: str) -> str:
    return f"networks-{digest[:16]}.safetensors"


def _choices(preparation: Preparation) -> list[tuple[int, Choices]]:
    """Return where in a row each column of categories begins, and the column."""
    found, start = [], 0
    for fitted in preparation.fitted.values():
        if isinstance(fitted, Choices):
            found.append((start, fitted))
        start += sum(span.width for span in fitted.spans)
    return found


def _codes(preparation: Preparation, matrix: Any) -> Tensor:
    codes = [
        torch.from_numpy(matrix[:, start : start + len(fitted.values)].argmax(axis=1))
        for start, fitted in _choices(preparation)
    ]
    return torch.stack(codes, dim=1) if codes else torch.zeros(len(matrix), 0, dtype=torch.int64)
