"""PQ sparse attention: keys chosen by product-quantisation codes (arXiv 2312.10365)."""

from sparsetrain.methods.pq_attention.config import PQAttention as PQAttention
