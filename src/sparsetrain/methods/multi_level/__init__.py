"""Multi-level training: a small model, merged out of the large one, trains for a part of the run (arXiv 2404.07999)."""

from sparsetrain.methods.multi_level.config import MultiLevel as MultiLevel
