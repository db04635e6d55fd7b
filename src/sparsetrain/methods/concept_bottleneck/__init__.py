"""A classifier whose decision is a sum over named concepts (Sparse-CBM, arXiv 2404.03323)."""

from sparsetrain.methods.concept_bottleneck.config import ConceptBottleneck as ConceptBottleneck
