"""The table of contents: one line a method, grouped by what it makes sparse; other packages bring theirs besides."""

from sparsetrain.core.outside import load_outside_methods

# attention
from sparsetrain.methods.flood_fill_attention import (  # block patterns cut from attention maps, arXiv 2309.12578
    FloodFillAttention as FloodFillAttention,
)

# the model itself
from sparsetrain.methods.masked_growth import MaskedGrowth as MaskedGrowth  # grown in mid-run, arXiv 2305.02869
from sparsetrain.methods.pq_attention import PQAttention as PQAttention  # keys chosen by PQ codes, arXiv 2312.10365

# feed-forward networks
from sparsetrain.methods.routed_ffn import RoutedFFN as RoutedFFN  # blocks chosen by a router, arXiv 2312.10365

# linears
from sparsetrain.methods.semi_structured import SemiStructured as SemiStructured  # 2:4 weights, arXiv 2404.01847

# what flows between blocks
from sparsetrain.methods.token_selection import TokenSelection as TokenSelection  # gradient, arXiv 2501.18824

load_outside_methods()
