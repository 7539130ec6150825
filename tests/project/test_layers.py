"""Imports point down: operators and the four-pass engine know nothing of what is built on them."""

import ast
from pathlib import Path

import pytest

import wgan_fast

ROOT = Path(wgan_fast.__file__).parent
LEAVES = {"backends", "build", "checks", "errors", "precision", "reference"}
ALLOWED = {
    "reference.py": {"precision"},
    "precision.py": set(),
    "ops": {"ops", *LEAVES},
    "four_pass": {"four_pass", "ops", *LEAVES},
    "engine": {"engine", "four_pass", "ops", "losses", *LEAVES},
    "losses.py": LEAVES,
    "explain.py": {"engine", "four_pass", "losses", *LEAVES},
    "penalty.py": {"engine", "four_pass", "ops", *LEAVES},
    "critic_step.py": {"engine", "four_pass", "ops", "losses", "penalty", *LEAVES},
}


def imported(path: Path) -> set[str]:
    """The parts of the package's root that a module imports, wherever in it."""
    found = set()
    package = ["wgan_fast", *path.parent.relative_to(ROOT).parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            absolute = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [part for part in absolute[1:] if part]
            found |= {names[0]} if names else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wgan_fast"):
            found.add((node.module or "").split(".")[1] if "." in (node.module or "") else "wgan_fast")
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("wgan_fast.")}
    return found


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_only_what_is_below_it(layer: str) -> None:
    path = ROOT / layer
    modules = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert modules
    upwards = {str(module.relative_to(ROOT)): imported(module) - ALLOWED[layer] for module in modules}
    assert not {module: names for module, names in upwards.items() if names}


def test_an_import_upwards_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    module = tmp_path / "ops" / "inner" / "one.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "from ...engines import explain\nfrom ... import penalty\nfrom . import two\nimport wgan_fast.cli\n"
    )
    assert imported(module) == {"engines", "penalty", "ops", "cli"}
