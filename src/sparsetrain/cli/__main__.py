"""`python -m sparsetrain.cli`."""

from sparsetrain.cli import main

main()
