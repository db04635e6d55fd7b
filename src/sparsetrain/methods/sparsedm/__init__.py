"""N:M weights for diffusion models: masks anew in every forward over a dense weight (arXiv 2404.10445)."""

from sparsetrain.methods.sparsedm.config import SparseDM as SparseDM
