"""Settings by their names: read from a file, and found by the names that people know from other programs."""

import dataclasses
import difflib
import importlib.util
import json
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import InputError
from .config import TrainConfig

_OTHER_NAMES = {
    "data": "dataset data_dir data_path dataroot",
    "width": "dim ngf ndf base_channels",
    "latent_dim": "z_dim nz z_size noise_dim",
    "steps": "iterations iters n_iters num_iters max_iter",
    "epochs": "epoch n_epochs num_epochs",
    "batch_size": "batch bs",
    "n_critic": "n_critics critic_iters critic_steps n_dis",
    "learning_rate": "lr lr_d d_lr",
    "generator_learning_rate": "lr_g g_lr",
    "beta1": "b1",
    "beta2": "b2 alpha",
    "schedule": "scheduler lr_schedule lr_scheduler",
    "penalty_weight": "lambda lambda_gp gp_weight gp_lambda lambda_term",
    "clip": "clip_value weight_clip",
    "image_size": "img_size resolution",
    "device": "gpu gpus gpu_id cuda",
    "precision": "amp fp16 bf16",
    "workers": "num_workers n_workers",
    "out": "output output_dir outdir save_dir",
    "init_from": "pretrained finetune fine_tune",
    "log_every": "log_interval print_every",
    "sample_every": "sample_interval",
    "checkpoint_every": "save_every save_interval checkpoint_interval",
}
"""What settings are called in the code that people come from."""


def close_settings(name: str, settings: Collection[str]) -> list[str]:
    """Return the one of ``settings`` that an unknown name may have meant; empty where it is like none."""
    name = name.replace("-", "_")
    for setting, others in _OTHER_NAMES.items():
        if name in others.split() and setting in settings:
            return [setting]
    return difflib.get_close_matches(name, settings, n=1, cutoff=0.7)


def read_settings(path: Path) -> dict[str, Any]:
    """Read settings from a file: a mapping in YAML or JSON, or the ``config.json`` of a run, without its folder.

    Raises:
        InputError: It cannot be read, or a setting is unknown or not of its type.
    """
    try:
        values = _parse(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"config {path} cannot be read: {reason}") from error
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        values = {name: value for name, value in values["config"].items() if name != "out"}
    if not isinstance(values, dict):
        raise InputError(f"config {path} must hold settings by their names, such as steps: 2000")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    if "lr" in values and "learning_rate" not in values:
        values["learning_rate"] = values.pop("lr")  # as on the command line
    for name in values.keys() - _names():
        close = "".join(f"; did you mean {setting}?" for setting in close_settings(name, _names()))
        raise InputError(f"config {path} has an unknown setting {name}{close}")
    values = {name: _typed(name, value) for name, value in values.items()}
    try:
        TrainConfig(**values)
    except InputError as error:
        raise InputError(f"config {path}: {error}") from error
    return values


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(TrainConfig)]


def _typed(name: str, value: Any) -> Any:
    """Return numbers that YAML takes for text, such as 1e-4, as numbers."""
    if isinstance(value, str) and float in typing.get_args(typing.get_type_hints(TrainConfig)[name]):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    if importlib.util.find_spec("yaml") is None:
        raise ValueError(
            "YAML needs PyYAML: pip install 'wgan_fast[train]'; a name that ends in .json is read without it"
        )
    import yaml  # type: ignore[import-untyped,unused-ignore]

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
