"""`python -m perta`: the command line."""

from perta.cli import main

main()
