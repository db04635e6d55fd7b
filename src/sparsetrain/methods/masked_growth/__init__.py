"""Masked structural growth: pre-train a small model, enlarge it in mid-run without a jump (arXiv 2305.02869)."""

from sparsetrain.methods.masked_growth.config import MaskedGrowth as MaskedGrowth
