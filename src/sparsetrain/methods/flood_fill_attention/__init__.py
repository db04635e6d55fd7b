"""Flood-fill attention: fixed block patterns cut from each layer's mean attention map (SPION, arXiv 2309.12578)."""

from sparsetrain.methods.flood_fill_attention.config import FloodFillAttention as FloodFillAttention
