"""Token selection: back-propagate through the tokens that matter (arXiv 2501.18824)."""

from sparsetrain.methods.token_selection.config import TokenSelection as TokenSelection
