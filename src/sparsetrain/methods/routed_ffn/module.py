"""The routed FFN inside a model: the router, and the owner module's new forward.

y = b + FFN_shared(x) + Σ_{g in S(x)} c_g · FFN_g(x) + Σ_{g not in S(x)} shift_g + skip(x)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.anatomy import FFNSite, trained_copy
from sparsetrain.methods.routed_ffn.config import RoutedFFN
from sparsetrain.methods.routed_ffn.permute import reorder
from sparsetrain.ops.routed_ffn import routed_ffn
from sparsetrain.ops.routing import balance_loss, choose_blocks, load_stats
from sparsetrain.surgery.idle import Place, attach_zeros, places_of
from sparsetrain.surgery.lora import has_lora_bias, linear_parts, refused_adapter
from sparsetrain.surgery.reclass import View, dense_forward, pass_through
from sparsetrain.surgery.site import Site
from sparsetrain.surgery.targets import DenseRows


class Router(nn.Module):
    """Logits of the blocks, and what compensates for the blocks that are dropped; all fp32, all trained.

    A module of its own, so that PEFT keeps it trainable through `modules_to_save=["router"]`.
    """

    def __init__(self, hidden: int, num_blocks: int, shift: bool = False, rank: int = 0) -> None:
        super().__init__()
        # exactly zero weights would make all logits tie and send every token to the same blocks
        self.weight = nn.Parameter(torch.randn(num_blocks, hidden) * 0.02)
        self.bias = nn.Parameter(torch.zeros(num_blocks))
        self.shift = nn.Parameter(torch.zeros(num_blocks, hidden)) if shift else None
        self.skip_a = nn.Parameter(torch.zeros(rank, hidden)) if rank else None
        self.skip_b = nn.Parameter(torch.zeros(hidden, rank)) if rank else None

    def forward(self, x_td: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(logits [t, G] fp32, shift [G, d] or None, skip(x) [t, d] or None)."""
        with torch.autocast(x_td.device.type, enabled=False):
            logits_tg = F.linear(x_td.float(), self.weight.float(), self.bias.float())
        skip_td = None
        if self.skip_a is not None and self.skip_b is not None:
            skip_td = F.linear(F.linear(x_td, self.skip_a.to(x_td.dtype)), self.skip_b.to(x_td.dtype))
        return logits_tg, self.shift, skip_td


