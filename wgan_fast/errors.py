"""The two ways in which training and its files go wrong for reasons outside this code."""

import os
import sys


class InputError(ValueError):
    """What the user gave cannot be used: the message names it, says what it was and what is allowed.

    The command line prints the message on one line and exits with status 2.
    """


class DivergenceError(RuntimeError):
    """Training produced a non-finite quantity; the message names the quantity and the step."""


def users_level() -> int:
    """Return how many frames up the user's own code is, for a warning raised by the calling function."""
    package, frame, level = os.path.dirname(__file__), sys._getframe(1), 1
    while frame.f_back and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level
