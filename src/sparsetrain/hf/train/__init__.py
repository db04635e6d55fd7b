"""One training run: rows, parts, the Trainer with its callbacks and checkpoints, evaluation."""
