"""Settings that every test shares."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from textbook import CASES, Case

from wgan_fast.engine import piecewise_linear

# The tensors of the tests are small: threads only cost, and results stay the same from machine to machine.
torch.set_num_threads(1)

# It would hide a child process that does not flush what a test waits for.
os.environ.pop("PYTHONUNBUFFERED", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where tensors and layers are made: with cuda, the engine's tests run on a GPU")


def pytest_configure(config: pytest.Config) -> None:
    if device := config.getoption("--device"):
        torch.set_default_device(device)
        torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True, scope="session")
def _cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Classifiers that tests train are kept for the tests alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _global_settings_survive() -> Iterator[None]:
    """Fail a test that leaves autograd, the default dtype or autocast changed behind it."""
    yield
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def convolutions_compute_in() -> Iterator[Callable[[str], None]]:
    """Set what cuDNN's convolutions compute float32 in, for a test; monkeypatch cannot."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    yield lambda setting: setattr(conv, "fp32_precision", setting)
    conv.fp32_precision = before


@pytest.fixture
def replaced_however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the autograd engine replace the activations of tiny critics, too."""
    monkeypatch.setattr(piecewise_linear, "LARGE", 0)
