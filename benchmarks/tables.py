"""TableSynthesizer against the package ctgan: the same table, networks, batches, epochs and threads, in turns.

    python benchmarks/tables.py --ctgan PYTHON --table diamonds --epochs 30 --out benchmarks/results/tables

``PYTHON`` is an interpreter that has ctgan, plotnine and statsmodels, which are no dependencies. Every run is a process
of its own and tells its settings; unequal ones are refused. Quality is what ``wgan_fast.tables.judge`` finds of rows
that neither has seen.
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

MEASURES = {
    "preparation": "preparation, s",
    "training": "training, s",
    "columns": "distance of columns",
    "correlation": "correlations, difference",
    "ratio": "correlation ratios, difference",
    "contingency": "contingency tables, distance",
    "score": "R² of a model",
    "nearer_to_train": "closer to training than held out",
}
SEEDS = (0, 1, 2)
ROWS = 10_000
"""Made of each learned table."""


TABLES = {
    "diamonds": ("from plotnine.data import diamonds as table", "price"),
    "fair": (
        "from statsmodels.datasets import fair; table = fair.load_pandas().data; "
        "table = table.assign(**{c: 'kind ' + table[c].astype(str) for c in ('occupation', 'occupation_husb')})",
        "yrs_married",
    ),
}
"""How a table is made, and which of its columns a model is to predict."""


def ours(table: pd.DataFrame, epochs: int, seed: int) -> tuple[dict[str, Any], pd.DataFrame]:
    """Times of the parts in seconds, the settings, and made rows."""
    import torch

    from wgan_fast.tables import TableSynthesizer

    class Timed(TableSynthesizer):
        def _build(self, codes: Any) -> None:
            self.begun = time.perf_counter()  # the table is prepared; what follows is training, as it is of ctgan
            super()._build(codes)

    synthesizer = Timed(epochs=epochs, seed=seed)
    start = time.perf_counter()
    synthesizer.fit(table)
    end = time.perf_counter()
    settings = {
        "epochs": synthesizer.epochs, "batch_size": synthesizer.batch_size, "latent_dim": synthesizer.latent_dim,
        "generator": list(synthesizer.hidden), "critic": list(synthesizer.hidden), "packed": synthesizer.group_size,
        "learning_rate": synthesizer.learning_rate, "weight_decay": synthesizer.weight_decay,
        "rows": len(table), "threads": torch.get_num_threads(),
    }  # fmt: skip
    seconds = {"preparation": synthesizer.begun - start, "training": end - synthesizer.begun}
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


def worker(which: str, options: argparse.Namespace) -> None:
    """One run, in the process of one of the two."""
    table = pd.read_csv(options.out / "train.csv")
    found, rows = {"ours": ours, "ctgan": theirs}[which](table, options.epochs, options.seed)
    rows.to_csv(options.out / "rows.csv", index=False)
    (options.out / "found.json").write_text(json.dumps(found))


def quality(made: pd.DataFrame, train: pd.DataFrame, held_out: pd.DataFrame, target: str) -> dict[str, float]:
    """The figures of one run that are compared, and of real rows."""
    from wgan_fast.tables import judge

    found = judge(made, train, held_out, target=target)
    pairs = {name: of for name, of in found["pairs"].items() if of["mean"] is not None}
    return {
        "columns": found["columns"]["mean"], "columns_floor": found["columns"]["floor"],
        **{name: of["mean"] for name, of in pairs.items()},
        **{f"{name}_floor": of["floor"] for name, of in pairs.items()},
        "score": found["model"]["made"], "score_real": found["model"]["real"],
        "nearer_to_train": found["privacy"]["nearer_to_train"],
    }  # fmt: skip


def section(folder: Path) -> str:
    """The tables of docs/tables.md from committed results: medians over seeds, in brackets the least and the most."""
    from wgan_fast.bench.report import table

    parts = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        runs = {which: [run for run in found["runs"] if run["which"] == which] for which in ("ours", "ctgan")}
        settings = found["settings"]
        rows = [["", "ours", "ctgan", "real rows"]]
        for key, label in MEASURES.items():
            if key in runs["ours"][0]:
                real = found["runs"][0].get(f"{key}_floor", found["runs"][0].get(f"{key}_real"))
                rows.append([label, *(_spread([run[key] for run in of]) for of in runs.values()), _figure(real)])
        for key in ("preparation", "training"):
            ratios = [other[key] / own[key] for own, other in zip(*runs.values())]
            rows.append([f"{key}, ctgan / ours", _spread(ratios), "", ""])
        parts.append(
            f"`{found['table']}`: {settings['rows']:,} rows, {settings['epochs']} epochs, {len(runs['ours'])} seeds, "
            f"{settings['threads']} threads of {found['environment']['device']}. The model predicts "
            f"`{found['target']}`."
        )
        parts.append(table(rows))
    return "\n\n".join(parts)


def _spread(values: list[float]) -> str:
    return f"{_figure(statistics.median(values))} ({_figure(min(values))} to {_figure(max(values))})"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main() -> None:
    """Run both in turns and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctgan", type=Path, help="an interpreter that has ctgan")
    parser.add_argument("--table", choices=TABLES, default="diamonds")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, help="only write the results that are in OUT into this page")
    parser.add_argument("--worker", choices=["ours", "ctgan"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options)

    if options.report:
        from wgan_fast.bench.report import update

        return update(options.report, section(options.out))
    from wgan_fast.bench.results import environment, slug

    program, target = TABLES[options.table]
    result: dict[str, Any] = {"table": options.table, "target": target, "runs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = f"{program}; table.to_csv({str(folder / 'real.csv')!r}, index=False)"
        subprocess.run([options.ctgan, "-c", written], check=True)
        real = pd.read_csv(folder / "real.csv").sample(frac=1, random_state=0, ignore_index=True)
        kept = min(ROWS, len(real) // 5)
        held_out, train = real[:kept].reset_index(drop=True), real[kept:].reset_index(drop=True)
        train.to_csv(folder / "train.csv", index=False)
        for seed in SEEDS:
            settings = []
            for which, python in (("ours", Path(sys.executable)), ("ctgan", options.ctgan)):
                command = [python, __file__, "--worker", which, "--out", folder, "--seed", str(seed)]
                subprocess.run([*command, "--epochs", str(options.epochs)], check=True)
                found = json.loads((folder / "found.json").read_text())
                settings.append(found.pop("settings"))
                found |= quality(pd.read_csv(folder / "rows.csv"), train, held_out, target)
                result["runs"].append({"which": which, "seed": seed, **found})
                print(result["runs"][-1], flush=True)
            if settings[0] != settings[1]:
                sys.exit(f"unequal settings, so no comparison: {settings[0]} and {settings[1]}")
            result["settings"] = settings[0]
    import torch

    described = environment(torch.device("cpu"))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{slug(described)}-{options.table}.json"
    path.write_text(json.dumps({"environment": described, **result}, indent=1) + "\n")
    of = {which: [run for run in result["runs"] if run["which"] == which] for which in ("ours", "ctgan")}
    for key in ("preparation", "training"):
        ratios = [other[key] / own[key] for own, other in zip(of["ours"], of["ctgan"])]
        print(f"{key}: ctgan / ours {statistics.median(ratios):.2f} of {', '.join(f'{r:.2f}' for r in ratios)}")
    for key in of["ours"][0]:
        if key not in ("which", "seed", "preparation", "training"):
            shown = (f"{which} {statistics.median(run[key] for run in runs):.4f}" for which, runs in of.items())
            print(f"{key}: {', '.join(shown)}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
