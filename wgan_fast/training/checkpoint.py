"""Checkpoints that survive a kill at any instant: two files, written aside, hashed, renamed into place.

``step-00000500.safetensors`` holds every tensor and, in its metadata, the JSON structure around them;
``step-00000500.json`` holds its SHA-256 and is written last, so a checkpoint exists once that file does. No pickle.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..errors import InputError
from .files import write_atomically

FORMAT = 1
CHECKPOINTS = "checkpoints"
"""The subfolder of a run that holds them."""
_TENSOR = "__tensor__"

Tree = Any
"""Nested dicts (string keys) and lists of tensors, numbers, strings, booleans and None."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint read back.

    Attributes:
        step: Generator steps taken when it was written.
        state: The tree that was saved, tensors on the CPU.
        path: The file that holds it.
        skipped: For every newer checkpoint that was passed over, its name and what is wrong with it.
    """

    step: int
    state: Tree
    path: Path
    skipped: tuple[str, ...] = ()


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a run's checkpoint of ``step`` lies."""
    return run / CHECKPOINTS / f"step-{step:08d}.safetensors"


def save_checkpoint(run: Path, step: int, state: Tree, *, keep: int) -> Path:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep`` up to it.

    A later one can only be a damaged one that was passed over when the run was resumed: it is removed too.

    Args:
        run: The run's folder.
        step: Generator steps taken.
        state: What to save; tensors of any device, shape and dtype.
        keep: Checkpoints to leave, at least 1.

    Returns:
        The path of the tensor file.

    Raises:
        OSError: The disk refused; earlier checkpoints are untouched.
    """
    folder = run / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    structure = _pack(state, "", tensors)
    metadata = {"format": str(FORMAT), "step": str(step), "structure": json.dumps(structure)}
    body = save(tensors, metadata)
    path = checkpoint_path(run, step)
    write_atomically(path, body)
    digest = {"format": FORMAT, "step": step, "sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)}
    write_atomically(path.with_suffix(".json"), json.dumps(digest).encode())
    _prune(folder, step, keep)
    return path


def has_checkpoint(run: Path) -> bool:
    """Whether a run has written a checkpoint, whole or damaged since."""
    return any((run / CHECKPOINTS).glob("step-*.json"))


def load_checkpoint(run: Path) -> Checkpoint | None:
    """Read the newest checkpoint of a run that is whole.

    Args:
        run: The run's folder.

    Returns:
        The checkpoint; None if the run has not written any.

    Raises:
        InputError: There are checkpoints, and every one of them is damaged.
    """
    skipped: list[str] = []
    for seal in sorted((run / CHECKPOINTS).glob("step-*.json"), reverse=True):
        try:
            step, state = _read(seal)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            skipped.append(f"{seal.stem} ({error})")
            continue
        return Checkpoint(step, state, seal.with_suffix(".safetensors"), tuple(skipped))
    if skipped:
        raise InputError(f"every checkpoint in {run} is damaged: {'; '.join(skipped)}")
    return None


def load_module(module: nn.Module, state: dict[str, Tensor], name: str, source: Path) -> None:
    """Load ``state`` into ``module``.

    Raises:
        InputError: The state belongs to another architecture; the message names the first difference.
    """
    own = module.state_dict()
    for key in dict.fromkeys([*own, *state]):
        if key not in state:
            difference = f"{key} is missing"
        elif key not in own:
            difference = f"{key} is not in the model"
        elif own[key].shape != state[key].shape:
            difference = f"{key} has shape {list(state[key].shape)}, the model's is {list(own[key].shape)}"
        else:
            continue
        raise InputError(f"{source} holds another architecture of the {name}: {difference}")
    module.load_state_dict(state)


def _read(seal: Path) -> tuple[int, Tree]:
    path = seal.with_suffix(".safetensors")
    digest = json.loads(seal.read_bytes())
    if digest["format"] != FORMAT:
        raise ValueError(f"its format is {digest['format']}, this version reads {FORMAT}")
    # Read once, into memory: the bytes used are the bytes hashed, and no tensor is a view of a file that may change.
    body = path.read_bytes()
    if hashlib.sha256(body).hexdigest() != digest["sha256"]:
        raise ValueError("its SHA-256 differs from the recorded one")
    tensors = load(body)
    metadata = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
    if not int(metadata["step"]) == digest["step"] == int(seal.stem.removeprefix("step-")):
        raise ValueError("its name, its seal and its content disagree about the step")
    return digest["step"], _unpack(json.loads(metadata["structure"]), tensors)


def _pack(tree: Tree, name: str, tensors: dict[str, Tensor]) -> Tree:
    """Replace every tensor of ``tree`` by a reference to its name and collect it, copied to the CPU."""
    if isinstance(tree, Tensor):
        # A copy of its own for each: safetensors refuses tensors that share memory (tied weights).
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(tree, dict):
        return {key: _pack(value, f"{name}.{key}" if name else key, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_pack(value, f"{name}.{index}", tensors) for index, value in enumerate(tree)]
    return tree


def _unpack(tree: Tree, tensors: dict[str, Tensor]) -> Tree:
    if isinstance(tree, dict):
        if tree.keys() == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: _unpack(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_unpack(value, tensors) for value in tree]
    return tree


def _prune(folder: Path, step: int, keep: int) -> None:
    seals = sorted(folder.glob("step-*.json"))
    kept = [seal for seal in seals if seal.stem <= f"step-{step:08d}"][-keep:]
    for seal in seals:
        # The seal goes first: a checkpoint without its tensors would look damaged, one without a seal is none.
        if seal not in kept:
            seal.unlink()
    sealed = {seal.stem for seal in kept}
    for path in [*folder.glob("step-*.safetensors"), *folder.glob(".step-*.tmp")]:
        if path.stem not in sealed:
            path.unlink()


def optimizer_state(optimizer: torch.optim.Optimizer) -> Tree:
    """Return an optimizer's state as a tree with string keys."""
    state = optimizer.state_dict()
    return {**state, "state": {str(index): values for index, values in state["state"].items()}}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Tree, *, own: bool = False) -> None:
    """Load the moments that ``optimizer_state`` returned.

    Settings stay those that the optimizer was built with, except for one of the user's ``own``, which may keep what
    changes among them.
    """
    moments = {int(index): values for index, values in state["state"].items()}
    groups = state["param_groups"] if own else optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            # Fused optimizers go through memory side by side, whatever the strides say.
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