class Routing(Site):
    """State and schedule of one routed FFN; lives in the owner as its child `routed`.

    Attributes:
        dense_rows: knows the rows that go through the dense FFN; None: none ever does.
    """

    adds_losses = True
    dense_rows: DenseRows | None = None
    valid_bt: Tensor | None = None
    order: Tensor | None

    def __init__(self, config: RoutedFFN, site: FFNSite, router: Router, order: Tensor | None) -> None:
        super().__init__()
        self.config, self.site = config, site
        self.router = router
        self.register_buffer("order", order, persistent=False)
        self.num_shared, self.block_width = config.split(site.ffn_size)
        self.warming_up = False
        self.last: dict[str, Tensor] = {}

    def set_step(self, step: int, total_steps: int | None) -> None:
        warmup_steps = self.config.warmup() * (total_steps or 0)
        self.warming_up = step < warmup_steps

    def tensors(self) -> dict[str, Tensor]:
        trained = trained_copy(self.router)
        found = {f"router.{name}": value.detach() for name, value in trained.named_parameters()}
        if self.order is not None:
            found["order"] = self.order
        return found

    @torch.no_grad()
    def take(self, owner: nn.Module, tensors: dict[str, Tensor]) -> None:
        if tensors.keys() != self.tensors().keys():
            raise ValueError("it was saved by another kind of conversion")
        if self.order is not None and not torch.equal(tensors["order"].to(self.order.device), self.order):
            # the weights lie in the order of this conversion; the optimizer's state of a checkpoint, in that of its own
            reorder(owner, self.site, torch.argsort(self.order))
            self.order.copy_(tensors["order"])
            reorder(owner, self.site, self.order)
        for name, parameter in trained_copy(self.router).named_parameters():
            parameter.copy_(tensors[f"router.{name}"])

    def stats(self) -> dict[str, float]:
        known = {} if self.dense_rows is None else {"dense_rows": self.dense_rows.share}
        return {name: float(value) for name, value in (self.last | known).items()}

    def merge_error(self) -> str | None:
        if self.config.num_active == self.config.num_blocks:
            return None
        return f"routing drops {self.config.num_blocks - self.config.num_active} of {self.config.num_blocks} blocks"

    @property
    def trains(self) -> bool:
        """Is the router trained?"""
        return trained_copy(self.router).weight.requires_grad

    @property
    def dense(self) -> bool:
        return self.runs_dense or self.config.num_active == self.config.num_blocks

    def forward(self, owner: nn.Module, x: Tensor) -> Tensor:
        """x [..., d] -> y [..., d], dropout and residual left to the owner."""
        config, site = self.config, self.site
        x_td = x.reshape(-1, x.shape[-1])
        valid_t, dense_t = self._valid(x_td.shape[0]), self._dense(x_td.shape[0])
        logits_tg, shift_gd, skip_td = self.router(x_td)
        choice_tk = choose_blocks(logits_tg, config.num_active)
        gate_tk = self.gates(logits_tg).gather(1, choice_tk.long())
        with self.watching():
            y_td = routed_ffn(
                x_td,
                self._parts(owner, site.up),
                self._parts(owner, site.down),
                choice_tk,
                gate_tk.to(x.dtype),
                gate=self._parts(owner, site.gate) if site.gate else None,
                num_shared=self.num_shared,
                num_blocks=config.num_blocks,
                activation=site.activation,
                # rescaled gates are no longer 1, so they count as an output gate
                gate_mode="output" if config.gated_by == "ste" and config.rescale else config.gated_by,
                block_shift_gd=shift_gd,
                valid_t=valid_t,
                dense_t=dense_t,
            )
        if skip_td is not None:
            y_td = y_td + (skip_td if dense_t is None else skip_td.masked_fill(dense_t[:, None], 0))
        return self._with_balance_loss(y_td, logits_tg, choice_tk, _context(valid_t, dense_t)).view(x.shape)

    def idle_parameters(self) -> list[Place]:
        """What gets no gradient in the present phase: all of it while the FFN is dense, in the warm-up what stands in
        for dropped blocks, for none is dropped."""
        if not (self.dense or self.warming_up):
            return []
        used = () if self.dense else ("weight", "bias")
        return [place for place in places_of(trained_copy(self.router)) if place[1] not in used]

    def gates(self, logits_tg: Tensor) -> Tensor:
        """c [t, G]: 2σ(logit), as a value and gradient (`output`, `spt`) or as a gradient only (`ste`)."""
        c = 2 * torch.sigmoid(logits_tg)
        if self.config.gated_by == "ste":  # a router that isn't trained has no use for the gradient of c
            c = 1 + (c - c.detach()) if self.trains else torch.ones_like(c)
        return c * (self.config.num_blocks / self.config.num_active) if self.config.rescale else c

    def unit_gates(self, x: Tensor) -> Tensor:
        """Warm-up: the gate of every hidden unit [..., f]; all blocks run, so that the router gets gradient."""
        x_td = x.reshape(-1, x.shape[-1])
        logits_tg, _, _ = self.router(x_td)
        gates = self.gates(logits_tg).to(x.dtype).repeat_interleave(self.block_width, dim=1)
        gates = F.pad(gates, (self.num_shared, 0), value=1.0)
        choice_tk = choose_blocks(logits_tg, self.config.num_active)
        valid_t, dense_t = self._valid(x_td.shape[0]), self._dense(x_td.shape[0])
        if dense_t is not None:
            gates = gates.masked_fill(dense_t[:, None], 1.0)
        gates = self._with_balance_loss(gates, logits_tg, choice_tk, _context(valid_t, dense_t))
        return gates.view(*x.shape[:-1], -1)

    def _valid(self, num_tokens: int) -> Tensor | None:
        valid = self.valid_bt
        return valid.reshape(-1) if valid is not None and valid.numel() == num_tokens else None

    def _dense(self, num_tokens: int) -> Tensor | None:
        rows_bt = None if self.dense_rows is None else self.dense_rows.of(num_tokens)
        return None if rows_bt is None else rows_bt.reshape(-1)

    def check_adapters(self, owner: nn.Module) -> None:
        """Raise ValueError if a linear carries an adapter that routing would compute wrongly, whatever runs now."""
        if self.config.num_active == self.config.num_blocks and self.order is None:
            return  # dense in the dense order: the linears are called as they are
        for name in (self.site.up, self.site.gate, self.site.down):
            if name is None:
                continue
            if reason := refused_adapter(owner.get_submodule(name)):
                raise ValueError(f"routed_ffn: {self.site.name}.{name} {reason}")
            if self.config.gated_by == "spt" and has_lora_bias(owner.get_submodule(name)):
                raise ValueError(
                    f"routed_ffn: {self.site.name}.{name} has LoRA with lora_bias=True, and with gate='spt' LoRA goes "
                    "around the gate that biases go through. Set lora_bias=False, or use gate='output' or 'ste'."
                )

    def _parts(self, owner: nn.Module, name: str) -> Any:
        return linear_parts(owner.get_submodule(name), self.site.transposed)

    def _with_balance_loss(self, y: Tensor, logits_tg: Tensor, choice_tk: Tensor, valid_t: Tensor | None) -> Tensor:
        self.last = load_stats(choice_tk, self.config.num_blocks, valid_t)
        if not (self.training and torch.is_grad_enabled() and self.config.balance_weight and self.trains):
            return y
        loss = balance_loss(logits_tg, choice_tk, valid_t)
        self.last["balance_loss"] = loss.detach()
        return self.add_loss(y, loss, self.config.balance_weight)


