"""`python -m sparsetrain`, and so `torchrun -m sparsetrain`."""

from sparsetrain.cli import main

if __name__ == "__main__":
    main()
