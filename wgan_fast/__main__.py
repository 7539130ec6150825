"""``python -m wgan_fast`` is the command line."""

from .cli import main

main()
