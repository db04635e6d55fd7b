"""The table of contents: one line a method, grouped by what it makes sparse; other packages bring theirs besides."""

from sparsetrain.core.outside import load_outside_methods

# isort: off

# attention
from sparsetrain.methods.flood_fill_attention import (  # block patterns cut from attention maps, arXiv 2309.12578
    FloodFillAttention as FloodFillAttention,
)
from sparsetrain.methods.pq_attention import PQAttention as PQAttention  # keys chosen by PQ codes, arXiv 2312.10365

# feed-forward networks
from sparsetrain.methods.routed_ffn import RoutedFFN as RoutedFFN  # blocks chosen by a router, arXiv 2312.10365

# linears
from sparsetrain.methods.monarch import Monarch as Monarch  # block-diagonal factors, arXiv 2204.00595
from sparsetrain.methods.monarch import MonarchThenDense as MonarchThenDense  # the same, multiplied out in mid-run
from sparsetrain.methods.pst import PST as PST  # pruned by factors of weight and score, arXiv 2205.11005
from sparsetrain.methods.semi_structured import SemiStructured as SemiStructured  # 2:4 weights, arXiv 2404.01847
from sparsetrain.methods.sparsedm import SparseDM as SparseDM  # N:M, of diffusion models too, arXiv 2404.10445

# which entries are updated
from sparsetrain.methods.sara import SaRA as SaRA  # the smallest ones, arXiv 2409.06633

# what a classifier decides by
from sparsetrain.methods.concept_bottleneck import (  # named concepts, arXiv 2404.03323
    ConceptBottleneck as ConceptBottleneck,
)

# what flows between blocks
from sparsetrain.methods.token_selection import TokenSelection as TokenSelection  # gradient, arXiv 2501.18824

# the model itself, in mid-run
from sparsetrain.methods.masked_growth import MaskedGrowth as MaskedGrowth  # grown, arXiv 2305.02869
from sparsetrain.methods.multi_level import MultiLevel as MultiLevel  # through smaller models, arXiv 2404.07999

# isort: on

load_outside_methods()
