"""What a run on a table is: its configuration, which is also ``wgan-fast train --data table.csv``."""

import dataclasses
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from ..errors import InputError
from ..training.config import MAX_SEED

SUFFIXES = (".csv", ".tsv", ".parquet")
CHANGEABLE = frozenset({"data", "device", "epochs", "log_every", "checkpoint_every", "keep", "out"})
"""What may differ when a run goes on: what does not change its course."""
_LEAST = {
    "rows": 1, "epochs": 1, "batch_size": 1, "latent_dim": 1, "width": 1, "seed": 0, "log_every": 1,
    "checkpoint_every": 1, "keep": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TableConfig:
    """Everything that decides a run on a table; defaults are CTGAN's (Xu et al. 2019, arXiv:1907.00503).

    Attributes:
        data: The table: a .csv, .tsv or .parquet file, compressed or not.
        column: What a column is, as NAME=KIND: number, integer, category, yes/no, date, constant, or identifier, which
            leaves it out. Once for each column that is not what it is taken for. Dates in another form than ISO 8601
            are date:%d/%m/%Y and so on.
        numbers: What a number becomes for the networks: its place in a mode of a mixture (modes), or its quantile.
        sep: What stands between values, such as ';'; a comma, in a .tsv file a tab, by default.
        decimal: What stands before decimals.
        rows: How many rows to draw from the file, each as likely, to learn from; all by default.
        stream: Whether the file is read in parts, twice: columns are told and fitted by a million rows that are drawn,
            and all rows are learned. By default where it would not fit into memory.
        holdout: Share of the rows kept from training, for evaluation.
        epochs: How often as many rows are drawn as the table has.
        batch_size: Rows in a batch.
        latent_dim: Length of the generator's noise.
        width: Units in each hidden layer of both networks.
        learning_rate: Of both networks.
        penalty_weight: Of the gradient penalty.
        seed: Of the split, of initialisation and of everything that is drawn.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one.
        precision: Of the critic's step: fp32, tf32, or bf16.
        out: Folder of the run; a new one under runs/ by default.
        log_every: Steps between lines of metrics.
        checkpoint_every: Steps between checkpoints, and between ratings against rows that were held out.
        keep: Checkpoints kept, the newest ones.
    """

    data: str
    column: tuple[str, ...] = ()
    numbers: Literal["modes", "quantiles"] = "modes"
    sep: str | None = None
    decimal: str = "."
    rows: int | None = None
    stream: bool | None = None
    holdout: float = 0.1
    epochs: int = 300
    batch_size: int = 500
    latent_dim: int = 128
    width: int = 256
    learning_rate: float = 2e-4
    penalty_weight: float = 10.0
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    out: Path | None = None
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        if self.seed > MAX_SEED:
            raise InputError(f"seed must be at most {MAX_SEED}, got {self.seed}")
        if not 0 <= self.holdout < 1:
            raise InputError(f"holdout must be in [0, 1), got {self.holdout}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate must be finite and above 0, got {self.learning_rate}")
        if len(self.decimal) != 1:
            raise InputError(f"decimal must be one character, got {self.decimal!r}")
        if self.stream and self.rows is not None:
            raise InputError(f"rows draws some of the rows, and stream learns all of them, got rows {self.rows}")
        _ = self.kinds

    @property
    def written(self) -> dict[str, str]:
        """What ``column`` says of columns by their names, with the form of dates."""
        return pairs(self.column, "column", "NAME=KIND, such as pay=number")

    @property
    def kinds(self) -> dict[str, str]:
        """What ``column`` says that columns are, by their names."""
        return {name: kind.partition(":")[0] for name, kind in self.written.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        return {**dataclasses.asdict(self), "out": None if self.out is None else str(self.out)}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the configuration of the run in ``folder``.

        Raises:
            InputError: There is none of a table, or it is damaged.
        """
        try:
            values = json.loads((folder / "config.json").read_text())["config"]
            return cls(**{**values, "column": tuple(values["column"]), "out": folder})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} holds no run on a table, or its config.json is damaged: {error}") from None

    def check_unchanged(self, after: Self) -> None:
        """Raise where a run that goes on would change a setting that decides its course.

        Raises:
            InputError: Naming the setting, what it was and what may change.
        """
        for name, value in vars(after).items():
            if name not in CHANGEABLE and value != getattr(self, name):
                raise InputError(
                    f"a resumed run keeps its settings: {name} was {getattr(self, name)!r}, got {value!r} "
                    f"(what may change: {', '.join(sorted(CHANGEABLE - {'out'}))})"
                )


def is_table(data: str) -> bool:
    """Say whether a path is that of a table, by its name."""
    return any(suffix.lower() in SUFFIXES for suffix in Path(data).suffixes)


def is_table_run(folder: Path) -> bool:
    """Say whether a folder holds a run on a table."""
    try:
        return bool(json.loads((folder / "config.json").read_text())["kind"] == "table")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def pairs(given: tuple[str, ...], option: str, form: str, names: Collection[str] = ()) -> dict[str, str]:
    """Return what is given as NAME=VALUE; the last "=" counts, unless another one ends one of ``names``.

    Raises:
        InputError: Something has no "=", is said twice, or may be split at several.
    """
    found: dict[str, str] = {}
    for pair in given:
        meant = [name for name in names if pair.startswith(f"{name}=")]
        if len(meant) > 1:
            raise InputError(f"{option} {pair!r} may be of the columns {' and '.join(map(repr, meant))}: rename one")
        name, equals, value = pair.rpartition("=") if not meant else (meant[0], "=", pair[len(meant[0]) + 1 :])
        if not equals or not name:
            raise InputError(f"{option} must be {form}, got {pair!r}")
        if found.setdefault(name, value) != value:
            raise InputError(f"{option} says both {found[name]!r} and {value!r} of {name!r}")
    return found
