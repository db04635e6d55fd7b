"""The parts of a model that memory and time are told apart by."""

COMPONENTS: tuple[str, ...] = ("attention", "ffn", "norms", "embedding", "head_and_loss", "adapters", "other")
