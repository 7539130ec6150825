"""``python -m wgan_fast`` is the command line."""

from .training.cli import main

main()
