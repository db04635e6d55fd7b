"""2:4 training: half of the FFN weights in every group of four are zero, over a dense master (arXiv 2404.01847)."""

from sparsetrain.methods.semi_structured.config import SemiStructured as SemiStructured
