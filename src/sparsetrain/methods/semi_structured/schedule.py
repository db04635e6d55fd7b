"""The schedule of one FFN's 2:4 linears: mask refresh, packing, masked decay, and the dense tail."""

from __future__ import annotations

from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsetrain.core import ranks
from sparsetrain.core.errors import Unsupported
from sparsetrain.methods.semi_structured.config import SemiStructured
from sparsetrain.methods.semi_structured.flips import check_ranks_agree
from sparsetrain.methods.semi_structured.module import BUFFERS
from sparsetrain.ops.sparse24_linear import wgrad_refusal
from sparsetrain.ops.sparse24_linear.gain import WORTH, Gain, gain_together, measure_gain
from sparsetrain.surgery.lora import adapter_kind
from sparsetrain.surgery.site import Site

measured_gain = cache(measure_gain)
"""A shape is timed once a process, however many layers have it."""


class Schedule24(Site):
    """State and schedule of the 2:4 linears of one FFN; lives in the FFN's owner as its child `semi_structured`.

    Args:
        linears: name -> linear, as `make_sparse` returned it.
        layer: index of the block, for the seeds of the draws.
        tensors: what `tensors()` gave, or {}.
    """

    linears: dict[str, Any]

    def __init__(self, config: SemiStructured, linears: dict[str, Any], layer: int, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        # plain attributes: the linears are children of the owner, and must not be ours too
        vars(self)["linears"] = linears
        self._seen: list[tuple[int, bool]] | None = None
        self._next: list[tuple[int, bool]] | None = None
        self._looking = False
        progress = tensors.get("progress", torch.tensor([0, config.tail_in_force == 1]))
        self.last_refresh, self.dense = int(progress[0]), bool(progress[1])
        history = tensors.get("history", torch.zeros(1, 1 + len(linears)))
        self.history: list[list[float]] = history.double().tolist()
        self.gains: dict[str, Gain] = {}
        self._enter_phase()
        self._reseed(0)

    def set_step(self, step: int, total_steps: int | None) -> None:
        config, tail = self.config, self.config.tail_in_force
        if total_steps is not None:
            self.dense = tail == 1 or (tail > 0 and step >= config.first_dense_step(total_steps))
            self._choose_kernels()
            if step == 0 or step < self.last_refresh:  # a run that begins, not one that goes on
                self.last_refresh, self.history = -1, []
        # a resumed run may come between two multiples with masks of neither: it catches up
        due = step // config.refresh_every * config.refresh_every
        if due > self.last_refresh and (not self.dense or tail == 1):
            self._refresh(due, agree=total_steps is not None)
        self._enter_phase()
        self._reseed(step)

    def held_tensors(self) -> list[Tensor]:
        """The packed copies of the weights, which are neither parameters nor buffers."""
        return [part for linear in self.linears.values() if linear.packed is not None for part in linear.packed.parts()]

    def settle(self) -> None:
        """For evaluation and export: the phase that training is in, and W̃ of the weights as they are now."""
        self._enter_phase()

    @property
    def adjusts_gradients(self) -> bool:  # type: ignore[override]
        return self.config.decay_in_force > 0

    def derive(self) -> None:
        self._enter_phase()

    def run_dense(self, dense: bool) -> None:
        super().run_dense(dense)
        for linear in () if dense or self.dense else self.linears.values():
            linear.check_unchanged(repacks=True)  # merged into while it ran dense
        self._enter_phase()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.deploys_dense:  # evaluation runs the dense weights
            self._enter_phase()
        return self

    def before_forward(self, owner: nn.Module) -> None:
        """Look at what stands on the linears now (PEFT may have wrapped, merged or unwrapped them meanwhile).

        Raises:
            ValueError: an adapter is merged into a 2:4 weight, or changes it from outside.
        """
        found = {name: owner.get_submodule(name) for name in self.linears}
        standing = [(id(module), bool(getattr(module, "merged", False))) for module in found.values()]
        if standing == self._seen or torch.compiler.is_compiling():
            return
        for name, module in found.items():
            linear = self.linears[name]
            if linear.packed is None:
                continue
            if getattr(module, "merged", False) or adapter_kind(module) == "lora.ParamWrapper":
                raise ValueError(
                    f"semi_structured: {adapter_kind(module)} on {name} changes a weight that runs 2:4 by a dense "
                    "update, so outputs would differ. Unmerge it, and use LoRA on modules, not on parameters."
                )
            linear.check_unchanged(repacks=False)
            vars(linear)["called"] = False
        self._looking, self._next = True, standing

    def after_forward(self) -> None:
        """Raise ValueError if what stands on a linear computed with its dense weight, past the 2:4 one."""
        if not self._looking or torch.compiler.is_compiling():
            return
        for name, linear in self.linears.items():
            if linear.packed is not None and not linear.called:
                raise ValueError(
                    f"semi_structured: what stands on {name} (an adapter that reads the weight itself, or a copy in "
                    "modules_to_save) does not call the linear, so it would run dense. Use LoRA on it, or leave it out."
                )
        self._looking, self._seen = False, self._next

    def adjust_gradients(self) -> None:
        """Masked decay; off in the dense tail."""
        if self.dense or not self.adjusts_gradients:
            return
        for linear in self.linears.values():
            linear.add_masked_decay(self.config.decay_in_force)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{name}.{key}": getattr(linear, key) for name, linear in self.linears.items() for key in BUFFERS}
        found["progress"] = torch.tensor([self.last_refresh, int(self.dense)])
        found["history"] = torch.tensor(self.history, dtype=torch.float64).view(-1, 1 + len(self.linears))
        return found

    @torch.no_grad()
    def take(self, owner: nn.Module, tensors: dict[str, Tensor]) -> None:
        for name, linear in self.linears.items():
            for key in BUFFERS:
                getattr(linear, key).copy_(tensors[f"{name}.{key}"])
        self.last_refresh, self.dense = int(tensors["progress"][0]), bool(tensors["progress"][1])
        self.history = tensors["history"].double().tolist()
        self._enter_phase()

    def stats(self) -> dict[str, float]:
        flips = sum(float(linear.flip_rate) for linear in self.linears.values()) / len(self.linears)
        return {
            "flip_rate": flips,
            "flip_rate_per_step": flips / self.config.refresh_every,
            "zero_ratio": self._zero_ratio(),
            "decay": 0.0 if self.dense else self.config.decay_in_force,
            "dense_phase": float(self.dense),
        }

    def merge_error(self) -> str | None:
        if self.dense:
            return None
        return "its weights run 2:4 and are stored dense (to_24 writes the zeros in; so does `export --format 24`)"

    def notes(self) -> list[str]:
        """What the products run on, and why."""
        if self.config.tail_in_force == 1:
            return []
        if self.gains:
            return [*(f"semi_structured, {gain}" for gain in self.gains.values()), *self._dense_wgrads()]
        kernels = {linear.kernel for linear in self.linears.values()}
        if kernels != {"emulate"}:
            asked = f"semi_structured: 2:4 products on {', '.join(sorted(kernels))}, as asked; not timed."
            return [asked, *self._dense_wgrads()]
        device = next(iter(self.linears.values())).weight.device.type
        return [f"semi_structured: emulation, no speed: dense products of the pruned weights on {device}."]

    def _refresh(self, step: int, *, agree: bool) -> None:
        for linear in self.linears.values():
            linear.refresh(first=not self.history)
        if agree:
            check_ranks_agree([linear.mask for linear in self.linears.values()])
        self.last_refresh = step
        self.history.append([float(step), *(float(linear.flip_rate) for linear in self.linears.values())])

    def _enter_phase(self) -> None:
        for linear in self.linears.values():
            linear.dense = self.dense or self.runs_dense
            linear.repack()

    def _reseed(self, step: int) -> None:
        for place, linear in enumerate(self.linears.values()):
            key = self.config.seed
            for part in (step, self.layer, place, ranks.rank()):
                key = (key * 1_000_003 + part + 1) % (1 << 62)
            linear.reseed(key)

    def _dense_wgrads(self) -> list[str]:
        """Where MVUE draws, and its product is dense all the same."""
        sparse = [linear for linear in self.linears.values() if linear.kernel != "emulate"]
        if self.config.wgrad != "mvue":
            return []
        reasons = {wgrad_refusal(self.config.tokens, linear.weight.shape[1 - linear.groups_dim]) for linear in sparse}
        return [
            f"semi_structured: wgrad='mvue' draws as asked, and its product is dense, without speed: {reason}."
            for reason in sorted(reason for reason in reasons if reason)
        ]

    def _choose_kernels(self) -> None:
        """`auto` on a GPU: time this FFN's shapes once.

        Raises:
            Unsupported: the FFN gains too little there, or no kernel can run its shapes.
        """
        device = next(iter(self.linears.values())).weight.device
        if self.config.backend != "auto" or self.gains or self.dense or device.type != "cuda":
            return
        gains = {name: self._gain_of(linear) for name, linear in self.linears.items()}
        together = gain_together(gains.values())
        if together < WORTH:
            found = "; ".join(f"{name} {str(gain).rstrip('.')}" for name, gain in gains.items())
            raise Unsupported(
                f"semi_structured: 2:4 products do not pay on this FFN's shapes: with the weights sparse that gain "
                f"{WORTH}x alone it gains {together:.2f}x, and {WORTH}x is needed. {found}. Train dense (leave the "
                "method out), or set backend='emulate' for the same numbers without speed."
            )
        self.gains = gains
        for name, linear in self.linears.items():
            gain = gains[name]
            linear.kernel, linear.algorithm = (gain.backend, gain.algorithm) if gain.pays else ("emulate", 0)

    def _gain_of(self, linear: Any) -> Gain:
        weight = linear.weight
        out_features, in_features = weight.shape[:: -1 if linear.transposed else 1]
        return measured_gain(
            out_features,
            in_features,
            self.config.tokens,
            dtype=weight.dtype if weight.dtype != torch.float32 else torch.bfloat16,
            device=weight.device,
            transposable=self.config.transposable,
        )

    def _zero_ratio(self) -> float:
        if self.dense:
            return 0.0
        # not pruned(), for which the ranks of a sharded model would have to meet
        held = [
            linear.packed.forward if linear.packed and linear.packed.backend == "emulate" else linear.pruned()
            for linear in self.linears.values()
        ]
        counts = [(int(weight.eq(0).sum()), weight.numel()) for weight in held]
        return sum(zeros for zeros, _ in counts) / sum(size for _, size in counts)
