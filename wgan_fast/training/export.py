"""A trained generator as files that need PyTorch alone: its weights, a description, and a program."""

import contextlib
import hashlib
import io
import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .. import __version__
from ..engine.guarded import hushed
from ..errors import InputError
from .files import write_atomically
from .networks import copy_of
from .randomness import undisturbed
from .run import Run, draw_noise

FORMAT = 1


def export_generator(run: Run, folder: Path) -> list[Path]:
    """Write what is sampled from a run, the moving average of its generator in eval mode, into a folder.

    Args:
        run: The run.
        folder: Where the files go; it is made, and files of an earlier export are replaced.

    Returns:
        The files: ``generator.safetensors`` holds the weights by their names in the module, ``generator.pt2`` a
        program of ``torch.export`` for the CPU and any number of samples (of noise, and of labels for a conditional
        run), and ``generator.json``, written last, says what both are and holds their SHA-256.

    Raises:
        InputError: ``torch.export`` does not take the generator, or makes another function of it; nothing is written.
        OSError: The folder cannot be written.
    """
    generator = copy_of(run.generator).cpu().eval()
    # A copy of its own for each: safetensors refuses tensors that share memory.
    weights = {name: tensor.clone().contiguous() for name, tensor in generator.state_dict().items()}
    noise = draw_noise(3, run.latent_dim, 0).to(next(generator.parameters()).dtype)
    program = _program(generator, noise, *run.condition(len(noise)))
    bodies = {"generator.safetensors": save(weights), "generator.pt2": program}
    config = run.description.config
    description = {
        "format": FORMAT,
        "generator": f"{type(generator).__module__.removesuffix('.architectures')}.{type(generator).__qualname__}",
        "weights": "moving average" if config.ema else "last",
        "step": run.step,
        "noise": "standard normal",
        "latent_dim": run.latent_dim,
        "classes": list(run.description.classes),
        "dtype": str(noise.dtype).removeprefix("torch."),
        "sample_shape": list(run.description.sample_shape),
        "kind": run.description.kind,
        "range": [-1, 1] if run.description.kind == "images" else None,
        "config": config.to_json(),
        "sha256": {name: hashlib.sha256(body).hexdigest() for name, body in bodies.items()},
        "versions": {"wgan_fast": __version__, "torch": torch.__version__},
    }
    bodies["generator.json"] = (json.dumps(description, indent=2) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in bodies.items():
        write_atomically(folder / name, body)
    return [folder / name for name in bodies]


@torch.no_grad()
def _program(generator: nn.Module, *inputs: Tensor) -> bytes:
    """Trace a generator, and see that the trace makes the same samples as the generator does."""
    cpu, buffer = torch.device("cpu"), io.BytesIO()
    try:
        # What it refuses it prints as well, as a graph.
        with undisturbed(cpu, 0), hushed(), contextlib.redirect_stderr(io.StringIO()):
            n = torch.export.Dim("n")
            shapes = tuple({0: n} for _ in inputs)
            program = torch.export.export(generator, tuple(part[:2] for part in inputs), dynamic_shapes=shapes)
            traced = program.module()
            torch.export.save(program, buffer)
    except Exception as error:  # what a tracer raises about a user's module has no common class
        why = str(error).strip().partition("\n")[0]
        raise InputError(f"torch.export does not take the generator: {type(error).__name__}: {why}") from error
    for rows in (1, len(inputs[0])):
        made = []
        for network in (generator, traced):
            with undisturbed(cpu, 0):
                made.append(network(*(part[:rows] for part in inputs)))
        try:
            torch.testing.assert_close(*made)
        except AssertionError as error:
            raise InputError(
                "torch.export does not take the generator: its program makes other samples, so the generator must "
                "depend on more than its weights and its noise"
            ) from error
    return buffer.getvalue()
