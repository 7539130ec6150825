"""The tests of the Triton kernels, for a process in which Triton interprets: tests/ops/test_kernels.py starts it."""

import os
from collections.abc import Iterator

import pytest
import torch

# The kernels are built for the interpreter or for a GPU as they are imported: these tests need a process of their own.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _new_memory_is_nan() -> Iterator[None]:
    """Poison what torch.empty gives: an element that a kernel does not write fails every comparison."""
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
