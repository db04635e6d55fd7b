"""What is in a model while it grows: one site with the masks, and the modules that read them.

Everything that a masked channel, head or layer gives is multiplied by c: nothing at 0, itself at 1. Masks are buffers
that are changed in place between steps, so that nothing waits for the host and nothing is compiled anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.methods.masked_growth.config import GrowthRamp
from sparsetrain.methods.masked_growth.own_steps import follow
from sparsetrain.ops.masked_norm import masked_layer_norm, masked_rms_norm
from sparsetrain.surgery.reclass import dense_forward
from sparsetrain.surgery.site import Site


class RampSite(Site):
    """The masks of one growth.

    Args:
        old: axis -> which of its channels were there before, bool.
        entries: the parameters with new entries: (parameter, shape of its old corner or None if there is none,
            (dimension, number) of its fused parts or None).

    Attributes:
        count: the steps in which new entries had a gradient, the present one among them. is_last: of the ramp.
    """

    def __init__(
        self,
        config: GrowthRamp,
        old: dict[str, Tensor],
        entries: list[tuple[nn.Parameter, torch.Size | None, tuple[int, int] | None]],
    ) -> None:
        super().__init__()
        self.config, self.entries, self.value = config, tuple(entries), 0.0
        self.count, self.is_last = 0, False
        self.num_old = {axis: int(there.sum()) for axis, there in old.items()}
        self._before: list[Tensor] | None = None
        first = entries[0][0]
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.register_buffer("gate", torch.zeros((), dtype=dtype, device=first.device), persistent=False)
        for axis, there in old.items():
            self.register_buffer(f"new_{axis}", ~there.to(first.device), persistent=False)
            self.register_buffer(f"mask_{axis}", there.to(first.device, dtype), persistent=False)
        if config is not None and config.own_steps:
            follow(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.config is not None and self.config.own_steps:
            follow(self)

    def mask(self, axis: str) -> Tensor:
        return getattr(self, f"mask_{axis}")

    def masked(self, x: Tensor, axis: str | None) -> Tensor:
        """x ⊙ c, along its last dimension."""
        return x if axis is None else x * self.mask(axis).to(x.dtype)

    @torch.no_grad()
    def fill(self, value: float) -> None:
        """Make every mask c = `value` on what is new."""
        self.gate.fill_(value)  # type: ignore[operator]
        for axis in self.num_old:
            self.mask(axis).masked_fill_(getattr(self, f"new_{axis}"), value)

    @torch.no_grad()
    def set_step(self, step: int, total_steps: int | None) -> None:
        if total_steps is None:  # unknown yet: nothing has risen
            return
        self.value = self.config.value(step, total_steps)
        (self.count, _), self.is_last = self.config.counted(step, total_steps), self.config.is_last(step, total_steps)
        self.fill(1.0 if self.held_dense else self.value)
        self._before = [p.detach().clone() for p, *_ in self.entries] if self.value == 0 else None

    @torch.no_grad()
    def updated(self) -> None:
        """Take weight decay back from new entries whose mask was 0: the loss had no say in them."""
        for (parameter, corner, parts), before in zip(self.entries, self._before or (), strict=False):
            if corner is not None:
                now, old = (t if parts is None else t.unflatten(parts[0], (parts[1], -1)) for t in (parameter, before))
                where = tuple(slice(0, size) for size in corner)
                old[where] = now[where]
            parameter.copy_(before)
        self._before = None

    def settle(self) -> None:
        """A model in a ramp is evaluated as it is."""

    def run_dense(self, dense: bool) -> None:
        super().run_dense(dense)
        self.fill(1.0 if dense else self.value)

    def tensors(self) -> dict[str, Tensor]:
        return {"gate": torch.full_like(self.gate, self.value)}  # type: ignore[arg-type]

    def take(self, owner: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().take(owner, tensors)
        self.value = float(tensors["gate"])
        self.fill(1.0 if self.held_dense else self.value)

    def held_tensors(self) -> list[Tensor]:
        return list(self._before or ())

    def stats(self) -> dict[str, float]:
        return {"mask": self.value}

    def merge_error(self) -> str | None:
        if self.value == 1.0:
            return None
        return f"it is still growing: its mask is at {self.value:g}, and the plain model is there when it is at 1"


class MaskedLinear:
    """A linear whose inputs or outputs are masked."""

    def forward(self: Any, x: Tensor) -> Tensor:
        site, reads, writes = self.growth
        return site.masked(dense_forward(MaskedLinear, self, site.masked(x, reads)), writes)


class MaskedNorm:
    """A norm over channels of which some are new; `growth` holds the site and what is added to a stored gain."""

    def forward(self: Any, x: Tensor) -> Tensor:
        site, added = self.growth
        mask, num_old = site.mask("hidden"), site.num_old["hidden"]
        if isinstance(self, nn.LayerNorm):
            return masked_layer_norm(x, mask, num_old, self.weight, self.bias, self.eps)
        gain = self.weight + added if added else self.weight
        return masked_rms_norm(x, mask, num_old, gain, epsilon(self))


class MaskedStream:
    """The first block of a model whose embeddings no norm masks."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return dense_forward(MaskedStream, self, self.stream.masked(hidden_states, "hidden"), *args, **kwargs)


class GatedBlock:
    """A new layer: h ← c · layer(h) + (1 − c) · h."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        gate = self.growth.gate.to(hidden_states.dtype)
        out = dense_forward(GatedBlock, self, hidden_states, *args, **kwargs)
        y = out[0] if isinstance(out, tuple) else out
        y = gate * y + (1 - gate) * hidden_states
        return (y, *out[1:]) if isinstance(out, tuple) else y


def epsilon(norm: Any) -> float:
    """ε of an RMSNorm, as its family calls it."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


@torch.no_grad()
def added_to_gain(norm: Any, name: str) -> float:
    """What an RMSNorm adds to its stored gain: 0, or 1 (Gemma); found by its outputs.

    Raises:
        ValueError: it is no norm that we know.
    """
    x = torch.ones_like(norm.weight)
    found = norm(x) * (1 + epsilon(norm)) ** 0.5
    for added in (0.0, 1.0):
        if torch.allclose(found, norm.weight + added, rtol=1e-2, atol=1e-3):
            return added
    raise ValueError(
        f"masked_growth cannot mask {name} ({type(norm).__name__}): it is neither LayerNorm nor RMSNorm with a gain w "
        "or 1 + w. Grow only ffn, heads and layers of this model."
    )
