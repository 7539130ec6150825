"""Imports point down: operators and the four-pass engine know nothing of what is built on them."""

import ast
from pathlib import Path

import pytest

import wgan_fast

ROOT = Path(wgan_fast.__file__).parent
LEAVES = {"backends", "build", "checks", "errors", "precision", "reference"}
FACE = {"clipping", "critic_step", "explain", "losses", "optim", "penalty", "points"}
ALLOWED = {
    "backends.py": set(),
    "errors.py": set(),
    "precision.py": set(),
    "build.py": {"__version__"},
    "checks.py": {"precision"},
    "reference.py": {"precision"},
    "ops": {"ops", "build", "precision", "reference"},
    "four_pass": {"four_pass", "ops", *LEAVES},
    "engine": {"engine", "four_pass", "ops", *LEAVES},
    "losses.py": {"precision"},
    "clipping.py": {"ops", *LEAVES},
    "optim.py": {"clipping", "ops", *LEAVES},
    "explain.py": {"critic_step", "engine", "four_pass", "losses", "points", *LEAVES},
    "points.py": {"ops", *LEAVES},
    "penalty.py": {"engine", "four_pass", "ops", "points", *LEAVES},
    "critic_step.py": {"engine", "four_pass", "ops", "losses", "points", *LEAVES},
    "__init__.py": {*FACE, "build"},
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
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "wgan_fast"]
            found |= {f"{name}.wgan_fast".split(".")[1] for name in names}
    return found


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_layer_imports_only_what_is_below_it(layer: str) -> None:
    path = ROOT / layer
    modules = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert modules
    upwards = {str(module.relative_to(ROOT)): imported(module) - ALLOWED[layer] for module in modules}
    assert not {module: names for module, names in upwards.items() if names}


def test_every_module_below_the_application_has_its_place() -> None:
    parts = {path.name for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert parts - {"training", "tables", "bench", "__main__.py", "kernels"} == ALLOWED.keys()


def test_kernels_import_nothing_of_the_package() -> None:
    for path in (ROOT.parent / "kernels").glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text()))
        names = [n.module or "" for n in tree if isinstance(n, ast.ImportFrom) and not n.level]
        assert not [name for name in names if name.startswith("wgan_fast")], path


def test_an_import_upwards_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    module = tmp_path / "ops" / "inner" / "one.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "from ...engines import explain\nfrom ... import penalty\nfrom . import two\n"
        "import wgan_fast.cli\nimport wgan_fast\n"
    )
    assert imported(module) == {"engines", "penalty", "ops", "cli", "wgan_fast"}
