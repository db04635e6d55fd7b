"""Monarch linears: two block-diagonal factors in place of a dense weight (arXiv 2204.00595)."""

from sparsetrain.methods.monarch.config import Monarch as Monarch
from sparsetrain.methods.monarch.config import MonarchThenDense as MonarchThenDense
