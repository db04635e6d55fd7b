"""Prune while fine-tuning, with small factors for the weight and for the score that masks it (arXiv 2205.11005)."""

from sparsetrain.methods.pst.config import PST as PST
