"""benchmarks/forms.py: its variants compute the same, and docs/forms.md is what was measured."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def forms() -> ModuleType:
    spec = importlib.util.spec_from_file_location("forms", CHECKOUT / "benchmarks" / "forms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAST = ["r1-r2/toy-mlp", "stargan/64"]
SLOW = ["r1-r2/dcgan-28", "r1-r2/r3gan-32", "forces/128x16x64"]


@pytest.mark.parametrize("name", [*FAST, *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]])
def test_variants_leave_the_same_gradients(forms: ModuleType, name: str) -> None:
    forms.cases()[name].check()


def test_a_variant_that_differs_is_refused(forms: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = forms.cases()["r1-r2/toy-mlp"]
    make = case.make

    def wrong(*given):
        steps = make(*given)
        return steps | {"ours": lambda: (steps["ours"](), [p.grad.mul_(1.001) for p in given[0].parameters()])}

    monkeypatch.setattr(case, "make", wrong)
    with pytest.raises(AssertionError, match="ours"):
        case.check()


def test_the_page_is_what_was_measured(forms: ModuleType) -> None:
    page = (CHECKOUT / "docs" / "forms.md").read_text()
    assert page == forms.report(CHECKOUT / "benchmarks" / "results" / "forms"), "run `make report`"
    assert "usual / ours" in page


def test_one_form_is_measured_into_a_file(
    forms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forms, "SECONDS", 0.05)
    monkeypatch.setattr(sys, "argv", ["forms.py", "--out", str(tmp_path), "--only", "r1-r2/toy"])
    forms.main()
    assert "usual / ours" in capsys.readouterr().out
    assert "R1 + R2 and loss" in forms.report(tmp_path)
