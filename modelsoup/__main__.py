"""`python -m modelsoup` is the command `soup`."""

from .cli import main

main()
