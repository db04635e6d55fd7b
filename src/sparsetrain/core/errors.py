"""The exception types. What a user can fix is a ValueError; what only we can break is an assert."""


class Unsupported(RuntimeError):
    """A backend that was asked for by name cannot run this call. The message says why and what can."""


class PlanError(ValueError):
    """The configs do not fit the model: nothing matched, two claim one site, or a size does not divide."""


class UnknownFamily(ValueError):
    """The model's family is not in the anatomy table. The message says how to add a row."""


class CheckpointError(ValueError):
    """A checkpoint or sidecar is missing, truncated, or was written by another recipe."""


class InUse(ValueError):
    """Another process writes into the same folder. The message says which, and since when."""


class NotFinite(RuntimeError):
    """A loss, a gradient or a weight is infinite or not a number. The message says which, and at which step."""


class RankFailed(RuntimeError):
    """Another rank of this run has failed, so this one ends too. Whoever failed has said why."""
