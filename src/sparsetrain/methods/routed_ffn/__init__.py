"""Routed FFN: cut the feed-forward network into blocks and use a few of them a token (arXiv 2312.10365)."""

from sparsetrain.methods.routed_ffn.config import RoutedFFN as RoutedFFN
