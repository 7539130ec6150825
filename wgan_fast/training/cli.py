"""The command line: ``wgan-fast train | sample | evaluate | export | bench | info``."""

import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from .. import __version__
from ..errors import DivergenceError, InputError
from .config import Change, TrainConfig
from .files import as_path
from .settings import close_settings, read_settings

try:
    import tyro
except ImportError as missing:
    sys.exit(f"wgan-fast: {missing}; the command line needs pip install 'wgan_fast[train]'")

from ..tables.commands import EvaluateTable, SampleTable, TrainTable
from ..tables.config import is_table, is_table_run
from .commands import Bench, Evaluate, Export, Info, Sample, Train


def _commands(arguments: list[str]) -> Any:
    """Return the subcommands; the settings of a resumed run, or of a file, are the defaults of ``train``.

    Tables have commands of their own: those of the data that is given, or of the run.
    """
    on_table = _on_table(arguments)
    train: Any = Train()
    if on_table:
        folder = _option(arguments, "--resume") if arguments[:1] == ["train"] else None
        train = TrainTable(_option(arguments, "--data") or "") if folder is None else TrainTable.of(Path(folder))
    elif arguments[:1] == ["train"]:
        train = _defaults(arguments)
    # Where a run is resumed, its settings are switched on and off; elsewhere a flag is off until it is given.
    one_way = tyro.conf.FlagCreatePairsOff
    return (
        Annotated[TrainTable if on_table else Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[SampleTable if on_table else Sample, tyro.conf.subcommand("sample"), one_way]
        | Annotated[EvaluateTable if on_table else Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Bench, tyro.conf.subcommand("bench"), one_way]
        | Annotated[Info, tyro.conf.subcommand("info"), one_way]
    )


def _on_table(arguments: list[str]) -> bool:
    """Whether a command is about a table: the one that it trains on, or that of the run that it is given."""
    if arguments[:1] != ["train"]:
        return any(is_table_run(as_path(argument)) for argument in arguments[1:])
    if (resumed := _option(arguments, "--resume")) is not None:
        return is_table_run(as_path(resumed))
    return is_table(_option(arguments, "--data") or "")


def _defaults(arguments: list[str]) -> Train:
    """Return what ``train`` starts from where an argument does not say otherwise."""
    folder, file = _option(arguments, "--resume"), _option(arguments, "--config")
    values: dict[str, Any] = {}
    if folder is not None:
        from .description import Description

        config = Description.read(Path(folder)).config
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
        values |= {"out": Path(folder), "resume": Path(folder)}
    elif file is not None:
        values = read_settings(Path(file))
    # Steps given take the place of epochs, and the other way.
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if _option(arguments, f"--{name}") is not None:
            values.pop(other, None)
    return Train(**values)


def _parse(arguments: list[str]) -> Any:
    if arguments[:1] == ["train"]:
        names = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
        if "--lr" in names and "--learning-rate" in names:
            raise InputError("--lr is --learning-rate: give one of the two")
        arguments = [re.sub(r"^--lr(?=$|=)", "--learning-rate", argument) for argument in arguments]
        changes = "|".join(get_args(Change))
        for at, argument in enumerate(arguments):
            if re.fullmatch(rf"({changes})(,({changes}))+", argument):  # as the paper's code takes them
                arguments[at : at + 1] = argument.split(",")
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            return tyro.cli(
                _commands(arguments),
                prog="wgan-fast",
                description="Train, sample and evaluate WGAN-GP and its relatives.",
                args=arguments,
                config=(tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as end:
        if not end.code:
            raise
        # tyro writes a title, a rule, the message, a rule and a hint, in a frame and in colour where it can: every
        # error here is one plain line.
        plain = re.sub(r"\x1b\[[\d;]*m|[│╭╮╰╯]", " ", framed.getvalue())
        title, *rest = re.split(r"[-─]{5,}", plain)
        message = " ".join(next(part for part in [*rest, title] if part.strip()).split())
        for pattern, said in _REWORDED:
            message = re.sub(pattern, said, message)
        raise InputError(message + _hint(plain, arguments)) from None


_REWORDED = (
    (r"^Error parsing Train(Table)?: ", ""),
    (r"^Error parsing (\S+): .*invalid literal for int\(\) with base 10: ", r"\1 must be a whole number, got "),
    (r"^Error parsing (\S+): .*could not convert string to float: ", r"\1 must be a number, got "),
    (r"^invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\) ?\.", r"\2 must be one of \3, got \1"),
    (r" Expected 1 values\.$", ""),
)
"""What tyro says as every other error here says it: with the argument, what it must be, and what it was."""


def _hint(text: str, arguments: list[str]) -> str:
    """Say what tyro suggests in place of an unknown option or command."""
    if commands := re.search(r"Available subcommands: (.*)", text):
        return f"; the commands are {commands[1].strip()}"
    suggestions = re.findall(r"(--[\w-]+)(?:(?!--)[\s\S])*?in wgan-fast (\w+) --help", text)
    flags = [flag for flag, command in suggestions if command in arguments[:1]]
    if arguments[:1] == ["train"] and (unknown := re.search(r"Unrecognized options: --([\w-]+)", text)):
        settings = [field.name for field in dataclasses.fields(TrainTable if _on_table(arguments) else Train)]
        flags = [f"--{name.replace('_', '-')}" for name in close_settings(unknown[1], settings)] or flags
    return f"; did you mean {' or '.join(flags)}?" if flags else ""


def _option(arguments: list[str], flag: str) -> str | None:
    for argument, following in zip(arguments, [*arguments[1:], None]):
        if argument == flag:
            return None if following is None or following.startswith("--") else following
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: What follows the program's name; None means the process's own.

    Exits with 2 and one line on standard error when the input is at fault, with 1 when another process of the same
    training is lost, with 130 when interrupted and 143 when terminated.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # Networks of one's own (module:function) lie where the command is run.
    sys.path.insert(0, os.getcwd())
    _let_every_character_pass(sys.stdout)
    if arguments == ["--version"]:
        print(f"wgan-fast {__version__}")
        return
    try:
        with _warnings_in_one_line():
            _run(_parse(arguments))
    except (InputError, DivergenceError, OSError) as error:
        sys.exit(_fail(error, 2))
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signal", signal.SIGINT)  # of an InterruptedTraining
        sys.exit(_fail(stop if str(stop) else "interrupted", 128 + number))


def _run(command: Any) -> None:
    try:
        from . import Trainer  # noqa: F401 (so that what is not installed is said of every command alike)
        from .distributed import LostProcessError
    except ImportError as missing:
        sys.exit(f"wgan-fast: {missing}; the command line needs pip install 'wgan_fast[train]'")
    try:
        command.run()
    except LostProcessError as error:
        sys.exit(_fail(f"{error}; train goes on with --resume and the run's folder", 1))


def _let_every_character_pass(stream: object) -> None:
    """Have a stream write what its encoding cannot say as a question mark, and a path's bytes as they are."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "replace")


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Write warnings as errors are written: the line of code that Python would add is none of the user's."""
    before = warnings.formatwarning
    # Not showwarning: whoever records warnings around a call of main would miss them.
    warnings.formatwarning = lambda message, *place: _line("warning", message)
    try:
        yield
    finally:
        warnings.formatwarning = before


def _fail(error: object, status: int) -> int:
    print(_line("error", error), end="", file=sys.stderr)
    return status


def _line(kind: str, message: object) -> str:
    return f"wgan-fast: {kind}: {' '.join(str(message).split())}\n"
