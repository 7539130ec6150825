"""The two ways in which training and its files go wrong for reasons outside this code."""


class InputError(ValueError):
    """What the user gave cannot be used: the message names it, says what it was and what is allowed.

    The command line prints the message on one line and exits with status 2.
    """


class DivergenceError(RuntimeError):
    """Training produced a non-finite quantity; the message names the quantity and the step."""
