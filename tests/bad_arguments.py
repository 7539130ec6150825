"""Arguments that must be refused: what is wrong, the arguments, the exception, and words of its message.

The words are the name of the argument, its value and, where there is one, the rule. Batches are ``[4, 6]``.
"""

from typing import Any

import pytest
import torch

Row = tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]


HERE = torch.get_default_device().type
NAN, INF = float("nan"), float("inf")
OPTION_ERRORS: list[Row] = [
    ("weight is a string", {"weight": "10"}, TypeError, ("weight", "str")),
    ("weight is a bool", {"weight": True}, TypeError, ("weight", "bool")),
    ("weight is a tensor", {"weight": torch.tensor(10.0)}, TypeError, ("weight", "Tensor")),
    ("weight is None", {"weight": None}, TypeError, ("weight", "NoneType")),
    ("weight is NaN", {"weight": NAN}, ValueError, ("weight", "nan")),
    ("weight is infinite", {"weight": INF}, ValueError, ("weight", "inf")),
    ("weight is negative", {"weight": -1.5}, ValueError, ("weight", "-1.5")),
    ("target is a string", {"target": "1"}, TypeError, ("target", "str")),
    ("target is NaN", {"target": NAN}, ValueError, ("target", "nan")),
    ("target is infinite", {"target": -INF}, ValueError, ("target", "-inf")),
    ("target is negative", {"target": -0.25}, ValueError, ("target", "-0.25")),
    ("one_sided is a number", {"one_sided": 1}, TypeError, ("one_sided", "1")),
    ("one_sided is a string", {"one_sided": "yes"}, TypeError, ("one_sided", "'yes'")),
    ("at is unknown", {"at": "middle"}, ValueError, ("at", "'middle'", "interpolates", "perturbed")),
    ("at is None", {"at": None}, ValueError, ("at", "None")),
    ("at is a list", {"at": ["real"]}, ValueError, ("at", "['real']")),
    ("group_size is zero", {"group_size": 0}, ValueError, ("group_size", "0")),
    ("group_size is negative", {"group_size": -2}, ValueError, ("group_size", "-2")),
    ("group_size is a float", {"group_size": 2.0}, TypeError, ("group_size", "float")),
    ("group_size is a bool", {"group_size": True}, TypeError, ("group_size", "bool")),
]
CALL_ERRORS: list[Row] = [
    ("critic is a string", {"critic": "critic"}, TypeError, ("critic", "str")),
    ("engine is unknown", {"engine": "warp"}, ValueError, ("engine", "'warp'", "four_pass", "autograd")),
    ("engine is None", {"engine": None}, ValueError, ("engine", "None")),
    ("critic_args is a tensor", {"critic_args": torch.zeros(0)}, TypeError, ("critic_args", "Tensor")),
    ("critic_args is a string", {"critic_args": "labels"}, TypeError, ("critic_args", "str")),
    ("critic_kwargs is a tuple", {"critic_kwargs": ()}, TypeError, ("critic_kwargs", "tuple")),
    ("generator is a seed", {"generator": 17}, TypeError, ("generator", "int")),
    ("generator is a seed, unused", {"generator": 17, "at": "real"}, TypeError, ("generator", "int")),
]
SAMPLE_ERRORS: list[Row] = [
    ("real is a list", {"real": [[0.0] * 6] * 4}, TypeError, ("real", "list")),
    ("fake is None", {"fake": None}, TypeError, ("fake", "NoneType")),
    ("real is integer", {"real": torch.ones(4, 6, dtype=torch.int64)}, TypeError, ("real", "torch.int64")),
    ("real is uint8", {"real": torch.ones(4, 6, dtype=torch.uint8)}, TypeError, ("real", "torch.uint8")),
    ("fake is bool", {"fake": torch.ones(4, 6, dtype=torch.bool)}, TypeError, ("fake", "torch.bool")),
    ("fake is complex", {"fake": torch.ones(4, 6, dtype=torch.complex64)}, TypeError, ("fake", "torch.complex64")),
    ("fake is one sample short", {"fake": torch.ones(3, 6)}, ValueError, ("fake", "[3, 6]", "[4, 6]")),
    ("fake would broadcast", {"fake": torch.ones(1, 6)}, ValueError, ("fake", "[1, 6]", "[4, 6]")),
    ("fake is flattened", {"fake": torch.ones(24)}, ValueError, ("fake", "[24]", "[4, 6]")),
    ("fake is half", {"fake": torch.ones(4, 6).half()}, TypeError, ("fake", "torch.float16", "torch.float32")),
    ("real is double", {"real": torch.ones(4, 6).double()}, TypeError, ("fake", "torch.float32", "torch.float64")),
    ("fake is elsewhere", {"fake": torch.ones(4, 6, device="meta")}, ValueError, ("fake", "meta", HERE)),
    ("the batch is empty", {"real": torch.ones(0, 6), "fake": torch.ones(0, 6)}, ValueError, ("real", "[0, 6]")),
    ("samples are empty", {"real": torch.ones(4, 0), "fake": torch.ones(4, 0)}, ValueError, ("real", "[4, 0]")),
    ("samples are scalars", {"real": torch.ones(4), "fake": torch.ones(4)}, ValueError, ("real", "[4]")),
    ("no batch", {"real": torch.tensor(1.0), "fake": torch.tensor(1.0)}, ValueError, ("real", "[]")),
    ("alpha is a word", {"alpha": "0.5"}, TypeError, ("alpha", "str")),
    ("alpha is a bool", {"alpha": True}, TypeError, ("alpha", "bool")),
    ("alpha is integer", {"alpha": torch.ones(4, dtype=torch.int32)}, TypeError, ("alpha", "torch.int32")),
    ("alpha is one short", {"alpha": torch.rand(3)}, ValueError, ("alpha", "[3]", "[4]")),
    ("alpha has a dimension more", {"alpha": torch.rand(1, 4, 6)}, ValueError, ("alpha", "[1, 4, 6]", "[4]", "[4, 6]")),
    ("alpha is transposed", {"alpha": torch.rand(1, 4)}, ValueError, ("alpha", "[1, 4]", "[4]")),
    ("alpha is empty", {"alpha": torch.rand(0)}, ValueError, ("alpha", "[0]", "[4]")),
    ("alpha is elsewhere", {"alpha": torch.ones(4, device="meta")}, ValueError, ("alpha", "meta", HERE)),
]
CRITIC_ERRORS: list[Row] = [
    ("critic packs what is not divided", {"group_size": 3}, ValueError, ("group_size", "3", "4 samples")),
    ("critic does not pack", {"group_size": 2}, ValueError, ("critic", "group of 2", "[2]", "[4, 1]")),
    ("critic packs unasked", {"critic": lambda x: x.view(2, 12).sum(1)}, ValueError, ("critic", "[4]", "[2]")),
    ("the mean score", {"critic": lambda x: x.mean()}, ValueError, ("critic", "[]", "[4]")),
    ("the mean score, 1-dim", {"critic": lambda x: x.mean().view(1)}, ValueError, ("critic", "[1]", "[4]")),
    ("scores in a row", {"critic": lambda x: x.sum(1).view(1, 4)}, ValueError, ("critic", "[1, 4]", "[4]")),
    ("scores and features", {"critic": lambda x: (x.sum(1), x)}, TypeError, ("critic", "tuple")),
    ("a number", {"critic": lambda x: 1.0}, TypeError, ("critic", "float")),
    ("integer scores", {"critic": lambda x: x.sum(1).long()}, TypeError, ("critic", "torch.int64")),
    ("detached scores", {"critic": lambda x: x.sum(1).detach()}, ValueError, ("critic", "detached")),
    ("scores under no_grad", {"critic": torch.no_grad()(lambda x: x.sum(1))}, ValueError, ("critic", "no_grad")),
    ("constant scores", {"critic": lambda x: torch.zeros(4, requires_grad=True)}, ValueError, ("critic", "input")),
]


def rows(*tables: list[Any]) -> list[Any]:
    return [pytest.param(*row[1:], id=row[0]) for table in tables for row in table]


def assert_says(message: str, words: tuple[str, ...]) -> None:
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
