"""2:4 training: half of the FFN weights in every group of four are zero, over a dense master (arXiv 2404.01847)."""

from sparsetrain.methods.semi_structured import surgery as surgery
from sparsetrain.methods.semi_structured.config import SemiStructured as SemiStructured
from sparsetrain.methods.semi_structured.export import to_24 as to_24
from sparsetrain.methods.semi_structured.export import to_dense as to_dense
from sparsetrain.methods.semi_structured.flips import flip_curve as flip_curve
from sparsetrain.methods.semi_structured.flips import mask_digest as mask_digest
from sparsetrain.methods.semi_structured.tuning import find_decay as find_decay
