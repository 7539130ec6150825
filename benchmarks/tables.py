"""TableSynthesizer against the package ctgan: the same table, networks, batches, epochs and threads, in turns.

    python benchmarks/tables.py --ctgan PYTHON --table diamonds.csv --out benchmarks/results/tables

``PYTHON`` is an interpreter that has ctgan, which is no dependency. Every run is a process of its own and tells its
settings; unequal ones are refused. Quality is asked of rows that neither has seen: distances of columns and of pairs,
and a model that is trained on made rows and tested on real ones, beside one that is trained on real ones.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SEEDS = (0, 1, 2)
ROWS = 10_000
"""Made of each learned table."""


def ours(table: pd.DataFrame, epochs: int, seed: int) -> tuple[dict[str, Any], pd.DataFrame]:
    """Times of the parts in seconds, the settings, and made rows."""
    import torch

    from wgan_fast.tables import TableSynthesizer

    marks = {}
    train = TableSynthesizer._train

    def timed(self: Any, rows: Any) -> None:
        marks["begun"] = time.perf_counter()
        train(self, rows)

    TableSynthesizer._train = timed  # type: ignore[method-assign]
    synthesizer = TableSynthesizer(epochs=epochs, seed=seed)
    start = time.perf_counter()
    synthesizer.fit(table)
    end = time.perf_counter()
    settings = {
        "epochs": synthesizer.epochs, "batch_size": synthesizer.batch_size, "latent_dim": synthesizer.latent_dim,
        "generator": list(synthesizer.hidden), "critic": list(synthesizer.hidden), "packed": synthesizer.group_size,
        "learning_rate": synthesizer.learning_rate, "weight_decay": synthesizer.weight_decay,
        "rows": len(table), "threads": torch.get_num_threads(),
    }  # fmt: skip
    seconds = {"preparation": marks["begun"] - start, "training": end - marks["begun"]}
    return {"settings": settings, **seconds}, synthesizer.sample(ROWS, seed=seed)


def theirs(table: pd.DataFrame, epochs: int, seed: int) -> tuple[dict[str, Any], pd.DataFrame]:
    """As ``ours``."""
    import torch
    from ctgan import CTGAN
    from ctgan.synthesizers import ctgan as module

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what it draws from)
    marks = {}
    sampler = module.DataSampler

    def marked(*args: Any, **kwargs: Any) -> Any:
        made = sampler(*args, **kwargs)
        marks["begun"] = time.perf_counter()
        return made

    module.DataSampler = marked
    model = CTGAN(epochs=epochs, verbose=False)
    discrete = [name for name in table.columns if not pd.api.types.is_numeric_dtype(table[name])]
    start = time.perf_counter()
    model.fit(table, discrete)
    end = time.perf_counter()
    settings = {
        "epochs": model._epochs, "batch_size": model._batch_size, "latent_dim": model._embedding_dim,
        "generator": list(model._generator_dim), "critic": list(model._discriminator_dim), "packed": model.pac,
        "learning_rate": model._generator_lr, "weight_decay": model._generator_decay,
        "rows": len(table), "threads": torch.get_num_threads(),
    }  # fmt: skip
    seconds = {"preparation": marks["begun"] - start, "training": end - marks["begun"]}
    return {"settings": settings, **seconds}, model.sample(ROWS)


def distances(made: pd.DataFrame, real: pd.DataFrame) -> dict[str, float]:
    """Mean distance of columns (Kolmogorov-Smirnov, total variation) and of pairs (correlations) of two tables."""
    numbers = [name for name in real.columns if pd.api.types.is_numeric_dtype(real[name])]
    columns = []
    for name in real.columns:
        one, other = made[name], real[name]
        if name in numbers:
            places = np.sort(np.concatenate([one, other]))
            shares = [np.searchsorted(np.sort(x), places, side="right") / len(x) for x in (one, other)]
            columns.append(float(np.abs(shares[0] - shares[1]).max()))
        else:
            shares = [x.value_counts(normalize=True) for x in (one, other)]
            columns.append(float(shares[0].sub(shares[1], fill_value=0).abs().sum() / 2))
    pairs = (made[numbers].corr() - real[numbers].corr()).abs().to_numpy()
    return {"columns": statistics.fmean(columns), "pairs": float(pairs[np.triu_indices(len(numbers), 1)].mean())}


def score(train: pd.DataFrame, test: pd.DataFrame, target: str) -> float:
    """R² on ``test`` of a boosted model that was trained on ``train``."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    def encoded(table: pd.DataFrame) -> Any:
        return pd.get_dummies(table.drop(columns=target)).astype(float)

    features = encoded(test)
    model = HistGradientBoostingRegressor(random_state=0)
    model.fit(encoded(train).reindex(columns=features.columns, fill_value=0.0), train[target])
    return float(model.score(features, test[target]))


def worker(which: str, options: argparse.Namespace) -> None:
    """One run, in the process of one of the two."""
    found, rows = {"ours": ours, "ctgan": theirs}[which](pd.read_csv(options.table), options.epochs, options.seed)
    rows.to_csv(options.out / "rows.csv", index=False)
    (options.out / "found.json").write_text(json.dumps(found))


def main() -> None:
    """Run both in turns and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctgan", type=Path, help="an interpreter that has ctgan")
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--target", default="price", help="the column that a model is to predict")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", choices=["ours", "ctgan"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options)

    from wgan_fast.bench.results import environment, slug

    real = pd.read_csv(options.table).sample(frac=1, random_state=0, ignore_index=True)
    held_out, train = real[:ROWS], real[ROWS:]
    result: dict[str, Any] = {"table": options.table.name, "target": options.target, "runs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train.to_csv(folder / "train.csv", index=False)
        for seed in SEEDS:
            settings = []
            for which, python in (("ours", Path(sys.executable)), ("ctgan", options.ctgan)):
                command = [python, __file__, "--worker", which, "--table", folder / "train.csv", "--out", folder]
                subprocess.run([*command, "--seed", str(seed), "--epochs", str(options.epochs)], check=True)
                found = json.loads((folder / "found.json").read_text())
                settings.append(found.pop("settings"))
                made = pd.read_csv(folder / "rows.csv")
                quality = {**distances(made, held_out), "score": score(made, held_out, options.target)}
                result["runs"].append({"which": which, "seed": seed, **found, **quality})
                print(result["runs"][-1], flush=True)
            if settings[0] != settings[1]:
                sys.exit(f"unequal settings, so no comparison: {settings[0]} and {settings[1]}")
            result["settings"] = settings[0]
    some = train.sample(ROWS, random_state=1)
    result["real"] = {**distances(some, held_out), "score": score(some, held_out, options.target)}
    import torch

    described = environment(torch.device("cpu"))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{slug(described)}-{options.table.stem}.json"
    path.write_text(json.dumps({"environment": described, **result}, indent=1) + "\n")
    for key in ("preparation", "training"):
        ours_, ctgan = ([run[key] for run in result["runs"] if run["which"] == w] for w in ("ours", "ctgan"))
        print(f"{key}: ctgan / ours {statistics.median(c / o for c, o in zip(ctgan, ours_)):.2f}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