def _context(valid_t: Tensor | None, dense_t: Tensor | None) -> Tensor | None:
    """bool [t]: the tokens that are routed, which alone count for the router."""
    if dense_t is None:
        return valid_t
    return ~dense_t if valid_t is None else valid_t & ~dense_t


class Routed:
    """Mixed into an FFN's owner: its forward, with the FFN routed."""

    routed: Routing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routed = self.routed
        routed.check_adapters(self)  # type: ignore[arg-type]
        if routed.dense_rows is not None and routed.dense_rows.everywhere and not routed.dense:
            out = dense_forward(Routed, self, *args, **kwargs)
            return attach_zeros(out, places_of(trained_copy(routed.router)), idle=False)  # another rank has other rows
        out = self._in_phase(*args, **kwargs)
        return attach_zeros(out, routed.idle_parameters()) if routed.training else out

    def _in_phase(self, *args: Any, **kwargs: Any) -> Any:
        site, routed = self.routed.site, self.routed
        if routed.dense:
            return dense_forward(Routed, self, *args, **kwargs)
        if routed.warming_up and site.gate is None:
            return self._gated_by_unit(*args, **kwargs)
        if routed.warming_up:
            return self._gated_glu(*args, **kwargs)
        if site.gate is not None:
            return routed(self, args[0] if args else next(iter(kwargs.values())))
        whole = {site.up: lambda x: routed(self, x), site.down: pass_through}
        view = View(self, whole | dict.fromkeys(site.bypass, pass_through))  # type: ignore[arg-type]
        return dense_forward(Routed, view, *args, **kwargs)

    def _gated_by_unit(self, *args: Any, **kwargs: Any) -> Any:
        site, routed = self.routed.site, self.routed
        up: Any = self.get_submodule(site.up)  # type: ignore[attr-defined]
        act: Any = _attribute(self, site.bypass[0])
        gates: list[Tensor] = []

        def first(x: Tensor) -> Tensor:
            gates[:] = [routed.unit_gates(x)]
            return up(x)

        view = View(self, {site.up: first, site.bypass[0]: lambda h: act(h) * gates[0]})  # type: ignore[arg-type]
        return dense_forward(Routed, view, *args, **kwargs)

    def _gated_glu(self, x: Tensor) -> Tensor:
        site = self.routed.site
        up, gate, down = (self.get_submodule(name) for name in (site.up, site.gate, site.down))  # type: ignore[attr-defined]
        hidden = _attribute(self, site.bypass[0])(gate(x)) * up(x)
        return down(hidden * self.routed.unit_gates(x))


class NotesPadding:
    """Mixed into a block: before it runs, its routed FFN learns which tokens are padding.

    Part of the forward, not a hook: when gradient checkpointing recomputes a block, the mask is that of this forward.
    """

    notes_padding_to: Routing
    attention_mask_place: int | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        place = self.attention_mask_place
        if mask is None and place is not None and len(args) > place:
            mask = args[place]
        self.notes_padding_to.valid_bt = valid_tokens(mask)
        return dense_forward(NotesPadding, self, *args, **kwargs)


def valid_tokens(mask: Any) -> Tensor | None:
    """Which tokens are real, [b, t] bool, from the mask a block receives; None when all are or it does not say."""
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return mask > 0
    if mask.ndim == 4 and mask.dtype == torch.int32:  # beside a sparse attention: of each key its sequence and place
        return mask[:, :, 0, 1] >= 0
    if mask.ndim == 4 and mask.shape[2] == mask.shape[3]:
        diagonal = mask[:, 0].diagonal(dim1=1, dim2=2)
        return diagonal if diagonal.dtype == torch.bool else diagonal == 0
    return None


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
