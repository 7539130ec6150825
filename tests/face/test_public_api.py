import dataclasses
import doctest
import importlib
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import wgan_fast
from wgan_fast import CriticStep, CriticStepResult, GradientPenalty, PenaltyConfig

NAMES = {
    "Explanation",
    "explain",
    "CriticStep",
    "CriticStepResult",
    "GradientPenalty",
    "PenaltyConfig",
    "PenaltyResult",
    "build_info",
    "clip_weights_",
    "gradient_penalty",
    "interpolate",
    "losses",
    "optim",
    "penalty_from_gradient",
}
REQUIRED = inspect.Parameter.empty
PENALTY_OPTIONS = {"weight": 10.0, "target": 1.0, "one_sided": False}
FORM_OPTIONS = {"score": None, "penalty": None, **PENALTY_OPTIONS, "at": "interpolates"}
CALL_OPTIONS = {
    "generator": None,
    "group_size": 1,
    "critic_args": (),
    "penalty_args": (),
    "critic_kwargs": None,
    "engine": "auto",
    "return_norms": False,
    "return_scores": False,
}

# What calling code relies on: positional arguments in their order, keyword arguments in any, and their defaults.
SIGNATURES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "gradient_penalty": (
        wgan_fast.gradient_penalty,
        {"critic": REQUIRED, "real": None, "fake": None},
        {"points": None, "alpha": None, **FORM_OPTIONS, **CALL_OPTIONS},
    ),
    "GradientPenalty": (
        GradientPenalty,
        {"critic": REQUIRED, "config": None},
        {**FORM_OPTIONS, **CALL_OPTIONS},
    ),
    "GradientPenalty()": (
        GradientPenalty.__call__,
        {"self": REQUIRED, "real": None, "fake": None, "alpha": None},
        {"points": None, "critic_args": None, "penalty_args": None, "critic_kwargs": None},
    ),
    "CriticStep": (
        CriticStep,
        {"critic": REQUIRED},
        {
            "loss": "wasserstein",
            "penalty": PenaltyConfig.wgan_gp(),
            "score": None,
            "engine": "auto",
            "compile": False,
            "precision": "fp32",
            "schedule": "auto",
        },
    ),
    "CriticStep()": (
        CriticStep.__call__,
        {"self": REQUIRED, "real": REQUIRED, "fake": REQUIRED, "alpha": None, "accumulate": False},
        {
            "critic_args": (),
            "critic_kwargs": None,
            "fake_args": None,
            "fake_kwargs": None,
            "loss_args": (),
            "penalty_args": (),
        },
    ),
    "PenaltyConfig": (
        PenaltyConfig,
        {
            **PENALTY_OPTIONS,
            "at": "interpolates",
            "group_size": 1,
            "every": 1,
            "samples": None,
            "penalty": None,
            "score": None,
        },
        {},
    ),
    "PenaltyConfig.wgan_gp": (PenaltyConfig.wgan_gp, {"weight": 10.0}, {}),
    "PenaltyConfig.wgan_lp": (PenaltyConfig.wgan_lp, {"weight": 10.0}, {}),
    "PenaltyConfig.r1": (PenaltyConfig.r1, {"gamma": 10.0}, {}),
    "PenaltyConfig.r2": (PenaltyConfig.r2, {"gamma": 10.0}, {}),
    "PenaltyConfig.dragan": (PenaltyConfig.dragan, {"weight": 10.0}, {}),
    "penalty_from_gradient": (wgan_fast.penalty_from_gradient, {"gradient": REQUIRED}, PENALTY_OPTIONS),
    "interpolate": (
        wgan_fast.interpolate,
        {"real": REQUIRED, "fake": REQUIRED, "alpha": None},
        {"generator": None, "out": None},
    ),
    "clip_weights_": (wgan_fast.clip_weights_, {"module_or_tensors": REQUIRED, "bound": 0.01}, {}),
    "build_info": (wgan_fast.build_info, {}, {}),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_as_promised(name: str) -> None:
    function, positional, keyword = SIGNATURES[name]
    parameters = inspect.signature(function).parameters.values()
    by_kind = {kind: {p.name: p.default for p in parameters if p.kind == kind} for kind in {p.kind for p in parameters}}
    actual_positional = by_kind.pop(inspect.Parameter.POSITIONAL_OR_KEYWORD, {})
    actual_keyword = by_kind.pop(inspect.Parameter.KEYWORD_ONLY, {})
    assert list(actual_positional.items()) == list(positional.items())
    assert actual_keyword == keyword
    assert not by_kind


def test_the_public_names_are_those_promised() -> None:
    assert set(wgan_fast.__all__) == NAMES
    assert all(hasattr(wgan_fast, name) for name in NAMES)


def test_the_version_is_that_of_the_distribution() -> None:
    try:
        installed = importlib.metadata.version("wgan_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from the source tree, not installed")
    assert wgan_fast.__version__ == installed


def test_the_result_of_a_step_has_the_promised_fields() -> None:
    fields = ("loss", "penalty", "wasserstein", "real_score", "fake_score", "gradient_norm")
    assert CriticStepResult._fields == fields


def test_a_config_has_the_promised_fields_and_no_others() -> None:
    fields = ["weight", "target", "one_sided", "at", "group_size", "every", "samples", "penalty", "score"]
    assert [field.name for field in dataclasses.fields(PenaltyConfig)] == fields


@pytest.mark.parametrize("name", ["wasserstein", "non_saturating", "least_squares", "hinge"])
def test_a_loss_has_a_side_for_each_network(name: str) -> None:
    loss = getattr(wgan_fast.losses, name)
    scores = torch.zeros(3)
    assert loss.critic(scores, scores).dim() == 0
    assert loss.generator(scores).dim() == 0


def test_training_has_the_promised_names() -> None:
    training = pytest.importorskip("wgan_fast.training", exc_type=ImportError)
    assert {"TrainConfig", "Trainer"} <= set(training.__all__)


def test_importing_the_package_needs_and_loads_no_optional_dependency() -> None:
    optional = ("matplotlib", "PIL", "ot", "rich", "safetensors", "tyro", "mlxtend", "skimage", "sklearn", "triton")
    block = f"import sys; sys.modules.update(dict.fromkeys({optional!r}))"  # a None there makes an import fail
    use = "import torch, wgan_fast as w; w.gradient_penalty(torch.nn.Linear(2, 1), torch.ones(3, 2), torch.zeros(3, 2))"
    run = subprocess.run([sys.executable, "-c", f"{block}; {use}"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def modules() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(wgan_fast.__path__, "wgan_fast.", onerror=lambda _: None)]
    return ["wgan_fast", *(name for name in found if not name.endswith(("._C", ".__main__")))]


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_the_documentation_are_true(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if str(error.name).startswith("wgan_fast"):
            raise
        pytest.skip(f"{name}: {error}")
    assert doctest.testmod(module).failed == 0


def test_the_functions_of_the_tensor_api_have_examples() -> None:
    for function in ("gradient_penalty", "interpolate", "penalty_from_gradient", "clip_weights_"):
        assert ">>>" in inspect.getdoc(getattr(wgan_fast, function)), function


def test_importing_the_package_imports_no_compiler() -> None:
    heavy = ("torch._dynamo", "sympy", "triton", "matplotlib", "sklearn")
    code = (
        f"import sys, torch; known = set(sys.modules); import wgan_fast; print(set({heavy}) & set(sys.modules) - known)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert output.strip() == "set()"
