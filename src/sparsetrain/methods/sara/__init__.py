"""Only the smallest entries of the weights are trained, and they alone have gradient and moments (arXiv 2409.06633)."""

from sparsetrain.methods.sara.config import SaRA as SaRA
