"""PyTorch's libraries, switched off where their layers cannot be differentiated twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def switched_off(*backends: Any) -> Iterator[None]:
    """Have PyTorch take its own layers in place of those of ``torch.backends.cudnn`` or ``torch.backends.mkldnn``.

    Unlike the backends' own ``flags``, this reads no other setting: those refuse to be read under some settings of
    ``fp32_precision``.
    """
    before = [backend.enabled for backend in backends]
    for backend in backends:
        backend.enabled = False
    try:
        yield
    finally:
        for backend, enabled in zip(backends, before):
            backend.enabled = enabled
