"""What tests of the trainer share."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from runs import TINY

from wgan_fast.training.cli import main

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@pytest.fixture
def real_curves() -> None:
    """For a test that looks at the curves, in a file whose others draw none."""


@pytest.fixture
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes a second, most of the time of runs as small as those of tests."""
    if "real_curves" not in request.fixturenames:
        monkeypatch.setattr(
            "wgan_fast.training.curves.save_curves", lambda records, path, **options: path.write_bytes(b"")
        )


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; the command line puts it on the path of modules, which is restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, which tests must leave as it is."""
    out = tmp_path_factory.mktemp("finished") / "run"
    main(["train", *TINY, "--steps", "4", "--checkpoint-every", "2", "--out", str(out)])
    return out


@pytest.fixture
def run(finished: Path, workplace: Path) -> Path:
    """A copy of it in the current folder."""
    return Path(shutil.copytree(finished, workplace / "run"))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list["Figure"]:
    """The figures that were saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def remember(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures
