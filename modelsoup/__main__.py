"""`python -m modelsoup` is the command `soup`."""

from .terminal.cli import main

main()
